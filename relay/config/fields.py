"""The types of the configuration's values: how text from the file becomes each of them, and what the JSON Schema says of it.

No section knows another one here, and nothing is said about what a key means: that is `config.model`. Pure.
"""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationInfo, WithJsonSchema

from relay.config import encryption, machine, quantities, values
from relay.config.password import CREDENTIAL_LIMIT_BYTES, checked, parse_hash
from relay.config.secrets import SECRET_SCHEMA, Secret, resolve
from relay.config.values import Network, Uid


class Section(BaseModel):
    """A mapping of the file: frozen, and it takes no key that it does not know."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", strict=True, populate_by_name=True, arbitrary_types_allowed=True, hide_input_in_errors=True
    )


def listed(value: Any) -> Any:
    """One value stands for a list of one."""
    if isinstance(value, list):
        return tuple(value)
    return value if isinstance(value, tuple) or value is None else (value,)


def _sequence(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def check_credential(value: str) -> str:
    """A user name or password, for us or for an upstream: aiosmtplib and most servers end at the same number of bytes."""
    if len(value) > CREDENTIAL_LIMIT_BYTES or len(value.encode(errors="replace")) > CREDENTIAL_LIMIT_BYTES:
        raise ValueError(f"must have at most {CREDENTIAL_LIMIT_BYTES} bytes")
    return values.parse_text(value)


def _secret(check: Callable[[str], object]) -> BeforeValidator:
    def read(value: Any, info: ValidationInfo) -> Secret:
        context: dict[str, Any] = info.context or {}
        environ, base = context.get("environ", os.environ), context.get("base", Path())
        keys: encryption.Keys = context.get("keys") or encryption.keys_at(None, environ)
        return resolve(values.as_written(value), environ, base=base, check=check, decrypt=keys.decrypt)

    return BeforeValidator(read, json_schema_input_type=Annotated[Any, WithJsonSchema(SECRET_SCHEMA)])


def _pem(checked: Callable[[Path], Path]) -> BeforeValidator:
    def read(value: Any, info: ValidationInfo) -> Any:
        return value if value is None or isinstance(value, Path) else checked(_path(value, info))

    return BeforeValidator(read, json_schema_input_type=str | None)


def _path(value: Any, info: ValidationInfo) -> Path:
    """The file that a name stands for: names that are relative begin where the configuration is."""
    value = values.as_written(value)
    if isinstance(value, Path):
        return value
    if not isinstance(value, str) or not value:
        raise ValueError("must be the name of a file")
    return Path((info.context or {}).get("base", Path()), Path(os.path.expanduser(value)))


CertificateFile = Annotated[Path | None, _pem(machine.certificate_file)]
KeyFile = Annotated[Path | None, _pem(machine.key_file)]
PathName = Annotated[Path, BeforeValidator(_path, json_schema_input_type=str)]
Password = Annotated[Secret, _secret(check_credential)]
Token = Annotated[Secret, _secret(values.parse_text)]
ServiceAccount = Annotated[Secret, _secret(values.parse_service_account)]
UserPassword = Annotated[Secret, _secret(checked)]
PasswordHash = Annotated[Secret, _secret(parse_hash)]
Text = Annotated[str, BeforeValidator(values.as_written), AfterValidator(values.parse_text)]
Name = Annotated[Text, AfterValidator(values.parse_name)]
Address = Annotated[Text, AfterValidator(values.parse_address)]
Host = Annotated[Text, AfterValidator(values.parse_host)]
Domain = Annotated[Text, AfterValidator(values.parse_domain)]
RemovableHeaderName = Annotated[Text, AfterValidator(values.parse_removable_header_name)]
HeaderFields = Annotated[
    dict[Annotated[Text, AfterValidator(values.parse_settable_header_name)], Text],
    BeforeValidator(lambda value: {} if value is None else value, json_schema_input_type=dict[str, str] | None),
    AfterValidator(values.unique_header_names),
]
Duration = Annotated[
    float,
    BeforeValidator(
        quantities.parse_duration,
        json_schema_input_type=Annotated[str, Field(pattern=r"^[0-9]+(\.[0-9]+)? ?(ms|s|m|h|d)$", examples=["30s", "5m", "2h"])],
    ),
]
Positive = Annotated[Duration, Field(gt=0)]
SizeOrNone = Annotated[
    int,
    BeforeValidator(
        quantities.parse_size,
        json_schema_input_type=Annotated[int, Field(ge=0)]
        | Annotated[str, Field(pattern=r"^[0-9]+(\.[0-9]+)? ?([kKMGT]i?)?B$", examples=["50MB", "50MiB"])],
    ),
    Field(ge=0),
]
Size = Annotated[SizeOrNone, Field(ge=1)]
Count = Annotated[int, Field(ge=1)]
Rate = Annotated[
    quantities.Rate,
    BeforeValidator(
        quantities.parse_rate,
        json_schema_input_type=Annotated[str, Field(pattern=r"^[0-9]+ ?/ ?[smhd]$", examples=["10/s", "30/m", "500/h", "2000/d"])],
    ),
]
Port = Annotated[int, Field(ge=1, le=65535)]
Sequence = BeforeValidator(_sequence)


def one_or_list(item: Any) -> BeforeValidator:
    return BeforeValidator(listed, json_schema_input_type=item | Annotated[list[item], Field(min_length=1)])


def null_or_list(item: Any) -> BeforeValidator:
    return BeforeValidator(lambda value: () if value is None else listed(value), json_schema_input_type=item | list[item] | None)


Condition = Annotated[Text, AfterValidator(values.parse_condition)]
RecipientCondition = Annotated[Text, AfterValidator(values.parse_recipient_condition)]
Permission = Annotated[Text, AfterValidator(values.parse_permission)]
UserPermission = Annotated[Text, AfterValidator(values.parse_user_permission)]
UserName = Annotated[Text, AfterValidator(checked)]
SourceNetwork = Annotated[Network, BeforeValidator(values.parse_network)]
Source = Annotated[Network | Uid, BeforeValidator(values.parse_source)]
TrustedSource = Annotated[Network | Uid, BeforeValidator(values.parse_trusted_source)]
ClientNetwork = Annotated[Network, BeforeValidator(values.parse_client_network)]
NonEmpty = Field(min_length=1)
