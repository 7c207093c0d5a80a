"""Counters of what happens rarely and must not be missed, in a registry of their own. Who serves them is decided elsewhere.

State: the counters. Laws: names begin with `relay_`; labels are names from the configuration, never an address; nothing that happens
to every message is counted here.
"""

from prometheus_client import CollectorRegistry, Counter, Gauge


class Metrics:
    """The counters of one relay."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()

        def counter(name: str, what: str, *labels: str) -> Counter:
            return Counter(name, what, labels, registry=self.registry)

        self._degraded = counter("relay_degraded", "Times that a route began to use a fallback.", "route", "upstream")
        self._recovered = counter("relay_recovered", "Times that a degraded route's own upstream took mail again.", "route", "upstream")
        self._opened = counter("relay_breaker_opened", "Times that an upstream was given up for a while.", "upstream", "kind")
        self._closed = counter("relay_breaker_closed", "Times that such an upstream dealt with mail again.", "upstream", "kind")
        self._probes = counter("relay_probes", "Upstreams tried without mail, and what came of it.", "upstream", "status")
        works = "Whether the last probe of an upstream succeeded: 1 or 0."
        self._probe_works = Gauge("relay_probe_works", works, ["upstream"], registry=self.registry)
        self._throttled = counter("relay_throttled", "Times that an upstream asked us to slow down, and we did.", "upstream")
        self._refused = counter("relay_refused", "Clients and mail refused, and sessions cut off at a limit.", "listener", "reason")

    def degraded(self, *, route: str, upstream: str) -> None:
        """`upstream`: the fallback that is used."""
        self._degraded.labels(route, upstream).inc()

    def recovered(self, *, route: str, upstream: str) -> None:
        self._recovered.labels(route, upstream).inc()

    def refused(self, *, listener: str, reason: str) -> None:
        """`reason`: one of a few words, such as connections or size."""
        self._refused.labels(listener, reason).inc()

    def throttled(self, *, upstream: str) -> None:
        self._throttled.labels(upstream).inc()

    def probed(self, *, upstream: str, works: bool) -> None:
        self._probes.labels(upstream, "ok" if works else "failed").inc()
        self._probe_works.labels(upstream).set(works)

    def breaker_opened(self, *, upstream: str, kind: str) -> None:
        """`kind`: connection or credential."""
        self._opened.labels(upstream, kind).inc()

    def breaker_closed(self, *, upstream: str, kind: str) -> None:
        self._closed.labels(upstream, kind).inc()
