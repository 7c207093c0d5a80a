"""The configuration as the program sees it: one frozen tree, checked value by value, durations in seconds and sizes in octets.

Attribute names are the keys of the file. Shorthand forms (one value for a list, `Name <address>` for a mapping) are read here, so
that the rest of the code meets one form only. What concerns several keys at once is in `config.consistency`, what is allowed and
unwise in `config.lint`. Context for validation: `environ` and `base`, where relative names of certificates and secrets begin.
"""

import os
from ipaddress import ip_network
from pathlib import Path
from typing import Annotated, Any, Final, Literal, Self

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationInfo,
    WithJsonSchema,
    model_validator,
)

from relay.config import machine, values
from relay.config.secrets import SECRET_SCHEMA, Secret, resolve
from relay.config.values import Network

PORTS: Final = {"starttls": 587, "tls": 465, "none": 25}
LOOPBACK: Final = (ip_network("127.0.0.0/8"), ip_network("::1/128"))
_CREDENTIAL_LIMIT: Final = 255  # aiosmtplib and most servers end there; RFC 4616 sets the same bound


def _listed(value: Any) -> Any:
    """One value stands for a list of one."""
    if isinstance(value, list):
        return tuple(value)
    return value if isinstance(value, tuple) or value is None else (value,)


def _sequence(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _one_of(known: tuple[str, ...], *, pending: tuple[str, ...]) -> BeforeValidator:
    """Refuse by name the choices that the contract has and the program does not."""

    def check(value: Any) -> Any:
        if isinstance(value, str) and value in pending:
            raise ValueError(f"{value!r} is not available yet; use {' or '.join(repr(word) for word in known)}")
        return value

    return BeforeValidator(check)


def _secret(value: Any, info: ValidationInfo) -> Secret:
    context: dict[str, Any] = info.context or {}
    secret = resolve(values.as_written(value), context.get("environ", os.environ), base=context.get("base", Path()))
    _check_credential(secret.reveal())
    return secret


def _check_credential(value: str) -> str:
    if len(value) > _CREDENTIAL_LIMIT or len(value.encode(errors="replace")) > _CREDENTIAL_LIMIT:
        raise ValueError(f"must have at most {_CREDENTIAL_LIMIT} bytes")
    return values.parse_text(value)


def _certificate_file(value: Any, info: ValidationInfo) -> Any:
    value = values.as_written(value)
    if value is None or isinstance(value, Path):
        return value
    if not isinstance(value, str) or not value:
        raise ValueError("must be the name of a file")
    return machine.certificate_file(Path((info.context or {}).get("base", Path()), Path(value).expanduser()))


def _spool_directory(value: Any, info: ValidationInfo) -> Any:
    value = values.as_written(value)
    if value is None:
        return machine.default_directory((info.context or {}).get("environ", os.environ))
    if isinstance(value, str) and value:
        return Path(value).expanduser()
    if not isinstance(value, Path):
        raise ValueError("must be the name of a directory")
    return value


def _null_sender(value: str) -> str:
    return value if value == "keep" else values.parse_address(value)


def _reply_to(value: str) -> str:
    return value if value == "original" else values.parse_address(value)


def _reject_text(value: str) -> str:
    """The reply goes out on one line of at most 512 octets (RFC 5321 section 4.5.3.1.5), with room for its codes."""
    if not value.strip():
        raise ValueError("must say something to the client")
    if not value.isascii() or len(value) > 450:
        raise ValueError("must be at most 450 ASCII characters, as it is part of an SMTP reply")
    return value


def _no_keys() -> Any:
    """A section that is left out, to be read like one that is empty: with the context of the validation."""
    return {}


def _from_rewrite(value: Any) -> Any:
    value = values.as_written(value)
    return values.parse_named_address(value) if isinstance(value, str) else value


def _fallbacks(value: Any) -> Any:
    value = _listed(value)
    if isinstance(value, tuple):
        return tuple({"upstream": item} if isinstance(item, str | values.Whole | values.Decimal) else item for item in value)
    return value


def _named_routes(value: "tuple[Route, ...]") -> "tuple[Route, ...]":
    """A route without a name is called by its place in the file, the first `routes[0]`."""
    return tuple(route if route.name else route.model_copy(update={"name": f"routes[{place}]"}) for place, route in enumerate(value))


Text = Annotated[str, BeforeValidator(values.as_written), AfterValidator(values.parse_text)]
Name = Annotated[Text, AfterValidator(values.parse_name)]
Address = Annotated[Text, AfterValidator(values.parse_address)]
Host = Annotated[Text, AfterValidator(values.parse_host)]
Domain = Annotated[Text, AfterValidator(values.parse_domain)]
HeaderName = Annotated[Text, AfterValidator(values.parse_header_name)]
HeaderFields = Annotated[
    dict[Annotated[Text, AfterValidator(values.parse_settable_header_name)], Text],
    BeforeValidator(lambda value: {} if value is None else value, json_schema_input_type=dict[str, str] | None),
    AfterValidator(values.unique_header_names),
]
Duration = Annotated[
    float,
    BeforeValidator(
        values.parse_duration,
        json_schema_input_type=Annotated[str, Field(pattern=r"^[0-9]+(\.[0-9]+)? ?(ms|s|m|h|d)$", examples=["30s", "5m", "2h"])],
    ),
]
Positive = Annotated[Duration, Field(gt=0)]
Size = Annotated[
    int,
    BeforeValidator(
        values.parse_size,
        json_schema_input_type=Annotated[int, Field(ge=1)]
        | Annotated[str, Field(pattern=r"^[0-9]+(\.[0-9]+)? ?([kKMGT]i?)?B$", examples=["50MB", "50MiB"])],
    ),
    Field(ge=1),
]
Count = Annotated[int, Field(ge=1)]
Port = Annotated[int, Field(ge=1, le=65535)]
Sequence = BeforeValidator(_sequence)


def _one_or_list(item: Any) -> BeforeValidator:
    return BeforeValidator(_listed, json_schema_input_type=item | Annotated[list[item], Field(min_length=1)])


def _null_or_list(item: Any) -> BeforeValidator:
    return BeforeValidator(lambda value: () if value is None else _listed(value), json_schema_input_type=item | list[item] | None)


_SecretInput = Annotated[Any, WithJsonSchema(SECRET_SCHEMA)]
_Condition = Annotated[Text, AfterValidator(values.parse_condition)]
_RecipientCondition = Annotated[Text, AfterValidator(values.parse_recipient_condition)]
_Permission = Annotated[Text, AfterValidator(values.parse_permission)]
_Network = Annotated[Network, BeforeValidator(values.parse_network)]
_ClientNetwork = Annotated[Network, BeforeValidator(values.parse_client_network)]
_NonEmpty = Field(min_length=1)


class _Section(BaseModel):
    model_config = ConfigDict(
        frozen=True, extra="forbid", strict=True, populate_by_name=True, arbitrary_types_allowed=True, hide_input_in_errors=True
    )


class Listener(_Section):
    """Where apps connect, and who may."""

    bind: Annotated[Text, AfterValidator(values.parse_bind)] = Field(default="127.0.0.1:2525", description='host:port or "[v6]:port"')
    name: Name = Field(default_factory=lambda data: data.get("bind", ""), description="what a route's `listener` says; default: the bind")
    networks: Annotated[tuple[_ClientNetwork, ...], _one_or_list(str), _NonEmpty] = Field(
        default=LOOPBACK, description="who may connect; default: loopback"
    )
    message_size: Size = Field(default=50_000_000, description="the largest message")
    recipients: Count = Field(default=1000, description="per message")
    connections: Count = Field(default=1000, description="at once")
    newlines: Annotated[Literal["normalize"], _one_of(("normalize",), pending=("reject", "legacy"))] = Field(
        default="normalize", description="what happens to a bare CR or LF"
    )
    security: Annotated[Literal["none"], _one_of(("none",), pending=("starttls", "tls"))] = "none"
    auth: Annotated[Literal["none"], _one_of(("none",), pending=("optional", "required"))] = "none"

    @property
    def host(self) -> str:
        return values.split_bind(self.bind)[0]

    @property
    def port(self) -> int:
        return values.split_bind(self.bind)[1]


class Limits(_Section):
    """How much at once an upstream gets."""

    connections: Count = Field(default=5, description="at once")
    recipients: Count = Field(default=100, description="per transaction")
    messages_per_connection: Count = 100


class Timeouts(_Section):
    """How long an upstream may take."""

    connect: Positive = Field(default=30.0, description="TCP and TLS")
    command: Positive = Field(default=60.0, description="the reply to a command")
    data: Positive = Field(default=60.0, description="without progress while content is sent")
    final: Positive = Field(default=600.0, description="the reply after the last octet")  # RFC 5321 section 4.5.3.2.6


class Upstream(_Section):
    """A next hop with its credential and limits."""

    description: Text = ""
    host: Annotated[tuple[Host, ...], _one_or_list(str), _NonEmpty] = Field(
        description="address records, never MX; a list is tried in order"
    )
    security: Literal["starttls", "tls", "none"] = Field(default="starttls", description="never downgraded")
    port: Port = Field(
        default_factory=lambda data: PORTS[data.get("security", "starttls")], description="default by security: 587, 465, 25"
    )
    ca_file: Annotated[Path | None, BeforeValidator(_certificate_file, json_schema_input_type=str | None)] = Field(
        default=None, description="default: the system's trust store"
    )
    verify: bool = Field(default=True, description="check the certificate and its name")
    username: Annotated[Text, AfterValidator(_check_credential)] | None = None
    password: Annotated[Secret, BeforeValidator(_secret, json_schema_input_type=_SecretInput)] | None = None
    auth: Annotated[
        Literal["auto", "plain", "login", "cram-md5", "none"],
        _one_of(("auto", "plain", "login", "cram-md5", "none"), pending=("xoauth2",)),
    ] = Field(default="auto", description="auto: the first offered of plain, login, cram-md5")
    senders: Annotated[tuple[_Permission, ...], _one_or_list(str), _NonEmpty] = Field(
        default=(), description="the domains and addresses this credential may ever send for; default: any"
    )
    source_address: Annotated[Text, AfterValidator(values.parse_ip)] | None = None
    ehlo: Annotated[Text, AfterValidator(values.parse_ehlo)] | None = Field(default=None, description="default: hostname")
    null_sender: Annotated[Text, AfterValidator(_null_sender)] = Field(default="keep", description="keep, or an address used instead of <>")
    limits: Limits = Limits()
    timeouts: Timeouts = Timeouts()


class FromRewrite(_Section):
    """What the header From becomes. What is None stays as the app wrote it."""

    name: Text | None = None
    address: Address | None = None

    @model_validator(mode="after")
    def _says_something(self) -> Self:
        if self.name is None and self.address is None:
            raise ValueError("must give a name, an address or both")
        return self


class Rewrite(_Section):
    """What changes in a message on its way to an upstream."""

    from_: Annotated[FromRewrite | None, BeforeValidator(_from_rewrite, json_schema_input_type=str | FromRewrite | None)] = Field(
        default=None,
        validation_alias="from",
        serialization_alias="from",
        description='"Name <address>", an address, {name: …} or {address: …}',
    )
    reply_to: Annotated[Text, AfterValidator(_reply_to)] | None = Field(
        default=None, description="an address, or original: the From that was replaced, where no Reply-To exists"
    )
    envelope_sender: Address | None = Field(default=None, description="never applied to a null sender")
    set_headers: HeaderFields = Field(default_factory=dict, description="replace or add")
    add_headers: HeaderFields = Field(default_factory=dict)
    remove_headers: Annotated[tuple[HeaderName, ...], _null_or_list(str)] = ()
    subject_prefix: Text | None = None
    bcc: Address | None = Field(default=None, description="one more recipient, once per message")


NO_REWRITE: Final = Rewrite()


class Fallback(_Section):
    """The next upstream of a route, when the one before cannot be used."""

    upstream: Text
    rewrite: Rewrite | None = Field(default=None, description="laid over the route's rewrite key by key; null unsets one")


class Route(_Section):
    """A rule: conditions that must all hold, and where the message then goes. In a list of values any one may hold."""

    name: Name = Field(default="", description="default: its place, such as routes[0]")
    sender: Annotated[tuple[_Condition, ...], _one_or_list(str), _NonEmpty] = Field(
        default=("*",), description='example.com, "*.example.com", user@example.com, "<>" or "*"'
    )
    recipient: Annotated[tuple[_RecipientCondition, ...], _one_or_list(str), _NonEmpty] = Field(
        default=(), description='example.com, "*.example.com", user@example.com or "*"'
    )
    client: Annotated[tuple[_Network, ...], _one_or_list(str), _NonEmpty] = Field(default=(), description="addresses and networks of apps")
    listener: Annotated[tuple[Text, ...], _one_or_list(str), _NonEmpty] = Field(default=(), description="names of listeners")
    upstream: Text | None = None
    reject: Annotated[Text, AfterValidator(_reject_text)] | None = Field(default=None, description="refuse with this text: 550 5.7.1")
    fallback: Annotated[tuple[Fallback, ...], BeforeValidator(_fallbacks, json_schema_input_type=str | Fallback | list[str | Fallback])] = (
        Field(default=(), description="a name, a list of names, or a list of {upstream: …, rewrite: …}")
    )
    rewrite: Rewrite | None = None


class Retry(_Section):
    """When a deferred message is tried again: exponentially, with jitter."""

    first: Positive = Field(default=60.0, description="before the second attempt")
    max: Positive = Field(default=3600.0, description="at most between two attempts")
    expire: Positive = Field(default=345_600.0, description="after this the message bounces")

    @model_validator(mode="after")
    def _ascends(self) -> Self:
        if not self.first <= self.max <= self.expire:
            raise ValueError("must ascend: first, max, expire")
        return self


class SpoolSettings(_Section):
    """Where accepted mail is kept."""

    directory: Annotated[Path, BeforeValidator(_spool_directory, json_schema_input_type=str)] = Field(
        default=None, validate_default=True, description="default: $STATE_DIRECTORY, else ./relay-data"
    )
    keep_log: Duration = Field(default=2_592_000.0, description="how long the delivery log keeps a line")


class LogSettings(_Section):
    """How events are written."""

    format: Literal["text", "json"] = "text"
    level: Literal["debug", "info", "warning", "error"] = "info"


class Config(_Section):
    """The whole file."""

    hostname: Domain = Field(default_factory=machine.default_hostname, description="for EHLO and Received; default: the machine's name")
    domain: Domain | None = Field(
        default_factory=lambda data: data.get("hostname"),
        description="completes bare addresses; default: hostname; null refuses them",
    )
    aliases: dict[Annotated[Text, AfterValidator(values.parse_alias)], Annotated[tuple[Address, ...], _one_or_list(str), _NonEmpty]] = (
        Field(default_factory=dict, description="recipients that stand for others, after completion")
    )
    listeners: Annotated[tuple[Listener, ...], Sequence, _NonEmpty] = (Listener(),)
    upstreams: dict[Annotated[Text, AfterValidator(values.parse_upstream_name)], Upstream] = Field(default_factory=dict)
    routes: Annotated[tuple[Route, ...], Sequence, AfterValidator(_named_routes)] = Field(
        default=(), description="the first match wins; without a match a sender is refused"
    )
    retry: Retry = Retry()
    spool: SpoolSettings = Field(default_factory=_no_keys, validate_default=True)
    shutdown_timeout: Duration = 20.0
    log: LogSettings = LogSettings()


def effective_rewrite(route: Route, upstream_name: str) -> Rewrite:
    """What `route` changes in a message for this upstream: its own rewrite, with that of a fallback laid over key by key."""
    own = route.rewrite or NO_REWRITE
    over = next((item.rewrite for item in route.fallback if item.upstream == upstream_name), None)
    if over is None or upstream_name == route.upstream:
        return own
    return own.model_copy(update={key: getattr(over, key) for key in over.model_fields_set})
