"""The gate of a listener: networks, and how many at once."""

from ipaddress import ip_network

import pytest

from relay.listener.access import Access


def gate(*networks: str, connections: int = 10) -> Access:
    return Access(tuple(ip_network(network) for network in networks), connections=connections)


@pytest.mark.parametrize(
    ("networks", "client", "enters"),
    [
        (("127.0.0.0/8",), "127.0.0.1", True),
        (("127.0.0.0/8",), "127.255.255.254", True),
        (("127.0.0.0/8",), "128.0.0.1", False),
        (("127.0.0.0/8",), "::1", False),
        (("::1/128",), "::1", True),
        (("::1/128",), "0:0:0:0:0:0:0:1", True),
        (("10.0.0.0/8",), "::ffff:10.1.2.3", True),
        (("10.0.0.0/8",), "::ffff:11.1.2.3", False),
        (("10.0.0.0/8", "192.0.2.7/32"), "192.0.2.7", True),
        (("10.0.0.0/8", "192.0.2.7/32"), "192.0.2.8", False),
        (("fe80::/10",), "fe80::1%eth0", True),
        (("fe80::/10",), "fd00::1%eth0", False),
        (("0.0.0.0/0",), "203.0.113.9", True),
        (("0.0.0.0/0",), "2001:db8::1", False),
        ((), "127.0.0.1", False),
        ((), "uid:1000", True),
        (("127.0.0.0/8",), "unix", False),
    ],
)
def test_only_allowed_networks_enter(networks: tuple[str, ...], client: str, enters: bool) -> None:
    access = gate(*networks)
    for _ in range(2):  # the second answer comes from memory
        refusal = access.enter(client)
        assert (refusal is None) is enters
        assert refusal is None or str(refusal) == "554 5.7.1 Access denied"


def test_over_the_limit_is_temporary_and_ends_when_one_leaves() -> None:
    access = gate("127.0.0.0/8", connections=2)
    assert [access.enter("127.0.0.1"), access.enter("127.0.0.2")] == [None, None]
    assert str(access.enter("127.0.0.1")) == "421 4.7.0 Too many connections"
    access.leave("127.0.0.1")
    assert access.enter("127.0.0.3") is None
    assert access.enter("127.0.0.1") is not None


def test_whoever_is_not_allowed_is_not_counted_and_hears_so_also_when_it_is_full() -> None:
    access = gate("127.0.0.0/8", connections=1)
    for _ in range(5):
        assert str(access.enter("192.0.2.1")).startswith("554")
    assert access.enter("127.0.0.1") is None
    assert str(access.enter("192.0.2.1")).startswith("554")


def test_a_probe_may_come_from_anywhere_and_is_counted() -> None:
    access = gate("192.0.2.0/24", connections=1)
    assert access.enter("10.9.9.9", probe=True) is None
    assert str(access.enter("10.9.9.9", probe=True)).startswith("421")
    access.leave("10.9.9.9")
    assert str(access.enter("10.9.9.9")).startswith("554")


def test_one_client_has_its_own_limit_and_others_theirs() -> None:
    access = Access((ip_network("127.0.0.0/8"),), connections=4, per_client=2)
    assert [access.enter("127.0.0.1") for _ in range(2)] == [None, None]
    assert str(access.enter("127.0.0.1")) == "421 4.7.0 Too many connections from one client"
    assert [access.enter("127.0.0.2") for _ in range(2)] == [None, None]
    assert str(access.enter("127.0.0.2")) == "421 4.7.0 Too many connections"
    access.leave("127.0.0.1")
    assert str(access.enter("127.0.0.2")) == "421 4.7.0 Too many connections from one client"
    assert access.enter("127.0.0.1") is None


def test_users_of_a_unix_socket_have_a_limit_each() -> None:
    access = Access((), connections=10, per_client=1)
    assert [access.enter("uid:0"), access.enter("uid:1000")] == [None, None]
    assert str(access.enter("uid:1000")).startswith("421")


def test_clients_that_have_left_are_forgotten() -> None:
    """A listener meets more addresses in a year than there is memory for."""
    access = Access((ip_network("10.0.0.0/8"),), connections=5, per_client=3)
    for number in range(10_000):
        client = f"10.0.{number >> 8}.{number & 255}"
        assert access.enter(client) is None and access.enter(client) is None
        access.leave(client)
        access.leave(client)
    assert (access._open, access._open_by) == (0, {})
