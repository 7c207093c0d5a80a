"""What a scripted upstream saw: connections, logins, transactions. Tests read it; only the session writes it."""

from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class Login:
    """One attempt to authenticate. `password` is `""` for CRAM-MD5, which does not tell it."""

    connection: int
    mechanism: str
    user: str
    password: str
    accepted: bool
    tls: bool


@dataclass(slots=True)
class Transaction:
    """One transaction, from a well-formed MAIL on, refused or not.

    `recipients` are those we took, `refused` the others. `content` is unstuffed, and partial unless `complete`, which says that
    CRLF.CRLF was seen. `reply` is what we said then, `b""` when we said nothing. `pipelined`: RCPT or DATA came before we had
    answered the command before it.
    """

    number: int
    connection: int
    sender: str
    parameters: tuple[str, ...]
    tls: bool
    user: str
    helo: str
    recipients: list[str] = field(default_factory=list)
    recipient_parameters: dict[str, tuple[str, ...]] = field(default_factory=dict)
    refused: list[str] = field(default_factory=list)
    content: bytes = b""
    complete: bool = False
    reply: bytes = b""
    pipelined: bool = False

    @property
    def accepted(self) -> bool:
        """We said 2xx to it, whether or not that arrived."""
        return self.complete and self.reply.startswith(b"2")


@dataclass(slots=True)
class Connection:
    """One connection, numbered from 1. `pipelined` are those of its `commands` that came before the reply to the one before."""

    number: int
    commands: list[bytes] = field(default_factory=list)
    pipelined: list[bytes] = field(default_factory=list)
    tls_version: str = ""
    tls_error: str = ""
    helo: str = ""
    user: str = ""
    closed: bool = False

    @property
    def verbs(self) -> list[str]:
        """The commands' first words, in upper case."""
        return [line.split(b" ")[0].decode("latin-1").upper() for line in self.commands]


@dataclass(slots=True)
class Record:
    """Everything, in the order in which it began."""

    connections: list[Connection] = field(default_factory=list)
    logins: list[Login] = field(default_factory=list)
    transactions: list[Transaction] = field(default_factory=list)
