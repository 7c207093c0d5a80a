"""The arithmetic of rates: what may go, and when the next may, against what was really sent in every window."""

from bisect import bisect_left
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from relay.clock import ManualClock
from relay.config.quantities import Rate
from relay.delivery.limits import Limit, Quota, Spacing, limit_of

HOUR, DAY = 3600, 86400


def full_speed(limit: Limit, clock: ManualClock, *, seconds: float, late: float = 0.0) -> list[float]:
    """When transactions go that go as soon as they may, or so much later."""
    begun, times = clock.monotonic(), []
    while clock.monotonic() < begun + seconds:
        if limit.room() > 0:
            limit.charge(1)
            times.append(clock.monotonic() - begun)
        else:
            clock.advance(max(limit.wait(), 0.0005) + late)
    return [time for time in times if time < seconds]


def most_in_any(times: list[float], seconds: float) -> int:
    """The most of them in any window that is half open."""
    return max(bisect_left(times, start + seconds - 1e-6) - place for place, start in enumerate(times))


@pytest.mark.parametrize(
    ("rate", "burst"),
    [(Rate(1, 1), 1), (Rate(2, 1), 2), (Rate(5, 1), 5), (Rate(100, 1), 100), (Rate(30, 60), 1), (Rate(600, 60), 10), (Rate(1, 60), 1)],
)
def test_a_rate_is_kept_with_a_burst_of_one_second(rate: Rate, burst: int) -> None:
    clock = ManualClock()
    limit = limit_of(rate, clock, empty_at=-1000.0)
    assert limit.room() == burst
    times = full_speed(limit, clock, seconds=300)
    assert len([time for time in times if time == 0.0]) == burst
    wanted = 300 * rate.number / rate.seconds
    assert wanted <= len(times) <= wanted + burst
    assert most_in_any(times, 60) <= max(1, 60 * rate.number / rate.seconds) + burst - 1


@pytest.mark.parametrize("rate", [Rate(5, 1), Rate(2, 1), Rate(30, 60)])
def test_a_rate_is_kept_within_two_percent_also_where_everything_is_a_little_late(rate: Rate) -> None:
    clock = ManualClock()
    limit = limit_of(rate, clock, empty_at=0.0)
    times = full_speed(limit, clock, seconds=60, late=0.005)
    assert len(times) == pytest.approx(60 * rate.number / rate.seconds, rel=0.02, abs=1)


def test_after_a_start_nothing_goes_that_may_have_gone_before_it() -> None:
    clock = ManualClock()
    clock.advance(100)
    limit = limit_of(Rate(30, 60), clock, empty_at=clock.monotonic())
    assert limit.room() == 0
    assert limit.wait() == pytest.approx(2.0)
    clock.advance(2)
    assert limit.room() == 1
    clock.advance(3600)
    assert limit.room() == 1


def test_the_burst_comes_back_with_time_and_no_further() -> None:
    clock = ManualClock()
    limit = limit_of(Rate(5, 1), clock, empty_at=-10.0)
    limit.charge(5)
    rooms = []
    for _ in range(8):
        rooms.append(limit.room())
        clock.advance(0.2)
    assert rooms == [0, 1, 2, 3, 4, 5, 5, 5]


@pytest.mark.parametrize("rate", [Rate(5, 1), Rate(30, 60), Rate(50, HOUR), Rate(2000, DAY)])
def test_what_did_not_go_is_given_back(rate: Rate) -> None:
    clock = ManualClock()
    limit = limit_of(rate, clock, empty_at=-1000.0)
    before = limit.room()
    for _ in range(100):
        limit.charge(1)
        limit.charge(-1)
    assert limit.room() == before
    limit.charge(-1)
    assert limit.room() <= before + 1
    clock.advance(2 * DAY)
    assert limit.room() == before


@pytest.mark.parametrize("rate", [Rate(5, 1), Rate(30, 60), Rate(50, HOUR)])
def test_what_a_charge_exceeds_is_owed(rate: Rate) -> None:
    clock = ManualClock()
    limit = limit_of(rate, clock, empty_at=-1000.0)
    limit.charge(3 * rate.number)
    assert limit.room() < 0
    waited = limit.wait()
    assert waited >= 2 * rate.seconds - 1
    clock.advance(waited - 0.001)
    assert limit.room() <= 0
    clock.advance(0.002)
    assert limit.room() >= 1


@pytest.mark.parametrize("rate", [Rate(50, HOUR), Rate(2000, DAY), Rate(1, HOUR)])
def test_a_quota_goes_at_once_and_comes_back_when_its_window_has_passed(rate: Rate) -> None:
    clock = ManualClock()
    limit = limit_of(rate, clock, empty_at=0.0)
    assert (limit.room(), limit.wait()) == (rate.number, 0.0)
    limit.charge(rate.number)
    assert limit.room() == 0
    waited = limit.wait()
    assert rate.seconds <= waited <= rate.seconds * 25 / 24
    clock.advance(waited - 0.01)
    assert limit.room() == 0
    clock.advance(0.02)
    assert limit.room() == rate.number


@given(st.lists(st.tuples(st.floats(0, 900), st.integers(1, 4)), max_size=60), st.integers(1, 12))
def test_no_window_has_more_than_its_quota_whatever_comes_when(coming: list[tuple[float, int]], number: int) -> None:
    clock = ManualClock()
    limit, sent = Quota(number, HOUR, clock.now), []
    for pause, count in coming:
        clock.advance(pause)
        for _ in range(min(count, limit.room())):
            limit.charge(1)
            sent.append(clock.now())
        if limit.room() <= 0:
            assert limit.wait() > 0
        else:
            assert limit.wait() == 0.0
    assert not sent or most_in_any(sent, HOUR) <= number


@given(st.lists(st.integers(1, 30), min_size=1, max_size=20), st.integers(1, 10))
def test_debts_are_paid_and_the_wait_is_true(charges: list[int], number: int) -> None:
    clock = ManualClock()
    limit = Quota(number, HOUR, clock.now)
    for count in charges:
        clock.advance(1000)
        limit.charge(count)
    for _ in range(1000):
        if limit.room() > 0:
            break
        clock.advance(limit.wait() + 0.01)
    assert limit.room() > 0
    clock.advance(HOUR * (1 + max(charges) / number) * 2)
    assert limit.room() == number


def test_a_quota_survives_a_clock_that_is_set_back() -> None:
    clock = ManualClock()
    limit = Quota(10, HOUR, clock.now)
    for _ in range(5):
        limit.charge(2)
        clock.advance(100)
    clock.step(-10 * DAY)
    assert limit.room() == 0
    assert limit.wait() <= HOUR * 25 / 24
    clock.advance(limit.wait() + 1)
    assert limit.room() == 10


def test_a_quota_is_restored_as_it_was() -> None:
    clock = ManualClock()
    first, second = Quota(10, HOUR, clock.now), Quota(10, HOUR, clock.now)
    for count in (3, 4, 2):
        second.restore(first.slice_start(), count)
        first.charge(count)
        clock.advance(400)
    while first.room() < 10:
        assert (first.room(), first.wait()) == (second.room(), second.wait())
        clock.advance(100)
    assert second.room() == 10


def test_waits_are_never_too_short() -> None:
    clock = ManualClock()
    limit = Spacing(7, 3, clock.monotonic, empty_at=-10.0)
    times = full_speed(limit, clock, seconds=100)
    assert min(later - earlier for earlier, later in pairwise(times[3:])) > 3 / 7 - 0.001
