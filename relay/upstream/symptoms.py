"""What a failure on the way to an upstream looks like, and which cause and fix go with it: the table of `upstream.diagnosis`.

Each row speaks to the person who wrote the configuration: one cause, and one fix that names the key to change where it is one. The
first row that fits decides. Words in braces are filled in from the case.

Laws: the last row fits every case; no secret is among what a row may name. Pure.
"""

from typing import Final

from relay.mail.outcome import TRANSACTION, Failure, Meaning, Phase
from relay.upstream.case import Case, Row


def masked(case: Case) -> str:
    """The row of X by which a device has replaced an extension."""
    return next((name.upper() for name in case.extensions if len(name) > 3 and set(name.upper()) == {"X"}), "")


def _no_login_offered(case: Case) -> bool:
    return not any(name.startswith("auth") for name in case.extensions)


def _in_clear(case: Case) -> bool:
    return case.upstream.security == "none"


def _good_itself(case: Case) -> bool:
    return case.look.certificate is not None and not case.look.certificate.expired


def _without_sign_in(case: Case) -> bool:
    return case.upstream.oauth2 is not None and case.upstream.oauth2.grant != "refresh_token"


def _other_port(case: Case) -> bool:
    return bool(case.look.ports)


_BEGINNING: Final = (Phase.TLS, Phase.GREETING)
_STARTING: Final = (Phase.GREETING, Phase.EHLO)
_SENDING: Final = TRANSACTION
_MAIL_DATA: Final = (Phase.MAIL, Phase.DATA, Phase.CONTENT, Phase.FINAL)
_NO_REPLY: Final = (Failure.TIMEOUT, Failure.CLOSED, Failure.NONSENSE)

SYMPTOMS: Final[tuple[Row, ...]] = (
    # -- the access token, before anything is connected to ------------------------------------------------------------------
    Row(
        "token-store", "There is {text}.",
        "Run this as the user that the relay runs as, or as root; else look at the room and the permissions in the spool's directory.",
        (Phase.AUTH,), says=("no place for the refresh token",),
    ),
    Row(
        "token", "There is no access token to log in with: {text}.", "Correct what this names in `oauth2`, or there.",
        (Phase.AUTH,), (Failure.REFUSED,), when=_without_sign_in,
    ),
    Row(
        "token", "There is no access token to log in with: {text}.",
        "Run `relay oauth login {name}` to sign in and consent again, unless this names what to change in `oauth2`.",
        (Phase.AUTH,), (Failure.REFUSED,),
    ),
    Row(
        "token-server", "The token server does not answer as it should: {text}.",
        "Look at `oauth2` (its `token_url` and `tenant`), and whether this machine may connect there; else try again later.",
        (Phase.AUTH,), when=lambda case: case.upstream.by_token and not case.connected,
    ),
    # -- the name ---------------------------------------------------------------------------------------------------------
    Row(
        "resolver-silent", "The resolver of this machine does not answer ({text}).",
        "Look at /etc/resolv.conf and at the way to the name servers in it.",
        (Phase.RESOLVE,), says=("temporary failure", "not be resolved within"),
    ),
    Row(
        "no-address-of-this-kind", "{host} has no address that {source} can reach: one is IPv4 and the other IPv6.",
        "Leave `source_address` out, or name an address of the other kind.",
        (Phase.RESOLVE,), when=lambda case: case.upstream.source_address is not None and "cannot be used" not in case.reply.text
        and "not known" not in case.reply.text,
    ),
    Row(
        "name-not-found", "The name {host} is not known ({text}).",
        "Look for a typing error in `host`: it must have an address record, for MX records are not asked. `getent hosts {host}` asks "
        "the same resolver as the relay.",
        (Phase.RESOLVE,),
    ),
    # -- the connection ---------------------------------------------------------------------------------------------------
    Row(
        "source-address", "{source} is not an address of this machine.", "Correct `source_address`; `ip address` lists what there is.",
        (Phase.CONNECT,), says=("assign requested address", "cannot be used on this machine"),
    ),
    Row(
        "wrong-port", "Nobody listens on port {port} of {host}, but on {ports}.", "Say {hint}.",
        (Phase.CONNECT,), (Failure.UNREACHABLE,), says=("refused",), when=_other_port,
    ),
    Row(
        "refused", "{where} refuses connections: nobody listens there, or a firewall answers for it.",
        "Look whether `host` and `port` are the provider's (587 with starttls, 465 with tls, 25 in your own network) and "
        "whether the server "
        "runs.",
        (Phase.CONNECT,), (Failure.UNREACHABLE,), says=("refused",),
    ),
    Row(
        "no-route", "This machine has no way to {address} ({text}).",
        "Look at its routes and its firewall; an IPv6 address without IPv6 in this network is such a case.",
        (Phase.CONNECT,), (Failure.UNREACHABLE,),
    ),
    Row(
        "wrong-port", "{where} does not answer, but {host} does on {ports}: a firewall drops what goes to port {port}.",
        "Say {hint}. Many networks let nothing out to port 25.",
        (Phase.CONNECT,), (Failure.TIMEOUT,), when=_other_port,
    ),
    Row(
        "timed-out", "{where} does not answer: a firewall drops the packets, here or there, or the provider lets in known addresses alone.",
        "Open port {port} for this machine in the firewall, or have the provider allow {here}; a network behind NAT has another address "
        "to the outside. With several addresses, `source_address` chooses one.",
        (Phase.CONNECT,),
    ),
    # -- TLS where there is none, and none where there is -------------------------------------------------------------------
    Row(
        "plain-port", "Port {port} speaks plain SMTP first, and the configuration begins with TLS.",
        "Say `security: starttls` for port {port}, or `port: 465` for TLS from the beginning.",
        _BEGINNING, when=lambda case: case.upstream.security == "tls" and case.look.starttls,
    ),
    Row(
        "plain-port", "Port {port} speaks plain SMTP and offers no TLS at all.",
        "Say `port: 465` for TLS from the beginning, or 587 with `security: starttls`; only for a server in your own network "
        "`security: none`.",
        _BEGINNING, when=lambda case: case.upstream.security == "tls" and bool(case.look.greeting),
    ),
    Row(
        "tls-port", "Port {port} speaks TLS from the first octet, and the configuration waits for plain SMTP.",
        "Say `security: tls` for port {port}, or `port: 587` with `security: starttls`.",
        _STARTING, _NO_REPLY, when=lambda case: case.upstream.security != "tls" and case.look.tls != "",
    ),
    Row(
        "tls-failed", "{where} answers in something else than TLS ({text}).",
        "Look at `host` and `port`: 465 is usual for `security: tls`, and 587 for `security: starttls`.",
        (Phase.TLS,), says=("wrong_version_number", "record_layer_failure"),
    ),
    # -- certificates -------------------------------------------------------------------------------------------------------
    Row(
        "own-files", "{text}.", "`ca_file`, `client_certificate` and `client_key` must be PEM files that the relay may read.",
        (Phase.TLS,), (Failure.UNTRUSTED,), when=lambda case: not case.connected,
    ),
    Row(
        "client-certificate", "{where} refuses our client certificate: {text}.",
        "Look at `client_certificate`: until when it is good, whether it is for clients (clientAuth), and whether its issuer is trusted "
        "there.",
        says=("our client certificate",), when=lambda case: case.upstream.client_certificate is not None,
    ),
    Row(
        "certificate-expired", "{where} shows a good certificate, but one above it, of {issuer} or whoever vouches for that, has expired.",
        "The server's owner must put the renewed one in its place; where `ca_file` is set, it may be the one in there.",
        (Phase.TLS,), (Failure.UNTRUSTED,), says=("has expired",), when=_good_itself,
    ),
    Row(
        "certificate-expired", "The certificate of {where} has expired{until}.",
        "Its owner must renew it; on a machine whose clock is wrong, set the clock. `verify: false` would let anybody read the mail.",
        (Phase.TLS,), (Failure.UNTRUSTED,), says=("has expired",),
    ),
    Row(
        "certificate-not-yet-valid", "The certificate of {where} is not valid yet{since}.",
        "Look at the clock of this machine (`date -u`), then ask the owner of the server.",
        (Phase.TLS,), (Failure.UNTRUSTED,), says=("not yet valid",),
    ),
    Row(
        "certificate-name", "The certificate of {where} is for {names}, not for {host}.",
        "Say in `host` one of the names in the certificate, if it leads there; else its owner must add {host} to it.",
        (Phase.TLS,), (Failure.UNTRUSTED,), says=("mismatch", "not valid for"),
    ),
    Row(
        "certificate-self-signed", "{where} shows a certificate that it has signed itself.",
        "If this is your own server, save its certificate to a file and name that in `ca_file`; else somebody is in between.",
        (Phase.TLS,), (Failure.UNTRUSTED,), says=("self-signed certificate", "self signed certificate"),
        when=lambda case: case.look.certificate is None or case.look.certificate.self_signed,
    ),
    Row(
        "certificate-unfit", "The certificate of {where}, or one above it, is not fit for a server ({text}).",
        "Its owner must have it made anew: for servers (serverAuth), with an RSA key of 2048 bits or more, signed with SHA-256 by a CA.",
        (Phase.TLS,), (Failure.UNTRUSTED,), says=("too weak", "purpose", "invalid ca "),
    ),
    Row(
        "certificate-unknown-ca", "The certificate of {where} comes from {issuer}, whom nobody here vouches for ({text}).",
        "Name that authority's certificate in `ca_file`; with one named already, it is the wrong one. An old machine may need newer "
        "ca-certificates, and a server that sends its certificate without the intermediate one is its owner's to mend.",
        (Phase.TLS,), (Failure.UNTRUSTED,), says=("issuer", "self-signed", "self signed", "verify", "unable to get", "ca ", "untrusted"),
    ),
    Row(
        "tls-version", "{where} speaks {tls} at most, and the relay at least TLSv1.2.", "Its owner must bring it up to date.",
        (Phase.TLS,), (Failure.UNTRUSTED,), says=("unsupported_protocol", "protocol_version", "no_protocols", "version_too_low"),
        when=lambda case: case.look.tls != "",
    ),
    Row(
        "tls-version", "{where} speaks {tls} only with ciphers or keys that this machine no longer takes.",
        "Its owner must bring it up to date.", (Phase.TLS,), (Failure.UNTRUSTED,), says=("alert_handshake_failure", "dh_key_too_small"),
        when=lambda case: case.look.tls not in ("", "TLSv1.3"),
    ),
    Row(
        "client-certificate", "{where} wants to see a certificate of ours.", "Name it in `client_certificate` and `client_key`.",
        says=("certificate_required", "certificate required", "bad_certificate", "unknown_ca", "alert_handshake_failure"),
        when=lambda case: case.upstream.security != "none",
    ),
    Row(
        "closed", "{where} closes the connection instead of beginning TLS.",
        "It may let in known addresses alone (we come from {here}), speak no TLS on port {port}, or be overloaded.",
        (Phase.TLS,), (Failure.CLOSED,),
    ),
    Row(
        "tls-failed", "TLS with {where} fails ({text}).",
        "`openssl s_client -connect {where}{flag}` shows more; a device between that looks into TLS is a common cause.",
        (Phase.TLS,),
    ),
    # -- STARTTLS -----------------------------------------------------------------------------------------------------------
    Row(
        "starttls-stripped", "A device in between takes STARTTLS out of what {where} says: it left {masked} in its place.",
        "Switch off its inspection of SMTP (Cisco calls it fixup or inspect esmtp), or use `port: 465` with `security: tls`.",
        (Phase.STARTTLS,), (Failure.LACKING,), when=lambda case: bool(masked(case)),
    ),
    Row(
        "starttls-missing", "{where} does not offer STARTTLS, but {host} answers on {ports}.",
        "Say {hint}. Only for a server in your own network say `security: none`: mail and password then go in clear text.",
        (Phase.STARTTLS,), (Failure.LACKING,), when=_other_port,
    ),
    Row(
        "starttls-missing", "{where} does not offer STARTTLS, and mail does not go without.",
        "Use the provider's port for TLS (587 with starttls, 465 with `security: tls`), or have the server's owner switch TLS on. Only "
        "for a server in your own network say `security: none`: mail and password then go in clear text.",
        (Phase.STARTTLS,), (Failure.LACKING,),
    ),
    Row(
        "starttls-refused",
        "{where} offers STARTTLS and refuses it: {reply}.", "Its owner must look at its certificate and its TLS settings.",
        (Phase.STARTTLS,),
    ),
    # -- before the login ---------------------------------------------------------------------------------------------------
    Row(
        "not-smtp", "What answers at {where} does not speak SMTP: {text}.", "Look at `host` and `port`: {where} is another service.",
        _STARTING, (Failure.NONSENSE,),
    ),
    Row(
        "no-greeting", "{where} takes the connection and says nothing for {patience}.",
        "It may make strangers wait on purpose, or look up {here} in a DNS that does not answer: raise `timeouts.connect`, or have "
        "{here} put on its list.",
        (Phase.GREETING,), (Failure.TIMEOUT,),
    ),
    Row(
        "closed", "{where} closes the connection without a word.",
        "It may let in known addresses alone (we come from {here}), want TLS first (`security: tls`), or be overloaded.",
        _STARTING, (Failure.CLOSED,),
    ),
    Row(
        "address-refused", "{where} does not take mail from {here}: {reply}.",
        "Have {here} put on the provider's list, and `ehlo` where it goes by that; a network behind NAT has another address to "
        "the outside.",
        meanings=(Meaning.ADDRESS,),
    ),
    Row(
        "throttled",
        "{where} asks us to slow down: {reply}.", "Try again later; lower `limits.connections` and set `limits.rate` if it goes on.",
        meanings=(Meaning.THROTTLED,),
    ),
    Row(
        "quota", "What the account may send is used up: {reply}.",
        "Wait until the quota is renewed or raise it with the provider; `limits.rate` (such as 2000/d) keeps below it.",
        meanings=(Meaning.QUOTA,),
    ),
    Row(
        "busy", "{where} has no time for us now: {reply}.", "Try again later; if it stays so, ask the provider about {here}.",
        _STARTING, when=lambda case: 400 <= case.reply.code < 500,
    ),
    Row(
        "address-refused", "{where} refuses the session: {reply}.",
        "It may not know {here}, or not like the name we give it ({ehlo}): have {here} put on its list, or set `ehlo`.",
        _STARTING, when=lambda case: case.reply.code >= 500,
    ),
    # -- the login ----------------------------------------------------------------------------------------------------------
    Row(
        "tls-needed", "{where} wants TLS before it goes on: {reply}.", "Say `security: starttls` (587) or `security: tls` (465).",
        meanings=(Meaning.TLS_NEEDED,),
    ),
    Row(
        "login-needs-tls",
        "{where} offers no login on a connection in clear text.", "Say `security: starttls` (587) or `security: tls` (465).",
        (Phase.AUTH,), (Failure.LACKING,), when=lambda case: _no_login_offered(case) and _in_clear(case),
    ),
    Row(
        "no-login-offered", "{where} offers no login at all.",
        "Use the provider's port for sending with a login, 587 or 465; where no login is wanted (a relay that goes by address), take "
        "`username` out or say `auth: none`.",
        (Phase.AUTH,), (Failure.LACKING,), when=_no_login_offered,
    ),
    Row(
        "mechanism", "{where} offers no way to log in that the configuration allows ({offered} is offered).",
        "Choose one of them with `auth`, or leave `auth` out; where XOAUTH2 is the only one, set `oauth2`.",
        (Phase.AUTH,), (Failure.LACKING,),
    ),
    Row(
        "app-password", "{where} wants an app password: the account's own is not taken from programs ({reply}).",
        "Make an app password in the account's security settings and use it as `password`.",
        meanings=(Meaning.APP_PASSWORD,),
    ),
    Row(
        "auth-disabled", "Logins of this kind are switched off for the account or the whole organisation ({reply}).",
        "An administrator must allow SMTP AUTH for {username}, or use `oauth2` where passwords are no longer taken.",
        meanings=(Meaning.AUTH_DISABLED,),
    ),
    Row(
        "token", "The access token is refused: it may not send mail as {username}, or is of another scope or tenant ({reply}).",
        "Let the application or the service account send as {username} there (docs/oauth.md has the steps), and look at `oauth2`.",
        meanings=(Meaning.TOKEN,), when=_without_sign_in,
    ),
    Row(
        "token", "The access token is refused: it has expired, lacks consent for sending mail, or is for another account ({reply}).",
        "Run `relay oauth login {name}` to sign in and consent again; {username} must be the mailbox that it was given for.",
        meanings=(Meaning.TOKEN,),
    ),
    Row(
        "account-blocked",
        "The account is blocked or not released for sending: {reply}.", "Ask the provider; another password changes nothing.",
        meanings=(Meaning.ACCOUNT,),
    ),
    Row(
        "mechanism", "{where} does not take this kind of login: {reply}.", "Choose another one with `auth` ({offered} is offered).",
        (Phase.AUTH,), meanings=(Meaning.MECHANISM,),
    ),
    Row(
        "wrong-password", "{where} refuses user name or password of {username}: {reply}.",
        "Correct `username` or `password` (from {secret}); a blank or line break at its end counts. Some providers want another user "
        "name than the address, or a key in place of the password.",
        (Phase.AUTH,), meanings=(Meaning.CREDENTIAL,),
    ),
    Row(
        "login-failed", "The login was not answered ({text}).", "Try again; if it stays so, raise `timeouts.command` or ask the provider.",
        (Phase.AUTH,), _NO_REPLY,
    ),
    Row(
        "login-failed",
        "{where} cannot check the login now: {reply}.", "Try again later: this is a fault of the provider's.", (Phase.AUTH,),
    ),
    # -- a message ----------------------------------------------------------------------------------------------------------
    Row(
        "login-needed", "{where} takes mail only after a login: {reply}.", "Set `username` and `password`{unless}.",
        meanings=(Meaning.AUTH_NEEDED,),
    ),
    Row(
        "wrong-password", "{where} does not take mail from {username}: {reply}.", "Correct `username` or `password` (from {secret}).",
        _SENDING, meanings=(Meaning.CREDENTIAL, Meaning.MECHANISM),
    ),
    Row(
        "sender", "{where} does not let this account send as that sender: {reply}.",
        "Add and confirm the address or its domain with the provider, use one that is (--from), or let a route's `rewrite` set it.",
        meanings=(Meaning.SENDER,),
    ),
    Row(
        "relaying", "{where} does not take mail for others from us: {reply}.",
        "Set `username` and `password`, or have {here} allowed there to relay.",
        meanings=(Meaning.RELAYING,), when=lambda case: not case.upstream.logs_in,
    ),
    Row(
        "relaying", "{where} does not take mail for others from {username}: {reply}.", "Its owner must allow the account to relay.",
        meanings=(Meaning.RELAYING,),
    ),
    Row(
        "lacking", "{where} cannot take such a message: {text}.", "Use ASCII addresses, or another upstream.", _SENDING, (Failure.LACKING,),
    ),
    Row(
        "recipient", "{where} works, and refuses this recipient: {reply}.", "Use another address with --to.",
        (Phase.RCPT,), when=lambda case: case.reply.code >= 500,
    ),
    Row(
        "recipient", "{where} works, and takes nothing for this recipient now: {reply}.", "Try again in some minutes, or use another --to.",
        (Phase.RCPT,), when=lambda case: 400 <= case.reply.code < 500,
    ),
    Row("message", "{where} refuses the message: {reply}.", "Its reply says why.", _MAIL_DATA, when=lambda case: case.reply.code >= 500),
    Row("message", "{where} does not take the message now: {reply}.", "Try again later.", _SENDING, when=lambda case: case.reply.code > 0),
    Row(
        "in-doubt",
        "The connection ended after the last octet of the message ({text}): it may have arrived.", "Look for it at its recipient.",
        (Phase.FINAL,),
    ),
    # -- all the rest -------------------------------------------------------------------------------------------------------
    Row("lost", "The session with {where} ended at {phase} ({text}).", "Try again; if it stays so, ask the owner of the server."),
)  # fmt: skip
