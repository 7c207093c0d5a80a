"""The operator's commands as processes, against the real relay: every verb on mail in every state, and a queue of ten thousand."""

import asyncio
import json
import os
import re
import socket
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from relay.cli.control import ControlError, ask
from relay.clock import SystemClock
from relay.mail.envelope import Envelope, Recipient
from relay.spool.base import Content, Draft, Lane
from relay.spool.sqlite import SqliteSpool
from relay.spool.sqlite_view import SqliteView
from tests.support.client import Client
from tests.support.eventually import eventually
from tests.support.process import REPOSITORY, RelayDied, RelayProcess
from tests.support.upstream import Hang, ScriptedUpstream, unused_port

CONFIG = """
hostname: relay.test
listeners: [{{bind: "127.0.0.1:0", name: local}}]
upstreams:
  up: {{host: 127.0.0.1, port: {port}, security: none, limits: {{connections: 1}}}}
  other: {{host: 127.0.0.1, port: {other}, security: none}}
routes:
  - {{name: first, sender: acme.example, upstream: up}}
  - {{name: second, sender: globex.example, upstream: other}}
retry: {{first: 1h, max: 1h, expire: 4d}}
spool: {{directory: {spool}}}
{more}
shutdown_timeout: 1s
log: {{format: json}}
"""
CONTENT = b"From: app@acme.example\r\nTo: you@example.org\r\nSubject: hi\r\n\r\nhello\r\n"
ID = re.compile(r"queued as (\w+)")
LAUNCH = "import sys; from relay.cli import main; sys.argv[0] = 'relay'; sys.exit(main())"


class Done(NamedTuple):
    code: int
    out: str
    err: str

    def objects(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.out.splitlines()]


class Site:
    """A relay, its upstream, and a shell."""

    def __init__(self, directory: Path, relay: RelayProcess, upstream: ScriptedUpstream) -> None:
        self.spool = directory / "spool"
        self.relay = relay
        self.upstream = upstream

    async def send(self, sender: str = "app@acme.example", content: bytes = CONTENT, *recipients: str) -> str:
        """One message; its id."""
        async with Client(*self.relay.address()) as client:
            await client.greet()
            reply = await client.deliver(sender, recipients or ("you@example.org",), content)
            await client.quit()
        match = ID.search(reply.text)
        assert match, reply
        return match[1]

    async def run(self, *argv: str, stdin: int = asyncio.subprocess.DEVNULL) -> Done:
        """One command of relay's, as a process."""
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-c", LAUNCH, *argv, "--spool", str(self.spool), cwd=REPOSITORY, stdin=stdin,
            stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
        )  # fmt: skip
        out, err = await asyncio.wait_for(process.communicate(), 60)
        assert process.returncode is not None
        return Done(process.returncode, out.decode(), err.decode())

    async def states(self) -> dict[str, str]:
        return {each["id"]: each["state"] for each in (await self.run("queue", "list", "--json")).objects()}

    async def until(self, id: str, state: str) -> None:
        def reached() -> bool:
            view = SqliteView(self.spool, SystemClock())
            try:
                queued = view.message(id)
            finally:
                view.close()
            return (queued.state if queued is not None else "gone") == state

        await eventually(reached, f"{id} to be {state}")


@asynccontextmanager
async def site(directory: Path, *, down: bool = False, more: str = "", other: int = 0) -> AsyncIterator[Site]:
    upstream = ScriptedUpstream(offers=("CHUNKING",))  # so that nobody rides
    await upstream.start()
    config = CONFIG.format(port=upstream.port, other=other or unused_port(), spool=directory / "spool", more=more)
    if down:
        await upstream.stop()
    try:
        async with RelayProcess(config, directory=directory) as relay:
            yield Site(directory, relay, upstream)
            assert await relay.terminate() == 0
            assert relay.events("fault") == []
    finally:
        await upstream.stop()


async def test_retry_delivers_at_once_and_the_story_is_told(tmp_path: Path) -> None:
    async with site(tmp_path, down=True) as at:
        id = await at.send()
        await at.until(id, "deferred")
        told = await at.run("trace", id)
        assert told.code == 0
        assert re.search(rf"^{id}, \d+ B, accepted .*\nfrom app@acme.example to you@example.org\n", told.out)
        assert re.search(r"deferred +1 +\S+ s +first +up +you@example.org +.*[Cc]onnect", told.out)
        assert "deferred: to be tried in" in told.out
        await at.upstream.start()
        assert await at.run("queue", "retry", id.lower()) == Done(0, f"{id}  due now\n1 message due now\n", "")
        await at.upstream.received(1)
        await at.until(id, "gone")
        told = await at.run("trace", id)
        assert re.search(r"sent +2 +\S+ s +first +up +you@example.org +250", told.out)
        assert "no longer queued" in told.out
        story = (await at.run("trace", id, "--json")).objects()[0]
        assert [each["status"] for each in story["log"]] == ["deferred", "sent"]
        assert story["queued"] is None
        assert (await at.run("queue", "show", id)).code == 1


async def test_hold_survives_a_restart_and_release_delivers(tmp_path: Path) -> None:
    async with site(tmp_path, down=True) as at:
        one, two = await at.send(), await at.send()
        await at.until(two, "deferred")
        held = await at.run("queue", "hold", "--sender", "acme.example", "--reason", "the invoices are wrong")
        assert held == Done(0, f"{one}  held\n{two}  held\n2 messages held\n", "")
        await at.upstream.start()
        for _ in range(2):
            assert set((await at.states()).values()) == {"held"}
            await at.relay.terminate()
            await at.relay.start()
        shown = await at.run("queue", "show", one)
        assert "state         held: the invoices are wrong; until it is released" in shown.out
        again = await at.run("queue", "hold", one)
        assert again == Done(1, f"{one}  left alone: held already\n0 messages held, 1 left alone\n", "")
        assert (await at.run("queue", "retry", one)).out.startswith(f"{one}  left alone: held: release it instead")
        assert at.upstream.accepted == []
        released = await at.run("queue", "release", "--all", "--json")
        assert released.objects() == [{"id": id, "result": "released", "why": ""} for id in (one, two)]
        await at.upstream.received(2)
        await at.until(two, "gone")
        statuses = [each["status"] for each in (await at.run("log", one, "--json")).objects()]
        assert statuses == ["deferred", "held", "released", "sent"]
        notes = [event["what"] for event in at.relay.events("note")]
        assert f"uid {os.getuid()}: queue hold of sender acme.example (the invoices are wrong): 2 held, 0 left alone" in notes


async def test_drop_removes_the_content_file_too(tmp_path: Path) -> None:
    large = CONTENT + b"x" * 70 + b"\r\n" + (b"y" * 70 + b"\r\n") * 6000
    async with site(tmp_path, down=True) as at:
        kept, held, gone = [await at.send("app@acme.example", large) for _ in range(3)]
        await at.until(gone, "deferred")
        assert len(list((at.spool / "content").iterdir())) == 3
        await at.run("queue", "hold", held)
        assert await at.run("queue", "drop", held, gone) == Done(0, f"{held}  dropped\n{gone}  dropped\n2 messages dropped\n", "")
        await eventually(lambda: [path.name for path in (at.spool / "content").iterdir()] == [kept], "the files to go")
        assert await at.states() == {kept: "deferred"}
        assert "dropped" in (await at.run("trace", gone)).out
        assert large in (await at.run("queue", "show", kept, "--content")).out.replace("\n", "\r\n").replace("\r\r\n", "\r\n").encode()


async def test_bounce_delivers_a_report(tmp_path: Path) -> None:
    async with site(tmp_path, down=True) as at:
        deferred, held = await at.send(), await at.send()
        await at.until(held, "deferred")
        await at.run("queue", "hold", held)
        await at.upstream.start()
        given_up = await at.run("queue", "bounce", deferred, held, "--reason", "nobody wants these")
        assert given_up == Done(0, f"{deferred}  given up\n{held}  given up\n2 messages given up\n", "")
        await at.run("queue", "retry", "--all")
        reports = await at.upstream.received(2)
        assert {report.sender for report in reports} == {""}
        assert all(b"nobody wants these" in report.content and b"multipart/report" in report.content for report in reports)
        await eventually(lambda: len(at.relay.events("sent")) == 2, "the end of the reports")
        assert await at.states() == {}
        (story,) = (await at.run("trace", held, "--json")).objects()
        assert [each["status"] for each in story["log"]] == ["deferred", "held", "failed"]
        assert "nobody wants these" in story["log"][-1]["reply"]
        assert [report["log"][-1]["status"] for report in story["reports"]] == ["sent"]
        assert re.search(r"^report \w{13} to the sender: sent: 250", (await at.run("trace", held)).out, re.MULTILINE)


async def test_what_is_being_attempted_is_left_alone_by_every_verb_and_what_is_due_is_not(tmp_path: Path) -> None:
    async with site(tmp_path) as at:
        at.upstream.script("final", Hang())
        first = await at.send()
        await eventually(lambda: bool(at.upstream.transactions) and at.upstream.transactions[0].complete, "the first to be under way")
        ids = [first, *[await at.send() for _ in range(8)]]
        states = await at.states()
        active = [id for id in ids if states[id] == "active"]
        due = [id for id in ids if states[id] == "due"]
        assert len(active) == 5, "one slot, who rides, and the window"
        assert len(due) == 4
        for verb in ("retry", "hold", "release", "drop", "bounce"):
            left = await at.run("queue", verb, active[0], active[1])
            assert left.code == 1
            assert left.out.startswith(f"{active[0]}  left alone: being attempted\n{active[1]}  left alone: being attempted\n0 messages")
        results = {
            verb: (await at.run("queue", verb, "--json", id)).objects()
            for verb, id in zip(("retry", "release", "hold", "drop", "bounce"), (due[0], *due), strict=True)
        }
        assert [(verb, result["result"], result["why"]) for verb, (result,) in results.items()] == [
            ("retry", "due now", ""),
            ("release", "left alone", "not held"),
            ("hold", "held", ""),
            ("drop", "dropped", ""),
            ("bounce", "given up", ""),
        ]
        states = await at.states()
        assert (states[due[0]], states[due[1]], due[2] in states, due[3] in states) == ("due", "held", False, False)
        everything = await at.run("queue", "hold", "--all")  # the report among them
        assert everything.code == 0, "nobody was named"
        assert everything.out.endswith("2 messages held, 6 left alone\n")


async def test_ids_that_are_not_queued_are_said(tmp_path: Path) -> None:
    async with site(tmp_path, down=True) as at:
        id = await at.send()
        await at.until(id, "deferred")
        some = await at.run("queue", "hold", id, "1")
        assert some == Done(1, f"{id}  held\n0000000000001  left alone: not in the queue\n1 message held, 1 left alone\n", "")
        filtered = await at.run("queue", "release", id, "--route", "second")
        assert filtered.code == 1
        assert "left alone: not in the queue, or not like that" in filtered.out
        assert await at.run("queue", "drop", "--older-than", "1h") == Done(0, "nothing in the queue is like that\n", "")
        assert (await at.run("trace", "1")).code == 1
        assert (await at.run("queue", "show", "1")).err.startswith("relay queue: 0000000000001 is not in the queue")
        assert await at.states() == {id: "held"}


async def test_without_a_relay_reading_works_and_changing_says_why_not(tmp_path: Path) -> None:
    async with site(tmp_path, down=True) as at:
        id = await at.send()
        await at.until(id, "deferred")
        await at.relay.kill()
        control = at.spool / "control.sock"
        assert control.is_socket(), "what a kill leaves"
        for verb in ("retry", "hold", "release", "drop", "bounce"):
            refused = await at.run("queue", verb, id)
            words = f"relay queue {verb}: no relay is running with this spool (no control socket at {control})\n"
            assert refused == Done(75, "", words)
        for argv in (["queue", "list"], ["queue", "show", id], ["queue", "show", id, "--headers"], ["trace", id], ["log"]):
            assert (await at.run(*argv)).code == 0
        await at.relay.start()  # the socket of the dead is replaced
        assert (await at.run("queue", "hold", id)).code == 0


async def test_a_second_relay_on_the_spool_is_refused_and_does_the_first_no_harm(tmp_path: Path) -> None:
    second = tmp_path / "second"
    second.mkdir()
    async with site(tmp_path, down=True) as at:
        id = await at.send()
        other = RelayProcess((tmp_path / "config.yaml").read_text(), directory=second)
        with pytest.raises(RelayDied, match="ended with 75"):
            await other.start()
        assert "is in use by another relay" in other.log()
        assert (await at.run("queue", "list")).code == 0
        await at.until(id, "deferred")
        assert (await at.run("queue", "hold", id)).code == 0


async def test_a_control_socket_elsewhere_is_found_and_is_nobody_elses(tmp_path: Path) -> None:
    second = tmp_path / "second"
    second.mkdir()
    control = tmp_path / "run" / "c.sock"
    control.parent.mkdir()
    async with site(tmp_path, down=True, more=f"control: {control}") as at:
        id = await at.send()
        await at.until(id, "deferred")
        assert (await at.run("queue", "hold", id)).code == 0  # through the link in the spool
        text = (tmp_path / "config.yaml").read_text().replace(str(at.spool), str(second / "spool"))
        other = RelayProcess(text, directory=second)
        with pytest.raises(RelayDied, match="ended with 75"):
            await other.start()
        assert f"the control socket {control} belongs to another relay" in other.log()
        assert (await at.run("queue", "release", id)).code == 0
    assert not control.exists()
    assert not (tmp_path / "spool" / "control.sock").is_symlink()


async def test_who_may_not_open_the_socket_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    async with site(tmp_path) as at:
        control = at.spool / "control.sock"
        request = {"verb": "count", "selection": {}}
        if os.geteuid() == 0:
            os.seteuid(65534)  # whom the directory is closed to
        else:
            control.chmod(0)
        try:
            with pytest.raises(ControlError, match="is for its owner and group alone; run this as the user that relay runs as"):
                list(ask(control, request))
        finally:
            if os.getuid() == 0:
                os.seteuid(0)
            else:
                control.chmod(0o660)
        (answer,) = await asyncio.to_thread(lambda: list(ask(control, request)))
        assert answer == {"version": 1, "matched": 0, "more": False}


async def test_garbage_on_the_socket_costs_nobody_anything(tmp_path: Path) -> None:
    async with site(tmp_path) as at:
        control = str(at.spool / "control.sock")
        for octets in (
            b"",
            b"\n",
            b"\x00" * 5000,
            b"GET / HTTP/1.0\r\n\r\n",
            b'{"version": 1',
            b"[" * 200_000 + b"\n",
            os.urandom(100_000),
        ):
            with socket.socket(socket.AF_UNIX) as rude:
                rude.setblocking(False)
                rude.connect(control)
                with suppress(BlockingIOError):
                    rude.send(octets)
        silent = [socket.socket(socket.AF_UNIX) for _ in range(10)]
        for each in silent:
            each.connect(control)
        await at.send()
        await at.upstream.received(1)
        assert (await at.run("queue", "hold", "--all")).code == 0
        for each in silent:
            each.close()


async def fill(spool: Path, count: int) -> None:
    """A backlog as a day without the upstream leaves it."""
    clock = SystemClock()
    filled = SqliteSpool(spool, clock, backoff=lambda attempts: 3600.0, keep_log_seconds=86400.0)
    now, content = clock.now(), Content(len(CONTENT), CONTENT)
    for start in range(0, count, 500):
        drafts = [
            Draft(
                filled.new_id(),
                Lane("up", "first"),
                Envelope("app@acme.example", (Recipient(f"u{n}@example.org"),)),
                content,
                now,
                due=now + 3600,
            )
            for n in range(start, start + 500)
        ]
        await asyncio.gather(*(filled.put([draft._replace(content=Content(len(CONTENT), CONTENT))], [False]) for draft in drafts))
    await filled.close()


@pytest.mark.timeout(120)
async def test_ten_thousand_queued_messages_are_listed_and_held_while_mail_flows(tmp_path: Path) -> None:
    count, limit = 10_000, 10.0
    await fill(tmp_path / "spool", count)
    async with ScriptedUpstream() as other, site(tmp_path, down=True, other=other.port) as at:
        slowest, sent, going = 0.0, 0, True

        async def flow() -> None:
            nonlocal slowest, sent
            while going:
                began = time.perf_counter()
                await at.send("app@globex.example")
                slowest, sent = max(slowest, time.perf_counter() - began), sent + 1

        async def timed(*argv: str) -> tuple[Done, float]:
            began = time.perf_counter()
            return await at.run(*argv), time.perf_counter() - began

        flowing = asyncio.create_task(flow(), name="flow")
        listed, list_seconds = await timed("queue", "list", "--route", "first")
        held, hold_seconds = await timed("queue", "hold", "--route", "first")
        ids = [line.split()[0] for line in held.out.splitlines()[:-1]]
        dropped, drop_seconds = await timed("queue", "drop", *ids[: count // 2])
        released, release_seconds = await timed("queue", "release", "--route", "first", "--json")
        going = False
        await flowing
        print(
            f"{count} queued: listed in {list_seconds:.1f} s, held in {hold_seconds:.1f} s, half of them dropped in {drop_seconds:.1f} s, "
            f"the others released in {release_seconds:.1f} s; meanwhile {sent} messages were taken, the slowest in {slowest * 1000:.0f} ms"
        )
        assert f"{count} messages, {count} recipients" in listed.out
        assert held.out.endswith(f"{count} messages held\n")
        assert dropped.out.endswith(f"{count // 2} messages dropped\n")
        assert [each["id"] for each in released.objects()] == ids[count // 2 :]
        assert max(list_seconds, hold_seconds, release_seconds, drop_seconds) < limit
        assert slowest < 2.0
        assert sent > 10
        await other.received(sent)


@pytest.mark.parametrize("argv", [["retry"], ["hold", "--all", "--route", "first"]])
async def test_an_order_about_nothing_or_about_all_but_not_is_refused(tmp_path: Path, argv: list[str], capsys: Any) -> None:
    from relay.cli import main

    assert main(["queue", *argv, "--spool", str(tmp_path)]) == 64
    assert "--all" in capsys.readouterr().err
