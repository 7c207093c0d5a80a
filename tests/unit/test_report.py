"""Whom an attempt's report speaks of, where it goes, and that there is one of it however often a settle is repeated."""

import asyncio
import email
import random
import threading
from collections.abc import AsyncIterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from email.message import Message
from pathlib import Path
from typing import Any

import pytest

from relay.clock import ManualClock
from relay.config.model import Config
from relay.delivery import report as report_module
from relay.delivery import settle
from relay.delivery.attempt import Result
from relay.delivery.breaker import Breakers
from relay.delivery.settle import Settler
from relay.mail.bounce import make_bounce
from relay.mail.envelope import Envelope, Origin, Recipient
from relay.mail.outcome import Failure, Outcome, Phase, outcome_of_failure, outcome_of_reply
from relay.mail.reply import Reply
from relay.observe.metrics import Metrics
from relay.routing import Router
from relay.spool.base import Claim, Content, Draft, Lane, Next, Settlement, SpoolError
from relay.spool.memory import MemorySpool
from relay.spool.sqlite import SqliteSpool
from tests.unit.delivery import LANE, PREFIX, SENT, Log, config_of

REFUSED = outcome_of_reply(Phase.RCPT, Reply(550, "5.1.1", "nobody here"))
BUSY = outcome_of_reply(Phase.RCPT, Reply(450, "4.2.0", "later"))
DOWN = outcome_of_failure(Phase.CONNECT, Failure.UNREACHABLE, "refused")
HEADER = b"From: App <app@acme.example>\r\nSubject: hi\r\n"
CONTENT = HEADER + b"\r\nhello\r\n"
WARNS = {"first": "1m", "max": "1h", "expire": "4d", "warn_after": "4h"}
ROUTES: list[dict[str, Any]] = [{"name": "acme", "sender": "acme.example", "upstream": "acme"}]
HOUR = 3600.0


class ForgetfulSpool(MemorySpool):
    """Stores an outcome and then says that it could not, as often as it is told."""

    lapses = 0
    settlements: list[Settlement]

    async def settle(self, settlement: Settlement) -> None:
        self.settlements.append(settlement)
        await super().settle(settlement)
        if self.lapses:
            self.lapses -= 1
            raise SpoolError("the disk did not answer")


class House:
    """A settler on a spool in memory."""

    def __init__(self, directory: Path, **config: Any) -> None:
        self.clock = ManualClock()
        self.log = Log(directory, self.clock)
        self.spool = ForgetfulSpool(directory / "spool", self.clock, backoff=lambda attempts: 60.0 * attempts)
        self.spool.settlements = []
        self.use(config_of(ROUTES, retry=WARNS, **config))

    def use(self, config: Config) -> None:
        metrics = Metrics()
        breakers = Breakers(config.retry, self.log.journal, metrics, self.clock)
        self.settler = Settler(
            config, Router(config), self.spool, self.log.journal, self.clock, rng=random.Random(1), breakers=breakers, metrics=metrics
        )  # fmt: skip

    async def claim(
        self, *recipients: Recipient | str, sender: str = "app@acme.example", content: Content | None = None, lane: Lane = LANE,
        ret: str = "",
    ) -> Claim:  # fmt: skip
        """A message that has just been put and claimed."""
        named = tuple(Recipient(r) if isinstance(r, str) else r for r in recipients or ("you@example.org",))
        kept = content or Content(len(CONTENT), CONTENT)
        origin = Origin("local", "127.0.0.1", "", "S1", sender)
        draft = Draft(self.spool.new_id(), lane, Envelope(sender, named, ret=ret), kept, self.clock.now(), PREFIX, origin)
        (claim,) = await self.spool.put([draft], [True])
        assert claim is not None
        return claim

    async def settle(self, claim: Claim, outcomes: Outcome | Mapping[str, Outcome]) -> list[Next]:
        if isinstance(outcomes, Outcome):
            outcomes = dict.fromkeys((r.address for r in claim.envelope.recipients), outcomes)
        return await self.settler.settle(claim, Result(outcomes))

    async def again(self, lane: Lane = LANE) -> Claim:
        """The one message of an app that is due."""
        (claim,) = [claim for claim in await self.spool.claim(lane, 100) if claim.envelope.sender]
        return claim

    async def reports(self, lane: Lane = LANE) -> list[Message]:
        """The reports that are due."""
        found = [claim.content.octets for claim in await self.spool.claim(lane, 100) if not claim.envelope.sender]
        return [email.message_from_bytes(octets) for octets in found if octets is not None]


@pytest.fixture
async def house(tmp_path: Path) -> AsyncIterator[House]:
    (tmp_path / "spool").mkdir()
    built = House(tmp_path)
    yield built
    built.log.text()
    await built.spool.close()


def part(report: Message, number: int) -> Message:
    parts = report.get_payload()
    assert isinstance(parts, list)
    found = parts[number]
    assert isinstance(found, Message)
    return found


def fates(report: Message) -> list[tuple[str, str]]:
    """The recipients and actions of a report's machine-readable part."""
    groups = part(report, 1).get_payload()
    assert isinstance(groups, list)
    return [(group["Final-Recipient"].partition(";")[2], group["Action"]) for group in groups[1:]]  # type: ignore[union-attr, index]


def text(report: Message) -> str:
    words = part(report, 0).get_payload()
    assert isinstance(words, str)
    return " ".join(words.split())


# -- success ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("notify", "promised", "told"),
    [
        ("SUCCESS", False, True),
        ("SUCCESS,FAILURE", False, True),
        ("SUCCESS", True, False),
        ("FAILURE,DELAY", False, False),
        ("NEVER", False, False),
        ("", False, False),
    ],
)
async def test_who_asked_for_success_is_told_where_the_upstream_promises_nothing(
    house: House, notify: str, promised: bool, told: bool
) -> None:  # fmt: skip
    claim = await house.claim(Recipient("you@example.org", notify=notify))
    due = await house.settle(claim, SENT._replace(reports=promised))
    assert due == ([Next(house.clock.now(), LANE)] if told else [])
    assert [fates(report) for report in await house.reports()] == ([[("you@example.org", "relayed")]] if told else [])
    assert [event.get("relayed") for event in house.log.events("bounced")] == (["you@example.org"] if told else [])


async def test_nobody_is_told_of_the_success_of_a_report(house: House) -> None:
    assert await house.settle(await house.claim(Recipient("you@example.org", notify="SUCCESS"), sender=""), SENT) == []


async def test_one_report_tells_of_success_failure_and_delay(house: House) -> None:
    claim = await house.claim(Recipient("a@example.org", notify="SUCCESS"), "b@example.org", "c@example.org", "d@example.org")
    house.clock.advance(5 * HOUR)
    outcomes = {"a@example.org": SENT, "b@example.org": REFUSED, "c@example.org": BUSY, "d@example.org": SENT}
    assert len(await house.settle(claim, outcomes)) == 2
    (report,) = await house.reports()
    assert fates(report) == [("a@example.org", "relayed"), ("b@example.org", "failed"), ("c@example.org", "delayed")]
    (event,) = house.log.events("bounced")
    assert (event["failed"], event["delayed"], event["relayed"]) == ("b@example.org", "c@example.org", "a@example.org")


@pytest.mark.parametrize(("count", "in_a_thread"), [(20, False), (21, True), (1000, True)])
async def test_a_long_report_is_made_beside_the_loop(
    house: House, monkeypatch: pytest.MonkeyPatch, count: int, in_a_thread: bool
) -> None:  # fmt: skip
    threads: list[int] = []

    def make(*arguments: Any, **keys: Any) -> Any:
        threads.append(threading.get_ident())
        return make_bounce(*arguments, **keys)

    monkeypatch.setattr(report_module, "make_bounce", make)
    await house.settle(await house.claim(*(f"r{number}@example.org" for number in range(count))), REFUSED)
    assert [thread != threading.get_ident() for thread in threads] == [in_a_thread]
    (report,) = await house.reports()
    assert len(fates(report)) == count


async def test_a_system_without_threads_loses_no_outcome_and_no_report(house: House, tmp_path: Path) -> None:
    class Starved(ThreadPoolExecutor):
        def submit(self, *arguments: Any, **options: Any) -> Any:
            raise RuntimeError("can't start new thread")

    asyncio.get_running_loop().set_default_executor(Starved(1))
    path, octets = tmp_path / "content", CONTENT + b"x" * 300_000
    path.write_bytes(octets)
    claim = (await house.claim(*(f"r{number}@example.org" for number in range(30))))._replace(content=Content(len(octets), None, path))
    await house.settle(claim, {r.address: SENT if number else REFUSED for number, r in enumerate(claim.envelope.recipients)})
    (report,) = await house.reports()
    assert fates(report) == [("r0@example.org", "failed")]
    assert part(report, 2).get_payload(decode=True) == PREFIX + HEADER
    await house.settle(await house.claim(*(f"r{number}@example.org" for number in range(30))), REFUSED)
    (report,) = await house.reports()
    assert len(fates(report)) == 30


# -- delay -----------------------------------------------------------------------------------------------------------------


async def test_a_delay_is_told_once_and_not_before_its_time(house: House) -> None:
    claim = await house.claim(Recipient("a@example.org"), Recipient("b@example.org", notify="NEVER"), Recipient("c@example.org"))
    for hours, told in ((3, False), (1, True), (2, False), (48, False)):
        house.clock.advance(hours * HOUR)
        await house.settle(claim, BUSY)
        assert [fates(report) for report in await house.reports()] == (
            [[("a@example.org", "delayed"), ("c@example.org", "delayed")]] * told
        )
        house.clock.advance(HOUR + 600)
        claim = await house.again()
    assert [recipient.warned for recipient in claim.envelope.recipients] == [True, False, True]


async def test_a_warning_and_its_memory_are_stored_in_one_step(house: House) -> None:
    claim = await house.claim()
    house.clock.advance(5 * HOUR)
    await house.settle(claim, BUSY)
    (settlement,) = house.spool.settlements
    assert settlement.bounce is not None
    assert settlement.claim.envelope.recipients[0].warned


async def test_a_warning_is_remembered_by_the_spool_on_disk(tmp_path: Path) -> None:
    clock = ManualClock()
    log = Log(tmp_path, clock)
    config = config_of(ROUTES, retry=WARNS)
    metrics = Metrics()
    for delay in (5 * HOUR, 2 * HOUR):
        spool = SqliteSpool(tmp_path / "spool", clock, backoff=lambda _: 60.0, keep_log_seconds=1e9)
        settler = Settler(
            config, Router(config), spool, log.journal, clock, rng=random.Random(1), metrics=metrics,
            breakers=Breakers(config.retry, log.journal, metrics, clock),
        )  # fmt: skip
        if delay == 5 * HOUR:
            content = Content(len(CONTENT), CONTENT)
            envelope = Envelope("app@acme.example", (Recipient("you@example.org"),))
            await spool.put([Draft(spool.new_id(), LANE, envelope, content, clock.now(), PREFIX, due=clock.now())], [False])
        clock.advance(delay)
        (claim,) = [claim for claim in await spool.claim(LANE, 10) if claim.envelope.sender]
        await settler.settle(claim, Result({"you@example.org": BUSY}))
        await spool.close()
    assert len(log.events("bounced")) == 1


@pytest.mark.parametrize(("notify", "told"), [("", True), ("DELAY", True), ("FAILURE,SUCCESS", False), ("NEVER", False)])
async def test_only_those_hear_of_a_delay_who_want_to(house: House, notify: str, told: bool) -> None:
    claim = await house.claim(Recipient("you@example.org", notify=notify))
    house.clock.advance(5 * HOUR)
    await house.settle(claim, BUSY)
    assert len(await house.reports()) == told


async def test_nobody_is_told_that_a_report_is_delayed(house: House) -> None:
    claim = await house.claim(sender="")
    house.clock.advance(5 * HOUR)
    assert len(await house.settle(claim, BUSY)) == 1


async def test_without_the_key_nobody_hears_of_a_delay(house: House) -> None:
    house.use(config_of(ROUTES))
    claim = await house.claim()
    house.clock.advance(72 * HOUR)
    assert len(await house.settle(claim, BUSY)) == 1


async def test_a_route_may_warn_at_a_time_of_its_own(house: House) -> None:
    house.use(config_of([{**ROUTES[0], "retry": {"warn_after": "10m"}}]))
    claim = await house.claim()
    house.clock.advance(601)
    await house.settle(claim, BUSY)
    (report,) = await house.reports()
    assert part(report, 1).get_payload(1)["Will-Retry-Until"] == "Tue, 19 Jan 2027 08:00:00 +0000"  # type: ignore[index]


async def test_who_goes_to_a_fallback_now_is_not_told_of_a_delay(house: House) -> None:
    house.use(config_of(retry=WARNS))
    claim = await house.claim()
    house.clock.advance(5 * HOUR)
    assert [due.lane for due in await house.settle(claim, DOWN)] == [Lane("spare", "acme")]


async def test_what_expires_is_reported_as_failed_and_not_as_delayed(house: House) -> None:
    claim = await house.claim()
    house.clock.advance(97 * HOUR)
    await house.settle(claim, BUSY)
    assert [fates(report) for report in await house.reports()] == [[("you@example.org", "failed")]]


# -- the end without an attempt --------------------------------------------------------------------------------------------


async def test_what_was_held_until_its_time_was_up_says_why(house: House) -> None:
    claim = (await house.claim())._replace(held="no route takes its sender any more")
    await house.settler.give_up(claim, "")
    (report,) = await house.reports()
    assert "Not tried any more: it was held until its time was up; no route takes its sender any more" in text(report)
    assert part(report, 1).get_payload(1)["Status"] == "4.4.7"  # type: ignore[index]


async def test_what_an_operator_gives_up_says_so_and_not_that_its_time_was_up(house: House) -> None:
    claim = (await house.claim())._replace(held="by hand")
    await house.settler.give_up(claim, "given up by the operator")
    (report,) = await house.reports()
    assert "Not tried any more: given up by the operator" in text(report) and "time was up" not in text(report)
    assert part(report, 1).get_payload(1)["Status"] == "5.0.0"  # type: ignore[index]


# -- the original ----------------------------------------------------------------------------------------------------------


async def test_a_failure_brings_back_the_whole_message_where_that_was_asked_for(house: House) -> None:
    await house.settle(await house.claim(ret="FULL"), REFUSED)
    (report,) = await house.reports()
    assert part(report, 2).get_content_type() == "message/rfc822"
    assert part(report, 2).get_payload(0).as_bytes() == (PREFIX + CONTENT).replace(b"\r\n", b"\n")  # type: ignore[union-attr]


@pytest.mark.parametrize("in_memory", [False, True])
@pytest.mark.parametrize(("read", "there"), [(False, True), (True, True), (False, False)])
async def test_of_a_large_message_the_header_comes_back_read_or_not(
    house: House, tmp_path: Path, read: bool, there: bool, in_memory: bool
) -> None:  # fmt: skip
    path, octets = tmp_path / "content", CONTENT + b"x" * 300_000
    path.write_bytes(octets)
    content = Content(len(octets), octets if in_memory else None, path if there else tmp_path / "gone")
    claim = (await house.claim(ret="FULL"))._replace(content=content)
    await house.settler.settle(claim, Result({"you@example.org": REFUSED}, header_block=HEADER if read else b""))
    (report,) = await house.reports()
    shown = part(report, 2).get_payload(decode=True)
    assert shown == PREFIX + (HEADER if there or read else b"")
    assert "too large to be returned" in text(report)


async def test_a_message_without_a_header_is_returned_with_what_we_wrote_above_it(house: House) -> None:
    await house.settle(await house.claim(content=Content(7, b"hello\r\n"), ret="FULL"), REFUSED)
    (report,) = await house.reports()
    assert part(report, 2).get_payload(0).as_bytes() == (PREFIX + b"\r\nhello\r\n").replace(b"\r\n", b"\n")  # type: ignore[union-attr]


# -- where it goes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("routes", "lane"),
    [
        ([{"name": "null", "sender": "<>", "upstream": "spare"}, *ROUTES], Lane("spare", "null")),
        ([{"name": "null", "sender": "<>", "reject": "not from apps"}, *ROUTES], LANE),
        ([{"name": "acme", "sender": "acme.example", "recipient": "example.org", "upstream": "acme"}], LANE),
        ([{"name": "acme", "recipient": "example.org", "upstream": "acme"}], LANE),
        ([{"name": "own", "sender": "app@acme.example", "upstream": "house"}, *ROUTES], Lane("house", "own")),
    ],
)
async def test_a_report_goes_the_way_of_the_senders_own_mail(house: House, routes: list[dict[str, Any]], lane: Lane) -> None:
    house.use(config_of(routes))
    due = await house.settle(await house.claim(), REFUSED)
    assert [each.lane for each in due] == [lane]


@pytest.mark.parametrize(("hosts", "host"), [("mx.acme.example", "dns; mx.acme.example"), (["a.example", "b.example"], None)])
async def test_the_host_is_named_where_there_is_no_doubt_which_it_was(house: House, hosts: Any, host: str | None) -> None:
    house.use(config_of(ROUTES, upstreams={"acme": {"host": hosts}}))
    await house.settle(await house.claim(), REFUSED)
    (report,) = await house.reports()
    assert part(report, 1).get_payload(1)["Remote-MTA"] == host  # type: ignore[index]


async def test_an_upstream_that_is_gone_keeps_no_report_back(house: House) -> None:
    claim = await house.claim(lane=Lane("gone", "acme"))
    await house.settle(claim, REFUSED)
    assert len(await house.reports()) == 1


# -- once ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "outcomes", [{"a@example.org": REFUSED, "b@example.org": REFUSED}, {"a@example.org": REFUSED, "b@example.org": BUSY}]
)
async def test_a_settle_that_was_stored_and_seemed_to_fail_makes_no_second_report(
    house: House, monkeypatch: pytest.MonkeyPatch, outcomes: dict[str, Outcome]
) -> None:  # fmt: skip
    monkeypatch.setattr(settle, "_AGAIN_SECONDS", 0.0)
    house.spool.lapses = 1
    await house.settle(await house.claim("a@example.org", "b@example.org"), outcomes)
    assert len(house.spool.settlements) == 2
    assert len({settlement.bounce.id for settlement in house.spool.settlements if settlement.bounce is not None}) == 1
    assert [fates(report) for report in await house.reports()] == [
        [("a@example.org", "failed")] + [("b@example.org", "failed")] * (REFUSED is outcomes["b@example.org"])
    ]


async def test_a_settle_of_another_attempt_reports_only_its_own_failures(house: House) -> None:
    claim = await house.claim("a@example.org", "b@example.org")
    await house.settle(claim, {"a@example.org": REFUSED, "b@example.org": BUSY})
    assert [fates(report) for report in await house.reports()] == [[("a@example.org", "failed")]]
    house.clock.advance(HOUR)
    await house.settle(await house.again(), REFUSED)
    assert [fates(report) for report in await house.reports()] == [[("b@example.org", "failed")]]


async def test_a_report_that_fails_is_told_to_nobody_but_the_log(house: House) -> None:
    await house.settle(await house.claim(), REFUSED)
    (report,) = await house.spool.claim(LANE, 10)
    assert await house.settle(report, REFUSED) == []
    assert await house.spool.next_due() == {}
    assert [event["reply"] for event in house.log.events("failed")][-1] == "a bounce is never bounced"
