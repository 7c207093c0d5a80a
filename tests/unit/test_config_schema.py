"""The JSON Schema takes what the program takes, as far as a schema can tell.

The interpreter below knows the words that the schema uses and fails at any other, so that none is silently ignored.
"""

import argparse
import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from relay.cli import schema as command
from relay.config.schema import json_schema

SCHEMA = json_schema()
EXAMPLE = Path(__file__).parents[2] / "config.example.yaml"
SPOKEN = {"$schema", "title", "description", "examples", "default", "$defs"}
TYPES = {"string": str, "object": dict, "array": list, "null": type(None), "boolean": bool}


def accepts(schema: dict[str, Any], value: Any) -> bool:
    return all(holds(word, schema, value) for word in schema if word not in SPOKEN)


def holds(word: str, schema: dict[str, Any], value: Any) -> bool:
    wanted = schema[word]
    match word:
        case "$ref":
            return accepts(SCHEMA["$defs"][wanted.removeprefix("#/$defs/")], value)
        case "anyOf":
            return any(accepts(choice, value) for choice in wanted)
        case "oneOf":
            return sum(accepts(choice, value) for choice in wanted) == 1
        case "type":
            return any(is_a(name, value) for name in ([wanted] if isinstance(wanted, str) else wanted))
        case "enum":
            return value in wanted
        case "const":
            return bool(value == wanted)
        case "pattern":
            return not isinstance(value, str) or bool(re.search(wanted, value))
        case "minLength":
            return not isinstance(value, str) or len(value) >= wanted
        case "minimum":
            return not is_a("number", value) or value >= wanted
        case "maximum":
            return not is_a("number", value) or value <= wanted
        case "minItems":
            return not isinstance(value, list) or len(value) >= wanted
        case "items":
            return not isinstance(value, list) or all(accepts(wanted, item) for item in value)
        case "required":
            return not isinstance(value, dict) or set(wanted) <= value.keys()
        case "minProperties":
            return not isinstance(value, dict) or len(value) >= wanted
        case "properties":
            return not isinstance(value, dict) or all(accepts(wanted[key], value[key]) for key in wanted if key in value)
        case "additionalProperties":
            others = value.keys() - schema.get("properties", {}) if isinstance(value, dict) else set()
            return all(wanted is not False and accepts(wanted, value[key]) for key in others)
    raise AssertionError(f"the schema has a word that is unknown here: {word}")


def is_a(name: str, value: Any) -> bool:
    if name in ("integer", "number"):
        return isinstance(value, int if name == "integer" else int | float) and not isinstance(value, bool)
    return isinstance(value, TYPES[name])


def whole(**keys: Any) -> dict[str, Any]:
    return {"upstreams": {"a": {"host": "a.example"}}, "routes": [{"upstream": "a"}], **keys}


def with_upstream(**keys: Any) -> dict[str, Any]:
    return whole(upstreams={"a": {"host": "a.example", **keys}})


def with_route(**keys: Any) -> dict[str, Any]:
    return whole(routes=[{"upstream": "a", **keys}])


def test_the_example_is_valid() -> None:
    assert accepts(SCHEMA, yaml.safe_load(EXAMPLE.read_text()))


@pytest.mark.parametrize(
    "value",
    [
        whole(),
        whole(domain=None, shutdown_timeout="20s", aliases={"root": "a@b.example", "x": ["a@b.example"]}),
        whole(listeners=[{"bind": "127.0.0.1:25", "message_size": "50MB"}, {"message_size": 1000}]),
        whole(users={"erp": {"password": {"file": "x"}, "senders": "*"}, "crm": {"password_hash": "scrypt$…", "senders": ["a.example"]}}),
        whole(listeners=[{"auth": "required", "auth_exempt": "10.1.2.0/24", "auth_without_tls": False}, {"auth_exempt": None}]),
        whole(listeners=[{"security": "tls", "minimum_tls": "1.3"}, {"security": "tls", "minimum_tls": 1.2}]),
        with_route(user="erp"),
        with_upstream(password="x", username="y"),
        with_upstream(password={"env": "A"}),
        with_upstream(password={"command": ["pass", "show"]}),
        with_upstream(password={"encrypted": "A"}),
        whole(secrets={"key_file": "relay.key"}),
        with_upstream(host=["a.example", "b.example"], limits={"connections": 3}, timeouts={"final": "10m"}, senders="a.example"),
        with_route(sender=["a.example"], recipient="b.example", name=2024),
        with_route(fallback="b"),
        with_route(fallback=["b", {"upstream": "c", "rewrite": {"from": "a@b.example", "bcc": None, "set_headers": None}}]),
        with_route(fallback={"upstream": "c", "after": "10m"}),
        with_route(retry={"first": "5m", "expire": "1d"}),
        with_route(rewrite={"from": {"name": "A"}, "set_headers": {"X-A": 1.2}, "remove_headers": "X-B"}),
        whole(routes=[{"reject": "no"}]),
    ],
)
def test_what_is_right_is_valid(value: Any) -> None:
    assert accepts(SCHEMA, value)


@pytest.mark.parametrize(
    "value",
    [
        {},
        whole(routes=[]),
        whole(upstreams={}),
        whole(hostnames="x"),
        whole(shutdown_timeout=20),
        whole(dkim={}),
        whole(listeners=[]),
        whole(listeners=[{"newlines": "lax"}]),
        whole(routes=[{"upstream": "a", "reject": "no"}]),
        whole(routes=[{"sender": "a.example"}]),
        whole(users={"erp": {"password": "x"}}),
        whole(users={"erp": {"password": {"where": "x"}, "senders": "*"}}),
        whole(users={"erp": {"password": "x", "senders": []}}),
        whole(listeners=[{"auth": "yes"}]),
        whole(listeners=[{"security": "tls", "minimum_tls": "1.4"}]),
        with_route(user=[]),
        with_upstream(port="587"),
        with_upstream(port=0),
        with_upstream(security="ssl"),
        with_upstream(password={"env": "A", "file": "B"}),
        with_upstream(password={"encrypted": ""}),
        whole(secrets={"key_file": ["relay.key"]}),
        with_upstream(verify="false"),
        with_upstream(senders=[]),
        with_route(fallback=[{"upstream": "c", "after": 10}]),
        with_route(retry={"warn_before": "4h"}),
        with_route(rewrite={"form": "a@b.example"}),
    ],
)
def test_what_is_wrong_is_not(value: Any) -> None:
    assert not accepts(SCHEMA, value)


def test_defaults_are_valid_where_they_stand() -> None:
    def check(node: Any) -> int:
        if isinstance(node, list):
            return sum(map(check, node))
        if not isinstance(node, dict):
            return 0
        if "default" in node and not isinstance(node["default"], dict):
            assert accepts(node, node["default"]), node
        return sum(map(check, node.values())) + ("default" in node)

    assert check(SCHEMA) > 20
    assert SCHEMA["$defs"]["Retry"]["properties"]["expire"]["default"] == "4d"


def test_the_command_prints_it(capsys: pytest.CaptureFixture[str]) -> None:
    parser = argparse.ArgumentParser()
    command.add_parser(parser.add_subparsers())
    options = parser.parse_args(["schema"])
    assert options.run(options) == 0
    assert json.loads(capsys.readouterr().out) == SCHEMA
