"""Where apps connect and who may: the listeners and the users, as the program sees them.

A part of `config.model`, and under its rules: attribute names are the keys of the file, and what concerns several keys at once is in
`config.consistency`.
"""

from ipaddress import ip_network
from typing import Annotated, Any, Final, Literal, Self

from pydantic import AfterValidator, BeforeValidator, Field, ValidationInfo, WithJsonSchema, model_validator

from relay.config import values
from relay.config.fields import (
    CertificateFile,
    ClientNetwork,
    Count,
    KeyFile,
    Name,
    NonEmpty,
    PasswordHash,
    Section,
    Size,
    SourceNetwork,
    Text,
    TrustedSource,
    UserPassword,
    UserPermission,
    null_or_list,
    one_or_list,
)

LOOPBACK: Final = (ip_network("127.0.0.0/8"), ip_network("::1/128"))
EVERYONE: Final = (ip_network("0.0.0.0/0"), ip_network("::/0"))


def _no_empty_list(value: Any) -> Any:
    """A template that came out empty would leave the listener open to whoever it was closed to."""
    if value == []:
        raise ValueError("is empty: name the proxies, or leave it out where there is none")
    return value


def _known_hosts(network: values.Network, info: ValidationInfo) -> values.Network:
    """A listener for everybody is no open relay where everybody has to log in. When `auth` is broken, that is said alone."""
    if info.data.get("auth", "required") == "required":
        return network
    try:
        return values.narrow(network)
    except ValueError as error:
        raise ValueError(f"{error}; name the networks of your apps, or set auth: required") from None


class Listener(Section):
    """Where apps connect, and who may."""

    bind: Annotated[Text, AfterValidator(values.parse_bind)] = Field(
        default="127.0.0.1:2525", description='host:port, "[v6]:port", unix:/path, or systemd:NAME'
    )
    name: Name = Field(default_factory=lambda data: data.get("bind", ""), description="what a route's `listener` says; default: the bind")
    mode: Annotated[int, BeforeValidator(values.parse_socket_mode, json_schema_input_type=str)] = Field(
        default=0o666, description='the permissions of a Unix socket; default "0666", every user of this machine'
    )
    auth: Literal["none", "optional", "required"] = Field(default="none", description="whether apps log in, as one of `users`")
    networks: Annotated[tuple[Annotated[SourceNetwork, AfterValidator(_known_hosts)], ...], one_or_list(str), NonEmpty] = Field(
        default_factory=lambda data: EVERYONE if data.get("auth") == "required" else LOOPBACK,
        description="who may connect; default: everyone where auth is required, else loopback",
    )
    proxy_protocol: Annotated[tuple[TrustedSource, ...], null_or_list(str), BeforeValidator(_no_empty_list)] = Field(
        default=(), description="the proxies that are believed: only they connect, and say with the PROXY protocol for whom"
    )
    message_size: Size = Field(default=50_000_000, description="the largest message")
    recipients: Count = Field(default=1000, description="per message")
    connections: Count = Field(default=1000, description="at once")
    connections_per_client: Count | None = Field(default=None, description="of them from one address; default: all of them")
    newlines: Literal["normalize", "reject", "legacy"] = Field(
        default="normalize", description="what a bare CR or LF comes to; legacy also ends mail at a dot between two bare LFs"
    )
    security: Literal["none", "starttls", "tls"] = Field(default="none", description="starttls offers TLS, tls begins with it")
    certificate: CertificateFile = Field(default=None, description="with its chain; default: a self-signed one, made by `relay serve`")
    key: KeyFile = Field(default=None, description="of the certificate; default: in the same file")
    require_tls: bool = Field(default=False, description="take no mail and no login in clear text")
    minimum_tls: Annotated[
        Literal["1.0", "1.1", "1.2", "1.3"],
        BeforeValidator(
            values.as_written,
            json_schema_input_type=Annotated[str, WithJsonSchema({"enum": ["1.0", "1.1", "1.2", "1.3", 1.0, 1.1, 1.2, 1.3]})],
        ),
    ] = Field(default="1.2", description="below 1.2, with its old ciphers, only on a listener with networks")
    auth_exempt: Annotated[tuple[ClientNetwork, ...], null_or_list(str)] = Field(
        default=(), description="who may send without a login all the same"
    )
    auth_without_tls: bool = Field(default=False, description="offer AUTH to clients of the network in clear text, too")

    @property
    def host(self) -> str:
        return values.split_bind(self.bind)[0]

    @property
    def port(self) -> int:
        return values.split_bind(self.bind)[1]

    @property
    def path(self) -> str:
        """Where its Unix socket is made; `""` for any other."""
        return values.socket_path(self.bind)

    @property
    def inherited(self) -> str:
        """The name under which systemd hands its sockets over; `""` for any other."""
        return values.inherited_name(self.bind)


class User(Section):
    """An app that logs in, and whose mail it may send."""

    password: UserPassword | None = None
    password_hash: PasswordHash | None = Field(default=None, description="from `relay hash-password`, instead of the password")
    senders: Annotated[tuple[UserPermission, ...], one_or_list(str), NonEmpty] = Field(
        description='domains and addresses it may use in MAIL FROM, From and Sender; "*" says any'
    )

    @model_validator(mode="after")
    def _has_one_password(self) -> Self:
        if (self.password is None) == (self.password_hash is None):
            raise ValueError("must have either a password or a password_hash")
        return self
