"""How long upstreams' certificates are good: when a warning is due, how often it comes, and what people can ask."""

import time
from datetime import timedelta

import pytest

from relay.clock import ManualClock
from relay.upstream.expiry import Expiries, Validity
from relay.upstream.pool import Pool
from tests.support.certificates import Authority
from tests.support.upstream import ScriptedUpstream
from tests.system.upstreams import all_sent, outgoing, secured

DAY = timedelta(days=1).total_seconds()


class Case:
    def __init__(self) -> None:
        self.clock = ManualClock()
        self.notes: list[str] = []
        self.expiries = Expiries(self.clock, lambda level, what: self.notes.append(f"{level}: {what}"))

    def see(self, *, lifetime: float, left: float, host: str = "smtp.acme.example", upstream: str = "acme") -> Validity:
        """In days."""
        ends = self.clock.now() + left * DAY
        validity = Validity(ends - lifetime * DAY, ends)
        self.expiries.saw(upstream, host, 587, validity)
        return validity


@pytest.mark.parametrize(
    ("lifetime", "left", "when"),
    [
        (398, 15, ""),
        (398, 14, "in 14 days"),
        (398, 13.9, "in 13 days"),
        (90, 14.1, ""),
        (90, 2, "in 2 days"),
        (90, 1.5, "tomorrow"),
        (90, 0.5, "today"),
        (47, 12, ""),
        (47, 11, "in 11 days"),
        (6, 2, ""),
        (6, 1.4, "tomorrow"),
    ],
)
def test_a_warning_is_due_when_the_certificate_should_have_been_renewed(lifetime: float, left: float, when: str) -> None:
    case = Case()
    case.see(lifetime=lifetime, left=left)
    warning = f"warning: upstream acme: the certificate of smtp.acme.example:587 expires {when}; it must be renewed there"
    assert case.notes == ([warning] if when else [])


def test_it_comes_once_a_day_for_a_host_whoever_connects() -> None:
    case = Case()
    for left in (10.0, 9.9, 9.5, 9.1):
        case.see(lifetime=90, left=left)
        case.see(lifetime=90, left=left, upstream="globex")
    assert len(case.notes) == 1
    case.see(lifetime=90, left=9, host="smtp.globex.example")
    assert len(case.notes) == 2
    case.clock.advance(DAY)
    case.see(lifetime=90, left=9)
    assert len(case.notes) == 3


def test_the_last_certificate_is_remembered_for_people() -> None:
    case = Case()
    assert case.expiries.of("smtp.acme.example", 587) is None
    case.see(lifetime=90, left=3)
    renewed = case.see(lifetime=90, left=90)
    assert case.expiries.of("smtp.acme.example", 587) == renewed
    assert case.expiries.of("smtp.acme.example", 465) is None


@pytest.mark.both_loops
@pytest.mark.parametrize("security", ["starttls", "tls"])
async def test_each_handshake_is_looked_at(tls: Authority, security: str) -> None:
    notes: list[str] = []
    async with ScriptedUpstream(security=security, tls=tls.context(days=5)) as server:  # type: ignore[arg-type]
        upstream = secured(server, tls, security, host="localhost")
        pool = Pool(
            {"acme": upstream}, hostname="relay.example.net", clock=ManualClock(time.time()), note=lambda _, what: notes.append(what)
        )
        assert pool.certificates("acme") == {}
        assert all_sent(await pool.send("acme", outgoing()))
        await pool.close()
    (warning,) = notes
    assert f"localhost:{server.port} expires in 4 days" in warning
    (validity,) = pool.certificates("acme").values()
    assert 4.9 * DAY < validity.ends - time.time() <= 5 * DAY


async def test_a_certificate_that_is_not_verified_is_no_reason_to_warn(tls: Authority) -> None:
    notes: list[str] = []
    async with ScriptedUpstream(security="tls", tls=tls.context(days=-1)) as server:
        upstream = secured(server, tls, "tls", verify=False)
        pool = Pool(
            {"acme": upstream}, hostname="relay.example.net", clock=ManualClock(time.time()), note=lambda _, what: notes.append(what)
        )
        assert all_sent(await pool.send("acme", outgoing()))
        await pool.close()
    assert (notes, pool.certificates("acme")) == ([], {})
