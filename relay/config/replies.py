"""What large providers say in words and codes of their own, and what must follow: rows that are looked at before the table of fates.

Data. A row is here because the table would read the reply wrongly, or could not tell a person what to look at. Beside each block
stands where its texts come from, with the date that the source bears: a document of the provider, or what people reported that they were
told ("seen"). "Undated" is what bears none; its stored copy was read in 2026-11. None was provoked at the provider itself. RCPT is among
the phases only where the words cannot be about the recipient.
"""

from typing import Final

from relay.mail.outcome import Meaning, Pattern, Phase, Row, Scope, Status

_LOGIN: Final = (Phase.AUTH,)
_MESSAGE: Final = (Phase.MAIL, Phase.DATA, Phase.CONTENT, Phase.FINAL)
_TRANSACTION: Final = (*_MESSAGE, Phase.RCPT)
_ANY: Final = (*_TRANSACTION, Phase.AUTH)


def _slow(event: Pattern, why: str, *, phases: tuple[Phase, ...] = _TRANSACTION, meaning: Meaning = Meaning.THROTTLED) -> Row:
    """Wait and come back slower; another upstream is no help, as the mail would go out at once and all of it."""
    return Row(phases, event, Status.DEFERRED, Scope.UPSTREAM, why, throttled=True, meaning=meaning)


def _account(event: Pattern, why: str, meaning: Meaning, *, phases: tuple[Phase, ...] = _MESSAGE) -> Row:
    """Nobody who uses this credential gets mail out, until a person has done something."""
    return Row(phases, event, Status.DEFERRED, Scope.CREDENTIAL, why, fallback=True, meaning=meaning)


def _sender(event: Pattern, why: str, *, phases: tuple[Phase, ...] = _MESSAGE) -> Row:
    """This sender does not get out here; others may. A 4xx is never for good."""
    status = Status.FAILED if event[0].startswith("5") else Status.DEFERRED
    return Row(phases, event, status, Scope.UPSTREAM, why, fallback=True, meaning=Meaning.SENDER)


# "Gmail SMTP errors and codes", support.google.com/a/answer/3726730 (undated). 534 5.7.9, 534 5.7.14 and the 5.4.5 of a user: seen, from
# 2019 on. In RFC 4954 section 6, 534 5.7.9 is any mechanism that is too weak.
GOOGLE: Final = (
    _slow(("550", "", ("relay limit exceeded", "sending limit exceeded", "sending quota exceeded")), "the day's quota is used up",
          meaning=Meaning.QUOTA),
    _slow(("550", "5.7.1", ("email quota exceeded",)), "a quota is used up", phases=_MESSAGE, meaning=Meaning.QUOTA),
    _account(("534", "5.7.9", ""), "the account wants an app password", Meaning.APP_PASSWORD, phases=_LOGIN),
    _account(("534", "5.7.14", ""), "Google wants the user to sign in with a browser first", Meaning.ACCOUNT, phases=_LOGIN),
    _account(("550", "5.7.0", ("mail sending denied",)), "the account is disabled, or not of this domain", Meaning.ACCOUNT,
             phases=_TRANSACTION),
)  # fmt: skip

# "SMTP relay service error messages", support.google.com/a/answer/6140680 (undated), and …/3726730. 550 5.7.0 with "invalid credentials":
# seen, 2026. Said of us at RCPT too, not of the recipient.
GOOGLE_RELAY: Final = (
    _account(("550", "5.7.x", ("invalid credentials for relay", "mail relay denied")), "our address, EHLO name or sender is not registered",
             Meaning.ADDRESS, phases=_TRANSACTION),
    _slow(("450", "4.2.1", ("smtp relay limit exceeded",)), "more than the relay takes at once"),
    *GOOGLE,
)  # fmt: skip

# "Email non-delivery reports and SMTP errors in Exchange Online", learn.microsoft.com, of 2023-01-29, 5.7.232 and .233 of 2026-01-07;
# "Message storage and concurrent connection throttling", of 2025-06-21; "NDR error codes 550 5.7.703 …", of 2024-04-22. The words of
# 535 5.7.139, 535 5.7.3, 550 5.7.30, 550 5.7.60 and 554 5.2.252: seen, 2025 and 2026.
MICROSOFT365: Final = (
    _account(("535", "5.7.139", ("credentials were incorrect",)), "user name or password is wrong", Meaning.CREDENTIAL, phases=_LOGIN),
    _account(("535", "5.7.139", ""), "SMTP AUTH, or logins with a password, are switched off", Meaning.AUTH_DISABLED, phases=_LOGIN),
    _account(("5xx", "5.7.30", ""), "passwords are not taken any more", Meaning.AUTH_DISABLED, phases=_ANY),
    _account(("535", "5.7.3", ""), "password or token refused", Meaning.CREDENTIAL, phases=_LOGIN),
    _account(("5xx", "5.7.57", ""), "it wants a login", Meaning.AUTH_NEEDED, phases=_TRANSACTION),
    _account(("550", "5.7.64", ""), "no connector takes mail from our address", Meaning.RELAYING, phases=_TRANSACTION),
    _account(("550", "5.7.708", ""), "our address has a bad name there", Meaning.ADDRESS, phases=_TRANSACTION),
    _account(("550", "5.1.8", ("bad outbound sender",)), "the account is blocked for spam", Meaning.ACCOUNT, phases=_TRANSACTION),
    _account(("550", "5.7.705", ""), "the organization is blocked for spam", Meaning.ACCOUNT, phases=_TRANSACTION),
    _slow(("432", "4.3.2", ""), "more than three connections for one mailbox", phases=_ANY),
    _slow(("451", "4.7.x", ("try again later", "server busy")), "restricted for a while"),
    _slow(("5xx", "5.2.x", ("submissionquotaexceeded", "submission quota exceeded")), "10,000 recipients a day are used up",
          meaning=Meaning.QUOTA),
    _slow(("5xx", "5.2.2", ("storedrv.submission",)), "the sending mailbox itself is full", meaning=Meaning.QUOTA),
    _slow(("5xx", "5.1.90", ""), "10,000 recipients a day are used up", meaning=Meaning.QUOTA),
    _slow(("5xx", "5.7.232", ""), "the organization's day is used up", meaning=Meaning.QUOTA),
    _slow(("5xx", "5.7.233", ""), "the organization's day is used up", meaning=Meaning.QUOTA),
    _sender(("5xx", "5.7.750", ""), "the sender's domain is not registered there"),
    _sender(("554", "5.2.x", ("sendasdenied",)), "the mailbox may not send as this address"),
    _sender(("5xx", "5.7.60", ""), "the mailbox may not send as this address", phases=_TRANSACTION),
)  # fmt: skip

# "Amazon SES SMTP issues", docs.aws.amazon.com/ses/latest/dg/troubleshoot-smtp.html (undated). What it says to a null sender: seen,
# 2022-02-10 (github.com/docker-mailserver/docker-mailserver/issues/2403).
SES: Final = (
    _account(("535", "", ("not subscribed to ses",)), "the AWS account has not signed up for SES", Meaning.ACCOUNT, phases=_LOGIN),
    _sender(("501", "", ("invalid mail from address",)), "not of a verified identity, as the null sender never is", phases=(Phase.MAIL,)),
    _sender(("554", "", ("email address is not verified",)), "an address, in the sandbox a recipient's too, is not verified"),
    _sender(("554", "", ("is not authorized to perform",)), "the IAM policy of the login does not allow this sender"),
)  # fmt: skip

# 403: "SMTP Errors and Troubleshooting", sendgrid.com/docs (undated). 550 at MAIL: seen, 2021 and 2025
# (github.com/sendgrid/docs/issues/6473, github.com/Billionmail/BillionMail/issues/171); 550 to the content: seen, 2021; 451: an article of
# Magento's support (undated).
SENDGRID: Final = (
    _slow(("451", "", ("maximum credits exceeded",)), "the plan's credits are used up", phases=_ANY, meaning=Meaning.QUOTA),
    _account(("5xx", "", ("unauthenticated senders",)), "it wants a login", Meaning.AUTH_NEEDED, phases=_TRANSACTION),
    _sender(("550", "", ("verified sender identity",)), "the From is no verified sender identity"),
    _sender(("403", "", ("not authorized to send from",)), "the From is no verified sender identity"),
)  # fmt: skip

# "Why Did I Receive Relaying Denied?", help.mailgun.com (360012360833, undated). The 421 to DATA: seen, undated; what may stand behind its
# colon, the first row: seen in answers of the HTTP API, 2026, and not over SMTP.
MAILGUN: Final = (
    _slow(("421", "", ("recipient limit exceeded", "sending too fast")), "more than the account may send now", meaning=Meaning.QUOTA),
    _account(("421", "", ("is not allowed to send",)), "the domain or account is disabled, or a sandbox", Meaning.ACCOUNT),
    _account(("550", "5.7.1", ("relaying denied",)), "it wants a login", Meaning.AUTH_NEEDED, phases=_TRANSACTION),
)

# Seen: 525, undated; 502 to the content and to MAIL, 2026 (github.com/frappe/frappe/issues/38806); 450 to the content, undated.
BREVO: Final = (
    _account(("525", "5.7.1", ""), "our address is not among the authorised ones", Meaning.ADDRESS, phases=_ANY),
    _account(("502", "", ("not yet activated",)), "the account is not yet activated for SMTP", Meaning.ACCOUNT, phases=_ANY),
    _account(("450", "", ("not yet activated",)), "the account is not yet activated for SMTP", Meaning.ACCOUNT, phases=_ANY),
    _account(("502", "", ("authenticate first",)), "it wants a login", Meaning.AUTH_NEEDED, phases=_TRANSACTION),
)

# "SMTP Error Codes" of ZeptoMail, www.zoho.com/zeptomail/help/api/smtp-error-codes.html (undated), and 553 at Zoho Mail: seen, 2019.
# 550 5.4.6: seen, 2018 to 2026 (github.com/cachethq/cachet/issues/3052). 554 5.1.8: help.zoho.com, a question of a user's (undated).
ZOHO: Final = (
    _sender(("55x", "", ("relaying disallowed",)), "From and sender must be the account's own address or alias"),
    _account(("550", "5.4.6", ("unusual sending activity",)), "outgoing mail is blocked for a while", Meaning.ACCOUNT),
    _account(("554", "5.1.8", ""), "outgoing mail of the account is blocked", Meaning.ACCOUNT, phases=(*_MESSAGE, Phase.AUTH)),
)

# Seen: 535, 2019 to 2020 (github.com/nodemailer/nodemailer/issues/1112, github.com/GUI/lua-resty-mail/issues/4); 550 to the content, 2020
# and 2022 (github.com/mattermost/mattermost/issues/13652, github.com/PHPMailer/PHPMailer/issues/2685), where it was the From, and may be
# what Yahoo takes for spam.
YAHOO: Final = (
    _account(("535", "", ("#auth005",)), "the account wants an app password", Meaning.APP_PASSWORD, phases=_LOGIN),
    _sender(("550", "", ("request failed; mailbox unavailable",)), "the From is not the account's, or it looks like spam"),
)
