"""How long the certificates of upstreams are still good, as seen at each handshake: who renews them forgets it, and mail stops.

Only certificates that are verified are looked at, without which OpenSSL does not take them apart. An expired one needs no warning: it
fails.

State: for each host and port the certificate seen last, and when it was warned of.
"""

import ssl
from collections.abc import Mapping
from functools import lru_cache
from typing import Final, NamedTuple

from relay.clock import Clock
from relay.upstream.watch import Note

_DAY_SECONDS: Final = 86400.0

#: Monitoring plugins commonly warn at 14 days. ACME clients renew when a third of the lifetime is left: a certificate for six or for
#: forty-seven days is well in order until a quarter is left.
_WARN_SECONDS: Final = 14 * _DAY_SECONDS
_WARN_SHARE: Final = 0.25


class Validity(NamedTuple):
    """From when until when a certificate is good, in seconds since the epoch."""

    begins: float
    ends: float

    @property
    def worrying_from(self) -> float:
        """When it should have been renewed."""
        return self.ends - min(_WARN_SECONDS, _WARN_SHARE * (self.ends - self.begins))


def validity_of(certificate: Mapping[str, object] | None) -> Validity | None:
    """That of a certificate as `ssl.SSLSocket.getpeercert` gives it; None without TLS (None) or where it was not verified (empty)."""
    if not certificate:
        return None
    return _validity(str(certificate["notBefore"]), str(certificate["notAfter"]))


@lru_cache(1000)
def _validity(begins: str, ends: str) -> Validity:
    """Of dates as OpenSSL writes them, which take a while to read."""
    return Validity(float(ssl.cert_time_to_seconds(begins)), float(ssl.cert_time_to_seconds(ends)))


class Expiries:
    """Remembers certificates, and warns of one that expires soon once a day."""

    def __init__(self, clock: Clock, note: Note) -> None:
        self._clock = clock
        self._note = note
        self._seen: dict[tuple[str, int], Validity] = {}
        self._told: dict[tuple[str, int], float] = {}

    def saw(self, upstream: str, host: str, port: int, validity: Validity) -> None:
        """A handshake for `upstream`, one of those that send there."""
        place, now = (host, port), self._clock.now()
        self._seen[place] = validity
        if now < validity.worrying_from or now - self._told.get(place, 0.0) < _DAY_SECONDS:
            return
        self._told[place] = now
        days = int((validity.ends - now) / _DAY_SECONDS)
        soon = "today" if days < 1 else "tomorrow" if days == 1 else f"in {days} days"
        self._note("warning", f"upstream {upstream}: the certificate of {host}:{port} expires {soon}; it must be renewed there")

    def of(self, host: str, port: int) -> Validity | None:
        """The certificate that was seen there last."""
        return self._seen.get((host, port))
