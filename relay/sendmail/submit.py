"""Hand a letter to the relay over SMTP, on a Unix socket or TCP, in clear and without a login: it is on this machine.

Nobody gets a message of which one recipient is refused for good, so that who tries again with a mended list sends no second copy; only
where the relay takes no more recipients at once are the rest sent after the others.

Laws: what 250 was heard for is taken off the letter, and nothing else is; when the connection breaks between the last octet and the
reply, the letter is sent again elsewhere: twice rather than never.
"""

import os
import socket
from collections.abc import Callable, Mapping

from relay.sendmail.message import Letter

DEFAULT_SOCKET = "/run/relay/smtp.sock"
_DEFAULT_PORT = 2525
_CONNECT_SECONDS = 10.0
_COMMAND_SECONDS = 60.0
_FINAL_SECONDS = 600.0  # RFC 5321 section 4.5.3.2.6; a route's `wait` holds it for a minute
_LINE_LIMIT = 8192
_RECIPIENTS_AT_ONCE = 100  # in one flight: their replies must fit into the buffers

_DATA, _NO_USER, _UNAVAILABLE, _TRY_AGAIN, _NO_PERMISSION = 65, 67, 69, 75, 77  # sysexits.h
_FULL = 452
#: RFC 3463: what an enhanced code says about whose fault it is, in the words of sysexits.h. The first that fits.
_EXITS = (("5.1.3", _DATA), ("5.1.7", _DATA), ("5.1.", _NO_USER), ("5.3.4", _DATA), ("5.6.", _DATA), ("5.7.", _NO_PERMISSION))
_WANTS_MORE = (530, 535, 538)  # a login or TLS: another way in may want neither

Endpoint = str | tuple[str, int]


class Unreachable(Exception):
    """This endpoint takes no mail at the moment, or not from us; another may."""


class Refused(Exception):
    """The relay has decided; no other endpoint need be asked. `code` is the exit code."""

    def __init__(self, text: str, *, code: int) -> None:
        super().__init__(text)
        self.code = code


def endpoints(environ: Mapping[str, str], said: list[str]) -> list[Endpoint]:
    """Where to try: `$RELAY_SMTP` (host:port, or unix:/path), the Unix socket, and the default listener. What is wrong with the variable
    goes to what the endpoints have `said`: mail is not lost over it."""
    found: list[Endpoint] = [DEFAULT_SOCKET, ("127.0.0.1", _DEFAULT_PORT)]
    if named := environ.get("RELAY_SMTP", ""):
        try:
            found.insert(0, _endpoint(named))
        except ValueError as error:
            said.append(str(error))
    return list(dict.fromkeys(found))


def _endpoint(text: str) -> Endpoint:
    """Raises ValueError."""
    if text.startswith(("unix:", "/")):
        return text.removeprefix("unix:")
    host, colon, port = text.rpartition(":")
    if not colon or text.endswith("]"):
        return text.strip("[]"), _DEFAULT_PORT
    if not (port.isascii() and port.isdigit() and 0 < int(port) < 65536):
        raise ValueError(f"$RELAY_SMTP is host:port or unix:/path, not {text!r}")
    return host.strip("[]"), int(port)


def connect(endpoint: Endpoint) -> socket.socket:
    """Raises Unreachable."""
    try:
        if not isinstance(endpoint, str) and not endpoint[0].replace(".", "").isdigit():
            return socket.create_connection(endpoint, timeout=_CONNECT_SECONDS)
        connection = socket.socket(socket.AF_UNIX if isinstance(endpoint, str) else socket.AF_INET)  # 3 ms less than a look-up
        try:
            connection.settimeout(_CONNECT_SECONDS)
            connection.connect(endpoint)
        except BaseException:
            connection.close()
            raise
        return connection
    except OSError as error:
        raise Unreachable(f"{_name(endpoint)}: {error.strerror or error}") from None


def submit(endpoint: Endpoint, letter: Letter, note: Callable[[str], None]) -> str:
    """Send `letter` to all its recipients, and answer what the relay said. `note` is told the dialogue. Raises Unreachable or Refused."""
    with connect(endpoint) as connection:
        session = _Session(connection, note)
        try:
            session.greet()
            while True:
                said = session.send(letter)
                if not letter.recipients:
                    break
            session.quit()
        except OSError as error:  # the time is up, or the connection is gone
            raise Unreachable(f"{_name(endpoint)}: {error.strerror or error}") from None
        except Unreachable as error:
            raise Unreachable(f"{_name(endpoint)}: {error}") from None
        return said


def _name(endpoint: Endpoint) -> str:
    return endpoint if isinstance(endpoint, str) else f"{endpoint[0]}:{endpoint[1]}"


class _Reply:
    def __init__(self, lines: list[str]) -> None:
        self.code = int(lines[-1][:3])
        self.lines = [line[4:] for line in lines]
        self.text = f"{self.code} {' '.join(self.lines)}"

    def raise_unless(self, *codes: int) -> None:
        """Raises what a reply with another code means: somebody else may be asked, nobody need be, or nobody may."""
        if self.code in codes:
            return
        if self.code == _FULL:
            raise Refused(self.text, code=_TRY_AGAIN)
        if self.code < 500 or self.code in _WANTS_MORE:
            raise Unreachable(self.text)
        raise Refused(self.text, code=next((code for status, code in _EXITS if self.lines[-1].startswith(status)), _UNAVAILABLE))


class _Session:
    """One connection. `extensions`: what the relay offers."""

    def __init__(self, connection: socket.socket, note: Callable[[str], None]) -> None:
        self._connection = connection
        self._replies = connection.makefile("rb")
        self._note = note
        self._extensions: set[str] = set()

    def greet(self) -> None:
        self._connection.settimeout(_COMMAND_SECONDS)
        greeting = self._reply()
        if greeting.code != 220:
            raise Unreachable(greeting.text)
        name = os.uname().nodename or "localhost"
        hello = self._ask(f"EHLO {name}")
        if hello.code != 250:
            hello = self._ask(f"HELO {name}")
            hello.raise_unless(250)
        self._extensions = {line.split(" ")[0].upper() for line in hello.lines[1:]}

    def send(self, letter: Letter) -> str:
        """One transaction, for as many recipients as the relay takes at once."""
        content = letter.stuffed()
        self._ask(self._mail(letter, len(content))).raise_unless(250)
        taken = self._recipients(letter)
        go_ahead = self._ask("DATA")
        go_ahead.raise_unless(354)
        self._connection.sendall(content)
        self._connection.settimeout(_FINAL_SECONDS)
        reply = self._reply()
        reply.raise_unless(250)
        self._connection.settimeout(_COMMAND_SECONDS)
        del letter.recipients[:taken]
        return reply.text

    def quit(self) -> None:
        """All is done; nobody minds what the relay says to this."""
        try:
            self._ask("QUIT")
        except (OSError, Unreachable):
            self._note("<- (nothing more)")

    def _mail(self, letter: Letter, size: int) -> str:
        command = f"MAIL FROM:<{letter.sender}>"
        if "SIZE" in self._extensions:
            command += f" SIZE={size}"
        if "8BITMIME" in self._extensions and not letter.content.isascii():
            command += " BODY=8BITMIME"
        if letter.smtputf8:
            if "SMTPUTF8" not in self._extensions:
                raise Refused("an address is not ASCII, and the relay does not take that", code=_DATA)
            command += " SMTPUTF8"
        if "DSN" in self._extensions:
            command += f" RET={letter.ret}" if letter.ret else ""
            command += f" ENVID={letter.envid}" if letter.envid else ""
        return command

    def _recipients(self, letter: Letter) -> int:
        """Say them, and answer how many of them are taken: all, or those before the first that was too many."""
        wishes = f" NOTIFY={letter.notify}" if letter.notify and "DSN" in self._extensions else ""
        flight = _RECIPIENTS_AT_ONCE if "PIPELINING" in self._extensions else 1
        taken = 0
        while taken < len(letter.recipients):
            commands = [f"RCPT TO:<{recipient}>{wishes}" for recipient in letter.recipients[taken : taken + flight]]
            self._say("\r\n".join(commands))
            replies = [self._reply() for _ in commands]
            for recipient, reply in zip(letter.recipients[taken:], replies, strict=False):
                if reply.code == _FULL and taken:
                    return taken
                try:
                    reply.raise_unless(250, 251, 252)
                except Refused as refusal:
                    raise Refused(f"{recipient}: {refusal}", code=refusal.code) from None
                taken += 1
        return taken

    def _ask(self, command: str) -> _Reply:
        self._say(command)
        return self._reply()

    def _say(self, command: str) -> None:
        self._note(f"-> {command}")
        self._connection.sendall(f"{command}\r\n".encode("utf-8", "surrogateescape"))

    def _reply(self) -> _Reply:
        lines: list[str] = []
        while True:
            line = self._replies.readline(_LINE_LIMIT).decode("utf-8", "replace")
            text = line.rstrip("\r\n")
            if not line.endswith("\n"):
                raise Unreachable("it has ended the connection")
            self._note(f"<- {text}")
            if not (text[:3].isascii() and text[:3].isdigit() and text[3:4] in ("", " ", "-")) or len(lines) > 100:
                raise Unreachable(f"this is no SMTP server: {text[:80]!r}")
            lines.append(text)
            if text[3:4] != "-":
                return _Reply(lines)
