"""The way in: a wrong password costs one refused login however many wait, and a new one is found where the old one came from."""

import asyncio
import os
import sys
from base64 import b64encode
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from relay.clock import ManualClock
from relay.config.upstreams import Upstream
from relay.mail.outcome import Outcome, Status
from relay.upstream import watch
from relay.upstream.pool import Pool
from tests.support.eventually import eventually
from tests.support.upstream import Close, Hang, Hold, ScriptedUpstream
from tests.system.upstreams import all_sent, open_sessions, outgoing, raw_server, settings, words

pytestmark = pytest.mark.both_loops

REFUSED = ["deferred credential auth fallback"]
OLD, NEW = "old-and-unseen", "new-and-unseen"


class Ear:
    """Remembers what the pool tells. At the end no secret may have been among it."""

    def __init__(self) -> None:
        self.notes: list[tuple[str, str]] = []
        self.changed: list[str] = []

    def note(self, level: str, what: str) -> None:
        assert OLD not in what and NEW not in what
        self.notes.append((level, what))


@asynccontextmanager
async def pool_and_ear(**upstreams: Upstream) -> AsyncIterator[tuple[Pool, Ear]]:
    ear = Ear()
    pool = Pool(upstreams, hostname="relay.example.net", clock=ManualClock(), note=ear.note)
    pool.secret_changed = ear.changed.append
    try:
        yield pool, ear
    finally:
        await pool.close()


def with_login(server: ScriptedUpstream, password: Any, **keys: Any) -> Upstream:
    limits = {"connections": 50, **keys.pop("limits", {})}  # so that nobody waits for a connection, but for his turn to log in
    return settings(server, username="acme", password=password, limits=limits, **keys)


async def send_together(pool: Pool, count: int, name: str = "acme") -> list[Outcome]:
    results = await asyncio.gather(*(pool.send(name, outgoing(f"{number}@example.org")) for number in range(count)))
    return [outcome for outcomes in results for outcome in outcomes]


def serve(**users: str) -> ScriptedUpstream:
    return ScriptedUpstream(users=users)


def change_password(server: ScriptedUpstream, user: str, password: str) -> None:
    users = server._offer.users
    assert isinstance(users, dict)
    users[user] = password


# -- one at a time ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("auth", ["auto", "login", "cram-md5"])
async def test_fifty_that_start_together_with_a_wrong_password_make_one_login(auth: str) -> None:
    async with serve(acme=NEW) as server, pool_and_ear(acme=with_login(server, OLD, auth=auth)) as (pool, _):
        assert words(await send_together(pool, 50)) == REFUSED * 50
        assert len(server.logins) == 1
        assert len(server.connections) == 1


async def test_one_upstreams_wrong_password_is_nobody_elses_matter() -> None:
    async with serve(acme=NEW, globex=NEW) as server:
        globex = settings(server, username="globex", password=NEW)
        async with pool_and_ear(acme=with_login(server, OLD), globex=globex) as (pool, _):
            refused, sent = await asyncio.gather(send_together(pool, 10), send_together(pool, 10, "globex"))
            assert words(refused) == REFUSED * 10
            assert all_sent(sent)


async def test_until_a_login_has_succeeded_the_others_wait_and_then_all_go() -> None:
    async with serve(acme=OLD) as server, pool_and_ear(acme=with_login(server, OLD)) as (pool, _):
        greeted, together = asyncio.Event(), asyncio.Event()
        server.script("auth", Hold(greeted), times=1)
        server.script("final", Hold(together))
        sending = asyncio.ensure_future(send_together(pool, 20))
        await eventually(lambda: bool(server.logins) and len(server.connections) == 1, "the first login")
        assert not sending.done()
        greeted.set()
        await eventually(lambda: sum(t.complete for t in server.transactions) == 20, "all transactions at once")
        together.set()
        assert all_sent(await sending)
        assert (len(server.connections), len(server.logins)) == (20, 20)


async def test_a_later_attempt_tries_again_and_alone() -> None:
    async with serve(acme=NEW) as server, pool_and_ear(acme=with_login(server, OLD)) as (pool, _):
        assert words(await send_together(pool, 5)) == REFUSED * 5
        assert words(await send_together(pool, 5)) == REFUSED * 5
        assert len(server.logins) == 2
        change_password(server, "acme", OLD)
        assert all_sent(await send_together(pool, 5))


async def test_a_proven_secret_that_is_refused_is_unproven() -> None:
    async with serve(acme=OLD) as server, pool_and_ear(acme=with_login(server, OLD, limits={"messages_per_connection": 1})) as (pool, _):
        assert all_sent(await send_together(pool, 1))
        change_password(server, "acme", NEW)
        assert words(await pool.send("acme", outgoing())) == REFUSED
        assert words(await send_together(pool, 30)) == REFUSED * 30
        assert [login.accepted for login in server.logins] == [True, False, False]


async def test_those_who_wait_slow_down_together() -> None:
    async with serve(acme=OLD) as server, pool_and_ear(acme=with_login(server, OLD)) as (pool, _):
        server.script("auth", b"454 4.7.0 Too many login attempts")
        assert words(await send_together(pool, 20)) == ["deferred upstream auth throttled"] * 20
        assert len(server.logins) == 1


async def test_a_connection_that_fails_is_no_refusal_for_the_others() -> None:
    async with serve(acme=OLD) as server, pool_and_ear(acme=with_login(server, OLD)) as (pool, _):
        server.script("greeting", Close(), times=2)
        outcomes = words(await send_together(pool, 10))
        assert sorted(outcomes) == ["deferred upstream greeting fallback"] * 2 + ["sent message final"] * 8


async def test_who_has_waited_as_long_as_a_connection_may_take_waits_no_longer() -> None:
    """An upstream that hangs while its secret is unproven holds up to fifty slots for one time-out each, not for all of them in turn."""
    async with serve(acme=OLD) as server:
        server.script("greeting", Hang())
        timeouts = {"connect": "100ms", "command": "100ms", "data": "100ms", "final": "100ms"}
        async with pool_and_ear(acme=with_login(server, OLD, timeouts=timeouts)) as (pool, _):
            assert words(await send_together(pool, 50)) == ["deferred upstream greeting fallback"] * 50
            assert len(server.connections) <= 2


async def test_a_login_that_is_cut_off_lets_the_next_one_try() -> None:
    async with serve(acme=OLD) as server, pool_and_ear(acme=with_login(server, OLD)) as (pool, _):
        server.script("auth", Hang(), times=1)
        first = asyncio.ensure_future(pool.send("acme", outgoing()))
        await eventually(lambda: bool(server.logins), "the first login")
        second = asyncio.ensure_future(pool.send("acme", outgoing()))
        first.cancel()
        assert all_sent(await second)
        with pytest.raises(asyncio.CancelledError):
            await first


async def test_the_user_name_of_login_waits_until_it_is_asked_for() -> None:
    """Some take none at once: they ask for it all the same, and would write the password that they are told into their logs."""
    said: list[bytes] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"220 old.test\r\n")
        for answer in (b"250-old.test\r\n250 AUTH LOGIN", b"334 VXNlcm5hbWU6", b"334 UGFzc3dvcmQ6", b"235 Welcome", b"550 no"):
            said.append((await reader.readline()).strip())
            writer.write(answer + b"\r\n")
        await reader.read()

    async with raw_server(serve) as upstream:
        settings = upstream.model_dump(include={"host", "port", "security", "timeouts"}) | {"username": "acme", "password": OLD}
        async with pool_and_ear(acme=Upstream.model_validate(settings)) as (pool, _):
            assert words(await pool.send("acme", outgoing())) == ["failed message mail"]
    assert said[1:4] == [b"AUTH LOGIN", b64encode(b"acme"), b64encode(OLD.encode())]


# -- the secret is read again ----------------------------------------------------------------------------------------------


@pytest.fixture
def secret_file(tmp_path: Path) -> Path:
    path = tmp_path / "secret"
    path.write_text(OLD + "\n")
    return path


async def test_a_changed_secret_is_found_after_one_refusal_and_everybody_goes(secret_file: Path) -> None:
    async with serve(acme=NEW) as server, pool_and_ear(acme=with_login(server, {"file": str(secret_file)})) as (pool, ear):
        secret_file.write_text(NEW)
        assert all_sent(await send_together(pool, 50))
        assert [login.password for login in server.logins if not login.accepted] == [OLD]
        assert {login.password for login in server.logins if login.accepted} == {NEW}
        assert ear.changed == ["acme"]
        assert ear.notes == [("info", f"upstream acme: its secret has changed (file {secret_file})")]


@pytest.mark.parametrize("reply", [None, b"451 4.3.0 later"])
async def test_a_changed_secret_is_found_also_where_a_flight_is_in_doubt(secret_file: Path, reply: bytes | None) -> None:
    async with ScriptedUpstream(users={"acme": OLD}, offers=("CHUNKING",)) as server:
        upstream = with_login(server, {"file": str(secret_file)})
        async with pool_and_ear(acme=upstream) as (pool, _):
            assert all_sent(await pool.send("acme", outgoing()))
            change_password(server, "acme", NEW)
            secret_file.write_text(NEW)
            server.script("mail", Close(), times=1)  # the flight is on its way, and nobody knows how far it came
            if reply is not None:
                server.script("final", reply)
            outcomes = await pool.send("acme", outgoing())
            assert words(outcomes) == ["sent message final" if reply is None else "deferred message final in_doubt"]
            assert [login.password for login in server.logins] == [OLD, OLD, NEW]


async def test_a_changed_secret_that_is_wrong_too_costs_one_more_login(secret_file: Path) -> None:
    async with serve(acme="another") as server, pool_and_ear(acme=with_login(server, {"file": str(secret_file)})) as (pool, ear):
        secret_file.write_text(NEW)
        assert words(await send_together(pool, 50)) == REFUSED * 50
        assert [login.password for login in server.logins] == [OLD, NEW]
        assert ear.changed == ["acme"]


async def test_a_proven_secret_that_changes_costs_its_refused_logins_and_no_mail(secret_file: Path) -> None:
    async with serve(acme=OLD) as server:
        upstream = with_login(server, {"file": str(secret_file)})
        async with pool_and_ear(acme=upstream) as (pool, _):
            await open_sessions(pool, server, 3)
            hold = asyncio.Event()
            server.script("final", Hold(hold), times=1)
            under_way = asyncio.ensure_future(pool.send("acme", outgoing()))
            await eventually(lambda: any(t.complete and not t.reply for t in server.transactions), "one under way")
            change_password(server, "acme", NEW)
            secret_file.write_text(NEW)
            server.script("mail", Close(), times=2)  # the two that are idle have gone stale
            assert all_sent(await send_together(pool, 2))
            hold.set()
            assert all_sent(await under_way)
            assert {login.password for login in server.logins if login.accepted and login.connection > 3} == {NEW}
            opened_before = {login.connection for login in server.logins if login.password == OLD}
            await eventually(lambda: all(c.closed for c in server.connections if c.number in opened_before), "the old sessions to end")
            assert all_sent(await pool.send("acme", outgoing()))


async def test_a_command_is_asked_once_however_many_were_refused(tmp_path: Path) -> None:
    asked = tmp_path / "asked"
    command = [sys.executable, "-c", f"open({str(asked)!r}, 'a').write('x'); print({OLD!r})"]
    async with serve(acme=NEW) as server, pool_and_ear(acme=with_login(server, {"command": command})) as (pool, ear):
        assert asked.read_text() == "x"
        assert words(await send_together(pool, 20)) == REFUSED * 20
        assert asked.read_text() == "xx"
        assert (len(server.logins), ear.changed, ear.notes) == (1, [], [])


async def test_who_comes_while_the_secret_is_being_read_shares_what_is_found(tmp_path: Path) -> None:
    go, begun = tmp_path / "go", tmp_path / "begun"
    go.touch()
    script = (
        f"import os, time; open({str(begun)!r}, 'a').write('x')\nwhile not os.path.exists({str(go)!r}): time.sleep(0.005)\nprint({OLD!r})"
    )
    async with serve(acme=NEW) as server:
        upstream = with_login(server, {"command": [sys.executable, "-c", script]})
        go.unlink()
        async with pool_and_ear(acme=upstream) as (pool, _):
            first = asyncio.ensure_future(send_together(pool, 3))
            await eventually(lambda: begun.read_text() == "xx", "the command to run again")
            later = asyncio.ensure_future(send_together(pool, 10))
            turn, rides = pool._logins["acme"]._turn, pool._rides["acme"]
            await eventually(lambda: len(turn._waiters or ()) + len(rides._waiting) >= 10, "ten more to wait for their turn")
            go.touch()
            assert words(await first) == REFUSED * 3
            assert words(await later) == REFUSED * 10
            assert len(server.logins) == 1
            assert begun.read_text() == "xx"


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (None, "No such file or directory"),
        (b"", "is empty"),
        (b"\xff", "is not UTF-8 text"),
        (b"new-and-\nunseen", "must not contain control characters"),
        (b"new-and-unseen" * 50, "must have at most 255 bytes"),
    ],
)
async def test_a_secret_that_cannot_be_read_again_stays_and_is_told(secret_file: Path, content: bytes | None, reason: str) -> None:
    async with serve(acme=NEW) as server, pool_and_ear(acme=with_login(server, {"file": str(secret_file)})) as (pool, ear):
        secret_file.unlink()
        if content is not None:
            secret_file.write_bytes(content)
        assert words(await send_together(pool, 5)) == REFUSED * 5
        assert len(server.logins) == 1
        ((level, what),) = ear.notes
        assert level == "warning"
        assert what.startswith("upstream acme: its secret cannot be read again: ")
        assert reason in what
        change_password(server, "acme", OLD)
        assert all_sent(await send_together(pool, 5))


async def test_a_secret_whose_file_hangs_costs_its_own_upstream_a_while_and_nobody_else(
    secret_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watch, "_HANG_SECONDS", 0.1)
    async with serve(acme=NEW, globex=NEW) as server:
        upstream, globex = with_login(server, {"file": str(secret_file)}), settings(server, username="globex", password=NEW)
        secret_file.unlink()
        os.mkfifo(secret_file)
        writer = os.open(secret_file, os.O_RDWR)
        async with pool_and_ear(acme=upstream, globex=globex) as (pool, ear):
            assert words(await send_together(pool, 5)) == REFUSED * 5
            assert ear.notes == [("warning", "upstream acme: its secret cannot be read again: it takes longer than 0.1 s")]
            assert all_sent(await send_together(pool, 5, "globex"))
        os.close(writer)  # lets the thread end


async def test_a_secret_from_the_environment_cannot_have_changed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACME", OLD)
    async with serve(acme=NEW) as server, pool_and_ear(acme=with_login(server, {"env": "ACME"})) as (pool, ear):
        monkeypatch.setenv("ACME", NEW)
        assert words(await send_together(pool, 5)) == REFUSED * 5
        assert (len(server.logins), ear.notes) == (1, [])


# -- somebody finds another one --------------------------------------------------------------------------------------------------


async def test_a_secret_that_somebody_else_has_found_is_used_for_new_sessions_and_the_idle_ones_end(secret_file: Path) -> None:
    async with serve(acme=OLD) as server, pool_and_ear(acme=with_login(server, {"file": str(secret_file)})) as (pool, ear):
        await open_sessions(pool, server, 3)
        (use,) = pool.uses()
        assert use.name == "upstream acme: its secret"
        change_password(server, "acme", NEW)
        secret_file.write_text(NEW)
        old = use.current()
        assert use.take(old, old.read_again())
        await eventually(lambda: server.open_connections == 0, "the idle sessions to end")
        assert ear.changed == ["acme"]
        await open_sessions(pool, server, 2)
        assert [login.password for login in server.logins if login.accepted] == [OLD] * 3 + [NEW] * 2
        assert not [login for login in server.logins if not login.accepted]


async def test_what_was_read_before_the_secret_in_use_takes_nobodys_place(secret_file: Path) -> None:
    async with serve(acme=NEW) as server, pool_and_ear(acme=with_login(server, {"file": str(secret_file)})) as (pool, ear):
        (use,) = pool.uses()
        old = use.current()
        secret_file.write_text(NEW)
        assert all_sent(await pool.send("acme", outgoing()))
        assert not use.take(old, old)
        assert use.current().reveal() == NEW
        assert ear.changed == ["acme"]


@pytest.mark.parametrize("password", [OLD, {"env": "ACME"}])
async def test_what_cannot_change_is_nobodys_matter(password: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACME", OLD)
    async with serve(acme=NEW) as server, pool_and_ear(acme=with_login(server, password)) as (pool, _):
        assert list(pool.uses()) == []


async def test_who_waits_while_a_new_secret_is_found_does_not_share_the_old_ones_fate(secret_file: Path) -> None:
    """The refusal is that of a secret which somebody has replaced while it was being read again."""
    async with serve(acme=NEW) as server, pool_and_ear(acme=with_login(server, {"file": str(secret_file)})) as (pool, _):
        (use,) = pool.uses()
        refused = asyncio.Event()
        server.script("auth", Hold(refused), times=1)
        sending = asyncio.ensure_future(send_together(pool, 5))
        await eventually(lambda: bool(server.logins), "the first login")
        old = use.current()
        secret_file.write_text(NEW)
        assert use.take(old, old.read_again())
        refused.set()
        assert all_sent(await sending)


# -- refusals after the login ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("phase", "reply"), [("mail", b"530 5.7.0 Authentication required"), ("final", b"550 Client was not authenticated")]
)
async def test_a_refusal_after_the_login_logs_in_anew_only_for_the_next_message(phase: Any, reply: bytes, secret_file: Path) -> None:
    async with serve(acme=OLD) as server, pool_and_ear(acme=with_login(server, {"file": str(secret_file)})) as (pool, _):
        assert all_sent(await pool.send("acme", outgoing()))
        server.script(phase, reply, times=1)
        assert words(await pool.send("acme", outgoing())) == [f"deferred credential {phase} fallback"]
        assert len(server.logins) == 1
        await eventually(lambda: server.open_connections == 0, "the session to be left")
        assert all_sent(await pool.send("acme", outgoing()))
        assert len(server.logins) == 2


async def test_a_refusal_after_the_login_is_answered_with_a_changed_secret_at_once(secret_file: Path) -> None:
    async with serve(acme=OLD) as server, pool_and_ear(acme=with_login(server, {"file": str(secret_file)})) as (pool, _):
        assert all_sent(await pool.send("acme", outgoing()))
        change_password(server, "acme", NEW)
        secret_file.write_text(NEW)
        server.script("mail", b"530 5.7.0 Authentication required", times=1)
        assert all_sent(await pool.send("acme", outgoing()))
        assert [login.password for login in server.logins] == [OLD, NEW]
        assert len(server.accepted) == 2


async def test_an_odd_recipient_whom_the_upstream_will_not_relay_to_costs_no_session() -> None:
    async with serve(acme=OLD) as server, pool_and_ear(acme=with_login(server, OLD)) as (pool, _):
        server.script("rcpt", b"554 5.7.1 Relay access denied", recipient="odd@example.org")
        for _ in range(3):
            assert words(await pool.send("acme", outgoing("odd@example.org"))) == ["deferred credential rcpt fallback"]
            assert all_sent(await pool.send("acme", outgoing()))
        both = await pool.send("acme", outgoing("odd@example.org", "you@example.org"))
        assert [outcome.status for outcome in both] == [Status.DEFERRED, Status.SENT]
        assert (len(server.connections), len(server.logins)) == (1, 1)


async def test_without_a_login_a_refusal_is_only_reported() -> None:
    async with ScriptedUpstream() as server, pool_and_ear(acme=settings(server)) as (pool, ear):
        server.script("mail", b"530 5.7.0 Authentication required")
        assert words(await send_together(pool, 3)) == ["deferred credential mail fallback"] * 3
        assert len(server.connections) <= 3
        assert ear.notes == []
