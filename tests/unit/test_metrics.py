"""The counters: their names, their labels, and that two relays in one process do not share them."""

from prometheus_client import generate_latest

from relay.observe.metrics import Metrics


def test_what_is_counted_has_the_names_that_dashboards_depend_on() -> None:
    metrics = Metrics()
    metrics.degraded(route="acme", upstream="house")
    metrics.degraded(route="acme", upstream="house")
    metrics.recovered(route="acme", upstream="acme")
    metrics.breaker_opened(upstream="acme", kind="connection")
    metrics.breaker_closed(upstream="acme", kind="connection")
    metrics.refused(listener="local", reason="size")
    lines = [line for line in generate_latest(metrics.registry).decode().splitlines() if "_total{" in line]
    assert lines == [
        'relay_degraded_total{route="acme",upstream="house"} 2.0',
        'relay_recovered_total{route="acme",upstream="acme"} 1.0',
        'relay_breaker_opened_total{kind="connection",upstream="acme"} 1.0',
        'relay_breaker_closed_total{kind="connection",upstream="acme"} 1.0',
        'relay_refused_total{listener="local",reason="size"} 1.0',
    ]


def test_each_relay_counts_on_its_own() -> None:
    first, second = Metrics(), Metrics()
    first.degraded(route="acme", upstream="house")
    assert b"route=" not in generate_latest(second.registry)
