"""The pace of an upstream: its limits together, how it slows down when it is asked to, and how it comes back."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from relay.clock import ManualClock
from relay.delivery.pace import Pace, Paces
from relay.mail.reply import Reply
from relay.observe.metrics import Metrics
from relay.spool.base import Used
from tests.unit.delivery import Log, config_of

SLOW_DOWN = Reply(454, "4.7.0", "slow down")


class House:
    """Paces of one upstream, `acme`, with these limits."""

    def __init__(self, directory: Path, *, retry: Any = None, **limits: Any) -> None:
        self.clock = ManualClock()
        self.log = Log(directory, self.clock)
        self.metrics = Metrics()
        self.config = config_of(upstreams={"acme": {"limits": limits}}, **({"retry": retry} if retry else {}))
        self.restart()

    def restart(self) -> None:
        self.paces = Paces(self.config, self.log.journal, self.metrics, self.clock)

    @property
    def pace(self) -> Pace:
        pace = self.paces.of("acme")
        assert pace is not None
        return pace

    def slow_down(self, *, observed: float = 1.0, connections: int = 4) -> Pace:
        return self.paces.slow_down("acme", SLOW_DOWN, observed=observed, connections=connections)

    def succeed_for(self, minutes: int) -> list[str]:
        """One success a minute; the pace after each, until there is none."""
        seen = []
        for _ in range(minutes):
            self.clock.advance(60)
            if (pace := self.paces.of("acme")) is None or pace.slowed is None:
                break
            self.paces.speed_up("acme")
            seen.append(pace.pacing().pace if pace.slowed is not None else "")  # type: ignore[redundant-expr]
        return seen

    def throttled(self) -> float:
        return self.metrics.registry.get_sample_value("relay_throttled_total", {"upstream": "acme"}) or 0.0


@pytest.fixture
def houses(tmp_path: Path) -> Iterator[Any]:
    made: list[House] = []

    def make(**keys: Any) -> House:
        made.append(House(tmp_path, **keys))
        return made[-1]

    yield make
    for house in made:
        house.log.text()


# -- limits ----------------------------------------------------------------------------------------------------------------


def test_an_upstream_without_limits_has_no_pace(houses: Any) -> None:
    house = houses()
    assert house.paces.of("acme") is None
    assert house.paces.of("nobody") is None
    assert house.paces.pacings() == []
    assert house.paces.restored


def test_the_scarcest_of_several_limits_decides(houses: Any) -> None:
    house = houses(rate=["5/s", "12/h"], recipient_rate="100/h")
    house.paces.restore([])
    house.clock.advance(100)
    pace = house.pace
    assert pace.room() == 5
    pace.charge(5, 5)
    assert pace.room() == 0
    assert pace.wait() == pytest.approx(0.2)
    house.clock.advance(10)
    assert pace.room() == 5
    pace.charge(5, 5)
    house.clock.advance(10)
    assert pace.room() == 2
    pace.charge(1, 90)
    assert pace.room() == 0
    assert pace.wait() > 3000
    assert not pace.owes
    pace.charge(0, 1)
    assert pace.owes
    assert [(limit, left) for limit, left in pace.pacing().limits] == [("5/s", 4), ("12/h", 1), ("100/h recipients", 0)]


def test_quotas_are_known_again_after_a_restart(houses: Any) -> None:
    house = houses(rate=["50/h", "2000/d"], recipient_rate="100/d")
    assert not house.paces.restored
    house.paces.restore([])
    stored: list[Used] = []
    for _ in range(4):
        house.pace.charge(10, 20)
        stored += house.pace.used(10, 20)
        house.clock.advance(300)
    assert {used.seconds for used in stored} == {3600, 86400}
    before = house.pace.pacing()
    house.restart()
    assert not house.paces.restored
    house.paces.restore([*stored, Used("gone", 3600, stored[0].start, 1, 1), Used("acme", 60, 0, 9, 9)])
    assert house.pace.pacing() == before
    assert (house.pace.room(), house.paces.restored) == (10, True)


def test_only_quotas_are_stored(houses: Any) -> None:
    house = houses(rate=["5/s", "30/m"], recipient_rate="100/m")
    assert house.pace.used(1, 1) == ()
    assert house.paces.restored


# -- slower ----------------------------------------------------------------------------------------------------------------


def test_a_request_to_slow_down_halves_pace_and_connections_and_pauses(houses: Any) -> None:
    house = houses(rate="10/s", connections=5)
    pace = house.slow_down(connections=5)
    state = pace.pacing()
    assert (state.pace, state.connections, state.pause_seconds, state.reply) == ("5/s", 2, 60.0, str(SLOW_DOWN))
    assert (pace.room(), pace.wait()) == (0, 60.0)
    house.clock.advance(60)
    assert pace.room() == 1, "no burst"
    (event,) = house.log.events("throttled")
    assert (event["upstream"], event["reply"], event["level"]) == ("acme", str(SLOW_DOWN), "warning")
    assert (event["pace"], event["next"]) == ("5/s over 2 connections", "in 60 s")
    assert house.throttled() == 1


def test_what_other_sessions_hear_meanwhile_changes_nothing(houses: Any) -> None:
    house = houses(rate="10/s")
    first = house.slow_down().pacing()
    for _ in range(3):
        house.clock.advance(10)
        house.slow_down()
    house.paces.speed_up("acme")  # it had begun before
    house.clock.advance(30)
    assert house.pace.pacing() == first._replace(wait_seconds=0.0, pause_seconds=0.0, limits=(("10/s", 10),))
    assert (len(house.log.events("throttled")), house.throttled()) == (1, 1)


def test_where_no_rate_is_configured_the_pace_of_the_last_minute_is_halved(houses: Any) -> None:
    house = houses(connections=10)
    assert house.slow_down(observed=4.0, connections=7).pacing()[3:6] == (60.0, "2/s", 3)


def test_hardly_any_mail_is_no_pace_to_halve(houses: Any) -> None:
    house = houses()
    assert house.slow_down(observed=0.001, connections=1).pacing()[4:6] == ("10/m", 1)


def test_a_quota_is_no_pace_to_halve(houses: Any) -> None:
    house = houses(rate="2000/d")
    assert house.slow_down(observed=4.0).pacing().pace == "2/s"


def test_without_a_success_between_the_pauses_grow_up_to_the_longest_wait_for_a_retry(houses: Any) -> None:
    house = houses(rate="10/s", connections=8, retry={"first": "1m", "max": "15m", "expire": "4d"})
    states = []
    for _ in range(8):
        states.append(house.slow_down().pacing())
        house.clock.advance(states[-1].pause_seconds)
    assert [state.pause_seconds for state in states] == [60, 120, 240, 480, 900, 900, 900, 900]
    assert (states[-1].pace, states[-1].connections) == ("5/s", 1)
    assert house.throttled() == 8
    house.paces.speed_up("acme")
    assert house.slow_down().pacing()[3:6] == (60.0, "2.5/s", 1)


def test_the_pace_has_a_floor(houses: Any) -> None:
    house = houses(rate="1/s")
    for _ in range(20):
        house.slow_down()
        house.clock.advance(60)
        house.paces.speed_up("acme")
    assert house.slow_down().pacing().pace == "1/m"


# -- faster ----------------------------------------------------------------------------------------------------------------


def test_success_brings_it_back_to_its_limit_step_by_step(houses: Any) -> None:
    house = houses(rate="10/s", connections=4)
    house.slow_down(connections=4)
    house.clock.advance(60)
    assert house.succeed_for(20) == ["6.25/s", "7.81/s", "9.77/s", ""]
    assert house.pace.slowed is None
    house.clock.advance(10)
    assert house.pace.room() == 10
    assert [event["what"] for event in house.log.events("note")] == ["upstream acme is back at its limit of 10/s"]


def test_success_brings_it_back_to_no_limit_where_none_is_configured(houses: Any) -> None:
    house = houses()
    house.slow_down(observed=1.0)
    house.clock.advance(60)
    seen = house.succeed_for(30)
    assert (seen[0], seen[-2]) == ("37.5/m", "3.73/s")
    assert len(seen) == 10
    assert house.paces.of("acme") is None
    assert [event["what"] for event in house.log.events("note")] == ["upstream acme is back at its full pace"]


def test_many_successes_at_once_are_one_step(houses: Any) -> None:
    house = houses(rate="10/s")
    house.slow_down()
    house.clock.advance(121)
    for _ in range(100):
        house.paces.speed_up("acme")
    assert house.pace.pacing().pace == "6.25/s"


def test_connections_come_back_too(houses: Any) -> None:
    house = houses(rate="10/s", connections=20)
    house.slow_down(connections=20)
    house.clock.advance(60)
    seen = []
    while (slowed := house.pace.slowed) is not None:
        seen.append(int(slowed.connections))
        house.clock.advance(60)
        house.paces.speed_up("acme")
    assert seen == [10, 12, 15, 19]


def test_somebody_may_end_the_pause(houses: Any) -> None:
    house = houses(rate="10/s")
    house.clock.advance(10)
    house.pace.resume()  # which is none yet
    pace = house.slow_down()
    pace.resume()
    assert (pace.pause(), pace.room()) == (0.0, 1)
