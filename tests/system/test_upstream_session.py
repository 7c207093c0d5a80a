"""Opening a session to a real upstream: TLS verified and never downgraded, one login, and each failure known by its phase."""

import asyncio
import gc
import logging
import socket
import ssl
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, Literal

import pytest

from relay.config.secrets import Secret
from relay.config.upstreams import Upstream
from relay.mail.outcome import Outcome, Phase, Status
from relay.upstream import dial as dial_module
from tests.support.certificates import Authority
from tests.support.eventually import eventually
from tests.support.upstream import Close, Drip, Garbage, Half, Hang, Reset, Say, ScriptedUpstream, unused_port
from tests.support.upstream import Phase as ScriptPhase
from tests.system.upstreams import PATIENT, RECIPIENT, all_sent, outgoing, pool_to, raw_server, secured, settings, words

pytestmark = pytest.mark.both_loops

LOGIN = {"username": "acme", "password": "secret-of-acme"}
USERS = {"acme": "secret-of-acme"}
QUICK = {"connect": "600ms", "command": "600ms", "data": "600ms", "final": "600ms"}
Security = Literal["none", "starttls", "tls"]


async def try_once(server: ScriptedUpstream, upstream: Any) -> Outcome:
    """The outcome of one message to one recipient."""
    async with pool_to(acme=upstream) as pool:
        (outcome,) = await pool.send("acme", outgoing())
    return outcome


async def try_each(upstream: Upstream, *, times: int) -> list[Outcome]:
    """The outcomes of so many messages, each with a pool of its own."""
    outcomes = []
    for _ in range(times):
        async with pool_to(acme=upstream) as pool:
            outcomes += await pool.send("acme", outgoing())
    return outcomes


# -- TLS -------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("security", ["starttls", "tls"])
async def test_mail_goes_under_verified_tls_with_a_login(tls: Authority, security: Security) -> None:
    async with ScriptedUpstream(users=USERS, security=security, tls=tls.server) as server:
        outcome = await try_once(server, secured(server, tls, security, ehlo="acme.example", **LOGIN))
        assert outcome.status is Status.SENT
        (transaction,) = server.accepted
        assert (transaction.tls, transaction.user, transaction.helo) == (True, "acme", "acme.example")
        (connection,) = server.connections
        assert connection.tls_version in ("TLSv1.2", "TLSv1.3")
        (login,) = server.logins
        assert (login.tls, login.mechanism, login.accepted) == (True, "PLAIN", True)


async def test_without_tls_the_relay_calls_itself_by_its_hostname() -> None:
    async with ScriptedUpstream() as server:
        assert (await try_once(server, settings(server))).status is Status.SENT
        assert server.connections[0].helo == "relay.example.net"
        assert server.connections[0].verbs == ["EHLO", "MAIL", "RCPT", "DATA", "QUIT"]


@pytest.mark.parametrize("security", ["starttls", "tls"])
@pytest.mark.parametrize("fault", ["unknown CA", "wrong name", "expired"])
async def test_a_certificate_that_does_not_verify_gets_nothing(tls: Authority, security: Security, fault: str) -> None:
    context = {
        "unknown CA": lambda: tls.stranger().server,
        "wrong name": lambda: tls.context("elsewhere.example"),
        "expired": lambda: tls.context(expired=True),
    }[fault]()
    async with ScriptedUpstream(users=USERS, security=security, tls=context) as server:
        outcome = await try_once(server, secured(server, tls, security, **LOGIN))
        assert words([outcome]) == ["deferred upstream tls fallback"]
        assert str(server.port) in outcome.reply.text
        assert {"unknown CA": "issuer", "wrong name": "mismatch", "expired": "expired"}[fault] in outcome.reply.text
        assert (server.logins, server.transactions) == ([], [])
        assert outcome.reply.code == 0


@pytest.mark.parametrize("security", ["starttls", "tls"])
async def test_verification_can_be_switched_off(tls: Authority, security: Security) -> None:
    async with ScriptedUpstream(security=security, tls=tls.stranger().context("elsewhere.example", expired=True)) as server:
        assert (await try_once(server, settings(server, security=security, verify=False))).status is Status.SENT


async def test_an_upstream_that_speaks_only_old_tls_is_refused(tls: Authority) -> None:
    context = tls.context()
    context.minimum_version, context.maximum_version = ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_2
    async with ScriptedUpstream(security="tls", tls=context) as server:
        assert (await try_once(server, secured(server, tls, "tls"))).status is Status.SENT
        assert server.connections[0].tls_version == "TLSv1.2"


async def test_an_upstream_that_speaks_no_tls_where_it_should_is_a_failure_of_tls(tls: Authority) -> None:
    async with ScriptedUpstream() as server:
        outcome = await try_once(server, secured(server, tls, "tls"))
        assert words([outcome]) == ["deferred upstream tls fallback"]
        assert "WRONG_VERSION_NUMBER" in outcome.reply.text
        assert server.transactions == []


async def test_a_ca_file_that_has_gone_is_a_failure_of_tls(tls: Authority) -> None:
    async with ScriptedUpstream(security="tls", tls=tls.server) as server:
        upstream = settings(server, security="tls").model_copy(update={"ca_file": tls.ca_file.with_name("gone.pem")})
        outcome = await try_once(server, upstream)
        assert words([outcome]) == ["deferred upstream tls fallback"]
        assert "gone.pem" in outcome.reply.text
        assert server.connections == []


@pytest.mark.parametrize(
    ("action", "expected"),
    [
        (Say(b"454 4.7.0 TLS not available"), "deferred upstream starttls fallback"),
        (Say(b"502 5.5.1 No"), "deferred upstream starttls fallback"),
        (Say(b"250 2.0.0 Ok, whatever"), "deferred upstream starttls fallback"),
        (Say(b"421 4.3.2 Closing"), "deferred upstream starttls fallback"),
        (Close(), "deferred upstream starttls fallback"),
        (Garbage(), "deferred upstream starttls fallback"),
    ],
)
async def test_a_refused_starttls_sends_nothing_in_clear(tls: Authority, action: Any, expected: str) -> None:
    async with ScriptedUpstream(users=USERS, security="starttls", tls=tls.server) as server:
        server.script("starttls", action)
        assert words([await try_once(server, secured(server, tls, **LOGIN))]) == [expected]
        assert (server.logins, server.transactions) == ([], [])
        assert server.connections[0].verbs == ["EHLO", "STARTTLS"]


async def test_a_missing_starttls_sends_nothing_in_clear(tls: Authority) -> None:
    async with ScriptedUpstream(users=USERS) as server:
        outcome = await try_once(server, secured(server, tls, **LOGIN))
        assert words([outcome]) == ["deferred upstream starttls fallback"]
        assert "does not offer STARTTLS" in outcome.reply.text
        assert (server.logins, server.transactions) == ([], [])
        assert server.connections[0].verbs == ["EHLO"]


@pytest.mark.parametrize("action", [Close(), Reset(), Hang(), Garbage(), Say(b"220 still in clear")], ids=str)
async def test_a_handshake_that_breaks_off_is_the_upstreams_fault(tls: Authority, action: Any) -> None:
    async with ScriptedUpstream(users=USERS, security="starttls", tls=tls.server) as server:
        server.script("tls", action)
        outcome = await try_once(server, secured(server, tls, **LOGIN, timeouts=QUICK))
        # An end that comes together with the reply to STARTTLS is met before the handshake begins.
        assert words([outcome])[0] in ("deferred upstream tls fallback", "deferred upstream starttls fallback")
        assert (server.logins, server.transactions) == ([], [])


async def test_replies_slipped_in_before_the_handshake_do_not_count(tls: Authority) -> None:
    injected = b"220 2.0.0 Ready\r\n250-evil.test\r\n250 AUTH PLAIN\r\n"
    async with ScriptedUpstream(users=USERS, security="starttls", tls=tls.server) as server:
        server.script("starttls", injected)
        outcome = await try_once(server, secured(server, tls, **LOGIN))
        assert outcome.status is not Status.SENT or server.logins[0].tls
        assert all(login.tls for login in server.logins)


@pytest.mark.parametrize(
    ("security", "keys", "verbs"),
    [
        ("none", {}, ["EHLO"]),
        ("none", LOGIN, ["EHLO", "AUTH"]),
        ("tls", LOGIN, ["EHLO", "AUTH"]),
        ("tls", LOGIN | {"auth": "login"}, ["EHLO", "AUTH"]),
        ("starttls", {}, ["EHLO", "STARTTLS", "EHLO"]),
        ("starttls", LOGIN, ["EHLO", "STARTTLS", "EHLO", "AUTH"]),
    ],
)
async def test_a_session_opens_with_no_more_round_trips_than_the_protocol_needs(
    tls: Authority, security: Security, keys: dict[str, str], verbs: list[str]
) -> None:
    users = USERS if keys else {}
    async with ScriptedUpstream(users=users, security=security, tls=None if security == "none" else tls.server) as server:
        upstream = settings(server, **keys) if security == "none" else secured(server, tls, security, **keys)
        assert (await try_once(server, upstream)).status is Status.SENT
        assert server.connections[0].verbs == [*verbs, "MAIL", "RCPT", "DATA", "QUIT"]


# -- AUTH ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("auth", "offered", "used"),
    [
        ("auto", ("PLAIN", "LOGIN", "CRAM-MD5"), "PLAIN"),
        ("auto", ("CRAM-MD5", "LOGIN"), "LOGIN"),
        ("auto", ("XOAUTH2", "CRAM-MD5"), "CRAM-MD5"),
        ("plain", ("PLAIN", "LOGIN"), "PLAIN"),
        ("login", ("PLAIN", "LOGIN"), "LOGIN"),
        ("cram-md5", ("PLAIN", "CRAM-MD5"), "CRAM-MD5"),
    ],
)
@pytest.mark.parametrize("password", ["secret-of-acme", "pässwörd mit ☃"])
async def test_one_mechanism_is_chosen_and_used(auth: str, offered: tuple[str, ...], used: str, password: str) -> None:
    async with ScriptedUpstream(users={"acme": password}, mechanisms=offered) as server:
        outcome = await try_once(server, settings(server, auth=auth, username="acme", password=password))
        assert outcome.status is Status.SENT
        assert [(login.mechanism, login.accepted) for login in server.logins] == [(used, True)]


@pytest.mark.parametrize("auth", ["auto", "plain", "login", "cram-md5"])
async def test_a_refused_password_is_tried_once_and_with_one_mechanism(auth: str) -> None:
    async with ScriptedUpstream(users=USERS) as server:
        outcome = await try_once(server, settings(server, auth=auth, username="acme", password="wrong"))
        assert words([outcome]) == ["deferred credential auth fallback"]
        assert outcome.reply.code == 535
        assert len(server.logins) == 1
        assert server.transactions == []
        assert server.connections[0].verbs.count("AUTH") == 1


@pytest.mark.parametrize(
    ("reply", "expected"),
    [
        (b"454 4.7.0 Temporary authentication failure", "deferred upstream auth throttled"),
        (b"454 try later", "deferred upstream auth throttled"),
        (b"432 4.7.12 A password transition is needed", "deferred upstream auth fallback"),
        (b"534 5.7.9 Mechanism too weak", "deferred credential auth fallback"),
        (b"538 5.7.11 Encryption required", "deferred credential auth fallback"),
        (b"530 5.7.0 Must issue a STARTTLS command first", "deferred credential auth fallback"),
        (b"500 5.5.6 Line too long", "deferred credential auth fallback"),
        (b"421 4.3.2 Closing", "deferred upstream auth fallback"),
        (b"421 4.7.0 Too many logins", "deferred upstream auth throttled"),
        (b"250 2.0.0 Ok", "deferred upstream auth fallback"),
        (b"999 what", "deferred upstream auth fallback"),
    ],
)
async def test_a_reply_to_the_login_means_what_the_table_says(reply: bytes, expected: str) -> None:
    async with ScriptedUpstream(users=USERS) as server:
        server.script("auth", reply)
        assert words([await try_once(server, settings(server, **LOGIN))]) == [expected]
        assert len(server.logins) == 1
        assert server.transactions == []


@pytest.mark.parametrize(("auth", "mechanisms"), [("auto", ("XOAUTH2", "GSSAPI")), ("cram-md5", ("PLAIN", "LOGIN")), ("plain", ())])
async def test_without_a_usable_mechanism_no_login_is_tried(auth: str, mechanisms: tuple[str, ...]) -> None:
    async with ScriptedUpstream(users=USERS if mechanisms else None, mechanisms=mechanisms or ("PLAIN",)) as server:
        outcome = await try_once(server, settings(server, auth=auth, **LOGIN))
        assert words([outcome]) == ["deferred credential auth fallback"]
        assert "offered" in outcome.reply.text
        assert server.logins == []
        assert server.transactions == []


async def test_auth_none_logs_in_nowhere() -> None:
    async with ScriptedUpstream(users=USERS, auth_required=False) as server:
        assert (await try_once(server, settings(server, auth="none", **LOGIN))).status is Status.SENT
        assert server.logins == []


@pytest.mark.parametrize("action", [Close(), Reset(), Half(b"535 5.7.8 no"), Garbage(), Hang()], ids=str)
async def test_a_login_that_gets_no_answer_is_no_refusal(action: Any) -> None:
    async with ScriptedUpstream(users=USERS) as server:
        server.script("auth", action)
        assert words([await try_once(server, settings(server, **LOGIN, timeouts=QUICK))]) == ["deferred upstream auth fallback"]
        assert len(server.logins) == 1


async def test_a_challenge_that_is_none_is_answered_with_nothing() -> None:
    """CRAM-MD5 needs base64 to answer; what is none must not reach the caller as an exception."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"220 odd.test\r\n")
        await reader.readline()
        writer.write(b"250-odd.test\r\n250 AUTH CRAM-MD5\r\n")
        await reader.readline()
        writer.write("334 ä!\r\n".encode())
        await reader.read()
        writer.close()

    async with raw_server(serve) as upstream:
        (outcome,) = await try_each(upstream.model_copy(update={"username": "acme", "password": Secret("secret-of-acme")}), times=1)
    assert outcome.phase is Phase.AUTH
    assert outcome.status is Status.DEFERRED


@pytest.mark.parametrize(
    "echo",
    [
        b"535 5.7.8 no such login: AGFjbWUAc2VjcmV0LW9mLWFjbWU=",
        b"535 5.7.8 wrong password: secret-of-acme",
        b"535 5.7.8 wrong password: c2VjcmV0LW9mLWFjbWU=",
        b"AUTH PLAIN AGFjbWUAc2VjcmV0LW9mLWFjbWU=",
        b"501 5.5.2 bad argument: AGFjbWUAc2VjcmV0LW9m",
        b"535 5.7.8 wrong password: secret-of-",
        b"535-5.7.8 wrong line: agfjbwuac2vjcmv0\r\n535 5.7.8 LW9mLWFjbWU=",
    ],
)
async def test_an_upstream_that_repeats_the_secret_does_not_bring_it_into_the_log(echo: bytes, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    async with ScriptedUpstream(users=USERS) as server:
        server.script("auth", echo)
        outcome = await try_once(server, settings(server, **LOGIN))
        assert "(secret)" in outcome.reply.text
        for told in ("secret-of", "AGFjbWUA", "agfjbwua", "c2VjcmV0", "LW9mLWFj"):
            assert told not in str(outcome)
            assert told not in caplog.text


# -- HELO only -------------------------------------------------------------------------------------------------------------


async def test_an_upstream_that_knows_only_helo_takes_plain_mail_in_lock_step() -> None:
    async with ScriptedUpstream(helo_only=True) as server:
        assert (await try_once(server, settings(server))).status is Status.SENT
        assert server.connections[0].verbs == ["EHLO", "HELO", "MAIL", "RCPT", "DATA", "QUIT"]
        assert server.accepted[0].parameters == ()
        assert server.connections[0].pipelined == []


async def test_helo_is_no_way_around_a_login(tls: Authority) -> None:
    async with ScriptedUpstream(helo_only=True) as server:
        assert words([await try_once(server, settings(server, **LOGIN))]) == ["deferred upstream ehlo fallback"]
        assert words([await try_once(server, secured(server, tls))]) == ["deferred upstream ehlo fallback"]
        assert server.transactions == []
        assert [connection.verbs for connection in server.connections] == [["EHLO"], ["EHLO"]]


# -- opening breaks off ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("script_phase", "action", "phase"),
    [
        ("connect", Close(), Phase.GREETING),
        ("connect", Reset(), Phase.GREETING),
        ("greeting", Hang(), Phase.GREETING),
        ("greeting", Close(), Phase.GREETING),
        ("greeting", Garbage(), Phase.GREETING),
        ("greeting", Half(b"220 half a greeting"), Phase.GREETING),
        ("greeting", Say(b"554 5.7.1 Not you"), Phase.GREETING),
        ("greeting", Say(b"421 4.3.2 Too busy"), Phase.GREETING),
        ("greeting", Say(b"250 2.0.0 An odd greeting"), Phase.GREETING),
        ("ehlo", Hang(), Phase.EHLO),
        ("ehlo", Close(), Phase.EHLO),
        ("ehlo", Reset(), Phase.EHLO),
        ("ehlo", Garbage(), Phase.EHLO),
        ("ehlo", Half(b"250 half"), Phase.EHLO),
        ("ehlo", Say(b"550 5.7.1 Not that name"), Phase.EHLO),
        ("ehlo", Say(b"421 4.3.2 Too busy"), Phase.EHLO),
    ],
    ids=str,
)
async def test_a_session_that_cannot_be_opened_is_the_upstreams_fault(script_phase: ScriptPhase, action: Any, phase: Phase) -> None:
    async with ScriptedUpstream() as server:
        server.script(script_phase, action)
        async with pool_to(acme=settings(server, timeouts=QUICK)) as pool:
            outcomes = await pool.send("acme", outgoing(RECIPIENT, "b@example.org"))
        assert words(outcomes) == [f"deferred upstream {phase.value} fallback"] * 2
        assert outcomes[0].reply.text
        assert server.transactions == []


@pytest.mark.parametrize("offer", ["SIZE " + 5000 * "9", "LIMITS RCPTMAX=" + 5000 * "9", "SIZE many"], ids=lambda offer: offer[:20])
async def test_a_number_that_is_none_is_no_limit(offer: str) -> None:
    async with ScriptedUpstream(offers=(offer,)) as server:
        assert (await try_once(server, settings(server))).status is Status.SENT


async def test_a_greeting_that_drips_in_many_lines_is_a_greeting() -> None:
    async with ScriptedUpstream() as server:
        server.script("greeting", Drip(b"220-welcome\r\n220-to the\r\n220 upstream\r\n"))
        server.script("ehlo", Drip())
        assert (await try_once(server, settings(server))).status is Status.SENT


@pytest.mark.parametrize("reply", [b"421 4.7.0 Too many connections from you", b"421 4.7.28 rate limited"])
async def test_a_greeting_that_asks_to_slow_down_is_throttling(reply: bytes) -> None:
    async with ScriptedUpstream() as server:
        server.script("greeting", reply)
        assert words([await try_once(server, settings(server))]) == ["deferred upstream greeting throttled"]


async def test_an_upstream_that_leaves_right_after_its_last_reply_is_no_fault_of_ours() -> None:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"220 hasty.test\r\n")
        await reader.readline()
        writer.write(b"250 hasty.test\r\n")
        writer.close()

    async with raw_server(serve) as upstream:
        for outcome in await try_each(upstream, times=5):
            assert (outcome.status, outcome.fallback, outcome.in_doubt) == (Status.DEFERRED, True, False)


# -- hosts -----------------------------------------------------------------------------------------------------------------


async def test_nobody_listening_is_told_by_host_and_port() -> None:
    async with ScriptedUpstream() as server:
        port = unused_port()
        outcome = await try_once(server, settings(server, port=port))
        assert words([outcome]) == ["deferred upstream connect fallback"]
        assert f"127.0.0.1:{port}" in outcome.reply.text


async def test_a_name_that_does_not_resolve_is_told_by_name() -> None:
    async with ScriptedUpstream() as server:
        outcome = await try_once(server, settings(server, host="no-such-host.invalid"))
        assert words([outcome]) == ["deferred upstream resolve fallback"]
        assert "no-such-host.invalid" in outcome.reply.text


async def test_a_name_that_cannot_be_a_host_is_told_by_name() -> None:
    async with ScriptedUpstream() as server:
        upstream = settings(server).model_copy(update={"host": ("x" * 70 + ".example",)})
        (outcome,) = await try_each(upstream, times=1)
        assert words([outcome]) == ["deferred upstream resolve fallback"]
        assert "x" * 70 in outcome.reply.text


async def test_hosts_are_tried_in_their_order_and_a_failure_names_its_own_host() -> None:
    async with ScriptedUpstream() as server:
        upstream = settings(server, host=["127.0.0.2", "127.0.0.1"])
        assert (await try_once(server, upstream)).status is Status.SENT
        server.script("ehlo", b"550 5.7.1 no")
        assert words([await try_once(server, upstream)]) == ["deferred upstream ehlo fallback"]
        server.heal()
        server.script("ehlo", Garbage())
        outcome = await try_once(server, upstream)
        assert "127.0.0.1" in outcome.reply.text
        assert "127.0.0.2" not in outcome.reply.text
        assert len(server.connections) == 3


@pytest.mark.parametrize(
    ("script_phase", "reply", "connections"),
    [
        ("greeting", b"421 4.3.2 down", 2),
        ("auth", b"535 5.7.8 no", 1),
        ("greeting", b"421 4.7.0 slow down", 1),
        ("auth", b"454 4.7.0 later", 1),
    ],
)
async def test_a_refused_login_and_throttling_are_not_repeated_at_the_next_host(
    script_phase: ScriptPhase, reply: bytes, connections: int
) -> None:
    async with ScriptedUpstream(users=USERS) as server:
        server.script(script_phase, reply)
        await try_once(server, settings(server, host=["127.0.0.1", "localhost"], **LOGIN))
        assert len(server.connections) == connections


@contextmanager
def black_hole(host: str, port: int) -> Iterator[None]:
    """An address that answers no SYN, as behind a firewall that drops them: a listening socket whose queue is full."""
    with ExitStack() as stack:
        listening = stack.enter_context(socket.socket())
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind((host, port))
        listening.listen(0)
        for _ in range(3):
            waiting = stack.enter_context(socket.socket())
            waiting.setblocking(False)
            waiting.connect_ex((host, port))
        yield


async def test_an_address_that_swallows_everything_costs_a_delay_and_not_the_mail(monkeypatch: pytest.MonkeyPatch) -> None:
    async with ScriptedUpstream() as server:
        found = [(socket.AF_INET, (host, server.port)) for host in ("127.0.0.3", "127.0.0.4", "127.0.0.1")]

        async def addresses(*_: object) -> list[Any]:
            return found

        monkeypatch.setattr(dial_module, "_addresses", addresses)
        with black_hole("127.0.0.3", server.port):
            upstream = settings(server, timeouts={**PATIENT, "connect": "300ms"})
            assert (await try_once(server, upstream)).status is Status.SENT
            del found[1:]
            outcome = await try_once(server, upstream)
            assert words([outcome]) == ["deferred upstream connect fallback"]
            assert outcome.reply.text == f"127.0.0.1:{server.port} did not answer within 0.3 s"
        found.clear()
        assert words([await try_once(server, upstream)]) == ["deferred upstream resolve fallback"]


async def test_a_resolver_that_hangs_is_given_up_in_time_and_holds_up_no_other_name(monkeypatch: pytest.MonkeyPatch) -> None:
    answering, real = threading.Event(), socket.getaddrinfo
    asked: list[str] = []

    def look_up(host: str, *rest: Any) -> Any:
        asked.append(host)
        if host.startswith("slow"):
            answering.wait(10)
            raise socket.gaierror(socket.EAI_AGAIN, "try again")
        return real(host, *rest)

    async def dialled(host: str, port: int = 25, *, seconds: float = 0.05) -> None:
        connection, _ = await dial_module.dial(host, port, source_address=None, timeout_seconds=seconds, names=names)
        connection.close()

    names = dial_module.Names()
    monkeypatch.setattr(socket, "getaddrinfo", look_up)
    try:
        async with ScriptedUpstream() as server:
            hanging = [f"slow{number % 50}.example" for number in range(100)]
            refusals = asyncio.gather(*map(dialled, hanging), return_exceptions=True)
            await dialled("localhost", server.port, seconds=10)
            for host, refusal in zip(hanging, await refusals, strict=True):
                assert str(refusal) == f"the name {host} could not be resolved within 0.05 s"
                assert isinstance(refusal, dial_module.NoConnection) and refusal.phase is Phase.RESOLVE
        assert sorted(asked) == sorted({*hanging, "localhost"}), "each once for all who ask"
        last = asyncio.ensure_future(dialled(hanging[0], seconds=10))
        await asyncio.sleep(0)
    finally:
        answering.set()
    with pytest.raises(dial_module.NoConnection, match="cannot be resolved: try again"):
        await last
    await eventually(lambda: not names._asked, "all answers")


@pytest.mark.parametrize("said", [b"", b"554 5.3.2 not on this machine", b"\xff\r\n"])
async def test_where_an_address_takes_connections_and_no_sessions_the_next_one_has_its_turn(
    monkeypatch: pytest.MonkeyPatch, said: bytes
) -> None:  # fmt: skip
    def look_up(host: str, port: int, *_: object) -> Any:
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, port)) for address in ("127.0.0.8", "127.0.0.1")]

    async def turn_away(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        came.append(1)
        writer.write(said)
        writer.close()

    came: list[int] = []
    async with ScriptedUpstream() as server:
        broken = await asyncio.start_server(turn_away, "127.0.0.8", server.port)
        monkeypatch.setattr(socket, "getaddrinfo", look_up)
        try:
            async with pool_to(acme=settings(server, host="smtp.acme.example", limits={"messages_per_connection": 1})) as pool:
                (outcome,) = await pool.send("acme", outgoing())
                assert (outcome.status, outcome.fallback) == (Status.DEFERRED, True)
                for _ in range(3):
                    assert all_sent(await pool.send("acme", outgoing()))
        finally:
            broken.close()
            await broken.wait_closed()
    assert (len(came), len(server.connections)) == (1, 3)


async def test_of_very_many_names_not_all_are_looked_up_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dial_module, "_LOOKUPS_LIMIT", 2)
    at_work: list[int] = []
    gate = threading.Semaphore(0)

    def look_up(*_: object) -> Any:
        at_work.append(1)
        gate.acquire(timeout=10)
        at_work.pop()
        return []

    monkeypatch.setattr(socket, "getaddrinfo", look_up)
    names = dial_module.Names()
    found = [asyncio.ensure_future(names.find(f"n{number}.example", 25, 0)) for number in range(5)]
    for left in range(5, 0, -1):
        await eventually(partial(lambda left: len(at_work) == min(2, left), left), "as many as may")
        gate.release()
        await asyncio.wait(found, return_when=asyncio.FIRST_COMPLETED)
        found = [each for each in found if not each.done()]
        assert len(found) == left - 1


async def test_without_a_thread_to_look_a_name_up_it_is_not_resolved(monkeypatch: pytest.MonkeyPatch) -> None:
    def start(_: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", start)
    with pytest.raises(dial_module.NoConnection, match="no thread is left"):
        await dial_module.dial("some.example", 25, source_address=None, timeout_seconds=1, names=dial_module.Names())


async def test_a_connection_attempt_that_is_cut_off_leaves_no_socket(monkeypatch: pytest.MonkeyPatch) -> None:
    async with ScriptedUpstream() as server:
        with black_hole("127.0.0.5", server.port):
            async with pool_to(acme=settings(server, host="127.0.0.5")) as pool:
                sending = asyncio.ensure_future(pool.send("acme", outgoing()))
                await asyncio.wait([sending], timeout=0.05)
                sending.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await sending


@pytest.mark.parametrize("security", ["none", "tls"])
async def test_small_segments_are_not_held_back(tls: Authority, security: Security) -> None:
    """Nagle's algorithm with delayed ACK costs 40 ms a message."""
    server = ScriptedUpstream(security=security, tls=tls.server if security == "tls" else None)
    async with server, pool_to(acme=settings(server) if security == "none" else secured(server, tls, security)) as pool:
        assert all_sent(await pool.send("acme", outgoing()))
        connection = pool._idle["acme"][0]._wire._transport.get_extra_info("socket")
        assert connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY) != 0


@pytest.mark.parametrize("source", ["192.0.2.77", "::1"])
async def test_a_source_address_that_is_not_ours_or_cannot_reach_the_host_is_told(source: str) -> None:
    async with ScriptedUpstream() as server:
        outcome = await try_once(server, settings(server, source_address=source))
        assert outcome.status is Status.DEFERRED
        assert outcome.fallback
        assert server.connections == []


async def test_a_source_address_is_used() -> None:
    peers: list[Any] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        peers.append(writer.get_extra_info("peername")[0])
        writer.close()

    async with raw_server(serve) as upstream:
        await try_each(upstream.model_copy(update={"source_address": "127.0.0.9"}), times=1)
    assert peers == ["127.0.0.9"]


async def test_every_recipient_shares_the_fate_of_a_session_that_could_not_be_opened() -> None:
    async with ScriptedUpstream() as server, pool_to(acme=settings(server, port=unused_port())) as pool:
        outcomes = await pool.send("acme", outgoing(*[f"r{n}@example.org" for n in range(5)]))
        assert len(outcomes) == 5
        assert len(set(outcomes)) == 1
        assert not all_sent(outcomes)


@pytest.mark.parametrize("security", ["starttls", "tls"])
async def test_what_tls_held_goes_with_the_session_and_not_with_the_next_collection(tls: Authority, security: Security) -> None:
    """A relay collects garbage seldom, and each session's TLS has some 80 kB."""
    server = ScriptedUpstream(security=security, tls=tls.server)
    async with server, pool_to(acme=secured(server, tls, security, limits={"messages_per_connection": 1})) as pool:
        gc.collect()
        gc.disable()
        try:
            for _ in range(5):
                assert all_sent(await pool.send("acme", outgoing()))
            await eventually(lambda: not pool._leaving, "the sessions to end")
            await eventually(lambda: server.open_connections == 0, "the connections to be closed")
            assert [each for each in gc.get_objects() if isinstance(each, ssl.SSLObject) and not each.server_side] == []
        finally:
            gc.enable()
