"""One AUTH command (RFC 4954) up to a name and a password: PLAIN (RFC 4616) or LOGIN.

Pure. State: the mechanism and what has been answered. Whether name and password are right is `listener.credentials`. Old clients are met
half-way: any letter case of the mechanism, padding left out, Latin-1 where the octets are not UTF-8.

Law: what could be nobody's credentials becomes a login that fails like any other, so that no reply tells what exists.
"""

from binascii import Error as Base64Error
from binascii import a2b_base64
from typing import NamedTuple

from relay.config.password import CREDENTIAL_LIMIT_BYTES, prepared
from relay.mail.reply import Reply

_GO_ON = Reply(334, "", "")
_ASK_USER = Reply(334, "", "VXNlcm5hbWU6")  # Username:
_ASK_PASSWORD = Reply(334, "", "UGFzc3dvcmQ6")  # Password:
_SYNTAX = Reply(501, "5.5.4", "Syntax error in the arguments")
_UNKNOWN = Reply(504, "5.5.4", "Unknown authentication mechanism")
_CANCELLED = Reply(501, "5.7.0", "Authentication cancelled")
_MALFORMED = Reply(501, "5.5.2", "Cannot decode this response")


class Given(NamedTuple):
    """What a client logs in with. Without a password it is wrong, whoever it says it is."""

    user: str
    password: str

    def __repr__(self) -> str:
        return f"Given(user={self.user!r})"


class Exchange:
    """The course of one AUTH command. Each step gives the reply that asks for more (334) or ends it, or what was given."""

    def __init__(self) -> None:
        self._plain = False
        self._user: bytes | None = None

    def begin(self, argument: str) -> Reply | Given:
        """Read what follows AUTH."""
        words = argument.split()
        if not 1 <= len(words) <= 2:
            return _SYNTAX
        mechanism = words[0].upper()
        if mechanism not in ("PLAIN", "LOGIN"):
            return _UNKNOWN
        self._plain = mechanism == "PLAIN"
        if len(words) == 1:
            return _GO_ON if self._plain else _ASK_USER
        if words[1] != "=":
            return self.go_on(words[1].encode("utf-8", "surrogateescape"))
        return _MALFORMED if self._plain else _ASK_USER  # an initial response of no octets

    def go_on(self, line: bytes) -> Reply | Given:
        """Read the line that answers a 334."""
        line = line.strip()
        if line == b"*":
            return _CANCELLED
        if (octets := _decoded(line)) is None:
            return _MALFORMED
        if self._plain:
            return _plain(octets)
        if self._user is None:
            self._user = octets
            return _ASK_PASSWORD
        return _given(self._user, octets)


def _plain(octets: bytes) -> Reply | Given:
    """A message of PLAIN: whom to act as, who it is, the password. Nobody here may act as somebody else."""
    parts = octets.split(b"\0")
    if len(parts) != 3:
        return _MALFORMED
    other, user, password = parts
    return _given(user, password if other in (b"", user) else b"")


def _given(user: bytes, password: bytes) -> Given:
    if len(user) > CREDENTIAL_LIMIT_BYTES or len(password) > CREDENTIAL_LIMIT_BYTES:
        return Given(_text(user[:CREDENTIAL_LIMIT_BYTES]), "")
    return Given(_text(user), _text(password))


def _text(octets: bytes) -> str:
    try:
        text = octets.decode("utf-8")
    except UnicodeDecodeError:
        text = octets.decode("latin-1")
    try:
        return prepared(text)
    except ValueError:
        return ""  # nobody is called so, and no password is so


def _decoded(line: bytes) -> bytes | None:
    """Base64 with or without its padding, or None."""
    try:
        return a2b_base64(line.rstrip(b"=") + b"=" * (-len(line.rstrip(b"=")) % 4), strict_mode=True)
    except Base64Error:
        return None
