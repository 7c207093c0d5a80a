"""Time: the machine's, and the one that tests move."""

import time

from relay.clock import Clock, ManualClock, SystemClock


def test_the_system_clock_tells_the_machines_time() -> None:
    clock: Clock = SystemClock()
    before, then, after = time.time(), clock.now(), time.time()
    assert before <= then <= after
    before, then, after = time.monotonic(), clock.monotonic(), time.monotonic()
    assert before <= then <= after


def test_a_manual_clock_stands_still_until_it_is_moved() -> None:
    clock: Clock = ManualClock(100.0)
    assert (clock.now(), clock.monotonic()) == (100.0, 0.0)
    assert (clock.now(), clock.monotonic()) == (100.0, 0.0)


def test_a_manual_clock_moves_both_times_by_the_same() -> None:
    clock = ManualClock(100.0)
    clock.advance(2.5)
    clock.advance(1.0)
    assert (clock.now(), clock.monotonic()) == (103.5, 3.5)
