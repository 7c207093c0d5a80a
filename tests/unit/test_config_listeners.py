"""Listeners in the configuration: where they bind, who may connect, and that none is an open relay."""

from ipaddress import ip_network
from typing import Any

import pytest
from pydantic import ValidationError

from relay.config import lint
from relay.config.listeners import EVERYONE, LOOPBACK, Listener
from relay.config.model import Config
from relay.config.values import Uid, client_of, is_from

CLIENTS = ("192.0.2.7", "10.1.2.3", "::ffff:10.1.2.3", "2001:db8::7", "fe80::1%eth0", "uid:0", "uid:1000", "unix", "", "uid:x")


def listener(**keys: Any) -> Listener:
    return Listener.model_validate(keys)


@pytest.mark.parametrize(
    ("bind", "host", "port", "path", "inherited"),
    [
        ("0.0.0.0:25", "0.0.0.0", 25, "", ""),
        ("[::1]:587", "::1", 587, "", ""),
        ("mail.example:25", "mail.example", 25, "", ""),
        ("unix:/run/relay/smtp.sock", "", 0, "/run/relay/smtp.sock", ""),
        ("unix:/run/a:25", "", 0, "/run/a:25", ""),
        ("systemd:smtp", "", 0, "", "smtp"),
        ("systemd:relay.socket", "", 0, "", "relay.socket"),
    ],
)
def test_a_bind_is_an_address_a_path_or_a_name(bind: str, host: str, port: int, path: str, inherited: str) -> None:
    built = listener(bind=bind)
    assert (built.host, built.port, built.path, built.inherited, built.name) == (host, port, path, inherited, bind)


@pytest.mark.parametrize(("auth", "networks"), [("none", LOOPBACK), ("optional", LOOPBACK), ("required", EVERYONE)])
def test_everyone_may_connect_only_where_everyone_has_to_log_in(auth: str, networks: tuple[Any, ...]) -> None:
    assert listener(auth=auth).networks == networks
    assert listener().networks == LOOPBACK


@pytest.mark.parametrize("network", ["0.0.0.0/0", "10.0.0.0/7", "::/0", "2000::/15", "::ffff:0:0/96"])
def test_a_wide_network_is_an_open_relay_unless_everyone_has_to_log_in(network: str) -> None:
    for keys in (
        {},
        {"auth": "none"},
        {"auth": "optional"},
        {"auth": "optional", "proxy_protocol": "10.9.9.9"},
        {"auth_without_tls": True},
    ):
        with pytest.raises(ValidationError, match="that would be an open relay"):
            listener(networks=network, **keys)
        with pytest.raises(ValidationError, match="that would be an open relay"):
            listener(networks=["10.0.0.0/8", network], **keys)
    assert listener(networks=network, auth="required").networks
    for key in ("proxy_protocol", "auth_exempt"):
        with pytest.raises(ValidationError, match="that would be an open relay"):
            listener(auth="required", **{key: network})


@pytest.mark.parametrize(("written", "mode"), [("0660", 0o660), ("666", 0o666), ("0600", 0o600), (0o640, 0o640)])
def test_a_mode_is_octal(written: Any, mode: int) -> None:
    assert listener(bind="unix:/run/s", mode=written).mode == mode
    assert listener(bind="unix:/run/s").mode == 0o666


@pytest.mark.parametrize("written", ["", "rw", "0888", "07777", "0o660", "66", True, 6.5, None, ["0660"]])
def test_anything_else_is_no_mode(written: Any) -> None:
    with pytest.raises(ValidationError, match="octal digits in quotes"):
        listener(bind="unix:/run/s", mode=written)


def test_proxies_are_addresses_networks_and_users() -> None:
    built = listener(proxy_protocol=["10.9.9.9", "2001:db8::/32", "uid:33", "::ffff:192.0.2.1"])
    assert built.proxy_protocol == (ip_network("10.9.9.9/32"), ip_network("2001:db8::/32"), Uid(33), ip_network("192.0.2.1/32"))
    assert str(Uid(33)) == "uid:33"
    assert listener().proxy_protocol == listener(proxy_protocol=None).proxy_protocol == ()


@pytest.mark.parametrize(
    ("sources", "inside"),
    [
        ((), ()),
        (("10.0.0.0/8",), ("10.1.2.3", "::ffff:10.1.2.3")),
        (("2001:db8::/32", "fe80::/10"), ("2001:db8::7", "fe80::1%eth0")),
        (("uid:1000",), ("uid:1000",)),
        (("uid:0", "192.0.2.7"), ("192.0.2.7", "uid:0")),
        (("0.0.0.0/0",), ("192.0.2.7", "10.1.2.3", "::ffff:10.1.2.3")),
        (("::/0",), ("2001:db8::7", "fe80::1%eth0")),
    ],
)
def test_a_client_is_from_a_network_or_is_a_user_and_never_both(sources: tuple[str, ...], inside: tuple[str, ...]) -> None:
    route = {"client": list(sources), "reject": "no"} if sources else {"reject": "no"}
    config = Config.model_validate({"hostname": "relay.example", "routes": [route]})
    assert tuple(client for client in CLIENTS if is_from(client_of(client), config.routes[0].client)) == inside


@pytest.mark.parametrize(
    ("keys", "warned"),
    [
        ({"proxy_protocol": "10.9.9.9"}, True),
        ({"proxy_protocol": "10.9.9.9", "networks": "192.0.2.0/24"}, False),
        ({"proxy_protocol": "10.9.9.9", "networks": "127.0.0.0/8"}, False),
        ({"proxy_protocol": "10.9.9.9", "auth": "required"}, False),
        ({"proxy_protocol": None}, False),
        ({}, False),
    ],
)
def test_a_proxy_whose_clients_may_not_connect_is_warned_of(keys: dict[str, Any], warned: bool) -> None:
    config = Config.model_validate({"hostname": "relay.example", "listeners": [{"bind": "0.0.0.0:25", **keys}]})
    found = [problem.path for problem in lint.improbable(config) if "behind the proxy" in problem.message]
    assert found == ([("listeners", 0, "proxy_protocol")] if warned else [])


@pytest.mark.parametrize("bind", ["unix:/run/s", "systemd:smtp"])
def test_an_upstream_is_no_circle_through_a_socket_without_an_address(bind: str) -> None:
    upstreams = {"a": {"host": "127.0.0.1", "port": 25}}
    config = Config.model_validate({"hostname": "relay.example", "listeners": [{"bind": bind}], "upstreams": upstreams})
    assert list(lint.circular(config)) == []
