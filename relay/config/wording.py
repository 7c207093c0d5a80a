"""Say what the model found in words for the person who wrote the file, and which keys exist, are meant, or are yet to come.

Pure. What pydantic calls an error type becomes a sentence; a key that the contract has and the program does not is named as such,
so that nobody believes it works.
"""

from collections.abc import Iterator
from typing import Any, Final

from pydantic import BaseModel, ValidationError

from relay.config import listeners, model, oauth, upstreams
from relay.config.findings import KeyPath, Problem, Suggestions, holds_secret, kind_of
from relay.config.providers import PROVIDERS, Provider

_ANY: Final = "*"
_SECTIONS: Final[dict[KeyPath, type[BaseModel]]] = {
    (): model.Config,
    ("listeners", _ANY): listeners.Listener,
    ("users", _ANY): listeners.User,
    ("upstreams", _ANY): upstreams.Upstream,
    ("upstreams", _ANY, "limits"): upstreams.Limits,
    ("upstreams", _ANY, "oauth2"): oauth.OAuth2,
    ("upstreams", _ANY, "timeouts"): upstreams.Timeouts,
    ("routes", _ANY): model.Route,
    ("routes", _ANY, "rewrite"): model.Rewrite,
    ("routes", _ANY, "rewrite", "from"): model.FromRewrite,
    ("routes", _ANY, "fallback"): model.Fallback,
    ("routes", _ANY, "fallback", _ANY): model.Fallback,
    ("routes", _ANY, "fallback", "rewrite"): model.Rewrite,
    ("routes", _ANY, "fallback", "rewrite", "from"): model.FromRewrite,
    ("routes", _ANY, "fallback", _ANY, "rewrite"): model.Rewrite,
    ("routes", _ANY, "fallback", _ANY, "rewrite", "from"): model.FromRewrite,
    ("routes", _ANY, "retry"): model.Retry,
    ("retry",): model.Retry,
    ("secrets",): model.SecretSettings,
    ("spool",): model.SpoolSettings,
    ("log",): model.LogSettings,
}
_YET_TO_COME: Final[dict[KeyPath, str]] = {
    (): "dkim soft_bounce admin include tenants tests",
    ("routes", _ANY): "header redirect discard soft_bounce",
    ("spool",): "postgresql node ephemeral",
    ("log",): "addresses subjects",
}
_COLLECTIONS: Final[set[KeyPath]] = {("upstreams",), ("users",), ("routes",), ("listeners",), ("aliases",)}
_TYPES: Final = {
    "missing": "is missing",
    "string_type": "must be text",
    "int_type": "must be a whole number",
    "int_from_float": "must be a whole number",
    "float_type": "must be a number",
    "bool_type": "must be true or false",
    "dict_type": "must be a mapping (key: value)",
    "model_type": "must be a mapping (key: value)",
    "tuple_type": "must be a list",
    "too_short": "must not be empty",
}


def problems(error: ValidationError, tree: Any) -> Iterator[Problem]:
    """Every error of the model over `tree`, the plain values of the file."""
    suggestions = Suggestions()
    seen: set[tuple[KeyPath, str]] = set()
    for item in error.errors(include_url=False, include_input=False):
        path, value, at_key = _place(item["loc"], tree)
        kind = item["type"]
        if kind == "default_factory_not_called":
            continue  # the value that the default depends on has an error of its own
        if kind == "missing":
            missing = (*path, str(item["loc"][-1]))
            known = _known(missing, tree)
            if known is None:
                continue  # a provider that is mistyped would have brought it
            problem = Problem(missing, f"is missing: {known.where}" if known.where else "is missing", at="missing")
        elif kind == "extra_forbidden":
            problem = Problem(path, _unknown_key(path, suggestions), at="key")
        else:
            message = _message(kind, item.get("ctx", {}), value, path=path, suggestions=suggestions)
            problem = Problem(path, message, at="key" if at_key else "value")
        if (problem.path, problem.message) not in seen:
            seen.add((problem.path, problem.message))
            yield problem


def _known(path: KeyPath, tree: Any) -> Provider | None:
    """The provider of the upstream whose host this is, one of which nothing is known where there is none, None where it is mistyped."""
    if _pattern(path) != ("upstreams", _ANY, "host"):
        return PROVIDERS["generic"]
    name = tree["upstreams"][path[1]].get("provider")
    return PROVIDERS.get(name if isinstance(name, str) else "generic")


def yet_to_come(path: KeyPath) -> bool:
    """Whether the key at `path` is one the contract has and the program does not."""
    return path[-1] in _YET_TO_COME.get(_pattern(path[:-1]), "").split()


def _place(loc: tuple[int | str, ...], tree: Any) -> tuple[KeyPath, Any, bool]:
    """The part of `loc` that the file has, what stands there, and whether the key itself is meant.

    A value that stands for a list of one has no index in the file; pydantic adds words of its own for keys and unions.
    """
    path: list[int | str] = []
    at: Any = tree
    for part in loc:
        if part == "[key]":
            return tuple(path), at, True
        if part in at if isinstance(at, dict) else isinstance(at, list) and isinstance(part, int) and part < len(at):
            path.append(part)
            at = at[part]
    return tuple(path), at, False


def _pattern(path: KeyPath) -> KeyPath:
    """`path` with a star for list places and for the names people choose."""
    named = path[:1] in (("users",), ("upstreams",))
    return tuple(_ANY if isinstance(part, int) or (place == 1 and named) else part for place, part in enumerate(path))


def _unknown_key(path: KeyPath, suggestions: Suggestions) -> str:
    if holds_secret(path[:-1]):
        return "unknown key"
    key = str(path[-1])
    if yet_to_come(path):
        return f"{key} is not available yet"
    section = _SECTIONS.get(_pattern(path[:-1]))
    names = [field.alias or name for name, field in section.model_fields.items()] if section else []
    names = ["from" if name == "from_" else name for name in names]
    meant = suggestions.meant(key, names)
    if not meant:
        meant = _belonging(key, _pattern(path[:-1]))
    return f"unknown key {key!r}{meant}"


def _belonging(key: str, section: KeyPath) -> str:
    """Where a key that is not known in this section would be: first looked for below it; `""` when that cannot be told."""
    places = [place for place, known in _SECTIONS.items() if key in known.model_fields and place != section]
    below = [place for place in places if place[: len(section)] == section]
    places = below if section and below else places
    return f"; it belongs to {_words(places[0])}" if len({_SECTIONS[place] for place in places}) == 1 else ""


def _words(section: KeyPath) -> str:
    """Where a section stands, for a person: `the top level`, `an item of upstreams`, `retry`."""
    if not section:
        return "the top level"
    names = [str(part) for part in section if part != _ANY]
    return f"an item of {names[-1]}" if section[-1] == _ANY else " of ".join(reversed(names))


def _message(kind: str, context: dict[str, Any], value: Any, *, path: KeyPath, suggestions: Suggestions) -> str:
    if kind == "value_error":
        return str(context["error"])
    if value is None:
        below = _pattern(path) in _SECTIONS or path in _COLLECTIONS
        return "is empty: what belongs to it stands below, further to the right" if below else "is empty"
    if kind == "literal_error":
        known = [word.strip(" '") for word in context["expected"].replace(" or ", ",").split(",")]
        meant = suggestions.meant(value, known) if isinstance(value, str) else ""
        return f"must be {', '.join(known[:-1])} or {known[-1]}{meant}" if len(known) > 1 else f"must be {known[0]}"
    if kind in _TYPES:
        words = _TYPES[kind]
        if kind == "too_short":
            return words
        if kind == "string_type" and isinstance(value, bool):
            return f"{words}: quote it"
        if kind in ("int_type", "int_from_float") and isinstance(value, str) and value.isdecimal():
            return f"{words}: remove the quotes"
        if kind == "bool_type" and isinstance(value, str) and value.lower() in ("true", "false"):
            return f"{words}: remove the quotes"
        if kind == "tuple_type" and not isinstance(value, bool | int | float):
            return f"{words}, not {kind_of(value)}: begin each item with - and a blank"
        if kind == "dict_type" and isinstance(value, list) and path in _COLLECTIONS:
            return f"{words}, not a list: write each name with a colon, and its keys below it"
        number = isinstance(value, int | float) and not isinstance(value, bool)
        return words if number and "number" in words else f"{words}, not {kind_of(value)}"
    bounds = {"greater_than": ("more than", "gt"), "greater_than_equal": ("at least", "ge"), "less_than_equal": ("at most", "le")}
    if kind in bounds:
        words, key = bounds[kind]
        return f"must be {words} {context[key]:g}"
    return "cannot be used here"
