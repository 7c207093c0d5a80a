"""One SMTP dialogue: what each command means after the ones before it, and the reply to it (RFC 5321 section 4).

Knows commands and replies, not connections or octets. State: who the client is and says it is, the transaction, and what is expected
of it next.
"""

import re
from collections.abc import Awaitable, Callable
from enum import Enum
from functools import partial
from typing import TYPE_CHECKING, Final, NamedTuple

from relay.intake import FAULT, Transaction
from relay.listener.access import NOBODY, NOT_ALLOWED, Peer
from relay.listener.chunks import Chunks, parse_chunk
from relay.listener.data import Gathering, reply_to
from relay.listener.login import Exchange, Given
from relay.listener.logins import LOGGED_IN, LOGIN_FIRST
from relay.listener.refusals import reason_of
from relay.mail import dsn
from relay.mail.address import AddressError, ParameterError, parse_parameters, parse_path
from relay.mail.envelope import NO_ORIGIN, Origin, Recipient
from relay.mail.reply import Reply, told

if TYPE_CHECKING:
    from relay.listener.door import Door

_OK = Reply(250, "2.0.0", "Ok")
_SENDER_OK = Reply(250, "2.1.0", "Ok")
_RECIPIENT_OK = Reply(250, "2.1.5", "Ok")
_GO_AHEAD = Reply(354, "", "End data with <CR><LF>.<CR><LF>")
_BYE = Reply(221, "2.0.0", "Bye")
_UNKNOWN = Reply(500, "5.5.2", "Unknown command")
_SYNTAX = Reply(501, "5.5.4", "Syntax error in the arguments")
_NEED_MAIL = Reply(503, "5.5.1", "MAIL first")
_NEED_RCPT = Reply(503, "5.5.1", "RCPT first")
_CHUNKS_BEGUN = Reply(503, "5.5.1", "The content has begun to come by BDAT")
_UNFRAMED = Reply(501, "5.5.4", "Syntax: BDAT size [LAST]")
_FOREIGN = Reply(554, "5.5.1", "This is an SMTP server")
_NESTED_MAIL = Reply(503, "5.5.1", "A transaction is already open")
_NEED_HELLO = Reply(503, "5.5.1", "EHLO or HELO first")
_UNKNOWN_PARAMETER = Reply(555, "5.5.4", "Unknown parameter")
_TOO_LARGE = reply_to("too large")
_READY = Reply(220, "2.0.0", "Ready to start TLS")
_SECURE_ALREADY = Reply(503, "5.5.1", "TLS is in use already")
_TLS_FIRST = Reply(530, "5.7.0", "STARTTLS first")
_VRFY = Reply(252, "2.5.0", "Cannot verify, but will take mail")
_HELP = Reply(214, "2.0.0", "EHLO HELO STARTTLS AUTH MAIL RCPT DATA BDAT RSET NOOP VRFY QUIT")

#: After these nothing that the client sends is to be read as commands: it may be anything.
CLOSING = frozenset((_FOREIGN, _UNFRAMED))

# How a client begins that takes us for a web server.
_HTTP = frozenset((b"GET", b"HEAD", b"POST", b"PUT", b"DELETE", b"CONNECT", b"OPTIONS", b"TRACE", b"PATCH", b"PRI"))

#: How a TLS handshake begins, also in its oldest form.
HANDSHAKE = re.compile(rb"\x16\x03|[\x80-\xff].\x01\x03", re.DOTALL)


class Expects(Enum):
    """What the client's next octets are."""

    COMMANDS = "commands"
    CONTENT = "content after 354"
    CHUNK = "as many octets as BDAT said"
    CREDENTIALS = "a line that answers 334"
    SILENCE = "nothing: it was not greeted"


COMMANDS, CONTENT, CHUNK, CREDENTIALS, SILENCE = Expects  # asked for with every command, and a member looked up in its class is no constant


class Later(NamedTuple):
    """A reply that takes time. While `work` runs, the session answers nothing else, and the end of the connection does not cancel it."""

    work: Callable[[], Awaitable[Reply]]


_Verb = Callable[["Dialogue", str], Reply | Later | None]


class Dialogue:
    """The commands of one session. `upgrading`: what comes next is a TLS handshake, as STARTTLS was answered with 220 or TLS is first."""

    def __init__(self, door: "Door", origin: Origin = NO_ORIGIN, peer: Peer = NOBODY) -> None:
        self._door = door
        self._origin = origin
        self._peer = peer
        self._client_name = ""
        self._extended = False
        self.transaction: Transaction | None = None
        self._login: Exchange | None = None
        self.chunks: Chunks | None = None  # content that comes by BDAT
        self.expects = COMMANDS
        self.upgrading = door.settings.security == "tls"

    def meet(self, origin: Origin, peer: Peer) -> None:
        """Somebody is there to talk to."""
        self._origin, self._peer = origin, peer

    def answer(self, line: bytes) -> Reply | Later | None:
        """Do one command, given without its LF. None: the reply comes after the chunk that follows. A fault of ours is 451."""
        word, _, argument = line.rstrip(b"\r").partition(b" ")
        if (verb := _VERBS.get(word.upper())) is None:
            return self.foreign(line) or _UNKNOWN
        try:
            return verb(self, argument.decode("utf-8", "surrogateescape"))
        except Exception as error:  # law 9: temporary to the client, loud in the log
            self._door.journal.fault(f"{word.decode('ascii', 'replace')[:10]} from a client", error, session=self._origin.session)
            return FAULT

    def respond(self, line: bytes) -> Reply | Later:
        """Read a line that answers 334."""
        assert self._login is not None, "CREDENTIALS are expected only within AUTH"
        return self._proceed(self._login.go_on(line))

    def take_transaction(self) -> Transaction:
        """The transaction whose content has come; the next one may begin."""
        transaction, self.transaction = self.transaction, None
        assert transaction is not None, "content is taken only inside a transaction"
        self.chunks = None
        return transaction

    def forget(self) -> None:
        """End the transaction, if there is one: nothing of it is kept."""
        self.transaction = None
        if self.chunks is not None:
            self.chunks.discard()
            self.chunks = None

    def end_chunk(self) -> Reply | None:
        """The reply to the chunk that has come whole; None where it is the last one, and the content can be taken."""
        chunks, transaction = self.chunks, self.transaction
        assert chunks is not None, "a chunk is expected after BDAT only"
        self.expects = COMMANDS
        if chunks.refusal is None and chunks.last:
            return None
        if chunks.refusal is None and chunks.trouble is not None and transaction is not None:
            chunks.refuse(self.refuse(reply_to(chunks.trouble)))
        reply = chunks.refusal or _OK
        if chunks.last:
            self.forget()
        elif transaction is None:
            self.chunks = None
        return reply

    def foreign(self, line: bytes) -> Reply | None:
        """The reply to who does not speak SMTP: does not wait for our greeting, or says HTTP, TLS, or the lines of a message."""
        word = line.split(b" ", 1)[0]
        if self.expects is SILENCE or word.upper() in _HTTP or (len(word) > 1 and word.endswith(b":")) or HANDSHAKE.match(line):
            return self.refuse(_FOREIGN)
        return None

    @property
    def secure(self) -> bool:
        """Whether TLS protects what is said."""
        return self._peer.secure

    def secured(self) -> None:
        """From now on TLS protects what is said. What the client said before may have been somebody else's (RFC 3207 section 4.2)."""
        self._peer = self._peer._replace(secure=True)
        self.forget()
        self._client_name, self._extended = "", False
        self._origin = self._origin._replace(user="")
        self.expects, self.upgrading = COMMANDS, False

    def refuse(self, reply: Reply, sender: str = "", recipients: str | None = None, *, reason: str = "") -> Reply:
        """Note a refusal in the journal, count it and hand it on. Without a sender it is one of the transaction at hand."""
        who, transaction = self._origin, self.transaction
        if transaction is not None and not sender:
            sender, recipients = transaction.sender or "<>", ",".join(transaction.recipients) if recipients is None else recipients
        self._door.count(reason or reason_of(reply))
        self._door.journal.refused(
            session=who.session, listener=who.listener, client=who.client, sender=sender, recipients=recipients or "", reply=str(reply)
        )
        return reply

    def _ehlo(self, argument: str) -> Reply:
        if not argument.strip():
            return _SYNTAX
        self._greet(argument, extended=True)
        return self._door.extensions(self._peer)

    def _helo(self, argument: str) -> Reply:
        if not argument.strip():
            return _SYNTAX
        self._greet(argument, extended=False)
        return Reply(250, "", self._door.hostname.decode())

    def _greet(self, name: str, *, extended: bool) -> None:
        self.forget()
        self._client_name, self._extended = name.strip()[:255], extended

    def _auth(self, argument: str) -> Reply | Later:
        """RFC 4954."""
        logins = self._door.logins
        if not logins.any:
            return _UNKNOWN
        if not self._client_name:
            return _NEED_HELLO
        if (refusal := logins.refusal(self._peer, self._origin, inside=self.transaction is not None)) is not None:
            return refusal
        self._login = Exchange()
        return self._proceed(self._login.begin(argument))

    def _proceed(self, step: Reply | Given) -> Reply | Later:
        asks_for_more = isinstance(step, Reply) and step.code == 334
        self.expects = CREDENTIALS if asks_for_more else COMMANDS
        return step if isinstance(step, Reply) else Later(partial(self._log_in, step))

    async def _log_in(self, given: Given) -> Reply:
        reply = await self._door.logins.verify(given, self._origin)
        if reply is LOGGED_IN:
            self._origin = self._origin._replace(user=given.user)
        return reply

    def _mail(self, argument: str) -> Reply:
        if not self._client_name:
            return _NEED_HELLO
        if self.transaction is not None:
            return _NESTED_MAIL
        if self._door.demands_tls(self._peer):
            return self.refuse(_TLS_FIRST)
        if self._peer.probe:
            return self.refuse(NOT_ALLOWED)
        if not self._origin.user and self._door.logins.demands(self._peer):
            return self.refuse(LOGIN_FIRST)
        try:
            sender, text = _path_after("FROM:", argument)
            parameters = parse_parameters(text) if text else {}
            ret, envid = dsn.message_wishes(parameters) if parameters else ("", "")
        except AddressError as error:
            return self.refuse(Reply(501, "5.1.7", f"Bad sender address: {error}"), told(argument))
        except (_KeywordMissing, ParameterError):
            return self.refuse(_SYNTAX, told(argument))
        if parameters and (reply := self._check_parameters(parameters)) is not None:
            return self.refuse(reply, (sender or "<>") if reply is _TOO_LARGE else told(argument))
        if "SIZE" in parameters and (obstacle := self._door.obstacle(int(parameters["SIZE"]))) is not None:
            return self.refuse(obstacle, sender or "<>")
        smtputf8 = "SMTPUTF8" in parameters
        if not smtputf8 and not sender.isascii():
            return self.refuse(Reply(550, "5.6.7", "A non-ASCII address needs SMTPUTF8"), sender)
        protocol = self._protocol(smtputf8=smtputf8)
        opened = self._door.intake.begin(self._origin, self._client_name, protocol, sender, smtputf8=smtputf8, ret=ret, envid=envid)
        if isinstance(opened, Reply):
            return self.refuse(opened, sender or "<>")
        self.transaction = opened
        return _SENDER_OK

    def _protocol(self, *, smtputf8: bool) -> str:
        """What our Received says after `with` (RFC 3848, RFC 6531 section 4.3)."""
        if not self._extended:
            return "SMTP"
        return ("UTF8SMTP" if smtputf8 else "ESMTP") + ("S" if self._peer.secure else "") + ("A" if self._origin.user else "")

    def _check_parameters(self, parameters: dict[str, str]) -> Reply | None:
        for keyword, value in parameters.items():
            if keyword == "SIZE":  # RFC 1870
                if not (value.isascii() and value.isdigit() and len(value) <= 20):
                    return _SYNTAX
                if int(value) > self._door.settings.message_size:
                    return _TOO_LARGE
            elif keyword == "BODY":  # RFC 6152
                if value.upper() not in ("7BIT", "8BITMIME"):
                    return _SYNTAX
            elif keyword == "SMTPUTF8":  # RFC 6531
                if value:
                    return _SYNTAX
            elif keyword == "AUTH":  # RFC 4954 section 5: who the client says has sent it. Nobody is trusted to vouch for others
                if not value:
                    return _SYNTAX
            elif keyword not in ("RET", "ENVID") and not keyword.startswith("X"):  # RFC 3461, read already; Exchange's XOORG and the like
                return _UNKNOWN_PARAMETER
        return None

    def _rcpt(self, argument: str) -> Reply:
        transaction = self.transaction
        if transaction is None:
            return _NEED_MAIL
        if self.chunks is not None:
            return _CHUNKS_BEGUN
        try:
            address, text = _path_after("TO:", argument)
            notify = orcpt = ""
            if text:
                parameters = parse_parameters(text)
                if any(keyword not in ("NOTIFY", "ORCPT") and not keyword.startswith("X") for keyword in parameters):
                    return self.refuse(_UNKNOWN_PARAMETER, recipients=told(argument))
                notify, orcpt = dsn.recipient_wishes(parameters, smtputf8=transaction.smtputf8)
        except AddressError as error:
            return self.refuse(Reply(501, "5.1.3", f"Bad recipient address: {error}"), recipients=told(argument))
        except (_KeywordMissing, ParameterError):
            return self.refuse(_SYNTAX, recipients=told(argument))
        if not address:
            return self.refuse(Reply(501, "5.1.3", "Bad recipient address: it is empty"), recipients="<>")
        if not transaction.smtputf8 and not address.isascii():
            return self.refuse(Reply(550, "5.6.7", "A non-ASCII address needs SMTPUTF8"), recipients=address)
        reply = self._door.intake.add(transaction, Recipient(address, notify, orcpt), limit=self._door.settings.recipients)
        return _RECIPIENT_OK if reply is None else self.refuse(reply, recipients=address)

    def _data(self, argument: str) -> Reply:
        transaction = self.transaction
        if argument.strip():
            return _SYNTAX
        if transaction is None:
            return _NEED_MAIL
        if not transaction.recipients:
            return _NEED_RCPT
        if self.chunks is not None:
            return _CHUNKS_BEGUN
        if (obstacle := self._door.obstacle()) is not None:
            return self.refuse(obstacle)
        self.expects = CONTENT
        return _GO_AHEAD

    def _bdat(self, argument: str) -> Reply | None:
        """RFC 3030 section 2: whatever is wrong, the octets that come are read before the reply. Unless nobody knows how many."""
        try:
            size, last = parse_chunk(argument)
        except ValueError:
            return _UNFRAMED
        begun, settings = self.chunks is not None, self._door.settings
        if self.chunks is None:
            gathering = Gathering(settings.message_size, self._door.intake.spill, strict=settings.newlines == "reject", stuffed=False)
            self.chunks = Chunks(gathering, limit_bytes=settings.message_size)
        self.chunks.begin(size, last=last)
        self.expects = CHUNK  # from here on nothing can go wrong that would have its octets taken for commands
        if not begun and (refusal := self._chunks_refusal(size)) is not None:
            self.chunks.refuse(refusal)
        return None

    def _chunks_refusal(self, size: int) -> Reply | None:
        transaction = self.transaction
        if transaction is None:
            return _NEED_MAIL
        if not transaction.recipients:
            return _NEED_RCPT
        if size > self._door.settings.message_size:
            return None  # said when the octets have come; what no message has is nothing to ask the spool about
        try:
            obstacle = self._door.obstacle(size)
        except Exception as error:  # law 9
            self._door.journal.fault("BDAT from a client", error, session=self._origin.session)
            return FAULT
        return self.refuse(obstacle) if obstacle is not None else None

    def _starttls(self, argument: str) -> Reply:
        if self._door.settings.security != "starttls":
            return _UNKNOWN
        if argument.strip():
            return _SYNTAX
        if self._peer.secure:
            return _SECURE_ALREADY
        self.upgrading = True
        return _READY

    def _rset(self, argument: str) -> Reply:
        self.forget()
        return _OK

    def _noop(self, argument: str) -> Reply:
        return _OK

    def _vrfy(self, argument: str) -> Reply:
        return _VRFY if argument.strip() else _SYNTAX

    def _help(self, argument: str) -> Reply:
        return _HELP

    def _quit(self, argument: str) -> Reply:
        return _SYNTAX if argument.strip() else _BYE


_VERBS: Final[dict[bytes, _Verb]] = {
    b"EHLO": Dialogue._ehlo,
    b"HELO": Dialogue._helo,
    b"MAIL": Dialogue._mail,
    b"RCPT": Dialogue._rcpt,
    b"DATA": Dialogue._data,
    b"BDAT": Dialogue._bdat,
    b"RSET": Dialogue._rset,
    b"NOOP": Dialogue._noop,
    b"VRFY": Dialogue._vrfy,
    b"HELP": Dialogue._help,
    b"QUIT": Dialogue._quit,
    b"STARTTLS": Dialogue._starttls,
    b"AUTH": Dialogue._auth,
}


class _KeywordMissing(ValueError):
    """MAIL without FROM:, RCPT without TO:."""


def _path_after(keyword: str, argument: str) -> tuple[str, str]:
    """The address and the parameters of MAIL or RCPT. Raises _KeywordMissing or AddressError."""
    argument = argument.lstrip(" \t")
    if argument[: len(keyword)].upper() != keyword:
        raise _KeywordMissing
    return parse_path(argument[len(keyword) :])
