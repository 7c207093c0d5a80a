"""Routing: the first route whose conditions all hold, found fast and explained."""

import time
from typing import Any

import pytest

from relay.config.model import Config, Route
from relay.mail.envelope import Facts, Origin
from relay.mail.rewrite import Rewrite
from relay.routing import Router, complete, expand_alias, rules_of, upstreams_of


def config(*routes: dict[str, Any], **more: Any) -> Config:
    given = [{"upstream": "house", **route} if "reject" not in route else route for route in routes]
    upstreams = {name: {"host": f"{name}.example"} for name in ("house", "acme", "spare")}
    return Config.model_validate({"hostname": "relay.example.net", "upstreams": upstreams, "routes": given, **more})


def route_for(setup: Config, facts: Facts) -> str | None:
    """The name of the route, on which `choose` and `explain` must agree."""
    router = Router(setup)
    route, verdicts = router.choose(*facts), router.explain(facts)
    assert [verdict.matched for verdict in verdicts].count(True) == (route is not None)
    assert route is (verdicts[-1].route if verdicts and verdicts[-1].matched else None)
    return route.name if route else None


@pytest.mark.parametrize(
    ("condition", "sender", "matches"),
    [
        ("acme.example", "app@acme.example", True),
        ("acme.example", "APP@Acme.Example", True),
        ("acme.example", "app@sub.acme.example", False),
        ("acme.example", "app@notacme.example", False),
        ("ACME.example", "app@acme.example", True),
        ("*.acme.example", "app@a.acme.example", True),
        ("*.acme.example", "app@a.b.acme.example", True),
        ("*.acme.example", "app@acme.example", False),
        ("*.acme.example", "app@xacme.example", False),
        ("app@acme.example", "App@acme.example", True),
        ("app@acme.example", "app+tag@acme.example", True),
        ("app@acme.example", "app+a+b@acme.example", True),
        ("app@acme.example", "apps@acme.example", False),
        ("app+tag@acme.example", "app+tag@acme.example", True),
        ("app+tag@acme.example", "app@acme.example", False),
        ("app+a@acme.example", "app+a+b@acme.example", True),
        ("app@acme.example", "app@sub.acme.example", False),
        ("bücher.example", "a@xn--bcher-kva.example", True),
        ("xn--bcher-kva.example", "a@BÜCHER.example", True),
        ('"a b"@acme.example', '"A b"@acme.example', True),
        ("*", "anybody@anywhere.example", True),
        ("*", "", True),
        ("<>", "", True),
        ("<>", "a@b.c", False),
        ("acme.example", "", False),
        ("*", "root", True),
        ("example", "a@b.example", False),
        ("*.example", "a@[127.0.0.1]", False),
    ],
)
def test_a_sender_condition_means_what_the_contract_says(condition: str, sender: str, matches: bool) -> None:
    expected = "routes[0]" if matches else None
    assert route_for(config({"sender": condition}), Facts(sender, "x@y.example")) == expected


def test_the_first_match_wins_whatever_kind_it_is() -> None:
    facts = Facts("app@a.acme.example", "x@y.example")
    kinds: list[dict[str, Any]] = [
        {"sender": "app@a.acme.example"},
        {"sender": "a.acme.example"},
        {"sender": "*.acme.example"},
        {"sender": "*.example"},
        {"sender": "*"},
        {"recipient": "y.example"},
        {"sender": ["nobody.example", "*.acme.example"]},
        {},
    ]
    for first in kinds:
        for second in kinds:
            assert route_for(config({"sender": "other.example"}, first, second), facts) == "routes[1]"


def test_a_null_sender_counts_as_its_from_but_for_its_own_condition() -> None:
    setup = config({"sender": "acme.example"}, {"sender": "<>", "listener": "a"}, {"sender": "*", "listener": "b"})

    def at(listener: str, header_from: str) -> str | None:
        return route_for(setup, Facts("", "x@y.example", Origin(listener=listener, header_from=header_from)))

    assert at("a", "app@acme.example") == "routes[0]"
    assert at("a", "app@globex.example") == "routes[1]"
    assert at("b", "") == "routes[2]"
    assert at("c", "") is None


def test_the_from_of_a_message_with_a_sender_changes_nothing() -> None:
    facts = Facts("a@globex.example", "x@y.example", Origin(header_from="app@acme.example"))
    assert route_for(config({"sender": "acme.example"}), facts) is None


def test_all_conditions_must_hold_and_any_value_of_one() -> None:
    setup = config(
        {
            "sender": ["acme.example", "globex.example"],
            "recipient": ["y.example", "*.z.example", "one@w.example"],
            "client": ["10.0.0.0/8", "2001:db8::/32"],
            "listener": ["local", "apps"],
        }
    )
    good = Facts("a@globex.example", "x@y.example", Origin(listener="apps", client="10.1.2.3"))
    assert route_for(setup, good) == "routes[0]"
    for facts in (
        Facts("a@other.example", good.recipient, good.origin),
        Facts(good.sender, "two@w.example", good.origin),
        Facts(good.sender, "a@z.example", good.origin),
        Facts(good.sender, good.recipient, Origin(listener="other", client="10.1.2.3")),
        Facts(good.sender, good.recipient, Origin(listener="apps", client="11.1.2.3")),
        Facts(good.sender, good.recipient, Origin(listener="apps", client="")),
        Facts(good.sender, good.recipient, Origin(listener="apps", client="unix")),
    ):
        assert route_for(setup, facts) is None
    for recipient in ("x@y.example", "a@b.z.example", "One+tag@w.example"):
        assert route_for(setup, Facts(good.sender, recipient, good.origin)) == "routes[0]"
    for client in ("10.255.0.1", "::ffff:10.0.0.1", "2001:db8::1", "2001:db8::1%eth0"):
        assert route_for(setup, Facts(good.sender, good.recipient, Origin(listener="apps", client=client))) == "routes[0]"


def test_a_user_of_this_machine_is_a_client_too() -> None:
    setup = config({"client": ["uid:1000", "10.0.0.0/8"]})
    clients = ("uid:1000", "10.1.2.3", "uid:100", "1000")
    taken = {client: route_for(setup, Facts("a@b.c", "d@e.f", Origin(client=client))) for client in clients}
    assert taken == {"uid:1000": "routes[0]", "10.1.2.3": "routes[0]", "uid:100": None, "1000": None}
    (verdict,) = Router(setup).explain(Facts("a@b.c", "d@e.f", Origin(client="uid:0")))
    assert verdict.why == "client uid:0 is not in uid:1000, 10.0.0.0/8"


def test_a_route_for_every_sender_and_some_recipients_keeps_its_place() -> None:
    setup = config({"sender": "acme.example", "listener": "x"}, {"recipient": "y.example"}, {"sender": "acme.example"}, {"recipient": "*"})
    assert route_for(setup, Facts("a@acme.example", "b@y.example")) == "routes[1]"
    assert route_for(setup, Facts("a@acme.example", "b@z.example")) == "routes[2]"
    assert route_for(setup, Facts("a@other.example", "b@z.example")) == "routes[3]"
    assert route_for(setup, Facts("", "b@y.example")) == "routes[1]"


def test_without_routes_nothing_matches() -> None:
    router = Router(config())
    assert router.choose("a@b.c", "d@e.f", Origin()) is None
    assert router.explain(Facts("a@b.c", "d@e.f")) == []
    assert router.foresee("a@b.c", Origin()) == router.foresee("", Origin()) == "no route takes this sender"


def test_an_explanation_names_the_condition_that_failed() -> None:
    setup = config(
        {"sender": "acme.example"},
        {"recipient": "z.example"},
        {"listener": "other"},
        {"client": "192.0.2.0/24"},
        {"sender": "globex.example", "listener": "local"},
        {"sender": "*"},
    )
    facts = Facts("a@globex.example", "x@y.example", Origin(listener="local", client="10.1.2.3"))
    assert [(verdict.matched, verdict.why) for verdict in Router(setup).explain(facts)] == [
        (False, "sender a@globex.example is not acme.example"),
        (False, "recipient x@y.example is not z.example"),
        (False, "listener local is not other"),
        (False, "client 10.1.2.3 is not in 192.0.2.0/24"),
        (True, "sender globex.example; listener local"),
    ]
    null = Router(config({"sender": "acme.example"}))
    assert "without a From" in null.explain(Facts("", "x@y.example"))[0].why
    assert "with a@b.c in From" in null.explain(Facts("", "x@y.example", Origin(header_from="a@b.c")))[0].why


@pytest.mark.parametrize(
    ("routes", "sender", "origin", "expected"),
    [
        ([{"sender": "acme.example"}], "a@acme.example", Origin(), "routes[0]"),
        ([{}, {"sender": "acme.example"}], "a@acme.example", Origin(), "routes[0]"),
        ([{"sender": "acme.example", "recipient": ["y.example", "*"]}], "a@acme.example", Origin(), "routes[0]"),
        ([{"sender": "acme.example"}], "a@other.example", Origin(), "no route takes this sender"),
        ([{"sender": "acme.example", "listener": "x"}], "a@acme.example", Origin(listener="y"), "no route takes this sender"),
        (
            [{"sender": "acme.example", "client": "10.0.0.0/8"}],
            "a@acme.example",
            Origin(client="11.0.0.1"),
            "no route takes this sender",
        ),
        ([{"sender": "acme.example", "recipient": "y.example"}], "a@acme.example", Origin(), None),
        ([{"sender": "acme.example", "recipient": "y.example"}, {}], "a@acme.example", Origin(), None),
        ([{"recipient": "y.example"}], "a@acme.example", Origin(), None),
        ([{"recipient": "y.example"}, {}], "a@acme.example", Origin(), None),
        ([{}, {"recipient": "y.example"}], "a@acme.example", Origin(), "routes[0]"),
        ([{"recipient": "y.example", "listener": "x"}], "a@acme.example", Origin(listener="y"), "no route takes this sender"),
        ([{"sender": "acme.example", "reject": "not ours"}, {}], "a@acme.example", Origin(), "not ours"),
        ([{"sender": "acme.example", "reject": "not ours", "recipient": "z.example"}, {}], "a@acme.example", Origin(), None),
        ([{"recipient": "y.example"}, {"sender": "acme.example", "reject": "not ours"}], "a@acme.example", Origin(), None),
        ([{"sender": "acme.example", "reject": "not ours"}, {"recipient": "y.example"}], "a@acme.example", Origin(), "not ours"),
        (
            [{"recipient": "y.example", "reject": "no"}, {"sender": "*", "reject": "not ours"}],
            "a@acme.example",
            Origin(),
            "not ours",
        ),
        (
            [{"sender": "acme.example", "reject": "no", "recipient": "y.example"}],
            "a@acme.example",
            Origin(),
            "no route takes this sender",
        ),
        ([{"sender": "acme.example"}], "", Origin(), None),
        ([{"sender": "acme.example"}], "", Origin(header_from="a@acme.example"), "routes[0]"),
        ([{"sender": "acme.example"}], "", Origin(header_from="a@other.example"), "no route takes this sender"),
    ],
)
def test_a_sender_is_refused_or_routed_as_early_as_the_routes_allow(
    routes: list[dict[str, Any]], sender: str, origin: Origin, expected: str | None
) -> None:
    known = Router(config(*routes)).foresee(sender, origin)
    assert (known.name if isinstance(known, Route) else known) == expected


def test_upstreams_are_the_primary_and_its_fallbacks() -> None:
    first, second = config({"upstream": "acme", "fallback": ["house", {"upstream": "spare"}]}, {"reject": "no"}).routes
    assert upstreams_of(first) == ("acme", "house", "spare")
    assert upstreams_of(second) == ()


def test_a_fallbacks_rewrite_lies_over_the_routes_key_by_key() -> None:
    setup = config(
        {
            "upstream": "acme",
            "rewrite": {"from": "Acme <no-reply@acme.example>", "subject_prefix": "[acme] ", "remove_headers": ["X-A"]},
            "fallback": [
                {"upstream": "house", "rewrite": {"from": {"address": "x@house.example"}, "subject_prefix": None}},
                "spare",
            ],
        },
        {"upstream": "acme"},
    )
    router = Router(setup)
    route, bare = setup.routes
    own = Rewrite(from_name="Acme", from_address="no-reply@acme.example", subject_prefix="[acme] ", remove_headers=("X-A",))
    assert router.rewrite_for(route, "acme") == own
    assert router.rewrite_for(route, "spare") == own
    assert router.rewrite_for(route, "house") == Rewrite(from_address="x@house.example", remove_headers=("X-A",))
    assert router.rewrite_for(route, "house") is router.rewrite_for(route, "house")
    assert router.rewrite_for(bare, "acme") is None


def test_every_key_of_a_rewrite_reaches_the_rules() -> None:
    settings = {
        "from": "N <a@b.c>",
        "reply_to": "original",
        "envelope_sender": "d@e.f",
        "set_headers": {"X-A": "1"},
        "add_headers": {"X-B": "2"},
        "remove_headers": ["X-C"],
        "subject_prefix": "[p] ",
        "bcc": "g@h.i",
    }
    rewrite = config({"rewrite": settings}).routes[0].rewrite
    assert rewrite is not None
    assert rules_of(rewrite) == Rewrite("N", "a@b.c", "original", "d@e.f", (("X-A", "1"),), (("X-B", "2"),), ("X-C",), "[p] ", "g@h.i")


@pytest.mark.parametrize(
    ("address", "domain", "expected"),
    [
        ("root", "example.net", "root@example.net"),
        ("a@b.c", "example.net", "a@b.c"),
        ("", "example.net", ""),
        ("root", None, "root"),
    ],
)
def test_bare_addresses_are_completed(address: str, domain: str | None, expected: str) -> None:
    assert complete(address, domain) == expected


def test_aliases_that_lead_to_each_other_on_many_ways_are_followed_once() -> None:
    ways = {f"{one}{number}": [f"{each}{number + 1}@acme.example" for each in "ab"] for number in range(60) for one in "ab"}
    setup = config(domain="acme.example", aliases=ways | {"a60": "one@example.org", "b60": "two@example.org"})
    assert expand_alias("a0@acme.example", setup) == ("one@example.org", "two@example.org")


def test_aliases_are_followed_and_circles_are_cut() -> None:
    setup = config(
        domain="example.net",
        aliases={
            "root": ["admin@example.net", "Log@other.example"],
            "admin": "ops@acme.example",
            "ops@acme.example": ["one@acme.example", "two@acme.example", "ONE@acme.example"],
            "self": ["self@example.net", "copy@other.example"],
            "ping": "pong@example.net",
            "pong": "ping@example.net",
        },
    )
    assert expand_alias("root@example.net", setup) == ("one@acme.example", "two@acme.example", "Log@other.example")
    assert expand_alias("ROOT@Example.NET", setup) == expand_alias("root@example.net", setup)
    assert expand_alias("root@other.example", setup) == ("root@other.example",)
    assert expand_alias("Bob@example.net", setup) == ("Bob@example.net",)
    assert expand_alias("self@example.net", setup) == ("self@example.net", "copy@other.example")
    assert expand_alias("ping@example.net", setup) == ("ping@example.net",)
    assert expand_alias("a@b.c", config()) == ("a@b.c",)


def test_a_look_up_costs_the_same_with_many_routes() -> None:
    def seconds(count: int) -> float:
        """The best of a few rounds of 200 look-ups."""
        setup = config(
            *({"sender": f"t{number}.example"} for number in range(count)),
            *({"recipient": f"r{number}.example"} for number in range(count)),
        )
        router = Router(setup)
        facts = [Facts(f"a@t{count - 1}.example", "b@y.example"), Facts("a@b.c", f"d@r{count - 1}.example")] * 100
        best = 9.9
        for _ in range(5):
            start = time.process_time()
            assert all(router.choose(*each) for each in facts)
            best = min(best, time.process_time() - start)
        return best

    assert seconds(5000) < 20 * seconds(5)


ACME = {"name": "acme", "sender": "acme.example"}


@pytest.mark.parametrize(
    ("routes", "expected"),
    [
        ([ACME], "acme"),
        ([{"name": "null", "sender": "<>"}, ACME], "null"),
        ([{"name": "null", "sender": "<>", "reject": "no"}, ACME], "acme"),
        ([{"name": "no", "sender": "acme.example", "recipient": "acme.example", "reject": "no"}, ACME], "no"),
        ([{**ACME, "recipient": "example.org"}], "acme"),
        ([{"name": "acme", "recipient": "example.org"}], "acme"),
        ([{"name": "other", "sender": "globex.example"}, {**ACME, "recipient": "example.org"}], "acme"),
        ([{"name": "acme", "sender": "globex.example", "recipient": "example.org"}], None),
        ([{**ACME, "recipient": "example.org", "reject": "no"}], None),
        ([{**ACME, "recipient": "example.org", "listener": "other"}], None),
        ([{**ACME, "recipient": "example.org", "client": "10.0.0.0/8"}], None),
        ([{"name": "renamed", "sender": "acme.example", "recipient": "example.org"}], None),
        ([{**ACME, "listener": "local"}], "acme"),
    ],
)
def test_a_report_of_ours_goes_where_its_senders_mail_goes(routes: list[dict[str, Any]], expected: str | None) -> None:
    origin = Origin("local", "192.0.2.1", "", "S1", "app@acme.example")
    route = Router(config(*routes)).report_route("app@acme.example", origin, came_by="acme")
    assert (route.name if route is not None else None) == expected
