"""The memory budget: what is taken is given back, and who finds none is refused instead of waiting."""

import pytest

from relay.listener.budget import Budget


def test_it_gives_what_it_has_and_no_more() -> None:
    budget = Budget(100)
    assert [budget.take(60), budget.take(41), budget.take(40), budget.take(1)] == [True, False, True, False]
    budget.give(60)
    assert (budget.taken, budget.take(60)) == (40, True)


def test_nothing_new_is_begun_with_what_is_left_for_messages_under_way() -> None:
    budget = Budget(160)
    assert budget.take(150) and not budget.spent
    assert budget.take(1) and budget.spent
    assert budget.take(9)
    budget.give(10)
    assert not budget.spent


def test_giving_back_more_than_was_taken_is_a_bug() -> None:
    budget = Budget(100)
    with pytest.raises(AssertionError):
        budget.give(1)
