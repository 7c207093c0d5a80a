"""Warnings: what is allowed and probably not meant, and nothing else."""

import time
from pathlib import Path
from typing import Any

import pytest

from relay.config import lint
from relay.config.model import Config


def config(routes: list[dict[str, Any]], **upstreams: dict[str, Any]) -> Config:
    names = {name for route in routes for name in (route.get("upstream"), route.get("fallback")) if name}
    hosts = {name: {"host": f"smtp.{name}.example", **upstreams.get(name, {})} for name in sorted(names | set(upstreams))}
    return Config.model_validate({"hostname": "relay.example.net", "upstreams": hosts, "routes": routes})


def unreachable(*routes: dict[str, Any]) -> list[str]:
    """The names of the routes, `a` to `z`, that are said to be unreachable."""
    named = [{"name": chr(ord("a") + place), "reject": "no", **route} for place, route in enumerate(routes)]
    found = lint.improbable(config(named))
    return [named[problem.path[1]]["name"] for problem in found if "never taken" in problem.message]  # type: ignore[index]


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ({}, {"sender": "a.example"}),
        ({"sender": "*"}, {"sender": "<>"}),
        ({"sender": "a.example"}, {"sender": "A.example"}),
        ({"sender": "a.example"}, {"sender": "user@a.example"}),
        ({"sender": "user@a.example"}, {"sender": "user+tag@a.example"}),
        ({"sender": "*.example"}, {"sender": "a.example"}),
        ({"sender": "*.example"}, {"sender": "*.a.example"}),
        ({"sender": "*.example"}, {"sender": "user@b.a.example"}),
        ({"sender": ["a.example", "b.example"]}, {"sender": "b.example"}),
        ({"sender": "a.example"}, {"sender": "a.example", "recipient": "b.example"}),
        ({"recipient": "b.example"}, {"sender": "a.example", "recipient": ["b.example", "c@b.example"]}),
        ({"client": "10.0.0.0/8"}, {"client": ["10.1.0.0/16", "10.2.3.4"]}),
        ({"client": "2001:db8::/32"}, {"client": "2001:db8::1"}),
        ({"client": ["uid:1000", "10.0.0.0/8"]}, {"client": "uid:1000"}),
        ({}, {"client": "uid:1000"}),
        ({"listener": ["x", "y"]}, {"listener": "y"}),
    ],
)
def test_a_route_behind_a_wider_one_is_unreachable(first: dict[str, Any], second: dict[str, Any]) -> None:
    assert unreachable(first, second) == ["b"]
    assert unreachable(second, first) == ([] if first != second and second != {"sender": "A.example"} else ["b"])


@pytest.mark.parametrize(
    ("after", "retry", "warned"),
    [("4d", None, True), ("3d", None, False), ("1h", {"expire": "1h"}, True), ("5d", {"expire": "6d"}, False)],
)
def test_a_fallback_that_comes_when_mail_has_expired_is_warned_of(after: str, retry: dict[str, Any] | None, warned: bool) -> None:
    upstreams = {name: {"host": f"smtp.{name}.example"} for name in ("a", "b")}
    route = {"upstream": "a", "fallback": {"upstream": "b", "after": after}, **({"retry": retry} if retry else {})}
    built = Config.model_validate({"hostname": "relay.example.net", "upstreams": upstreams, "routes": [route]})
    found = [problem.path for problem in lint.improbable(built) if "expires before the fallback b" in problem.message]
    assert found == ([("routes", 0, "fallback")] if warned else [])


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ({"sender": "*.a.example"}, {"sender": "a.example"}),
        ({"sender": "sub.a.example"}, {"sender": "a.example"}),
        ({"sender": "a.example"}, {"sender": "<>"}),
        ({"sender": "<>"}, {"sender": "*"}),
        ({"sender": "a.example"}, {"sender": ["a.example", "b.example"]}),
        ({"sender": "a.example", "recipient": "b.example"}, {"sender": "a.example"}),
        ({"sender": "a.example", "client": "10.0.0.0/8"}, {"sender": "a.example", "client": "11.0.0.0/8"}),
        ({"sender": "a.example", "listener": "x"}, {"sender": "a.example", "listener": "y"}),
        ({"client": "10.0.0.0/8"}, {"client": "2001:db8::/32"}),
        ({"sender": "a@a.example"}, {"sender": "b@a.example"}),
        ({"sender": "user+tag@a.example"}, {"sender": "user@a.example"}),
    ],
)
def test_a_route_that_takes_something_more_is_reachable(first: dict[str, Any], second: dict[str, Any]) -> None:
    assert unreachable(first, second) == []


def test_several_routes_together_hide_one() -> None:
    (problem,) = lint.improbable(
        config([
            {"name": "a", "sender": "a.example", "reject": "no"},
            {"name": "b", "sender": "b.example", "reject": "no"},
            {"name": "c", "sender": ["b.example", "x@a.example"], "reject": "no"},
        ])
    )  # fmt: skip
    assert problem.path == ("routes", 2)
    assert problem.message == "this route is never taken: a, b before it takes the same mail"
    assert problem.severity == "warning"


def test_many_routes_that_differ_in_one_condition_take_no_time() -> None:
    for key, value in (("recipient", "u{}-{}@x.example"), ("listener", "l{}-{}"), ("client", "10.{}.{}.1")):
        routes = [{"reject": "no", key: value.format(n // 250, n % 250)} for n in range(3000)]
        began = time.process_time()
        assert list(lint.improbable(config(routes))) == []
        assert time.process_time() - began < 5


@pytest.mark.parametrize(("probe", "warned"), [("1ms", True), ("59s", True), ("1m", False), (None, False)])
def test_logins_that_could_be_taken_for_an_attack_are_warned_of(probe: str | None, warned: bool) -> None:
    found = lint.improbable(config([{"upstream": "acme"}], acme={"probe": probe}))
    assert [problem.path for problem in found] == [("upstreams", "acme", "probe")] * warned


def test_an_upstream_that_no_route_names_is_unused() -> None:
    found = list(lint.improbable(config([{"upstream": "acme", "fallback": "house"}], spare={})))
    assert [(problem.path, problem.message) for problem in found] == [(("upstreams", "spare"), "no route uses this upstream")]


TENANTS = [{"sender": "a.example", "upstream": "a"}, {"sender": "b.example", "upstream": "b"}]


def test_tenants_without_senders_are_one_warning() -> None:
    (problem,) = lint.improbable(config(TENANTS, a={"senders": "a.example"}))
    assert problem.path == ("upstreams",)
    assert problem.message.startswith("several tenants, and no `senders` at b: ")
    assert not list(lint.improbable(config(TENANTS, a={"senders": "a.example"}, b={"senders": "b.example"})))
    many = [{"sender": f"t{n}.example", "upstream": f"t{n}"} for n in range(9)]
    (problem,) = lint.improbable(config(many))
    assert "at t0, t1, t2, t3, t4 and 4 more:" in problem.message


def test_one_tenant_needs_no_senders_and_neither_does_the_house() -> None:
    assert not list(lint.improbable(config([{"sender": "a.example", "upstream": "a"}, {"upstream": "house"}])))
    bound = {name: {"senders": f"{name}.example"} for name in "ab"}
    assert not list(lint.improbable(config([*TENANTS, {"upstream": "house", "fallback": "last"}], **bound)))


@pytest.mark.parametrize(
    ("keys", "exposed", "where"),
    [
        ({"username": "a", "password": "x"}, True, ["password"]),
        ({"username": "a", "password": "x"}, False, []),
        ({"username": "a", "password": "x", "security": "none"}, False, ["security"]),
        ({"username": "a", "password": "x", "security": "none", "host": "127.0.0.9"}, False, []),
        ({"username": "a", "password": "x", "security": "none", "host": ["localhost", "::1"]}, False, []),
        ({"username": "a", "password": "x", "security": "none", "host": ["localhost", "a.example"]}, False, ["security"]),
        ({"username": "a", "password": "x", "security": "none", "auth": "none"}, False, []),
        ({"security": "none"}, False, []),
        ({"verify": False}, False, ["verify"]),
        ({"verify": False, "security": "none"}, False, []),
        ({"verify": False, "host": "127.0.0.1"}, False, []),
    ],
)
def test_what_strangers_can_read_is_a_warning(keys: dict[str, Any], exposed: bool, where: list[str]) -> None:
    found = list(lint.unguarded(config([{"upstream": "acme"}], acme=keys), exposed=exposed))
    assert [problem.path for problem in found] == [("upstreams", "acme", key) for key in where]
    assert all(problem.severity == "warning" for problem in found)


@pytest.mark.parametrize(
    ("bind", "host", "port", "circular"),
    [
        ("127.0.0.1:2525", "127.0.0.1", 2525, True),
        ("127.0.0.1:2525", "127.0.0.1", 2526, False),
        ("127.0.0.1:2525", "127.0.0.2", 2525, False),
        ("127.0.0.1:2525", "localhost", 2525, True),
        ("127.0.0.1:2525", "mail.localhost", 2525, True),
        ("127.0.0.1:2525", "::1", 2525, False),
        ("[::1]:2525", "localhost", 2525, True),
        ("[::1]:2525", "0:0::1", 2525, True),
        ("localhost:2525", "127.0.0.1", 2525, True),
        ("0.0.0.0:2525", "127.0.0.7", 2525, True),
        ("0.0.0.0:2525", "::1", 2525, False),
        ("0.0.0.0:2525", "192.0.2.1", 2525, False),
        ("192.0.2.1:2525", "192.0.2.1", 2525, True),
        ("192.0.2.1:2525", "127.0.0.1", 2525, False),
        ("[::]:2525", "localhost", 2525, True),
        ("0.0.0.0:2525", "smtp.acme.example", 2525, False),
        ("mail.example.net:2525", "mail.example.net", 2525, False),
    ],
)
def test_an_upstream_that_is_a_listener_of_ours_is_an_error(bind: str, host: str, port: int, circular: bool) -> None:
    setup = Config.model_validate(
        {
            "hostname": "relay.example.net",
            "listeners": [{"bind": "127.0.0.1:1"}, {"bind": bind}],
            "upstreams": {"house": {"host": ["smtp.house.example", host], "port": port}},
            "routes": [{"upstream": "house"}],
        }
    )
    found = [(problem.path, problem.severity) for problem in lint.circular(setup)]
    assert found == ([(("upstreams", "house", "host"), "error")] if circular else [])


def not_allowed(route: dict[str, Any], **senders: str | list[str]) -> list[tuple[Any, str]]:
    upstreams = {name: {"senders": allowed} for name, allowed in senders.items()}
    problems = lint.improbable(config([route], **upstreams))
    return [(problem.path[2:], problem.message.partition(":")[0]) for problem in problems if "`senders` of" in problem.message]


@pytest.mark.parametrize(
    ("sender", "senders", "allowed"),
    [
        ("a.example", "a.example", True),
        ("a.example", "b.example", False),
        ("a.example", "billing@a.example", True),
        ("billing@a.example", "a.example", True),
        ("billing@a.example", "billing@a.example", True),
        ("billing@a.example", "sales@a.example", False),
        ("*.a.example", "b.a.example", True),
        ("*.a.example", "x@b.a.example", True),
        ("*.a.example", "a.example", False),
        ("a.example", "b.a.example", False),
        ("a.example", "ba.example", False),
        ("*", "b.example", True),
        ("<>", "b.example", True),
        (["b.example", "a.example"], "b.example", False),
    ],
)
def test_a_route_whose_upstream_may_not_send_for_its_sender_is_warned_of(sender: Any, senders: str, allowed: bool) -> None:
    found = not_allowed({"sender": sender, "upstream": "acme"}, acme=senders)
    assert [path for path, _ in found] == ([] if allowed else [("upstream",)])


REWRITE = {"from": "Acme <no-reply@house.example>", "envelope_sender": "bounces@house.example"}


@pytest.mark.parametrize(
    ("route", "found"),
    [
        ({"upstream": "house", "rewrite": REWRITE}, []),
        ({"upstream": "house", "rewrite": {"from": "x@house.example"}}, [(("upstream",), "acme.example")]),
        ({"upstream": "house", "rewrite": {"envelope_sender": "x@house.example"}}, [(("upstream",), "acme.example")]),
        ({"upstream": "house", "rewrite": {"from": {"name": "Acme"}}}, [(("upstream",), "acme.example")]),
        ({"upstream": "house", "rewrite": REWRITE | {"from": "x@acme.example"}}, [(("rewrite", "from"), "x@acme.example")]),
        (
            {"upstream": "house", "rewrite": REWRITE | {"envelope_sender": "x@acme.example"}},
            [(("rewrite", "envelope_sender"), "x@acme.example")],
        ),
        ({"upstream": "any", "fallback": ["acme", "house"]}, [(("fallback", 1, "upstream"), "acme.example")]),
        ({"upstream": "any", "fallback": {"upstream": "house", "rewrite": REWRITE}}, []),
        (
            {"upstream": "any", "rewrite": REWRITE, "fallback": {"upstream": "house", "rewrite": {"from": "x@acme.example"}}},
            [(("fallback", 0, "rewrite", "from"), "x@acme.example")],
        ),
        (
            {"upstream": "acme", "rewrite": {"from": "x@acme.example"}, "fallback": {"upstream": "house"}},
            [(("rewrite", "from"), "x@acme.example"), (("fallback", 0, "upstream"), "acme.example")],
        ),
    ],
)
def test_what_is_rewritten_must_be_allowed_too(route: dict[str, Any], found: list[tuple[Any, str]]) -> None:
    upstreams = {"acme": {"host": "a.example", "senders": "acme.example"}, "house": {"host": "h.example", "senders": "house.example"}}
    setup = {"hostname": "relay.example.net", "upstreams": upstreams | {"any": {"host": "x.example"}}}
    built = Config.model_validate(setup | {"routes": [{"sender": "acme.example"} | route]})
    problems = [problem for problem in lint.improbable(built) if "`senders` of house" in problem.message]
    assert [(problem.path[2:], problem.message.partition(" ")[0]) for problem in problems] == found


def test_sizes_that_were_to_have_a_unit_are_warned_of() -> None:
    listeners = [{"bind": "127.0.0.1:2525", "message_size": 50}, {"bind": "127.0.0.1:2526", "message_size": 65536}]
    setup = {"hostname": "relay.example.net", "upstreams": {"a": {"host": "a.example"}}, "routes": [{"upstream": "a"}]}
    built = Config.model_validate(setup | {"listeners": listeners, "spool": {"max_size": 65535}})
    assert [problem.path for problem in lint.improbable(built)] == [("listeners", 0, "message_size"), ("spool", "max_size")]


@pytest.mark.parametrize(("content", "warned"), [("x \n", True), (" x", True), ("x\n", False), ("\ufeffx\r\n", False), ("a b", False)])
def test_blanks_around_a_secret_from_elsewhere_are_warned_of(content: str, warned: bool, tmp_path: Path) -> None:
    (tmp_path / "secret").write_text(content)
    secret = {"file": str(tmp_path / "secret")}
    users = {"erp": {"password": secret, "senders": "*"}}
    upstreams = {"acme": {"host": "a.example", "username": "a", "password": secret}}
    built = Config.model_validate({"hostname": "a.example", "users": users, "upstreams": upstreams, "routes": [{"upstream": "acme"}]})
    found = [problem.path for problem in lint.unguarded(built, exposed=False)]
    assert found == ([("upstreams", "acme", "password"), ("users", "erp", "password")] if warned else [])
