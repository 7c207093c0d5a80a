"""The diagnosis of a failure: the table by itself, without a server."""

import itertools
import re
from datetime import UTC, datetime
from pathlib import Path

import pytest

from relay.config.upstreams import Upstream
from relay.mail.outcome import Failure, Meaning, Phase
from relay.mail.reply import Reply
from relay.upstream.case import Case
from relay.upstream.diagnosis import Diagnosis, diagnose
from relay.upstream.look import Certificate, Look
from relay.upstream.symptoms import SYMPTOMS

OURS_EXPIRED = "it says that our client certificate has expired (SSLV3_ALERT_CERTIFICATE_EXPIRED)"
OURS_UNKNOWN = "it does not trust who issued our client certificate (TLSV1_ALERT_UNKNOWN_CA)"
NOTHING_IN_COMMON = "it found nothing in common with us, or wants a client certificate (SSLV3_ALERT_HANDSHAKE_FAILURE)"
CLIENT = {"provider": "microsoft", "tenant": "globex.example", "client_id": "7e1f0c52", "client_secret": "unseen"}
BY_ITSELF = {"password": None, "oauth2": {**CLIENT, "client_credentials": True}}
NO_PLACE = "no place for the refresh token: /var/lib/relay/oauth/acme: Permission denied"
SECRET = "not-to-be-seen-anywhere"


def case_of(phase: Phase, *, code: int = 0, text: str = "", look: Look | None = None, **facts: object) -> Case:
    keys = {"host": "smtp.acme.example", "username": "app", "password": SECRET, **facts.pop("keys", {})}  # type: ignore[dict-item]
    case = Case(Upstream.model_validate(keys), "smtp.acme.example", "192.0.2.7", phase, Reply(code, "", text), here="10.0.0.5")
    return case._replace(look=look or case.look, **facts)  # type: ignore[arg-type]


def certificate(*names: str, expired: bool = False) -> Certificate:
    since, until = datetime(2026, 1, 1, tzinfo=UTC), datetime(2026, 2, 1, tzinfo=UTC)
    return Certificate(names or ("smtp.acme.example",), "The CA", since, until, self_signed=False, expired=expired)


def untrusted(text: str, look: Look | None = None) -> Case:
    """A failed handshake, in the words of `upstream.opening`."""
    text = f"TLS with smtp.acme.example:587 failed: {text}"
    return case_of(Phase.TLS, failure=Failure.UNTRUSTED, connected=True, text=text, look=look)


def with_our_certificate(case: Case) -> Case:
    return case._replace(upstream=case.upstream.model_copy(update={"client_certificate": Path("ours.pem")}))


def diagnosed(case: Case) -> Diagnosis:
    return diagnose(case, name="acme", provider_help={Meaning.APP_PASSWORD: "At example.com/apppasswords."})


def test_every_failure_has_a_diagnosis_in_full_sentences_and_without_the_secret() -> None:
    looks = (Look(), Look(greeting="220 hi", starttls=True), Look(tls="TLSv1.3"), Look(ports=(465, 25)))
    securities = ("starttls", "tls", "none")
    for phase, failure, look, security in itertools.product(Phase, (None, *Failure), looks, securities):
        for code, meaning in itertools.product((0,) if failure else (421, 535, 250), (Meaning.OTHER,) if failure else Meaning):
            case = case_of(phase, code=code, text="some words", look=look, failure=failure, meaning=meaning, keys={"security": security})
            found = diagnosed(case)
            assert found.what.endswith(".") and found.fix.endswith("."), found
            assert SECRET not in f"{found}" and "{" not in f"{found.what}{found.fix}", found


def test_the_last_row_takes_what_no_other_does() -> None:
    assert diagnosed(case_of(Phase.MAIL, failure=Failure.CLOSED, text="gone")).cause == "lost"
    assert [row.cause for row in SYMPTOMS].count("lost") == 1


@pytest.mark.parametrize(
    ("case", "cause", "words"),
    [
        (case_of(Phase.RESOLVE, failure=Failure.TIMEOUT, text="it could not be resolved within 30 s"), "resolver-silent", "resolv.conf"),
        (case_of(Phase.RESOLVE, failure=Failure.UNREACHABLE, text="Name or service not known"), "name-not-found", "typing error"),
        (
            case_of(
                Phase.RESOLVE, failure=Failure.UNREACHABLE, text="No address associated", keys={"source_address": "192.0.2.1"}
            ),
            "no-address-of-this-kind", "192.0.2.1",
        ),
        (case_of(Phase.CONNECT, failure=Failure.TIMEOUT, text="no answer"), "timed-out", "10.0.0.5"),
        (case_of(Phase.CONNECT, failure=Failure.TIMEOUT, look=Look(ports=(465, 25))), "wrong-port", "`port: 465` with `security: tls`"),
        (case_of(Phase.CONNECT, failure=Failure.UNREACHABLE, text="Connection refused", look=Look(ports=(25,))),
         "wrong-port", "`port: 25`"),
        (case_of(Phase.CONNECT, failure=Failure.UNREACHABLE, text="Network is unreachable"), "no-route", "IPv6"),
        (case_of(Phase.STARTTLS, failure=Failure.LACKING, extensions={"xxxxxxxa": ""}), "starttls-missing", "security: none"),
        (case_of(Phase.STARTTLS, failure=Failure.LACKING, extensions={"xxxxxxxx": ""}), "starttls-stripped", "XXXXXXXX"),
        (case_of(Phase.STARTTLS, code=454, text="TLS not available"), "starttls-refused", "454"),
        (case_of(Phase.TLS, failure=Failure.UNTRUSTED, connected=True, text="self-signed certificate"), "certificate-self-signed",
         "ca_file"),
        (
            case_of(Phase.TLS, failure=Failure.UNTRUSTED, connected=True, text="self-signed certificate in certificate chain"),
            "certificate-self-signed", "ca_file",
        ),
        (
            case_of(Phase.TLS, failure=Failure.UNTRUSTED, connected=True, text="UNSUPPORTED_PROTOCOL", look=Look(tls="TLSv1")),
            "tls-version", "TLSv1 at most",
        ),
        (untrusted("certificate has expired", Look(certificate=certificate(expired=True))), "certificate-expired", "on 2026-02-01"),
        (untrusted("certificate has expired", Look(certificate=certificate())), "certificate-expired", "one above it, of The CA"),
        (untrusted("Hostname mismatch", Look(certificate=certificate("a.example"))), "certificate-name", "is for a.example, not for smtp"),
        (untrusted("Hostname mismatch", Look(certificate=certificate(*"abcdefg"))), "certificate-name", "is for a, b, c, d, e and 2 more"),
        (untrusted("EE certificate key too weak"), "certificate-unfit", "2048 bits"),
        (untrusted("CA signature digest algorithm too weak"), "certificate-unfit", "SHA-256"),
        (untrusted("unsuitable certificate purpose"), "certificate-unfit", "serverAuth"),
        (untrusted("invalid CA certificate"), "certificate-unfit", "by a CA"),
        (untrusted("unable to get local issuer certificate"), "certificate-unknown-ca", "ca_file"),
        (with_our_certificate(untrusted(OURS_EXPIRED)), "client-certificate", "refuses our client certificate"),
        (with_our_certificate(untrusted(OURS_UNKNOWN)), "client-certificate", "whether its issuer is trusted"),
        (untrusted(NOTHING_IN_COMMON), "client-certificate", "wants to see"),
        (untrusted(NOTHING_IN_COMMON, Look(tls="TLSv1.2")), "tls-version", "ciphers"),
        (untrusted("DH_KEY_TOO_SMALL", Look(tls="TLSv1.2")), "tls-version", "up to date"),
        (untrusted("WRONG_VERSION_NUMBER"), "tls-failed", "something else than TLS"),
        (case_of(Phase.TLS, failure=Failure.CLOSED, connected=True, text="ConnectionResetError"), "closed", "instead of beginning TLS"),
        (case_of(Phase.AUTH, code=535, meaning=Meaning.CREDENTIAL), "wrong-password", "app"),
        (case_of(Phase.AUTH, code=534, meaning=Meaning.APP_PASSWORD), "app-password", "app password"),
        (case_of(Phase.AUTH, code=535, meaning=Meaning.AUTH_DISABLED), "auth-disabled", "SMTP AUTH"),
        (case_of(Phase.AUTH, code=535, meaning=Meaning.TOKEN), "token", "relay oauth login acme"),
        (case_of(Phase.AUTH, code=535, meaning=Meaning.TOKEN, connected=True, keys=BY_ITSELF), "token", "docs/oauth.md"),
        (case_of(Phase.AUTH, failure=Failure.REFUSED, text="invalid_client", keys=BY_ITSELF), "token", "Correct what this names"),
        (case_of(Phase.AUTH, failure=Failure.UNREACHABLE, text=NO_PLACE), "token-store", "the user that the relay runs as"),
        (case_of(Phase.AUTH, failure=Failure.LACKING, keys={"security": "none"}), "login-needs-tls", "starttls"),
        (case_of(Phase.AUTH, failure=Failure.LACKING), "no-login-offered", "auth: none"),
        (case_of(Phase.AUTH, failure=Failure.LACKING, extensions={"auth": "XOAUTH2"}), "mechanism", "XOAUTH2"),
        (case_of(Phase.AUTH, code=454, meaning=Meaning.THROTTLED), "throttled", "limits.rate"),
        (case_of(Phase.MAIL, code=550, meaning=Meaning.SENDER), "sender", "--from"),
        (case_of(Phase.RCPT, code=554, meaning=Meaning.RELAYING), "relaying", "app"),
        (case_of(Phase.RCPT, code=554, meaning=Meaning.RELAYING, keys={"username": None, "password": None}), "relaying", "10.0.0.5"),
        (case_of(Phase.RCPT, code=550), "recipient", "--to"),
        (case_of(Phase.RCPT, code=450), "recipient", "some minutes"),
        (case_of(Phase.FINAL, code=550), "message", "reply"),
        (case_of(Phase.FINAL, code=452, meaning=Meaning.QUOTA), "quota", "2000/d"),
        (case_of(Phase.FINAL, failure=Failure.CLOSED, text="gone"), "in-doubt", "may have arrived"),
        (case_of(Phase.GREETING, code=554, text="no"), "address-refused", "10.0.0.5"),
        (case_of(Phase.GREETING, code=421, text="busy"), "busy", "later"),
        (case_of(Phase.EHLO, failure=Failure.CLOSED, text="gone"), "closed", "10.0.0.5"),
        (case_of(Phase.EHLO, failure=Failure.TIMEOUT, text="no answer to EHLO"), "lost", "no answer to EHLO"),
    ],
)  # fmt: skip
def test_a_failure_is_told_with_its_cause_and_what_to_do(case: Case, cause: str, words: str) -> None:
    found = diagnosed(case)
    assert found.cause == cause
    assert words in f"{found.what} {found.fix}"


def test_nobody_is_sent_to_a_sign_in_that_the_command_refuses() -> None:
    for failure, meaning in ((Failure.REFUSED, Meaning.OTHER), (None, Meaning.TOKEN)):
        case = case_of(Phase.AUTH, failure=failure, meaning=meaning, connected=failure is None, keys=BY_ITSELF)
        assert "oauth login" not in f"{diagnosed(case)}"


def test_the_words_for_scripts_are_those_of_the_documentation() -> None:
    page = (Path(__file__).parents[2] / "docs/testing-upstreams.md").read_text()
    table = page.partition("| where | causes |")[2].partition("\n\n")[0]
    assert {row.cause for row in SYMPTOMS} == set(re.findall("`([a-z-]+)`", table))


def test_what_the_provider_says_of_its_own_is_added() -> None:
    assert diagnosed(case_of(Phase.AUTH, code=534, meaning=Meaning.APP_PASSWORD)).help == "At example.com/apppasswords."
    assert diagnosed(case_of(Phase.AUTH, code=535, meaning=Meaning.CREDENTIAL)).help == ""
