"""The configuration as the program sees it: one frozen tree, checked value by value, durations in seconds and sizes in octets.

Attribute names are the keys of the file. Shorthand forms (one value for a list, `Name <address>` for a mapping) are read here, so
that the rest of the code meets one form only. What concerns several keys at once is in `config.consistency`, what is allowed and
unwise in `config.lint`. Context for validation: `environ` and `base`, where relative names of certificates and secrets begin.
"""

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Final, Literal, Self

from pydantic import (
    AfterValidator,
    BeforeValidator,
    Field,
    ValidationError,
    ValidationInfo,
    model_validator,
)

from relay.config import encryption, machine, quantities, values
from relay.config.fields import (
    Address,
    Condition,
    Domain,
    Duration,
    HeaderFields,
    Name,
    NonEmpty,
    PathName,
    Positive,
    RecipientCondition,
    RemovableHeaderName,
    Section,
    Sequence,
    Size,
    SizeOrNone,
    Source,
    Text,
    UserName,
    listed,
    null_or_list,
    one_or_list,
)
from relay.config.listeners import Listener, User
from relay.config.upstreams import Upstream


def _spool_directory(value: Any, info: ValidationInfo) -> Any:
    value = values.as_written(value)
    if value is None:
        return machine.default_directory((info.context or {}).get("environ", os.environ))
    if isinstance(value, str) and value:
        return Path(os.path.expanduser(values.parse_text(value)))
    if not isinstance(value, Path):
        raise ValueError("must be the name of a directory")
    return value


def _control_socket(value: Any, info: ValidationInfo) -> Any:
    value = values.as_written(value)
    spool: SpoolSettings | None = info.data.get("spool")
    if value is None:
        directory = spool.directory if spool is not None else Path()
        path = machine.default_control((info.context or {}).get("environ", os.environ), directory)
    elif isinstance(value, str) and value.startswith("unix:"):
        raise ValueError("write the path alone, without unix:")
    elif isinstance(value, Path) or (isinstance(value, str) and value):
        path = Path(os.path.expanduser(values.parse_text(str(value))))
    else:
        raise ValueError("must be the path of a socket")
    if (length := len(os.fsencode(path))) > values.SOCKET_PATH_LIMIT:
        shorter = "name a shorter path" if value is not None else "name a shorter path with `control`"
        raise ValueError(f"the control socket {path} has {length} bytes, a socket's path at most {values.SOCKET_PATH_LIMIT}: {shorter}")
    return path


def _reply_to(value: str) -> str:
    return value if value == "original" else values.parse_address(value)


def _reject_text(value: str) -> str:
    """The reply goes out on one line of at most 512 octets (RFC 5321 section 4.5.3.1.5), with room for its codes."""
    if not value.strip():
        raise ValueError("must say something to the client")
    if not value.isascii() or len(value) > 450:
        raise ValueError("must be at most 450 ASCII characters, as it is part of an SMTP reply")
    if re.match(r"[45][0-5]\d(?:[ -]|\Z)", value):
        raise ValueError("leave out the code: every such reply begins with 550 5.7.1")
    return value


def _no_keys() -> Any:
    """A section that is left out, to be read like one that is empty: with the context of the validation."""
    return {}


def _from_rewrite(value: Any) -> Any:
    value = values.as_written(value)
    return values.parse_named_address(value) if isinstance(value, str) else value


def _fallbacks(value: Any) -> Any:
    value = listed(value)
    if isinstance(value, tuple):
        return tuple({"upstream": item} if isinstance(item, str | values.Whole | values.Decimal) else item for item in value)
    return value


def _named_routes(value: "tuple[Route, ...]") -> "tuple[Route, ...]":
    """A route without a name is called by its place in the file, the first `routes[0]`."""
    return tuple(route if route.name else route.model_copy(update={"name": f"routes[{place}]"}) for place, route in enumerate(value))


class FromRewrite(Section):
    """What the header From becomes. What is None stays as the app wrote it."""

    name: Text | None = None
    address: Address | None = None

    @model_validator(mode="after")
    def _says_something(self) -> Self:
        if self.name is None and self.address is None:
            raise ValueError("must give a name, an address or both")
        return self


class Rewrite(Section):
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
    remove_headers: Annotated[tuple[RemovableHeaderName, ...], null_or_list(str)] = ()
    subject_prefix: Text | None = None
    bcc: Address | None = Field(default=None, description="one more recipient, once per message")


NO_REWRITE: Final = Rewrite()


class Fallback(Section):
    """The next upstream of a route, when the one before cannot be used."""

    upstream: Text
    after: Duration = Field(default=0.0, description="how long the route's own upstream must have been failing")
    rewrite: Rewrite | None = Field(default=None, description="laid over the route's rewrite key by key; null unsets one")


class Retry(Section):
    """When a deferred message is tried again: exponentially, with jitter."""

    first: Positive = Field(default=60.0, description="before the second attempt")
    max: Positive = Field(default=3600.0, description="at most between two attempts")
    expire: Positive = Field(default=345_600.0, description="after this the message bounces")
    warn_after: Positive | None = Field(default=None, description="after this the sender is told that it still waits; default: never")

    @model_validator(mode="after")
    def _ascends(self) -> Self:
        if not self.first <= self.max <= self.expire:
            raise ValueError("must ascend: first, max, expire")
        if self.warn_after is not None and self.warn_after >= self.expire:
            raise ValueError("warn_after must come before expire, when the message bounces")
        return self


class Route(Section):
    """A rule: conditions that must all hold, and where the message then goes. In a list of values any one may hold."""

    name: Name = Field(default="", description="default: its place, such as routes[0]")
    sender: Annotated[tuple[Condition, ...], one_or_list(str), NonEmpty] = Field(
        default=("*",), description='example.com, "*.example.com", user@example.com, "<>" or "*"'
    )
    recipient: Annotated[tuple[RecipientCondition, ...], one_or_list(str), NonEmpty] = Field(
        default=(), description='example.com, "*.example.com", user@example.com or "*"'
    )
    client: Annotated[tuple[Source, ...], one_or_list(str), NonEmpty] = Field(
        default=(), description="addresses and networks of apps, or uid:1000 for a user of this machine on a Unix socket"
    )
    user: Annotated[tuple[UserName, ...], one_or_list(str), NonEmpty] = Field(default=(), description="names of users, as they log in")
    listener: Annotated[tuple[Text, ...], one_or_list(str), NonEmpty] = Field(default=(), description="names of listeners")
    upstream: Text | None = None
    reject: Annotated[Text, AfterValidator(_reject_text)] | None = Field(default=None, description="refuse with this text: 550 5.7.1")
    fallback: Annotated[tuple[Fallback, ...], BeforeValidator(_fallbacks, json_schema_input_type=str | Fallback | list[str | Fallback])] = (
        Field(default=(), description="a name, a list of names, or a list of {upstream: …, rewrite: …}")
    )
    rewrite: Rewrite | None = None
    retry: Retry | None = Field(default=None, description="its own, instead of the file's")
    wait: Annotated[Duration, AfterValidator(quantities.bounded_wait)] = Field(
        default=0.0, description="hold the reply to DATA for the upstream's own verdict, at most so long; default: never"
    )
    verified_only: bool = Field(default=False, description="use the fallback until `relay test` of the upstream has succeeded")


class SpoolSettings(Section):
    """Where accepted mail is kept."""

    directory: Annotated[Path, BeforeValidator(_spool_directory, json_schema_input_type=str)] = Field(
        default=None, validate_default=True, description="default: $STATE_DIRECTORY, else ./relay-data"
    )
    max_size: Size | None = Field(default=None, description="of all waiting mail together; default: as much as fits")
    min_free: SizeOrNone = Field(default=100_000_000, description="with less free on its disk no mail is taken; 0: never mind")
    keep_log: Duration = Field(default=2_592_000.0, description="how long the delivery log keeps a line")


class SecretSettings(Section):
    """Where the key is that opens `{encrypted: …}`."""

    key_file: PathName | None = Field(default=None, description="default: $RELAY_SECRET_KEY_FILE")


def keys_of(tree: dict[str, Any], base: Path, environ: Mapping[str, str]) -> encryption.Keys:
    """The keys that the plain values of a file name, before anything is read that needs them: the section may stand anywhere.

    What is wrong with it is said when the whole file is validated.
    """
    try:
        named = SecretSettings.model_validate(tree.get("secrets", {}), context={"base": base}).key_file
    except ValidationError:
        named = None
    return encryption.keys_at(named, environ)


class LogSettings(Section):
    """How events are written."""

    format: Literal["text", "json"] = "text"
    level: Literal["debug", "info", "warning", "error"] = "info"


class Config(Section):
    """The whole file."""

    hostname: Domain = Field(default_factory=machine.default_hostname, description="for EHLO and Received; default: the machine's name")
    domain: Domain | None = Field(
        default_factory=lambda data: data.get("hostname"),
        description="completes bare addresses; default: hostname; null refuses them",
    )
    aliases: dict[Annotated[Text, AfterValidator(values.parse_alias)], Annotated[tuple[Address, ...], one_or_list(str), NonEmpty]] = Field(
        default_factory=dict, description="recipients that stand for others, after completion"
    )
    listeners: Annotated[tuple[Listener, ...], Sequence, NonEmpty] = (Listener(),)
    users: dict[UserName, User] = Field(default_factory=dict, description="the apps that log in to us, by name")
    upstreams: dict[Annotated[Text, AfterValidator(values.parse_upstream_name)], Upstream] = Field(default_factory=dict)
    routes: Annotated[tuple[Route, ...], Sequence, AfterValidator(_named_routes)] = Field(
        default=(), description="the first match wins; without a match a sender is refused"
    )
    retry: Retry = Retry()
    spool: SpoolSettings = Field(default_factory=_no_keys, validate_default=True)
    control: Annotated[Path, BeforeValidator(_control_socket, json_schema_input_type=str)] = Field(
        default=None,
        validate_default=True,
        description="the socket of the operator's commands; default: in $RUNTIME_DIRECTORY, else in the spool's directory",
    )
    secrets: SecretSettings = SecretSettings()
    shutdown_timeout: Duration = 20.0
    log: LogSettings = LogSettings()


def effective_rewrite(route: Route, upstream_name: str) -> Rewrite:
    """What `route` changes in a message for this upstream: its own rewrite, with that of a fallback laid over key by key."""
    own = route.rewrite or NO_REWRITE
    over = next((item.rewrite for item in route.fallback if item.upstream == upstream_name), None)
    if over is None or upstream_name == route.upstream:
        return own
    return own.model_copy(update={key: getattr(over, key) for key in over.model_fields_set})
