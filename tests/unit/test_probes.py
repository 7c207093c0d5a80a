"""Probes: whose turn it is, and what comes of one."""

import asyncio
import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from relay.clock import ManualClock
from relay.config.model import Config
from relay.config.upstreams import Upstream
from relay.delivery.breaker import Breakers
from relay.delivery.probes import Probes
from relay.delivery.verified import Marks, Verified
from relay.mail.outcome import Failure, Outcome, Phase, outcome_of_failure, outcome_of_reply
from relay.mail.reply import Reply
from relay.observe.metrics import Metrics
from relay.spool.base import MessageId
from relay.upstream.rides import Busy
from tests.support.eventually import eventually
from tests.unit.delivery import Log, config_of

REFUSED = outcome_of_reply(Phase.AUTH, Reply(535, "5.7.8", "no"))
DOWN = outcome_of_failure(Phase.CONNECT, Failure.UNREACHABLE, "refused")
DENIED = outcome_of_reply(Phase.RCPT, Reply(554, "5.7.1", "Relay access denied"))


class FakePool:
    """Upstreams that answer probes as told, by default that they work; `gate` holds them up."""

    def __init__(self, config: Config) -> None:
        self.upstreams: dict[str, Upstream] = dict(config.upstreams)
        self.answers: dict[str, Outcome | Exception | None] = {}
        self.probed: list[str] = []
        self.opened: dict[str, float] = {}
        self.at_once = self.most = 0
        self.gate = asyncio.Event()
        self.gate.set()

    async def probe(self, name: str) -> Outcome | None:
        self.probed.append(name)
        self.at_once += 1
        self.most = max(self.most, self.at_once)
        try:
            await self.gate.wait()
        finally:
            self.at_once -= 1
        answer = self.answers.get(name)
        if isinstance(answer, Exception):
            raise answer
        return answer

    def settings(self, name: str) -> Upstream:
        return self.upstreams[name]

    def opened_at(self, name: str) -> float | None:
        return self.opened.get(name)


class House:
    """Probes with everything around them."""

    def __init__(self, directory: Path, upstreams: dict[str, dict[str, Any]], watched: tuple[str, ...]) -> None:
        config = config_of([{"upstream": "acme"}], upstreams=upstreams)
        self.clock, self.metrics = ManualClock(), Metrics()
        self.log = Log(directory, self.clock)
        self.pool = FakePool(config)
        self.breakers = Breakers(config.retry, self.log.journal, self.metrics, self.clock)
        self.marks = Marks(directory)
        self.verified = Verified(self.marks, self.pool.settings, self.clock)
        self.revived: list[str] = []
        self.probes = Probes(
            config.upstreams, self.pool, self.log.journal, self.metrics, self.clock, breakers=self.breakers, verified=self.verified,
            marks=self.marks, revive=self.revived.append, rng=random.Random(7), watched=watched,
        )  # fmt: skip
        self.verified.changed = self.probes.changed

    async def passes(self, seconds: float, *, step: float = 60.0) -> None:
        """Let time pass, and what is due be done."""
        for _ in range(round(seconds / step)):
            self.clock.advance(step)
            self.probes.look()
            await self.idle()

    async def idle(self) -> None:
        await self.probes.drained()

    def counted(self, upstream: str, status: str) -> float | None:
        return self.metrics.registry.get_sample_value("relay_probes_total", {"upstream": upstream, "status": status})


@asynccontextmanager
async def house_of(directory: Path, *, watched: tuple[str, ...] = (), **upstreams: dict[str, Any]) -> AsyncIterator[House]:
    house = House(directory, upstreams, watched)
    house.probes.open()
    yield house
    house.probes.stop()
    await house.probes.drained()
    house.log.text()


async def test_an_upstream_with_probe_is_tried_soon_after_the_start_and_then_at_its_interval(tmp_path: Path) -> None:
    async with house_of(tmp_path, acme={"probe": "1h"}) as house:
        await house.passes(600)
        assert house.pool.probed == ["acme"]
        await house.passes(86_400)
        assert 22 <= len(house.pool.probed) <= 28
        assert house.counted("acme", "ok") == len(house.pool.probed)
        assert house.metrics.registry.get_sample_value("relay_probe_works", {"upstream": "acme"}) == 1


async def test_nobody_is_tried_who_did_not_ask_for_it(tmp_path: Path) -> None:
    async with house_of(tmp_path) as house:
        await house.passes(7200)
        assert not house.pool.probed


async def test_mail_that_has_just_opened_a_session_is_proof_enough(tmp_path: Path) -> None:
    async with house_of(tmp_path, acme={"probe": "1h"}) as house:
        for _ in range(48):
            house.pool.opened["acme"] = house.clock.monotonic()
            await house.passes(1800)
        assert not house.pool.probed
        await house.passes(3 * 3600)
        assert house.pool.probed


async def test_a_refused_credential_opens_the_breaker_and_is_left_alone_for_as_long(tmp_path: Path) -> None:
    async with house_of(tmp_path, acme={"probe": "5m", "username": "app", "password": "x"}) as house:
        house.pool.answers["acme"] = REFUSED
        await house.passes(300)
        assert house.pool.probed == ["acme"]
        assert house.breakers.admit("acme", MessageId("00000000000A1")) is not None, "mail need not find out"
        await house.passes(540)
        assert house.pool.probed == ["acme"], "15 minutes are not over"
        await house.passes(600)
        assert len(house.pool.probed) == 2
        house.pool.answers.clear()
        await house.passes(3600)
        assert house.breakers.admit("acme", MessageId("00000000000A1")) is None
        assert house.revived == ["acme"]
    assert house.log.events("auth-failed")[0] | {"upstream": "acme", "user": "app"} == house.log.events("auth-failed")[0]
    assert any("succeeds again" in event["what"] for event in house.log.events("note"))


async def test_a_probe_says_nothing_of_mail_that_is_refused_after_the_login(tmp_path: Path) -> None:
    async with house_of(tmp_path, acme={"probe": "5m"}) as house:
        for number in range(3):
            house.breakers.record("acme", MessageId(f"00000000000A{number}"), [DENIED])
        assert house.breakers.ready_at("acme") > 0
        await house.passes(3600)
        assert house.pool.probed
        assert [trouble.upstream for trouble in house.breakers.troubles()] == ["acme"]
        await house.passes(60)
        assert house.breakers.admit("acme", MessageId("00000000000B1")) is None, "and takes the place of no message that tries"


async def test_an_upstream_that_is_down_opens_its_breaker_after_the_usual_number_of_failures(tmp_path: Path) -> None:
    async with house_of(tmp_path, acme={"probe": "1m"}) as house:
        house.pool.answers["acme"] = DOWN
        await house.passes(900)
        assert house.breakers.ready_at("acme") > 0
        assert not house.revived
    assert not house.log.events("auth-failed")


async def test_few_are_tried_at_once_and_never_two_of_one_upstream(tmp_path: Path) -> None:
    names: dict[str, Any] = {f"u{number}": {"probe": "10m"} for number in range(50)}
    async with house_of(tmp_path, **names) as house:
        house.pool.gate.clear()
        house.clock.advance(600)
        house.probes.look()
        await eventually(lambda: house.pool.at_once == 8, "eight probes")
        house.clock.advance(3600)
        house.probes.look()
        assert house.pool.at_once == 8
        house.pool.gate.set()
        await eventually(lambda: len(set(house.pool.probed)) == 50 and not house.pool.at_once, "all fifty")
        assert house.pool.most == 8


async def test_a_fault_of_ours_is_told_and_the_next_turn_comes(tmp_path: Path) -> None:
    async with house_of(tmp_path, acme={"probe": "10m"}) as house:
        house.pool.answers["acme"] = RuntimeError("broken")
        await house.passes(600)
        house.pool.answers.clear()
        await house.passes(1200)
        assert len(house.pool.probed) >= 2
    assert house.log.events("fault")


async def test_an_upstream_that_is_busy_with_mail_is_tried_at_its_next_turn(tmp_path: Path) -> None:
    async with house_of(tmp_path, acme={"probe": "1h"}) as house:
        house.pool.answers["acme"] = Busy()
        await house.passes(4 * 3600)
        assert 3 <= len(house.pool.probed) <= 5
        assert house.log.text() == ""
        assert house.breakers.admit("acme", MessageId("1")) is None
        house.pool.answers.clear()
        await house.passes(2 * 3600)
        assert house.counted("acme", "ok") in (1.0, 2.0, 3.0)


async def test_a_try_for_which_there_was_no_connection_is_somebody_else_s(tmp_path: Path) -> None:
    """The breaker lets in one at a time: nobody would ever try again."""
    async with house_of(tmp_path, acme={"probe": "1h"}) as house:
        house.pool.answers["acme"] = REFUSED
        await house.passes(600)
        assert house.breakers.admit("acme", MessageId("1")) is not None
        house.pool.answers["acme"] = Busy()
        await house.passes(86_400)
        assert len(house.pool.probed) > 1
        assert house.breakers.admit("acme", MessageId("1")) is None


async def test_stopping_cuts_off_what_is_under_way(tmp_path: Path) -> None:
    async with house_of(tmp_path, acme={"probe": "10m"}) as house:
        house.pool.gate.clear()
        house.clock.advance(600)
        house.probes.look()
        await eventually(lambda: house.pool.at_once == 1, "a probe")
        house.probes.stop()
        async with asyncio.timeout(20):
            await house.probes.drained()
        house.probes.changed("acme")
        house.clock.advance(6000)
        house.probes.look()
        assert house.pool.probed == ["acme"]


async def test_a_secret_that_has_changed_is_tried_at_once_however_long_the_old_one_is_to_be_left_alone(tmp_path: Path) -> None:
    async with house_of(tmp_path, acme={"probe": "1h", "username": "app", "password": "x"}) as house:
        house.pool.answers["acme"] = REFUSED
        await house.passes(600)
        assert house.pool.probed == ["acme"]
        del house.pool.answers["acme"]
        house.pool.opened["acme"] = house.clock.monotonic()
        house.breakers.reset("acme")
        house.probes.secret_changed("acme")
        house.probes.look()
        await house.idle()
        assert house.pool.probed == ["acme", "acme"] and house.counted("acme", "ok") == 1
        await house.passes(1800)
        assert len(house.pool.probed) == 2, "and then at its interval"


# -- verified -------------------------------------------------------------------------------------------------------------------


async def changed_house(house: House) -> None:
    """The upstream acme was verified, and has other settings now."""
    house.marks.record("acme", house.pool.upstreams["acme"], now=0.0)
    house.pool.upstreams["acme"] = house.pool.upstreams["acme"].model_copy(update={"port": 2525})
    house.clock.advance(5)


async def test_settings_that_changed_since_the_last_run_are_tested_and_the_mark_is_kept(tmp_path: Path) -> None:
    Marks(tmp_path).record("acme", Upstream.model_validate({"host": "smtp.acme.example", "security": "none", "port": 26}), now=0.0)
    async with house_of(tmp_path, watched=("acme", "spare")) as house:
        await eventually(lambda: "acme" in house.pool.probed, "the probe of acme")
        await house.idle()
        house.clock.advance(5)
        assert house.verified.objection("acme") is None
        assert house.pool.probed == ["acme"], "what was never verified is left alone"
    assert any("stays verified" in event["what"] for event in house.log.events("note"))


async def test_a_secret_that_has_changed_is_tested_before_mail_asks_where_the_old_one_was_verified(tmp_path: Path) -> None:
    async with house_of(tmp_path, watched=("acme",)) as house:
        house.probes.secret_changed("acme")
        house.probes.look()
        assert not house.pool.probed, "nobody has verified it"
        await changed_house(house)
        house.probes.secret_changed("acme")
        house.probes.look()
        await house.idle()
        assert house.pool.probed == ["acme"] and house.verified.objection("acme") is None


@pytest.mark.parametrize("answer", [DOWN, RuntimeError("broken")])
async def test_changed_settings_that_do_not_work_are_tried_again_less_and_less_often(tmp_path: Path, answer: Outcome | Exception) -> None:
    async with house_of(tmp_path, watched=("acme",)) as house:
        house.pool.answers["acme"] = answer
        await changed_house(house)
        for _ in range(30):  # mail asks all the time
            assert house.verified.objection("acme") is not None
            await house.passes(60)
        assert 2 <= len(house.pool.probed) <= 31
        house.pool.answers.clear()
        await house.passes(7200)
        assert house.verified.objection("acme") is None
        many = len(house.pool.probed)
        await house.passes(7200)
        assert len(house.pool.probed) == many, "one that is verified again needs no more probes"


async def test_settings_that_change_during_the_probe_are_tested_themselves(tmp_path: Path) -> None:
    async with house_of(tmp_path, watched=("acme",)) as house:
        await changed_house(house)
        house.pool.gate.clear()
        assert house.verified.objection("acme") is not None
        house.probes.look()
        await eventually(lambda: house.pool.at_once == 1, "the probe")
        house.pool.upstreams["acme"] = house.pool.upstreams["acme"].model_copy(update={"port": 2526})
        house.pool.gate.set()
        await house.idle()
        house.clock.advance(5)
        assert house.verified.objection("acme") is not None, "nobody has tested these"
        await house.passes(120)
        assert house.verified.objection("acme") is None
        assert len(house.pool.probed) == 2


async def test_a_secret_of_an_upstream_that_nobody_watches_is_no_reason_to_try_it(tmp_path: Path) -> None:
    async with house_of(tmp_path) as house:
        house.probes.secret_changed("acme")
        house.probes.look()
        await house.idle()
        assert house.pool.probed == []


async def test_a_mark_that_cannot_be_kept_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError("the disk is full")

    async with house_of(tmp_path, watched=("acme",)) as house:
        await changed_house(house)
        monkeypatch.setattr(house.marks, "record", refuse)
        house.probes.secret_changed("acme")
        house.probes.look()
        await house.idle()
    assert any("stays unverified: the disk is full" in event["what"] for event in house.log.events("note"))


async def test_a_probe_that_works_closes_the_breaker_though_a_message_is_finding_out_too(tmp_path: Path) -> None:
    async with house_of(tmp_path) as house:
        for number in range(3):
            house.breakers.record("acme", MessageId(str(number)), [DOWN])
        house.clock.advance(1000)
        assert house.breakers.admit("acme", MessageId("9")) is None, "it is the one to try"
        house.breakers.record_probe("acme", None)
        assert house.breakers.ready_at("acme") == 0.0
