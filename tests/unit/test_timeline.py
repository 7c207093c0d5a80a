"""When lanes are due: times, and parked lanes."""

from relay.delivery import timeline as module
from relay.delivery.timeline import Timeline
from relay.spool.base import Lane

ACME, OTHER, GLOBEX = Lane("acme", "acme"), Lane("acme", "other"), Lane("globex", "globex")


def test_a_parked_lane_is_not_due_before_its_time_whatever_is_added() -> None:
    timeline = Timeline()
    timeline.park(ACME, now=100.0, latest=130.0)
    timeline.add(ACME, 100.0)
    timeline.add(GLOBEX, 100.0)
    assert list(timeline.due(101.0)) == [GLOBEX]
    assert timeline.next() == 102.0
    assert set(timeline.due(102.0)) == {ACME}


def test_only_the_lanes_of_one_upstream_are_unparked() -> None:
    timeline = Timeline()
    for lane in (ACME, OTHER, GLOBEX):
        timeline.park(lane, now=100.0, latest=130.0)
    assert "acme" in timeline.parked
    timeline.unpark("acme")
    assert "acme" not in timeline.parked
    assert set(timeline.due(100.0)) == {ACME, OTHER}
    assert GLOBEX in set(timeline.due(102.0))


def test_the_more_lanes_are_parked_the_longer_and_those_that_came_out_do_not_count() -> None:
    timeline = Timeline()
    for number in range(100):
        timeline.park(Lane("acme", f"r{number}"), now=100.0, latest=1000.0)
    assert set(timeline.due(200.0)) == {Lane("acme", f"r{number}") for number in range(100)}
    timeline.park(ACME, now=200.0, latest=1000.0)
    assert list(timeline.due(202.0)) == [ACME]


def test_a_clock_that_is_set_back_ends_every_park() -> None:
    timeline = Timeline()
    timeline.park(ACME, now=100_000.0, latest=100_030.0)
    timeline.add(ACME, 50.0)  # as the spool tells it again within a minute
    assert list(timeline.due(100.0)) == [ACME]


def test_a_parked_lane_is_not_lost_when_old_times_are_swept_out() -> None:
    timeline = Timeline()
    timeline.park(ACME, now=100.0, latest=130.0)
    for number in range(2 * module._HINTS_LIMIT):
        timeline.add(GLOBEX, 1e6 - number)
    assert list(timeline.due(102.0)) == [ACME]
