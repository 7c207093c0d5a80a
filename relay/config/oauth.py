"""The `oauth2` section of an upstream: its keys, what they must agree on, and what is known of the token servers of large providers.

How a token is then asked for is `upstream.oauth2`'s business. What looks at the plain values of the file passes over values of a wrong
type, as `consistency` does. Pure, but for `unready`, which looks for what `relay oauth login` has stored.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final, Literal, NamedTuple
from urllib.parse import quote, urlsplit

from pydantic import AfterValidator, Field

from relay.config.fields import Section, ServiceAccount, Text, Token
from relay.config.findings import KeyPath, Problem

if TYPE_CHECKING:
    from relay.config.model import Config

Grant = Literal["refresh_token", "client_credentials", "service_account"]
_GRANTS: Final[tuple[Grant, ...]] = ("refresh_token", "client_credentials", "service_account")
_FILE_NAME_LIMIT: Final = 200  # of 255 on every file system, with room for what is put behind it
_PASSWORD_LOGINS: Final = ("plain", "login", "cram-md5")


def _https(value: str) -> str:
    try:
        parts = urlsplit(value)
        fits = parts.scheme == "https" and bool(parts.hostname) and parts.port != 0 and "@" not in parts.netloc
    except ValueError:
        fits = False
    if not fits or not value.isascii() or " " in value or "#" in value:
        raise ValueError("must be an address such as https://login.example.net/token")
    return value


def _tenant(value: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9.-]*", value):
        raise ValueError("must be a domain such as acme.onmicrosoft.com, or the directory's id")
    return value


Url = Annotated[Text, AfterValidator(_https)]


class OAuth2(Section):
    """How an access token for XOAUTH2 is got: by a refresh token, as the client itself, or as a service account."""

    provider: Literal["google", "microsoft"] | None = Field(default=None, description="default: that of the upstream's own provider")
    token_url: Url | None = Field(default=None, description="default: the provider's")
    scope: Text | None = Field(default=None, description="default: the provider's, for sending mail")
    tenant: Annotated[Text, AfterValidator(_tenant)] | None = Field(
        default=None, description="of Microsoft: a domain or an id; default: organizations"
    )
    client_id: Text | None = None
    client_secret: Token | None = None
    refresh_token: Token | None = Field(default=None, description="default: what `relay oauth login` has stored")
    client_credentials: bool = Field(default=False, description="ask for tokens as the client itself, without a user")
    service_account: ServiceAccount | None = Field(default=None, description="the JSON key of a service account of Google's")
    subject: Text | None = Field(default=None, description="the user that a service account speaks for; default: username")
    device_url: Url | None = Field(default=None, description="for `relay oauth login`, where to ask for a code; default: the provider's")
    authorize_url: Url | None = Field(default=None, description="for `relay oauth login`, where to sign in; default: the provider's")

    @property
    def grant(self) -> Grant:
        """Which of the three ways it is."""
        if self.service_account is not None:
            return "service_account"
        return "client_credentials" if self.client_credentials else "refresh_token"


@dataclass(frozen=True, slots=True)
class _Provider:
    """Addresses with `{tenant}` for Microsoft's. `app_scope`: of tokens that are asked for without a user."""

    token_url: str
    scope: str
    app_scope: str
    device_url: str | None
    authorize_url: str


# Google: developers.google.com/gmail/imap/xoauth2-protocol and /identity/protocols/oauth2 (2026-11). Its device flow does not give the
# scope of mail, so there is no address for it here. Microsoft: learn.microsoft.com, "Authenticate an IMAP, POP or SMTP connection using
# OAuth" (2026-11); offline_access is what makes it give a refresh token.
_PROVIDERS: Final[Mapping[str, _Provider]] = {
    "google": _Provider(
        "https://oauth2.googleapis.com/token",
        "https://mail.google.com/",
        "https://mail.google.com/",
        None,
        "https://accounts.google.com/o/oauth2/v2/auth",
    ),
    "microsoft": _Provider(
        "https://login.microsoftonline.com/{tenant}/oauth2/v2.0/token",
        "https://outlook.office.com/SMTP.Send offline_access",
        "https://outlook.office365.com/.default",
        "https://login.microsoftonline.com/{tenant}/oauth2/v2.0/devicecode",
        "https://login.microsoftonline.com/{tenant}/oauth2/v2.0/authorize",
    ),
}
#: Whose tokens an upstream wants, where its `oauth2` does not say.
_IMPLIED: Final = {"google": "google", "microsoft365": "microsoft"}


class TokenServer(NamedTuple):
    """Where tokens come from. `provider`: `google`, `microsoft` or `""`."""

    provider: str
    token_url: str
    scope: str
    device_url: str | None
    authorize_url: str | None


def token_server(oauth2: OAuth2, upstream_provider: str | None) -> TokenServer:
    """Where an upstream of this provider gets its tokens: what the file says, else what is known of the provider."""
    name = oauth2.provider or _IMPLIED.get(upstream_provider or "") or ("google" if oauth2.service_account else "")
    known = _PROVIDERS.get(name)
    if known is None:
        assert oauth2.token_url is not None, "the configuration has a provider or an address"
        return TokenServer("", oauth2.token_url, oauth2.scope or "", oauth2.device_url, oauth2.authorize_url)
    tenant = oauth2.tenant or "organizations"
    scope = known.scope if oauth2.grant == "refresh_token" else known.app_scope

    def filled(url: str | None) -> str | None:
        return url.replace("{tenant}", tenant) if url is not None else None

    return TokenServer(
        name,
        oauth2.token_url or known.token_url.replace("{tenant}", tenant),
        oauth2.scope or scope,
        oauth2.device_url or filled(known.device_url),
        oauth2.authorize_url or filled(known.authorize_url),
    )


def stored_at(spool: Path, upstream: str) -> Path:
    """Where the refresh token of an upstream is kept. A name may have characters that a file's has not."""
    name = quote(upstream, safe="@+=,")  # and letters, digits, _ . - ~
    if len(name) > _FILE_NAME_LIMIT:
        name = f"%{sha256(name.encode()).hexdigest()}"
    return spool / "oauth" / (f"%2E{name[1:]}" if name.startswith(".") else name)


# -- what the keys must agree on -------------------------------------------------------------------------------------------


def problems(path: KeyPath, upstream: Mapping[str, Any]) -> Iterator[Problem]:
    """What does not fit together at one upstream, whose plain values these are."""
    section, auth = upstream.get("oauth2"), upstream.get("auth", "auto")
    if section is None:
        if auth == "xoauth2":
            yield Problem((*path, "auth"), "auth: xoauth2 needs an oauth2 section: how to get a token")
        return
    if auth in _PASSWORD_LOGINS:
        yield Problem((*path, "auth"), f"auth: {auth} takes a password, and oauth2 gives none: leave `auth` out")
    elif auth != "none" and upstream.get("username") is None:
        message = "is missing: oauth2 needs the mailbox to log in to, such as mailer@example.com"
        yield Problem((*path, "username"), message, at="missing")
    if upstream.get("password") is not None:
        yield Problem((*path, "password"), "either a password or oauth2: nothing falls back from one to the other", at="key")
    if isinstance(section, dict):
        yield from _section((*path, "oauth2"), section, upstream.get("provider"))


def _section(path: KeyPath, section: Mapping[str, Any], upstream_provider: Any) -> Iterator[Problem]:
    grants = [grant for grant in _GRANTS if section.get(grant) not in (None, False)]
    for grant in grants[1:]:
        yield Problem((*path, grant), f"there is {grants[0]} already: one way to get a token is enough", at="key")
    grant = grants[0] if grants else "refresh_token"
    provider = section.get("provider") or (_IMPLIED.get(upstream_provider) if isinstance(upstream_provider, str) else None)
    if provider is None and section.get("token_url") is None and grant != "service_account":
        yield Problem((*path, "provider"), "is missing: google, microsoft, or a token_url", at="missing")
    if grant != "service_account" and section.get("client_id") is None:
        yield Problem((*path, "client_id"), "is missing: the id under which the relay is registered there", at="missing")
    if section.get("tenant") is not None and provider != "microsoft":
        yield Problem((*path, "tenant"), "only Microsoft has tenants", at="key")
    if section.get("subject") is not None and grant != "service_account":
        yield Problem((*path, "subject"), "only a service_account speaks for somebody", at="key")
    if grant == "client_credentials":
        yield from _client_credentials(path, section, provider)
    if grant == "service_account" and provider == "microsoft":
        yield Problem((*path, grant), "service accounts are Google's: with Microsoft use client_credentials", at="key")


def _client_credentials(path: KeyPath, section: Mapping[str, Any], provider: Any) -> Iterator[Problem]:
    if provider == "google":
        yield Problem((*path, "client_credentials"), "Google knows no client_credentials: use a service_account", at="key")
        return
    if section.get("client_secret") is None:
        yield Problem((*path, "client_secret"), "is missing: with client_credentials it is what proves the client", at="missing")
    if provider == "microsoft" and section.get("tenant") is None and section.get("token_url") is None:
        yield Problem((*path, "tenant"), "is missing: with client_credentials Microsoft must know whose", at="missing")


def unready(config: "Config") -> Iterator[Problem]:
    """Upstreams for which nobody has signed in yet, as far as this user may see."""
    for name, upstream in config.upstreams.items():
        oauth2 = upstream.oauth2
        if oauth2 is None or upstream.auth == "none" or oauth2.grant != "refresh_token" or oauth2.refresh_token is not None:
            continue
        try:
            stored_at(config.spool.directory, name).stat()
        except FileNotFoundError:
            message = f"there is no refresh token yet: sign in with `relay oauth login {name}`"
            yield Problem(("upstreams", name, "oauth2"), message, "warning", at="key")
        except OSError:  # the service may see it
            continue
