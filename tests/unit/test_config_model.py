"""The model: defaults of the contract, shorthand forms, and what one value may be."""

from ipaddress import ip_network
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from relay.config import machine, quantities, values
from relay.config.model import (
    Config,
    Fallback,
    FromRewrite,
    Listener,
    Retry,
    Rewrite,
    Route,
    effective_rewrite,
)
from relay.config.secrets import Secret
from relay.config.upstreams import Timeouts, Upstream


def upstream(**keys: Any) -> Upstream:
    return Upstream.model_validate({"host": "smtp.acme.example", **keys})


def rewrite(**keys: Any) -> Rewrite:
    return Rewrite.model_validate(keys)


def test_the_defaults_are_those_of_the_contract() -> None:
    config = Config(hostname="relay.example.net")
    (listener,) = config.listeners
    acme = upstream()
    assert config.domain == "relay.example.net"
    assert (listener.bind, listener.name, listener.host, listener.port) == ("127.0.0.1:2525", "127.0.0.1:2525", "127.0.0.1", 2525)
    assert listener.networks == (ip_network("127.0.0.0/8"), ip_network("::1/128"))
    assert (listener.message_size, listener.recipients, listener.connections) == (50_000_000, 1000, 1000)
    assert (acme.security, acme.port, acme.verify, acme.auth, acme.senders, acme.null_sender) == (
        "starttls",
        587,
        True,
        "auto",
        (),
        "keep",
    )
    assert acme.limits.model_dump() == {
        "connections": 5, "rate": (), "recipient_rate": (), "recipients": 100, "messages_per_connection": 500,
    }  # fmt: skip
    assert acme.timeouts.model_dump() == {"connect": 30, "command": 60, "data": 60, "final": 600}
    assert config.retry.model_dump() == {"first": 60, "max": 3600, "expire": 4 * 86400, "warn_after": None}
    assert (config.spool.keep_log, config.shutdown_timeout) == (30 * 86400, 20)
    assert (config.log.format, config.log.level) == ("text", "info")


@pytest.mark.parametrize(("security", "port"), [("starttls", 587), ("tls", 465), ("none", 25)])
def test_the_port_follows_security(security: str, port: int) -> None:
    assert upstream(security=security).port == port
    assert upstream(security=security, port=2525).port == 2525


def test_the_domain_may_be_unset() -> None:
    assert Config(hostname="relay.example.net", domain=None).domain is None
    assert Config(hostname="relay.example.net", domain="Bücher.example").domain == "xn--bcher-kva.example"


def test_the_hostname_is_the_machines(monkeypatch: pytest.MonkeyPatch) -> None:
    for qualified, short, expected in (("vm.example.net", "vm", "vm.example.net"), ("localhost", "vm", "vm")):
        machine.default_hostname.cache_clear()
        monkeypatch.setattr("socket.getfqdn", lambda name=qualified: name)
        monkeypatch.setattr("socket.gethostname", lambda name=short: name)
        assert Config().hostname == Config().domain == expected
    machine.default_hostname.cache_clear()


@pytest.mark.parametrize(
    ("keys", "environ", "expected"),
    [
        ({}, {}, "relay-data/control.sock"),
        ({}, {"STATE_DIRECTORY": "/var/lib/relay"}, "/var/lib/relay/control.sock"),
        ({}, {"STATE_DIRECTORY": "/var/lib/relay", "RUNTIME_DIRECTORY": "/run/relay:/run/other"}, "/run/relay/control.sock"),
        ({"spool": {"directory": "/srv/spool"}}, {}, "/srv/spool/control.sock"),
        ({"spool": {"directory": "/srv/spool"}, "control": "/run/c"}, {"RUNTIME_DIRECTORY": "/run/relay"}, "/run/c"),
        ({"control": "/" + "x" * 106}, {}, "/" + "x" * 106),
    ],
)
def test_the_control_socket_has_a_place(keys: dict[str, Any], environ: dict[str, str], expected: str) -> None:
    assert Config.model_validate({"hostname": "h.example", **keys}, context={"environ": environ}).control == Path(expected)


@pytest.mark.parametrize("path", ["/" + "x" * 107, "/" + "é" * 53 + "x"])
def test_a_path_that_no_socket_can_have_is_refused_in_octets(path: str) -> None:
    with pytest.raises(ValidationError, match="has 108 bytes, a socket's path at most 107"):
        Config(hostname="h.example", control=Path(path))


def test_one_value_stands_for_a_list() -> None:
    route = Route.model_validate({"sender": "Acme.example", "recipient": "a@B.example", "client": "10.0.0.1", "listener": "local"})
    assert (route.sender, route.recipient, route.listener) == (("acme.example",), ("a@b.example",), ("local",))
    assert route.client == (ip_network("10.0.0.1/32"),)
    assert upstream(host=["a.example", "::1"]).host == ("a.example", "::1")
    assert Config.model_validate({"aliases": {"Root": "Ops@Acme.example"}}).aliases == {"root": ("Ops@acme.example",)}


@pytest.mark.parametrize("written", ["house", ["house"], {"upstream": "house"}, [{"upstream": "house"}]])
def test_a_fallback_has_four_forms(written: Any) -> None:
    assert Route.model_validate({"upstream": "acme", "fallback": written}).fallback == (Fallback(upstream="house"),)


def test_a_route_without_a_name_is_called_by_its_place() -> None:
    config = Config.model_validate({"routes": [{"upstream": "a"}, {"upstream": "a", "name": "b"}, {"reject": "no"}]})
    assert [route.name for route in config.routes] == ["routes[0]", "b", "routes[2]"]


@pytest.mark.parametrize(
    ("written", "name", "address"),
    [
        ("Acme Billing <no-reply@acme.example>", "Acme Billing", "no-reply@acme.example"),
        ('"Billing, Acme \\"A\\"" <no-reply@acme.example>', 'Billing, Acme "A"', "no-reply@acme.example"),
        ("<no-reply@acme.example>", None, "no-reply@acme.example"),
        ("No-Reply@ACME.example", None, "No-Reply@acme.example"),
        ({"name": "Acme"}, "Acme", None),
        ({"address": "a@bücher.example"}, None, "a@xn--bcher-kva.example"),
        ({"name": "Acme", "address": "a@b.example"}, "Acme", "a@b.example"),
    ],
)
def test_a_from_has_many_forms(written: Any, name: str | None, address: str | None) -> None:
    assert rewrite(**{"from": written}).from_ == FromRewrite(name=name, address=address)


@pytest.mark.parametrize("written", ["Acme", "Acme <acme>", "Acme <a@b.example", "a@b.example, c@d.example", {}, "", {"name": "a\nb"}])
def test_a_from_that_is_none_is_refused(written: Any) -> None:
    with pytest.raises(ValidationError):
        rewrite(**{"from": written})


def test_a_fallbacks_rewrite_lies_over_the_routes() -> None:
    route = Route.model_validate(
        {
            "upstream": "acme",
            "rewrite": {
                "from": "Acme <a@acme.example>",
                "bcc": "c@acme.example",
                "set_headers": {"X-A": "1"},
                "remove_headers": "X-B",
            },
            "fallback": [
                {"upstream": "house", "rewrite": {"from": "House <h@house.example>", "bcc": None, "set_headers": None}},
                "plain",
                {"upstream": "bare", "rewrite": {"from": None, "remove_headers": None}},
            ],
        }
    )
    assert effective_rewrite(route, "acme") == route.rewrite
    assert effective_rewrite(route, "plain") == route.rewrite
    house = effective_rewrite(route, "house")
    assert (house.from_, house.bcc, house.set_headers) == (FromRewrite(name="House", address="h@house.example"), None, {})
    assert house.remove_headers == ("X-B",)
    bare = effective_rewrite(route, "bare")
    assert (bare.from_, bare.remove_headers, bare.bcc) == (None, (), "c@acme.example")


def test_a_fallback_rewrites_where_the_route_does_not() -> None:
    route = Route(upstream="acme", fallback=(Fallback(upstream="house", rewrite=rewrite(bcc="a@b.example")),))
    assert effective_rewrite(route, "acme") == Rewrite()
    assert effective_rewrite(route, "house").bcc == "a@b.example"


def test_the_model_can_be_built_by_code() -> None:
    config = Config(
        upstreams={"acme": Upstream(host=("127.0.0.1",), port=2500, security="none", username="a", password=Secret("b"))},
        listeners=(Listener(bind="[::1]:0", message_size=1000),),
        routes=(Route(upstream="acme"),),
        retry=Retry(first=0.1, max=1, expire=2),
    )
    assert (config.listeners[0].host, config.listeners[0].port) == ("::1", 0)
    assert Timeouts(connect=0.5).connect == 0.5
    assert config.retry.first == 0.1


def test_the_model_is_frozen_and_shows_no_secret() -> None:
    acme = upstream(username="a", password="hunter2")
    with pytest.raises(ValidationError):
        acme.port = 25  # type: ignore[misc]
    assert "hunter2" not in f"{acme!r} {acme} {acme.model_dump()}"
    with pytest.raises(ValidationError) as caught:
        upstream(username="a", password="hunter2" + "x" * 256)
    assert "hunter2" not in str(caught.value)


def test_header_names_ignore_case() -> None:
    with pytest.raises(ValidationError, match="x-a is there twice"):
        rewrite(set_headers={"X-A": "1", "x-a": "2"})


@pytest.mark.parametrize(
    ("written", "seconds"),
    [("500ms", 0.5), ("30s", 30), ("1.5m", 90), ("2h", 7200), ("4d", 345_600), ("0s", 0), ("5 m", 300), (0.25, 0.25)],
)
def test_durations_have_units(written: Any, seconds: float) -> None:
    assert quantities.parse_duration(written) == pytest.approx(seconds)


@pytest.mark.parametrize("written", ["30", "", "s", "-1s", "1h30m", "1w", "1S", None, True, [], "1e3s", "9" * 20 + "d"])
def test_what_is_no_duration_is_refused(written: Any) -> None:
    with pytest.raises(ValueError, match="must be a duration"):
        quantities.parse_duration(written)


@pytest.mark.parametrize(
    ("written", "octets"),
    [("50MB", 50_000_000), ("50MiB", 52_428_800), ("1kB", 1000), ("1KiB", 1024), ("1.5 GB", 1_500_000_000), ("10B", 10), (7, 7)],
)
def test_sizes_are_decimal_or_binary(written: Any, octets: int) -> None:
    assert quantities.parse_size(written) == octets


@pytest.mark.parametrize("written", ["50M", "50", "MB", "-1MB", "50mb", True, None, 1.5])
def test_what_is_no_size_is_refused(written: Any) -> None:
    with pytest.raises(ValueError, match="must be a size"):
        quantities.parse_size(written)


@pytest.mark.parametrize(
    ("written", "compared"),
    [
        ("Example.COM", "example.com"),
        ("*.Example.com", "*.example.com"),
        ("User@Example.com", "user@example.com"),
        ("BÜCHER.example", "xn--bcher-kva.example"),
        ("*.bücher.example", "*.xn--bcher-kva.example"),
        ("a@bücher.example", "a@xn--bcher-kva.example"),
        ("<>", "<>"),
        ("*", "*"),
        ("localhost", "localhost"),
        ("my_host.example", "my_host.example"),
        ('"a b"@c.example', '"a b"@c.example'),
    ],
)
def test_conditions_are_kept_as_they_compare(written: str, compared: str) -> None:
    assert values.parse_condition(written) == compared


@pytest.mark.parametrize(
    ("written", "network"),
    [
        ("10.0.0.0/8", "10.0.0.0/8"),
        ("192.0.2.7", "192.0.2.7/32"),
        ("2001:db8::/32", "2001:db8::/32"),
        ("::1", "::1/128"),
        ("::ffff:10.0.0.0/104", "10.0.0.0/8"),
        ("10.0.0.0/255.0.0.0", "10.0.0.0/8"),
    ],
)
def test_networks_and_addresses_are_networks(written: str, network: str) -> None:
    assert values.parse_client_network(written) == ip_network(network)


@pytest.mark.parametrize("written", ["0.0.0.0/0", "128.0.0.0/7", "::/0", "2000::/15", "::ffff:0:0/96", "::ffff:0:0/100", "::/8"])
def test_a_network_that_holds_the_world_is_no_network_of_clients(written: str) -> None:
    with pytest.raises(ValueError, match="that would be an open relay"):
        values.parse_client_network(written)


@pytest.mark.parametrize("name", ["Received", "RETURN-PATH", "bcc"])
def test_some_fields_may_be_removed_and_not_set(name: str) -> None:
    assert rewrite(remove_headers=name).remove_headers == (name,)
    for key in ("set_headers", "add_headers"):
        with pytest.raises(ValidationError, match="may not be set here"):
            rewrite(**{key: {name: "x"}})


@pytest.mark.parametrize("length", [255, 256])
def test_logins_have_at_most_255_octets(length: int) -> None:
    for keys in ({"username": "u" * length}, {"password": "p" * length}, {"username": "é" * (length // 2) + "u" * (length % 2)}):
        try:
            upstream(**keys)
        except ValidationError as error:
            assert length == 256
            assert "at most 255 bytes" in str(error)
        else:
            assert length == 255


def test_a_relative_path_begins_at_the_base_of_the_context(tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("x")
    keys = {"host": "a.example", "username": "a", "password": {"file": "secret"}}
    assert Upstream.model_validate(keys, context={"base": tmp_path, "environ": {}}).password == Secret("x")


def test_the_text_of_a_refusal_may_begin_with_a_number_but_not_with_the_code_of_a_refusal() -> None:
    for text in ("365 days are over", "2024 is over", "5.7.1 is what it says anyway", "550th of its kind"):
        assert Config.model_validate({"routes": [{"reject": text}]}).routes[0].reject == text
    for text in ("550", "550 no", "550-5.7.1 no", "451 4.7.1 later"):
        with pytest.raises(ValidationError, match="leave out the code"):
            Config.model_validate({"routes": [{"reject": text}]})
