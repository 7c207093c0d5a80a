"""The order of an upstream's hosts: as written, and for a while without those that have failed in front."""

from relay.clock import ManualClock
from relay.upstream.hosts import _BEHIND_SECONDS, Hosts

ABC = ("a.example", "b.example", "c.example")


class Case:
    def __init__(self) -> None:
        self.clock = ManualClock()
        self.notes: list[str] = []
        self.hosts = Hosts(self.clock, lambda level, what: self.notes.append(f"{level}: {what}"))

    def order(self, upstream: str = "acme") -> str:
        return "".join(host[0] for host in self.hosts.order(upstream, ABC))

    def fail(self, *hosts: str) -> None:
        for host in hosts:
            self.hosts.failed("acme", f"{host}.example", "connection refused")


def test_hosts_are_asked_as_written_until_one_fails() -> None:
    case = Case()
    assert case.order() == "abc"
    case.fail("a")
    assert case.order() == "bca"
    case.fail("b")
    assert case.order() == "cab"


def test_where_all_have_failed_they_are_asked_as_written() -> None:
    case = Case()
    case.fail("c", "a", "b")
    assert case.order() == "abc"


def test_what_one_upstream_has_seen_changes_nothing_for_another() -> None:
    case = Case()
    case.fail("a")
    assert case.order("globex") == "abc"


def test_a_failed_host_has_its_place_back_after_a_while_for_one_who_asks() -> None:
    case = Case()
    case.fail("a")
    case.clock.advance(_BEHIND_SECONDS - 1)
    assert case.order() == "bca"
    case.clock.advance(1)
    assert case.order() == "abc"
    assert case.order() == "bca", "the others do not wait for the answer"
    case.hosts.answered("acme", "a.example")
    assert case.order() == "abc"


def test_a_failure_is_told_once_and_so_is_its_end() -> None:
    case = Case()
    case.fail("a")
    case.clock.advance(_BEHIND_SECONDS)
    case.fail("a", "a")
    assert case.notes == ["warning: upstream acme: a.example fails and is asked after the other hosts for now: connection refused"]
    case.hosts.answered("acme", "a.example")
    case.hosts.answered("acme", "a.example")
    case.hosts.answered("acme", "b.example")
    assert case.notes[1:] == ["info: upstream acme: a.example works again"]
