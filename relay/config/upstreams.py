"""The upstreams of the configuration: where mail goes on to, with which credential, how fast, and how long it may take.

Keys that a `provider` knows are filled in before anything is checked, so that a default of ours and a value of the file are read alike.
"""

from typing import Annotated, Any, Final, Literal

from pydantic import AfterValidator, Field, ValidationInfo, model_validator

from relay.config import values
from relay.config.fields import (
    CertificateFile,
    Count,
    Host,
    KeyFile,
    NonEmpty,
    Password,
    Permission,
    Port,
    Positive,
    Rate,
    Section,
    Text,
    check_credential,
    one_or_list,
)
from relay.config.oauth import OAuth2
from relay.config.providers import Provider, ProviderName, filled, known_as
from relay.config.secrets import Secret
from relay.mail.outcome import Row
from relay.mail.permission import may_send

PORTS: Final = {"starttls": 587, "tls": 465, "none": 25}


def _null_sender(value: str, info: ValidationInfo) -> str:
    if value == "keep":
        return value
    address, senders = values.parse_address(value), info.data.get("senders", ())
    if senders and not may_send(senders, address):
        raise ValueError(f"{address} is not one of the `senders` of this upstream, which would then hold its bounces")
    return address


class Limits(Section):
    """How much at once an upstream gets, and how much in which time."""

    connections: Count = Field(default=5, description="at once")
    rate: Annotated[tuple[Rate, ...], one_or_list(str)] = Field(default=(), description="transactions, such as 10/s, or [30/m, 2000/d]")
    recipient_rate: Annotated[tuple[Rate, ...], one_or_list(str)] = Field(default=(), description="recipients, such as 100/m")
    recipients: Count = Field(default=100, description="per transaction")
    messages_per_connection: Count = Field(default=500, description="each new one costs the upstream a handshake and a login")


class Timeouts(Section):
    """How long an upstream may take."""

    connect: Positive = Field(default=30.0, description="TCP and TLS")
    command: Positive = Field(default=60.0, description="the reply to a command")
    data: Positive = Field(default=60.0, description="without progress while content is sent")
    final: Positive = Field(default=600.0, description="the reply after the last octet")  # RFC 5321 section 4.5.3.2.6


class Upstream(Section):
    """A next hop with its credential and limits."""

    description: Text = ""
    provider: ProviderName | None = Field(
        default=None, description="fills host, port, security, limits and what is known of its replies; any key overrides"
    )
    host: Annotated[tuple[Host, ...], one_or_list(str), NonEmpty] = Field(description="address records, never MX; a list is tried in order")
    security: Literal["starttls", "tls", "none"] = Field(default="starttls", description="never downgraded")
    port: Port = Field(
        default_factory=lambda data: PORTS[data.get("security", "starttls")], description="default by security: 587, 465, 25"
    )
    ca_file: CertificateFile = Field(default=None, description="default: the system's trust store")
    verify: bool = Field(default=True, description="check the certificate and its name")
    client_certificate: CertificateFile = Field(default=None, description="shown to the upstream, with its chain")
    client_key: KeyFile = Field(default=None, description="default: in the file of the certificate")
    username: Annotated[Text, AfterValidator(check_credential)] | None = None
    password: Password | None = None
    oauth2: OAuth2 | None = None
    auth: Literal["auto", "plain", "login", "cram-md5", "xoauth2", "none"] = Field(
        default="auto", description="auto: xoauth2 where oauth2 is set, else the first offered of plain, login, cram-md5"
    )
    senders: Annotated[tuple[Permission, ...], one_or_list(str), NonEmpty] = Field(
        default=(), description="the domains and addresses this credential may ever send for; default: any"
    )
    source_address: Annotated[Text, AfterValidator(values.parse_ip)] | None = None
    ehlo: Annotated[Text, AfterValidator(values.parse_ehlo)] | None = Field(default=None, description="default: hostname")
    null_sender: Annotated[Text, AfterValidator(_null_sender)] = Field(default="keep", description="keep, or an address used instead of <>")
    limits: Limits = Limits()
    timeouts: Timeouts = Timeouts()
    probe: Positive | None = Field(default=None, description="try EHLO, TLS and AUTH this often; default: never")

    @model_validator(mode="before")
    @classmethod
    def _with_provider(cls, data: Any) -> Any:
        return filled(data) if isinstance(data, dict) else data

    @property
    def secrets(self) -> dict[str, Secret]:
        """Every secret it has, by its key, below `oauth2` too."""
        own = {"password": self.password} if self.password is not None else {}
        keys = ("client_secret", "refresh_token", "service_account") if self.oauth2 is not None else ()
        return own | {key: secret for key in keys if (secret := getattr(self.oauth2, key)) is not None}

    def with_secret(self, key: str, secret: Secret) -> "Upstream":
        """The same with another secret in the place of one that it has."""
        if key == "password":
            return self.model_copy(update={key: secret})
        assert self.oauth2 is not None, "all other secrets are there"
        return self.model_copy(update={"oauth2": self.oauth2.model_copy(update={key: secret})})

    @property
    def known(self) -> Provider:
        """What is known of its provider: the one the file names, or the one its host belongs to."""
        return known_as(self.provider, self.host)

    @property
    def replies(self) -> tuple[Row, ...]:
        """What this provider's own replies mean, looked at before the table of fates."""
        return self.known.replies

    @property
    def logs_in(self) -> bool:
        """Whether mail goes there with a login."""
        return self.username is not None and self.auth != "none"

    @property
    def by_token(self) -> bool:
        """Whether that login is XOAUTH2."""
        return self.oauth2 is not None and self.auth != "none"
