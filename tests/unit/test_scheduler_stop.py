"""Stopping in the middle of a claim: what the spool is about to give out is given back or ended, never left claimed and in doubt."""

import asyncio
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from relay.clock import ManualClock
from relay.delivery.attempt import untried
from relay.spool.base import Claim, Lane, Next, Settlement, SpoolError
from tests.unit.delivery import Log
from tests.unit.test_scheduler import ACME, GLOBEX, CountingSpool, House


class SlowSpool(CountingSpool):
    """Gives out claims only once its gate is open, but claims them at once, as a commit does whose thread is not done yet."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.gate = asyncio.Event()
        self.broken: Lane | None = None
        self.asked_for: list[object] = []

    async def claim(self, lane: Lane, limit: int) -> Sequence[Claim]:
        if lane == self.broken:
            raise SpoolError("disk on fire")
        claims = await super().claim(lane, limit)
        self.asked_for.append(lane)
        await self.gate.wait()
        return claims

    async def overdue(self, limit: int) -> Sequence[Claim]:
        claims = await super().overdue(limit)
        self.asked_for.append("overdue")
        if claims:
            await self.gate.wait()
        return claims

    @property
    def claimed(self) -> list[str]:
        return [id for id, message in self._messages.items() if message.token is not None]


@pytest.fixture
async def house(tmp_path: Path) -> AsyncIterator[House]:
    clock = ManualClock()
    spool = SlowSpool(tmp_path, clock, backoff=lambda attempts: 60.0 * attempts)
    log = Log(tmp_path, clock)
    house = House(spool, clock, log)
    yield house
    spool.gate.set()
    if house.service is not None:
        house.service.cancel()
        await asyncio.gather(house.service, return_exceptions=True)
    await house.scheduler.abort()
    log.text()
    await spool.close()


async def stop(house: House) -> None:
    """As the relay does: no more attempts, then wait for those under way, then end the service."""
    spool = house.spool
    assert isinstance(spool, SlowSpool) and house.service is not None
    house.scheduler.stop()
    draining = asyncio.ensure_future(house.scheduler.drained())
    await house.turns()
    assert not draining.done(), "the spool would be closed now, with a claim still to come"
    spool.gate.set()
    async with asyncio.timeout(20):
        await draining
    house.service.cancel()
    await asyncio.gather(house.service, return_exceptions=True)
    await house.turns()


async def test_held_mail_that_is_being_given_up_is_not_left_claimed(house: House) -> None:
    spool = house.spool
    assert isinstance(spool, SlowSpool)
    await house.put(ACME)
    spool.gate.set()
    (claim,) = await spool.claim(ACME, 1)
    spool.gate.clear()
    held = Next(house.clock.now() + 10, ACME, counted=False, held="no route")
    await spool.settle(Settlement(claim, untried(claim), held, tried=False))
    house.clock.advance(11)
    spool.asked_for.clear()
    house.serve()
    await house.turns()
    assert spool.asked_for == ["overdue"]
    await stop(house)
    assert spool.claimed == []


async def test_a_claim_under_way_beside_one_that_failed_is_given_back(house: House) -> None:
    spool = house.spool
    assert isinstance(spool, SlowSpool)
    spool.broken = GLOBEX
    await house.put(ACME, GLOBEX, told=True)
    house.serve()
    await house.turns()
    assert ACME in spool.asked_for
    await stop(house)
    assert spool.claimed == []
