"""One session of the scripted upstream: the SMTP server side of RFC 5321, strict, with a playbook at every step.

Commands are answered one by one in their order, pipelined or not; content ends at CRLF.CRLF alone; an extension or parameter that
was not offered is refused. The state is what a server keeps: greeted, TLS, user, the open transaction.
"""

import asyncio
import base64
import binascii
import hashlib
import hmac
import json
import re
import ssl
from collections.abc import Container, Mapping
from dataclasses import dataclass
from typing import Literal, NoReturn

from tests.support.playbook import Action, Close, Drip, Garbage, Half, Hang, Hold, Phase, Playbook, Reset, Say
from tests.support.record import Connection, Login, Record, Transaction
from tests.support.wire import Wire

Security = Literal["none", "starttls", "tls"]

_PATH = re.compile(r"(?:FROM|TO):<([^<>]*)>(?: (.+))?", re.IGNORECASE)
_ENHANCED = re.compile(rb"^(\d{3}[ -])\d\.\d+\.\d+ ", re.MULTILINE)
_END = b"\r\n.\r\n"
#: Which MAIL and RCPT parameters come with which extension (RFC 1870, 6152, 6531, 4954, 3461).
_PARAMETERS = {"SIZE": "SIZE", "BODY": "8BITMIME", "SMTPUTF8": "SMTPUTF8", "AUTH": "AUTH"}
_DSN_PARAMETERS = {"RET": "DSN", "ENVID": "DSN", "NOTIFY": "DSN", "ORCPT": "DSN"}


@dataclass(frozen=True, slots=True)
class Offer:
    """What the server offers and demands. `recipients` is the most of them in one transaction."""

    extensions: tuple[str, ...]
    mechanisms: tuple[str, ...]
    users: Mapping[str, str]
    tokens: Container[str]
    auth_required: bool
    security: Security
    tls: ssl.SSLContext | None
    helo_only: bool
    recipients: int

    def has(self, keyword: str) -> bool:
        return any(extension.split()[0] == keyword for extension in self.extensions) or (keyword == "AUTH" and bool(self.mechanisms))

    @property
    def size(self) -> int:
        """The limit that SIZE announces; 0 for none."""
        return next((int(extension[5:]) for extension in self.extensions if extension.startswith("SIZE ")), 0)


class _Over(Exception):
    """The session has ended."""


class Session:
    """Serves one connection until it ends."""

    def __init__(self, wire: Wire, connection: Connection, *, offer: Offer, playbook: Playbook, record: Record) -> None:
        self._wire = wire
        self._connection = connection
        self._offer = offer
        self._playbook = playbook
        self._record = record
        self._buffer = b""
        self._early = False
        self._transaction: Transaction | None = None

    async def run(self) -> None:
        """Serve. Raises ConnectionError when the client goes away in the middle of a reply."""
        try:
            await self._misbehave(self._take("connect"))
            if self._offer.security == "tls":
                await self._shake_hands()
            await self._answer("greeting", b"220 upstream.test ESMTP")
            while True:
                await self._command(await self._line())
        except _Over:
            pass

    # -- commands ----------------------------------------------------------------------------------------------------

    async def _command(self, line: bytes) -> None:
        self._connection.commands.append(line)
        if self._early:
            self._connection.pipelined.append(line)
        try:
            verb, _, argument = line.decode().partition(" ")
        except UnicodeDecodeError:
            await self._send(b"500 5.5.2 Not UTF-8")
            return
        match verb.upper():
            case "EHLO" | "HELO" as hello:
                await self._hello(hello, argument)
            case "STARTTLS":
                await self._starttls()
            case "AUTH":
                await self._auth(argument)
            case "MAIL":
                await self._mail(argument)
            case "RCPT":
                await self._rcpt(argument)
            case "DATA":
                await self._data()
            case "BDAT" if self._offer.has("CHUNKING"):
                await self._bdat(argument)
            case "RSET":
                if (await self._answer("rset", b"250 2.0.0 Ok")).startswith(b"2"):
                    self._transaction = None
            case "NOOP":
                await self._send(b"250 2.0.0 Ok")
            case "QUIT":
                await self._answer("quit", b"221 2.0.0 Bye")
                self._end()
            case _:
                await self._send(b"500 5.5.2 Unknown command")

    async def _hello(self, verb: str, name: str) -> None:
        lines = [b"upstream.test"]
        if verb == "EHLO":
            if self._offer.helo_only:
                await self._send(b"502 5.5.1 Not implemented")
                return
            lines += [extension.encode() for extension in self._offer.extensions]
            if self._offer.security == "starttls" and not self._wire.tls_version:
                lines.append(b"STARTTLS")
            if self._auth_offered:
                lines.append(b"AUTH " + " ".join(self._offer.mechanisms).encode())
        reply = b"".join(b"250-" + line + b"\r\n" for line in lines[:-1]) + b"250 " + lines[-1]
        if (await self._answer("ehlo", reply)).startswith(b"2"):
            self._connection.helo = name
            self._transaction = None

    async def _starttls(self) -> None:
        if self._offer.security != "starttls" or self._wire.tls_version:
            await self._send(b"502 5.5.1 Not offered")
            return
        if (await self._answer("starttls", b"220 2.0.0 Ready")).startswith(b"2"):
            await self._shake_hands()

    async def _shake_hands(self) -> None:
        action = self._take("tls")
        await self._misbehave(action)
        if isinstance(action, Say | Drip | Garbage):
            await self._wire.send(action.octets)
            self._end()
        assert self._offer.tls, "the upstream's constructor saw to it"
        try:
            await self._wire.start_tls(self._offer.tls, server_side=True)
        except ssl.SSLError as error:
            self._connection.tls_error = error.reason or str(error)
            self._end()
        # RFC 3207 section 4.2: what was said before does not count any more
        self._buffer, self._connection.helo, self._transaction = b"", "", None
        self._connection.tls_version = self._wire.tls_version

    # -- AUTH (RFC 4954) -----------------------------------------------------------------------------------------------

    @property
    def _auth_offered(self) -> bool:
        return bool(self._offer.mechanisms) and (self._offer.security == "none" or bool(self._wire.tls_version))

    async def _auth(self, argument: str) -> None:
        mechanism, _, initial = argument.partition(" ")
        mechanism = mechanism.upper()
        if not self._auth_offered or mechanism not in self._offer.mechanisms:
            await self._send(b"504 5.5.4 Not offered")
            return
        if self._connection.user or self._transaction:
            await self._send(b"503 5.5.1 Not now")
            return
        try:
            user, password, good = await self._credentials(mechanism, initial)
        except (binascii.Error, ValueError):
            await self._send(b"501 5.5.2 Malformed or cancelled")
            return
        usual = b"235 2.7.0 Welcome" if good else b"535 5.7.8 Wrong user or password"
        login = Login(self._connection.number, mechanism, user, password, good, bool(self._wire.tls_version))
        self._record.logins.append(login)
        if (await self._answer("auth", usual)).startswith(b"2"):
            self._connection.user = user

    async def _credentials(self, mechanism: str, initial: str) -> tuple[str, str, bool]:
        if mechanism == "XOAUTH2":
            return await self._token(initial)
        if mechanism == "CRAM-MD5":
            challenge = f"<{self._connection.number}.{len(self._record.logins)}@upstream.test>".encode()
            user, _, digest = (await self._challenge(challenge)).decode().rpartition(" ")
            expected = hmac.new(self._offer.users.get(user, "").encode(), challenge, hashlib.md5).hexdigest()
            return user, "", user in self._offer.users and hmac.compare_digest(digest, expected)
        first = _decode("" if initial == "=" else initial) if initial else None
        if mechanism == "PLAIN":
            _, user, password = (first if first is not None else await self._challenge(b"")).decode().split("\0")
        else:
            user = (first if first is not None else await self._challenge(b"Username:")).decode()
            password = (await self._challenge(b"Password:")).decode()
        return user, password, user in self._offer.users and self._offer.users[user] == password

    async def _token(self, initial: str) -> tuple[str, str, bool]:
        """XOAUTH2: a refusal is a challenge with JSON, which the client answers with an empty line."""
        response = (_decode(initial) if initial else await self._challenge(b"")).decode()
        user, _, bearer = response.partition("\1")
        if not user.startswith("user=") or not bearer.startswith("auth=Bearer ") or not bearer.endswith("\1\1"):
            raise ValueError("no XOAUTH2")
        token = bearer.removeprefix("auth=Bearer ").removesuffix("\1\1")
        good = token in self._offer.tokens
        if not good:
            said = json.dumps({"status": "401", "schemes": "bearer", "scope": f"https://mail.test/ {token}"})
            if await self._challenge(said.encode()):
                raise ValueError("an empty line was expected")
        return user.removeprefix("user="), token, good

    async def _challenge(self, text: bytes) -> bytes:
        await self._wire.send(b"334 " + base64.b64encode(text) + b"\r\n")
        return _decode((await self._line()).decode())

    # -- the transaction -----------------------------------------------------------------------------------------------

    async def _mail(self, argument: str) -> None:
        match = _PATH.fullmatch(argument)
        if not match or not argument.upper().startswith("FROM:"):
            await self._send(b"501 5.5.4 Syntax: MAIL FROM:<address>")
            return
        parameters = tuple((match[2] or "").split())
        transaction = Transaction(
            number=len(self._record.transactions) + 1,
            connection=self._connection.number,
            sender=match[1],
            parameters=parameters,
            tls=bool(self._wire.tls_version),
            user=self._connection.user,
            helo=self._connection.helo,
        )
        self._record.transactions.append(transaction)
        usual = self._refusal_of_mail(match[1], parameters) or b"250 2.1.0 Ok"
        reply = await self._answer("mail", usual, transaction=transaction.number)
        if reply.startswith(b"2"):
            self._transaction = transaction
        else:
            transaction.reply = reply

    def _refusal_of_mail(self, sender: str, parameters: tuple[str, ...]) -> bytes:
        if not self._connection.helo:
            return b"503 5.5.1 Say EHLO first"
        if self._transaction:
            return b"503 5.5.1 One transaction at a time"
        if self._offer.security == "starttls" and not self._wire.tls_version:
            return b"530 5.7.0 Must issue a STARTTLS command first"
        if self._offer.auth_required and not self._connection.user:
            return b"530 5.7.0 Authentication required"
        if refusal := self._refusal_of_parameters(parameters, _PARAMETERS | _DSN_PARAMETERS):
            return refusal
        size = next((int(text[5:]) for text in parameters if text.upper().startswith("SIZE=")), 0)
        if self._offer.size and size > self._offer.size:
            return b"552 5.3.4 Too large"
        if not sender.isascii() and "SMTPUTF8" not in parameters:
            return b"553 5.6.7 SMTPUTF8 was not declared"
        return b""

    def _refusal_of_parameters(self, parameters: tuple[str, ...], known: Mapping[str, str]) -> bytes:
        for parameter in parameters:
            extension = known.get(parameter.partition("=")[0].upper())
            if extension is None or not self._offer.has(extension):
                return b"555 5.5.4 Parameter not offered: " + parameter.encode()
        return b""

    async def _rcpt(self, argument: str) -> None:
        match, transaction = _PATH.fullmatch(argument), self._transaction
        if not transaction:
            await self._send(b"503 5.5.1 MAIL first")
            return
        transaction.pipelined |= self._early
        if not match or not match[1] or not argument.upper().startswith("TO:"):
            await self._send(b"501 5.5.4 Syntax: RCPT TO:<address>")
            return
        parameters = tuple((match[2] or "").split())
        usual = self._refusal_of_parameters(parameters, _DSN_PARAMETERS) or b"250 2.1.5 Ok"
        if len(transaction.recipients) >= self._offer.recipients:
            usual = b"452 4.5.3 Too many recipients"
        if not match[1].isascii() and "SMTPUTF8" not in transaction.parameters:
            usual = b"553 5.6.7 SMTPUTF8 was not declared"
        taken = (await self._answer("rcpt", usual, recipient=match[1])).startswith(b"2")
        (transaction.recipients if taken else transaction.refused).append(match[1])
        transaction.recipient_parameters[match[1]] = parameters

    async def _data(self) -> None:
        transaction = self._transaction
        if not transaction:
            await self._send(b"503 5.5.1 MAIL first")
            return
        transaction.pipelined |= self._early
        usual = b"354 Go ahead" if transaction.recipients else b"554 5.5.1 No valid recipients"
        reply = await self._answer("data", usual)
        if not reply.startswith(b"3"):
            return
        await self._content(transaction)
        if self._offer.size and len(transaction.content) > self._offer.size:
            usual = b"552 5.3.4 Too large"
        elif not transaction.recipients:
            usual = b"554 5.5.1 No valid recipients"
        else:
            usual = b"250 2.0.0 Ok: queued as %d" % transaction.number
        await self._answer("final", usual)
        self._transaction = None

    async def _bdat(self, argument: str) -> None:
        """One chunk, read whatever became of the transaction (RFC 3030 section 2). The content phase is not scripted here."""
        length, _, last = argument.partition(" ")
        while len(self._buffer) < int(length):
            octets = await self._wire.receive()
            if not octets:
                self._end()
            self._buffer += octets
        chunk, self._buffer = self._buffer[: int(length)], self._buffer[int(length) :]
        transaction = self._transaction
        if transaction is None or not transaction.recipients:
            await self._send(b"503 5.5.1 No valid recipients")
            return
        transaction.pipelined |= self._early
        transaction.content += chunk
        if last.upper() != "LAST":
            await self._send(b"250 2.0.0 Ok")
            return
        transaction.complete = True
        too_large = self._offer.size and len(transaction.content) > self._offer.size
        usual = b"552 5.3.4 Too large" if too_large else b"250 2.0.0 Ok: queued as %d" % transaction.number
        await self._answer("final", usual)
        self._transaction = None

    async def _content(self, transaction: Transaction) -> None:
        """Read up to CRLF.CRLF. What came is on record at any moment that a script may end it."""
        action = self._take("content")
        limit = action.after if action else 0
        raw = bytearray(b"\r\n")  # the end may be the very first line (RFC 5321 section 4.1.1.4)
        scanned = 0
        octets, self._buffer = self._buffer, b""
        while True:
            raw += octets
            end = raw.find(_END, max(0, scanned - len(_END)))
            scanned = len(raw)
            arrived = (end if end >= 0 else scanned) - 2
            if action and arrived >= limit:
                transaction.content = _unstuffed(raw[: limit + 2])
                await self._misbehave(action)
                if isinstance(action, Say | Drip | Garbage):
                    await self._send(action.octets, drip=isinstance(action, Drip))
                action = None
            if end >= 0:
                break
            octets = await self._wire.receive()
            if not octets:
                transaction.content = _unstuffed(raw)
                self._end()
        self._buffer = bytes(raw[end + len(_END) :])
        transaction.content = _unstuffed(raw[: end + 2])
        transaction.complete = True

    # -- the script and the wire -----------------------------------------------------------------------------------------

    def _take(self, phase: Phase, *, transaction: int = 0, recipient: str = "") -> Action | None:
        number = transaction or (self._transaction.number if self._transaction else 0)
        return self._playbook.take(phase, connection=self._connection.number, transaction=number, recipient=recipient)

    async def _answer(self, phase: Phase, usual: bytes, *, transaction: int = 0, recipient: str = "") -> bytes:
        """Reply as the script has it, else as usual. Gives the reply, `b""` where it was none."""
        action = self._take(phase, transaction=transaction, recipient=recipient)
        await self._misbehave(action)
        octets = action.octets or usual if isinstance(action, Say | Drip | Garbage) else self._dressed(usual)
        reply = b"" if isinstance(action, Garbage) else octets
        if phase == "final" and self._transaction:
            self._transaction.reply = reply  # decided before it is sent, as with a server that commits first
        await self._send(octets, drip=isinstance(action, Drip))
        if reply.startswith(b"421"):
            self._end()
        return reply

    async def _misbehave(self, action: Action | None) -> None:
        match action:
            case Close():
                self._end()
            case Reset():
                self._wire.reset()
                self._end()
            case Half(octets):
                await self._wire.send(octets[: len(octets) // 2])
                self._end()
            case Hang():
                await asyncio.Event().wait()  # the upstream's end cancels it
            case Hold(until):
                await until.wait()

    def _dressed(self, reply: bytes) -> bytes:
        return reply if self._offer.has("ENHANCEDSTATUSCODES") else _ENHANCED.sub(rb"\1", reply)

    async def _send(self, octets: bytes, *, drip: bool = False) -> None:
        if not octets.endswith(b"\n"):
            octets += b"\r\n"
        if not drip:
            await self._wire.send(octets)
            return
        for octet in octets:
            await self._wire.send(bytes([octet]))
            await asyncio.sleep(0)

    async def _line(self) -> bytes:
        self._early = b"\n" in self._buffer
        while b"\n" not in self._buffer:
            octets = await self._wire.receive()
            if not octets:
                self._end()
            self._buffer += octets
        line, _, self._buffer = self._buffer.partition(b"\n")
        if not line.endswith(b"\r"):
            await self._send(b"500 5.5.2 A line ends with CRLF")
            self._end()
        return line[:-1]

    def _end(self) -> NoReturn:
        raise _Over


def _decode(text: str) -> bytes:
    if text == "*":
        raise ValueError("cancelled")
    return base64.b64decode(text, validate=True)


def _unstuffed(raw: bytes | bytearray) -> bytes:
    """Content without dot-stuffing (RFC 5321 section 4.5.2). `raw` begins with the CRLF before the content."""
    return bytes(raw.replace(b"\r\n.", b"\r\n"))[2:]
