"""What is known of large providers: where they take mail, how much of it, with which login, and what helps when they refuse.

Data, and the functions that lay a provider's settings under those of the file and tell a provider by its host. What providers reply
is in `config.replies`. Every number and host has its source beside it, with the date that the source bears; "undated" is a page that
bears none, whose stored copy was read in 2026-11. What has no source is left out, and then our own defaults hold. The advice in `help`
and `login` follows these pages; menus change. The port follows from `security`.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import translate
from typing import Any, Final, Literal

from relay.config import replies
from relay.mail.outcome import Meaning, Row


@dataclass(frozen=True, slots=True)
class Provider:
    """One provider. `settings`: keys of an upstream as a file would have them. `replies`: rows before those of the table of fates.

    `hosts`: patterns of its host names. `where`: which host to name, where none can be assumed. `login`: what goes into username and
    password, and whether nothing goes without. `help`: what to do about a refusal, in plain words, by what the refusal means.
    `idle_seconds`: how long it leaves an idle session open, at least; cautious where nobody says. `takes_null_sender`: None where it is
    not known.
    """

    settings: Mapping[str, Any]
    replies: tuple[Row, ...] = ()
    hosts: tuple[str, ...] = ()
    where: str = ""
    login: str = ""
    needs_login: bool = True
    idle_seconds: float = 30.0
    takes_null_sender: bool | None = None
    help: Mapping[Meaning, str] = field(default_factory=dict)


ProviderName = Literal[
    "google", "google-relay", "microsoft365", "ses", "sendgrid", "mailgun", "postmark", "brevo", "zoho", "yahoo", "generic"
]

# Host, ports, user name: developer.nylas.com/docs/cookbook/email/gmail-smtp-settings (undated, after May 2025). Limits: "Gmail sending
# limits in Google Workspace", support.google.com/a/answer/166852 (undated): 2,000 messages (500 on trial) and 10,000 recipients in any
# 24 hours, 100 recipients for a message sent by SMTP. Personal accounts, 500 messages: the page of Nylas. 465 is offered, too.
_GOOGLE: Final = Provider(
    {
        "host": "smtp.gmail.com",
        "security": "starttls",
        "limits": {"rate": "2000/d", "recipient_rate": "10000/d", "recipients": 100},
    },
    replies.GOOGLE,
    hosts=("smtp.gmail.com", "smtp.googlemail.com"),
    login="username: the full address; password: an app password of 16 letters, or oauth2",
    help={
        Meaning.CREDENTIAL: "Google takes an app password (myaccount.google.com/apppasswords, needs 2-step verification) or oauth2, "
        "never the account's own password",
        Meaning.TOKEN: "the token must have the scope https://mail.google.com/ and be the user's own; a service account needs domain-wide "
        "delegation for that scope",
        Meaning.APP_PASSWORD: "make an app password at myaccount.google.com/apppasswords and use it as `password`, or set `oauth2`",
        Meaning.ACCOUNT: "sign in to the account with a browser, answer what Google asks, and try again",
        Meaning.QUOTA: "Workspace accounts send 2,000 messages in 24 hours, personal and trial accounts 500: wait, or set "
        "`limits: {rate: 500/d}`, or use google-relay",
        Meaning.SENDER: "add the address to the account under Settings, Accounts, Send mail as",
    },
)

# "Route outgoing SMTP relay messages through Google", support.google.com/a/answer/2956491 (undated, of 2023 or later): 10,000 messages
# and recipients in any 24 hours for each *user*, who is told by the envelope sender: that cannot be said of the upstream as a whole.
# "SMTP relay service error messages", …/6140680 (undated), and …/166852: 100 recipients for a transaction. The customer is told by
# address, by the domain in MAIL FROM, or by the name in EHLO (…/6140680), which for a null sender is all there is.
_GOOGLE_RELAY: Final = Provider(
    {"host": "smtp-relay.gmail.com", "security": "starttls", "limits": {"recipients": 100}},
    replies.GOOGLE_RELAY,
    hosts=("smtp-relay.gmail.com",),
    login="none: Google knows the organization by our address and the EHLO name; or a Workspace user with an app password",
    needs_login=False,
    takes_null_sender=True,
    help={
        Meaning.ADDRESS: "register our public address (Google Admin, Apps, Google Workspace, Gmail, Routing, SMTP relay service), and set "
        "`ehlo` to a domain of the organization",
        Meaning.THROTTLED: "Google closes sessions whose EHLO name it does not like: set `ehlo` to a domain of the organization",
        Meaning.QUOTA: "each user relays to 10,000 recipients in 24 hours, and the organization has a limit of its own: wait",
        Meaning.RELAYING: "register our public address (Google Admin, Apps, Google Workspace, Gmail, Routing, SMTP relay service)",
        **{meaning: _GOOGLE.help[meaning] for meaning in (Meaning.CREDENTIAL, Meaning.APP_PASSWORD, Meaning.ACCOUNT)},
    },
)

# "Message storage and concurrent connection throttling for SMTP Authenticated Submission", learn.microsoft.com, of 2025-06-21: three
# connections, 30 messages a minute, 10,000 recipients a day. "Exchange Online limits", as universities quote it (undated): 500 recipients
# a message, which an administrator may raise to 1,000. The host of personal accounts, smtp-mail.outlook.com: seen, undated; that of
# connectors: "External DNS records", docs of Microsoft 365 (undated).
_MICROSOFT365: Final = Provider(
    {
        "host": "smtp.office365.com",
        "security": "starttls",
        "limits": {"connections": 3, "rate": "30/m", "recipient_rate": "10000/d", "recipients": 500},
    },
    replies.MICROSOFT365,
    hosts=("smtp.office365.com", "smtp-mail.outlook.com", "*.mail.protection.outlook.com"),
    login="username: the mailbox; oauth2 (or, where the organization still allows it, password)",
    help={
        Meaning.AUTH_DISABLED: "an administrator must allow Authenticated SMTP for the mailbox (Microsoft 365 admin center, the user, "
        "Mail, Manage email apps) and for the organization; where passwords are off altogether, set `oauth2`",
        Meaning.CREDENTIAL: "check user name and password; an app password is needed where the user has multi-factor authentication",
        Meaning.TOKEN: "the app registration needs SMTP.Send with the user's consent, or SMTP.SendAsApp with an administrator's consent "
        "and a service principal that may use the mailbox; SMTP AUTH must be allowed for the mailbox, too",
        Meaning.ADDRESS: "a new organization must ask Microsoft's support to take mail from our address; others should find out why it "
        "has a bad name",
        Meaning.SENDER: "give the mailbox Send As on this address, or let the route rewrite `from` and `envelope_sender`",
        Meaning.THROTTLED: "one mailbox has three connections and 30 messages a minute: lower `limits`, or use several mailboxes",
        Meaning.QUOTA: "a mailbox sends to 10,000 recipients in 24 hours: wait, or use another mailbox or a bulk provider",
        Meaning.RELAYING: "without a login Exchange Online takes mail only by a connector that names our address or certificate",
        Meaning.ACCOUNT: "an administrator must find out why it sent spam and release it (security.microsoft.com, Restricted entities)",
    },
)

# email-smtp.REGION.amazonaws.com: "Amazon SES SMTP issues", docs.aws.amazon.com (undated); -fips: seen, undated. Identities, credentials
# and quotas are of one region, so there is no host to assume. "Service quotas in Amazon SES", …/ses/latest/dg/quotas.html (undated): 50
# recipients; the rate is the account's own (the sandbox: 1/s and 200/d). "Amazon SES SMTP issues" also asks for connections that do not
# live for long. Idle sessions end after about 10 seconds: seen, undated. The null sender: seen, 2022 (`config.replies`).
_SES: Final = Provider(
    {"security": "starttls", "limits": {"recipients": 50}},
    replies.SES,
    hosts=("email-smtp.*.amazonaws.com", "email-smtp-fips.*.amazonaws.com"),
    where="each region has its own, such as email-smtp.eu-central-1.amazonaws.com",
    login="SMTP credentials made for SES in this region: not an access key and its secret",
    idle_seconds=10.0,
    takes_null_sender=False,
    help={
        Meaning.CREDENTIAL: "use SMTP credentials (SES console, SMTP settings) of the region of `host`: an AWS secret key is no password",
        Meaning.SENDER: "verify the domain in this region, in the sandbox every recipient too, and allow the login ses:SendRawEmail; for "
        "bounces set `null_sender` to a verified address",
        Meaning.THROTTLED: "set `limits: {rate: …}` to the send rate that the SES console shows for this region",
        Meaning.QUOTA: "the account's quota for 24 hours is used up: wait, or ask AWS for more (SES console, Account dashboard)",
        Meaning.ACCOUNT: "the SES console, Account dashboard, shows why sending is paused, or that SES was never set up",
    },
)

# "Integrating with the SMTP API", www.twilio.com/docs/sendgrid (undated): the user name is the word apikey; 5,000 messages over one
# connection, 10,000 connections. The host of the EU: seen, undated.
_SENDGRID: Final = Provider(
    {"host": "smtp.sendgrid.net", "security": "starttls", "username": "apikey", "limits": {"messages_per_connection": 5000}},
    replies.SENDGRID,
    hosts=("smtp.sendgrid.net", "smtp.eu.sendgrid.net"),
    login="username: the word apikey; password: an API key that may send mail",
    help={
        Meaning.CREDENTIAL: "the user name is the word apikey, the password an API key with the permission Mail Send",
        Meaning.AUTH_NEEDED: "set `password` to an API key with the permission Mail Send",
        Meaning.SENDER: "verify the address or authenticate its domain (Settings, Sender Authentication)",
        Meaning.QUOTA: "the plan's credits are used up: wait for the next period, or buy more",
    },
)

# Mailgun's manual, as kb.umbhost.net quotes it (undated): ports 25, 587, 2525 with STARTTLS, 465 with TLS. The host of the EU region:
# smtptester.org/guides/mailgun-smtp-test (undated).
_MAILGUN: Final = Provider(
    {"host": "smtp.mailgun.org", "security": "starttls"},
    replies.MAILGUN,
    hosts=("smtp.mailgun.org", "smtp.eu.mailgun.org"),
    login="username: an SMTP user of the domain, such as postmaster@mg.example.com; password: that user's, not an API key",
    help={
        Meaning.CREDENTIAL: "use an SMTP user of the domain (Sending, Domain settings, SMTP credentials), not an API key; a domain of the "
        "EU region needs `host: smtp.eu.mailgun.org`",
        Meaning.AUTH_NEEDED: "set `username` and `password` of an SMTP user of the domain",
        Meaning.ACCOUNT: "the Mailgun dashboard shows why the domain or account is disabled; a sandbox domain sends to "
        "authorized recipients only",
    },
)

# "Send email with SMTP", postmarkapp.com/developer, and "Common SMTP Connection Errors", postmarkapp.com/support (undated): ports 25, 2525
# and 587, STARTTLS; a server API token as user name and password, or the access key and secret key of a stream's SMTP token. The host of
# broadcasts: seen, undated. Of replies about senders and recipients no page speaks; rejections come afterwards ("SMTP API Error").
_POSTMARK: Final = Provider(
    {"host": "smtp.postmarkapp.com", "security": "starttls"},
    hosts=("smtp.postmarkapp.com", "smtp-broadcasts.postmarkapp.com"),
    login="username: the access key of an SMTP token, password: its secret key (a server API token as both works, but a user name is "
    "shown in logs)",
    help={
        Meaning.CREDENTIAL: "use the access key and secret key of an SMTP token (the message stream, Settings), or a *server* API token as "
        "both; SMTP must be enabled for the server",
    },
)

# "Troubleshooting Brevo SMTP", help.brevo.com (115000188150, undated): ports 587, 465, 2525; login and key. The host:
# smtptester.org/guides/brevo-smtp-test (undated); the older one: the same article of Sendinblue's (undated).
_BREVO: Final = Provider(
    {"host": "smtp-relay.brevo.com", "security": "starttls"},
    replies.BREVO,
    hosts=("smtp-relay.brevo.com", "smtp-relay.sendinblue.com"),
    login="username: the SMTP login, password: an SMTP key; neither the account's password nor an API key",
    help={
        Meaning.CREDENTIAL: "use the SMTP login and an SMTP key (Settings, SMTP & API, SMTP), not an API key",
        Meaning.ADDRESS: "authorise our public address, IPv6 too, or switch the check off (Security, Authorised IPs)",
        Meaning.ACCOUNT: "ask Brevo's support to activate sending by SMTP",
        Meaning.AUTH_NEEDED: "set `username` to the SMTP login and `password` to an SMTP key; if they are set, try `auth: login`",
    },
)

# "SMTP Server Configuration", www.zoho.com/mail/help/zoho-smtp.html (undated): 465 with TLS, 587 with STARTTLS. smtppro.zoho.com and
# smtp.zoho.eu: seen, 2019 and later.
_ZOHO: Final = Provider(
    {"host": "smtp.zoho.com", "security": "tls"},
    replies.ZOHO,
    hosts=("smtp.zoho.*", "smtppro.zoho.*"),
    login="username: the full address; password: an application-specific one where 2-step verification is on",
    help={
        Meaning.CREDENTIAL: "with 2-step verification make an application-specific password; accounts of an organization use "
        "`host: smtppro.zoho.com`, those of other data centres smtp.zoho.eu, .in and so on",
        Meaning.SENDER: "envelope sender and From must be the account's address or one of its aliases: let the route rewrite both",
        Meaning.ACCOUNT: "unblock the account at mail.zoho.com/UnblockMe, or ask the administrator; Zoho Mail is not for bulk mail",
    },
)

# help.yahoo.com SLN4724, as it was quoted on 2020-04-20 (github.com/PHPMailer/PHPMailer/issues/2034): 465 or 587. App passwords: SLN15241,
# as quoted in 2019. smtp.bizmail.yahoo.com: seen, undated.
_YAHOO: Final = Provider(
    {"host": "smtp.mail.yahoo.com", "security": "tls"},
    replies.YAHOO,
    hosts=("smtp.mail.yahoo.com", "smtp.bizmail.yahoo.com"),
    login="username: the full address; password: an app password",
    help={
        Meaning.CREDENTIAL: "Yahoo takes an app password only (Account security, Generate app password)",
        Meaning.APP_PASSWORD: "make one under Account security, Generate app password, and use it as `password`",
        Meaning.SENDER: "envelope sender and From must be the account's own address: let the route rewrite both",
    },
)

PROVIDERS: Final[dict[str, Provider]] = {
    "google": _GOOGLE,
    "google-relay": _GOOGLE_RELAY,
    "microsoft365": _MICROSOFT365,
    "ses": _SES,
    "sendgrid": _SENDGRID,
    "mailgun": _MAILGUN,
    "postmark": _POSTMARK,
    "brevo": _BREVO,
    "zoho": _ZOHO,
    "yahoo": _YAHOO,
    "generic": Provider({}, needs_login=False),
}


#: There may be thousands of upstreams to ask this of.
_BY_HOST: Final = {host: each for each in PROVIDERS.values() for host in each.hosts if "*" not in host}
_BY_PATTERN: Final = [(re.compile(translate(host)), each) for each in PROVIDERS.values() for host in each.hosts if "*" in host]


def filled(upstream: dict[str, Any]) -> dict[str, Any]:
    """The settings of an upstream with those of its provider under them, section by section; as they are where it names none we know."""
    name = upstream.get("provider")
    provider = PROVIDERS.get(name) if isinstance(name, str) else None
    if provider is None:
        return upstream
    merged = dict(provider.settings) | upstream
    for key, value in provider.settings.items():
        if isinstance(value, Mapping) and isinstance(upstream.get(key), Mapping):
            merged[key] = {**value, **upstream[key]}
    return merged


def known_as(provider: str | None, hosts: Sequence[str]) -> Provider:
    """The provider that the file names, else the one that its first host belongs to, else one of which nothing is known."""
    if provider is not None:
        return PROVIDERS[provider]
    host = hosts[0].lower().rstrip(".") if hosts else ""
    return _BY_HOST.get(host) or next((each for pattern, each in _BY_PATTERN if pattern.match(host)), PROVIDERS["generic"])
