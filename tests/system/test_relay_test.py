"""`relay test` against real servers in every state that it has a diagnosis for, and the mark it leaves."""

import asyncio
import json
import re
import socket
from collections.abc import AsyncIterator, Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from relay.cli import main
from relay.config.encryption import keys_at
from relay.config.upstreams import Upstream
from relay.upstream.diagnose import Findings, examine
from relay.upstream.token_store import TokenStore
from tests.support.certificates import Authority
from tests.support.token_server import Answer, TokenServer, refused
from tests.support.token_server import Close as CloseToken
from tests.support.upstream import Close, Garbage, Hang, Reset, Say, ScriptedUpstream, unused_port
from tests.system.upstreams import outgoing, secured, settings

USER, SECRET = "app@acme.example", "not-to-be-seen-anywhere"
LOGIN = {"username": USER, "password": SECRET}
HASTY = {"connect": "1s", "command": "1s", "data": "1s", "final": "1s"}


async def examined(upstream: Upstream, **more: Any) -> Findings:
    report = await examine("acme", upstream, ehlo="relay.example.net", told=lambda *_: None, **more)
    assert SECRET not in repr(report)
    return report


async def cause_of(upstream: Upstream, **more: Any) -> str:
    report = await examined(upstream, **more)
    assert not report.ok and report.trouble is not None
    return report.trouble.diagnosis.cause


def steps_of(report: Findings) -> list[str]:
    return [step.name for trial in report.trials for step in trial.steps]


# -- what works -------------------------------------------------------------------------------------------------------------


async def test_every_step_is_told_with_what_it_found(tls: Authority) -> None:
    async with ScriptedUpstream(users={USER: SECRET}, security="starttls", tls=tls.server) as server:
        report = await examined(secured(server, tls, **LOGIN), message=outgoing())
        assert report.ok and not report.remarks
        assert steps_of(report) == ["resolve", "connect", "greeting", "ehlo", "starttls", "auth", "message"]
        found = {step.name: step for trial in report.trials for step in trial.steps}
        assert found["starttls"].facts["version"].startswith("TLSv1.")
        assert found["starttls"].facts["certificate"]["names"][0] == "localhost"
        assert found["auth"].found == f"PLAIN, as {USER}"
        assert found["message"].found.startswith("250 2.0.0")
        assert all(step.seconds is not None for step in found.values())
        assert len(server.accepted) == 1


async def test_tls_from_the_beginning_is_a_step_before_the_greeting(tls: Authority) -> None:
    async with ScriptedUpstream(security="tls", tls=tls.server) as server:
        report = await examined(secured(server, tls, security="tls"))
        assert report.ok
        assert steps_of(report) == ["resolve", "connect", "tls", "greeting", "ehlo"]


async def test_all_hosts_are_tried_and_one_that_works_is_enough(tls: Authority) -> None:
    async with ScriptedUpstream(users={USER: SECRET}, security="starttls", tls=tls.server) as server:
        report = await examined(secured(server, tls, host=["no.such.invalid", "127.0.0.1", "localhost"], **LOGIN), message=outgoing())
        assert report.ok and report.trouble is None
        assert [trial.complete for trial in report.trials] == [False, True, True]
        assert any("not by no.such.invalid" in remark for remark in report.remarks)
        assert len(server.accepted) == 1, "a test mail goes once"
        assert len(server.logins) == 2


async def test_a_test_mail_that_is_refused_at_one_host_was_not_taken_because_another_host_answers() -> None:
    async with ScriptedUpstream() as server:
        server.script("rcpt", b"550 5.1.1 Nobody")
        upstream = settings(server, host=["127.0.0.1", "localhost"])
        report = await examined(upstream, message=outgoing("you@example.org"))
        assert not report.ok and report.trouble is not None and report.trouble.diagnosis.cause == "recipient"
        assert len(report.trials) == 2 and not server.accepted


async def test_a_refused_login_is_not_tried_at_the_next_host(tls: Authority) -> None:
    async with ScriptedUpstream(users={USER: "another"}, security="starttls", tls=tls.server) as server:
        report = await examined(secured(server, tls, host=["127.0.0.1", "localhost"], **LOGIN), message=outgoing())
        assert not report.ok
        assert len(server.logins) == 1
        assert len(server.connections) == 2, "the other host is looked at all the same"
        assert not server.transactions


async def test_what_works_and_is_unwise_is_remarked(tls: Authority) -> None:
    async with (
        ScriptedUpstream(users={USER: SECRET}) as clear,
        ScriptedUpstream(users={USER: SECRET}, security="starttls", tls=tls.context(expired=True)) as unchecked,
    ):
        (clear_text,) = (await examined(settings(clear, **LOGIN))).remarks
        remarks = (await examined(secured(unchecked, tls, verify=False, **LOGIN))).remarks
    assert "clear text" in clear_text
    assert any("expires on" in remark for remark in remarks) and any("verify: false" in remark for remark in remarks)


# -- one diagnosis for each failure -------------------------------------------------------------------------------------------


async def test_a_name_that_leads_nowhere() -> None:
    assert await cause_of(Upstream.model_validate({"host": "no.such.invalid"})) in ("name-not-found", "resolver-silent")


async def test_a_port_on_which_nobody_listens() -> None:
    assert await cause_of(Upstream.model_validate({"host": "127.0.0.1", "port": unused_port()})) == "refused"


async def test_a_source_address_that_this_machine_does_not_have() -> None:
    upstream = Upstream.model_validate({"host": "127.0.0.1", "port": unused_port(), "source_address": "192.0.2.1"})
    assert await cause_of(upstream) == "source-address"


async def test_a_source_address_of_the_other_kind() -> None:
    assert await cause_of(Upstream.model_validate({"host": "127.0.0.1", "source_address": "::1"})) == "no-address-of-this-kind"


async def test_a_server_that_swallows_packets() -> None:
    with socket.socket() as listening, socket.socket() as first, socket.socket() as second:
        listening.bind(("127.0.0.1", 0))
        listening.listen(0)
        for filling in (first, second):  # the queue is full: the next one gets no answer, as from a firewall
            filling.setblocking(False)
            filling.connect_ex(listening.getsockname())
        upstream = Upstream.model_validate({"host": "127.0.0.1", "port": listening.getsockname()[1], "timeouts": HASTY})
        assert await cause_of(upstream) in ("timed-out", "wrong-port")  # the latter where this machine has a mail server


Case = tuple[dict[str, Any], dict[str, Any], Callable[[ScriptedUpstream], object], str]
CASES: Mapping[str, Case] = {
    "tls to a plain port": ({}, {"security": "tls"}, lambda _: None, "plain-port"),
    "no starttls": ({}, {"security": "starttls"}, lambda _: None, "starttls-missing"),
    "a device masks starttls": ({"offers": ["XXXXXXXX"]}, {"security": "starttls"}, lambda _: None, "starttls-stripped"),
    "not smtp": ({}, {}, lambda s: s.script("greeting", Garbage(b"SSH-2.0-OpenSSH_9.2\r\n")), "not-smtp"),
    "no greeting": ({}, {"timeouts": HASTY}, lambda s: s.script("greeting", Hang()), "no-greeting"),
    "closed": ({}, {}, lambda s: s.script("greeting", Close()), "closed"),
    "reset": ({}, {}, lambda s: s.script("greeting", Reset()), "closed"),
    "refused at the greeting": ({}, {}, lambda s: s.script("greeting", Say(b"554 5.7.1 No service for you")), "address-refused"),
    "busy": ({}, {}, lambda s: s.script("greeting", Say(b"421 Try later")), "busy"),
    "throttled": ({}, {}, lambda s: s.script("greeting", Say(b"421 4.7.0 Too many connections")), "throttled"),
    "wrong password": ({"users": {USER: "other"}}, LOGIN, lambda _: None, "wrong-password"),
    "app password": (
        {"users": {USER: SECRET}}, LOGIN,
        lambda s: s.script("auth", Say(b"534 5.7.9 Application-specific password required. Learn more at example.com")), "app-password",
    ),
    "app password, in words that are in the password": (
        {"users": {USER: SECRET}}, {**LOGIN, "password": "Password123!"},
        lambda s: s.script("auth", Say(b"535 5.7.8 Error: application-specific password required")), "app-password",
    ),
    "smtp auth is off": (
        {"users": {USER: SECRET}}, LOGIN,
        lambda s: s.script("auth", Say(b"535 5.7.139 Authentication unsuccessful, SmtpClientAuthentication is disabled for the Tenant")),
        "auth-disabled",
    ),
    "auth deferred": ({"users": {USER: SECRET}}, LOGIN, lambda s: s.script("auth", Say(b"451 4.3.0 Broken")), "login-failed"),
    "auth hangs": ({"users": {USER: SECRET}}, {**LOGIN, "timeouts": HASTY}, lambda s: s.script("auth", Hang()), "login-failed"),
    "no login offered": ({}, LOGIN, lambda _: None, "login-needs-tls"),
    "another mechanism": ({"users": {USER: SECRET}, "mechanisms": ["GSSAPI"]}, LOGIN, lambda _: None, "mechanism"),
    "login needed": ({"users": {USER: SECRET}}, {}, lambda _: None, "login-needed"),
    "tls needed": ({}, {}, lambda s: s.script("mail", Say(b"530 5.7.0 Must issue a STARTTLS command first")), "tls-needed"),
    "sender": ({}, {}, lambda s: s.script("mail", Say(b"553 5.7.1 Sender address rejected: not owned by user")), "sender"),
    "sender after data": ({}, {}, lambda s: s.script("final", Say(b"554 5.7.60 SendAsDenied")), "sender"),
    "quota": ({}, {}, lambda s: s.script("mail", Say(b"550 5.4.5 Daily sending quota exceeded")), "quota"),
    "relaying": ({}, {}, lambda s: s.script("rcpt", Say(b"554 5.7.1 <you@example.org>: Relay access denied")), "relaying"),
    "recipient": ({}, {}, lambda s: s.script("rcpt", Say(b"550 5.1.1 No such user")), "recipient"),
    "greylisted": ({}, {}, lambda s: s.script("rcpt", Say(b"451 4.7.1 Greylisted")), "recipient"),
    "content": ({}, {}, lambda s: s.script("final", Say(b"550 5.6.0 I do not like it")), "message"),
    "in doubt": ({}, {}, lambda s: s.script("final", Close()), "in-doubt"),
}  # fmt: skip


@pytest.mark.parametrize(("server", "keys", "script", "cause"), CASES.values(), ids=CASES.keys())
async def test_what_is_wrong_is_told(
    server: dict[str, Any], keys: dict[str, Any], script: Callable[[ScriptedUpstream], object], cause: str
) -> None:
    async with ScriptedUpstream(**server) as upstream:
        script(upstream)
        assert await cause_of(settings(upstream, **keys), message=outgoing()) == cause


@pytest.mark.parametrize(
    ("names", "expired", "trusted", "cause"),
    [
        ((), True, True, "certificate-expired"),
        (("mail.other.example",), False, True, "certificate-name"),
        ((), False, False, "certificate-unknown-ca"),
    ],
)
@pytest.mark.parametrize("security", ["starttls", "tls"])
async def test_a_certificate_that_is_no_good(
    tls: Authority, names: tuple[str, ...], expired: bool, trusted: bool, cause: str, security: Any
) -> None:
    async with ScriptedUpstream(security=security, tls=tls.context(*names, expired=expired)) as server:
        ca_file = tls.ca_file if trusted else tls.stranger().ca_file
        assert await cause_of(secured(server, tls, security, ca_file=str(ca_file))) == cause


async def test_tls_from_the_beginning_spoken_to_a_port_with_starttls(tls: Authority) -> None:
    async with ScriptedUpstream(security="starttls", tls=tls.server) as server:
        report = await examined(secured(server, tls, "tls"))
        assert report.trouble is not None
        assert report.trouble.diagnosis.cause == "plain-port" and "`security: starttls`" in report.trouble.diagnosis.fix


@pytest.mark.parametrize("security", ["starttls", "none"])
async def test_plain_smtp_spoken_to_a_port_with_tls_is_found_out_before_the_time_is_up(tls: Authority, security: str) -> None:
    async with ScriptedUpstream(security="tls", tls=tls.server) as server:
        upstream = secured(server, tls, security, timeouts={"connect": "60s"})
        async with asyncio.timeout(30):
            assert await cause_of(upstream) == "tls-port"


# -- access tokens --------------------------------------------------------------------------------------------------------------


@pytest.fixture
async def token_server(tls: Authority, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[TokenServer]:
    monkeypatch.setenv("SSL_CERT_FILE", str(tls.ca_file))
    async with TokenServer(tls.server, rotates=True) as server:
        yield server


async def with_token(server: ScriptedUpstream, tokens: TokenServer, directory: Path) -> Findings:
    upstream = settings(server, username=USER, oauth2=tokens.settings())
    report = await examined(upstream, store=TokenStore(directory, keys_at(None, {}), note=lambda _: None))
    assert "unseen" not in repr(report), "tokens are secrets, too"
    return report


async def test_the_login_is_with_an_access_token_where_the_upstream_has_oauth2(token_server: TokenServer, tmp_path: Path) -> None:
    async with ScriptedUpstream(tokens=token_server.valid) as server:
        for _ in range(2):  # the rotated refresh token was kept
            assert (await with_token(server, token_server, tmp_path)).ok
        assert [login.accepted for login in server.logins] == [True, True]


@pytest.mark.parametrize(
    ("script", "cause"),
    [(refused("invalid_grant", "revoked"), "token"), (Answer(503, b"later"), "token-server"), (CloseToken(), "token-server")],
)
async def test_a_token_that_cannot_be_had_is_told_and_the_hosts_are_looked_at_all_the_same(
    token_server: TokenServer, tmp_path: Path, script: Any, cause: str
) -> None:
    token_server.script(script)
    async with ScriptedUpstream(tokens=token_server.valid) as server:
        report = await with_token(server, token_server, tmp_path)
        assert report.trouble is not None and report.trouble.diagnosis.cause == cause
        assert len(server.connections) == 1 and not server.logins


async def test_a_token_that_the_upstream_does_not_take_is_told(token_server: TokenServer, tmp_path: Path) -> None:
    async with ScriptedUpstream(tokens={"none of these"}) as server:
        report = await with_token(server, token_server, tmp_path)
        assert report.trouble is not None and report.trouble.diagnosis.cause == "token"
        assert "relay oauth login acme" in report.trouble.diagnosis.fix


# -- the command --------------------------------------------------------------------------------------------------------------


def written(
    directory: Path, server: ScriptedUpstream, authority: Authority, *, password: str = SECRET, verified_only: bool = False
) -> Path:
    """A configuration whose upstream `acme` is the server."""
    file = directory / "config.yaml"
    route = "{sender: acme.example, upstream: acme, fallback: spare, verified_only: true}" if verified_only else "{upstream: acme}"
    file.write_text(
        f"hostname: relay.example.net\nspool: {{directory: {directory / 'spool'}}}\nupstreams:\n"
        f"  acme: {{host: localhost, port: {server.port}, ca_file: {authority.ca_file}, username: {USER}, password: {password}, "
        f"senders: acme.example}}\n  spare: {{host: localhost, port: 1, security: none}}\nroutes: [{route}]\n"
    )
    file.chmod(0o600)
    (directory / "spool").mkdir(exist_ok=True)
    return file


async def run(config: Path, *arguments: str) -> int:
    return await asyncio.to_thread(main, ["test", *arguments, "-c", str(config)])


def comparable(text: str, server: ScriptedUpstream) -> str:
    """Without what differs each time."""
    text = re.sub(r"[ \d]{6}\d ms", "   TIME ms", text.replace(str(server.port), "PORT"))
    text = re.sub(r"\d{4}-\d\d-\d\d", "DATE", text)
    return re.sub(r"TLSv1\.\d \S+;", "TLSv1.x CIPHER;", text)


async def test_the_command_prints_a_table_and_its_end(
    tls: Authority, tmp_path: Path, capsys: pytest.CaptureFixture[str], golden: Callable[[str, str], None]
) -> None:
    async with ScriptedUpstream(users={USER: SECRET}, security="starttls", tls=tls.server) as server:
        assert await run(written(tmp_path, server, tls), "acme", "--to", "you@example.org") == 0
        succeeded = capsys.readouterr()
        assert await run(written(tmp_path, server, tls, password="wrong"), "acme") == 1
        failed = capsys.readouterr()
    assert not succeeded.err and not failed.err
    assert server.accepted[0].sender == USER
    golden("test/succeeds.txt", comparable(succeeded.out, server))
    golden("test/fails.txt", comparable(failed.out, server))


@pytest.mark.parametrize("said", ["\x1b]0;mine\x07", "\x9b2J", "\u202e", 5000 * "z"], ids=["escape", "control", "backwards", "long"])
async def test_a_server_does_not_write_to_the_terminal_as_it_likes(
    tls: Authority, tmp_path: Path, capsys: pytest.CaptureFixture[str], said: str
) -> None:
    async with ScriptedUpstream(users={USER: SECRET}, security="starttls", tls=tls.server, offers=(f"X{said} {said}",)) as server:
        server.script("greeting", b"220 " + said.encode())
        server.script("auth", b"535 " + said.encode())
        assert await run(written(tmp_path, server, tls), "acme") == 1
        server.script("greeting", said.encode())
        assert await run(written(tmp_path, server, tls), "acme", "--json") == 1
    printed = capsys.readouterr().out
    assert printed.replace("\n", "").isprintable()
    assert max(map(len, printed.partition("{")[0].splitlines())) < 2500


async def test_a_script_gets_json(tls: Authority, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    async with ScriptedUpstream(users={USER: "other"}, security="starttls", tls=tls.server) as server:
        assert await run(written(tmp_path, server, tls), "acme", "--json") == 1
    answer = json.loads(capsys.readouterr().out)
    assert answer["ok"] is False and answer["verified"] is False
    assert answer["trouble"]["cause"] == "wrong-password" and answer["trouble"]["phase"] == "auth"
    assert [step["step"] for step in answer["trials"][0]["steps"]] == ["resolve", "connect", "greeting", "ehlo", "starttls"]
    assert SECRET not in json.dumps(answer)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["akme"], "did you mean 'acme'?"),
        (["acme", "--from", "a@acme.example"], "--from needs --to"),
        (["acme", "--to", "nobody nowhere"], "not an address"),
        (["acme", "--to", "you@example.org", "--from", "a@globex.example"], "not one of its senders"),
    ],
)
async def test_what_cannot_be_tested_is_a_usage_error_and_nobody_is_connected_to(
    tls: Authority, tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], words: str
) -> None:
    async with ScriptedUpstream(users={USER: SECRET}, security="starttls", tls=tls.server) as server:
        assert await run(written(tmp_path, server, tls), *arguments) == 64
        assert not server.connections
    assert words in capsys.readouterr().err


async def test_success_that_a_route_needs_and_that_cannot_be_recorded_is_try_again(
    tls: Authority, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    async with ScriptedUpstream(users={USER: SECRET}, security="starttls", tls=tls.server) as server:
        config = written(tmp_path, server, tls, verified_only=True)
        (tmp_path / "spool" / "verified").write_text("a file where the directory should be")
        assert await run(config, "acme") == 75
    assert "not recorded" in capsys.readouterr().err
