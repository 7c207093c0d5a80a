"""What several keys must agree on: names that refer to each other, names given twice, keys that need or exclude each other.

It looks at the plain values of the file, not at the model: so a wrong value in one place hides no wrong name in another.
Values of a wrong type are passed over here, as the model speaks of them. Pure.
"""

from collections.abc import Collection, Iterator
from typing import Any, Final

from relay.config import oauth
from relay.config.findings import KeyPath, Problem, Suggestions
from relay.config.providers import PROVIDERS, filled
from relay.config.values import as_written

_OTHER_ACTIONS: Final = {"redirect", "discard"}  # not available yet, as is said elsewhere; they take the place of an upstream
_Names = Collection[str] | None  # None: they cannot be told


def problems(tree: dict[str, Any]) -> Iterator[Problem]:
    """Everything in the file's plain values that does not fit together."""
    suggestions = Suggestions()
    for section in ("upstreams", "routes"):
        if section not in tree:
            why = "there is nowhere to send mail" if section == "upstreams" else "without a route every sender is refused"
            yield Problem((section,), f"is missing: {why}", at="missing")
        elif tree[section] in ({}, []):
            yield Problem((section,), "must not be empty", at="key")
    upstreams = tree.get("upstreams")
    names: _Names = None
    if isinstance(upstreams, dict):
        names = upstreams.keys()
        for name, upstream in upstreams.items():
            if isinstance(upstream, dict):
                yield from _login(("upstreams", name), upstream)
                yield from oauth.problems(("upstreams", name), upstream)
                yield from _client_certificate(("upstreams", name), upstream)
    users = tree.get("users", {})
    yield from _aliases(tree.get("aliases"))
    yield from _listeners(tree.get("listeners"))
    yield from _doors(tree.get("listeners"))
    yield from _line_ends(tree.get("listeners"))
    yield from _logins(tree.get("listeners"), users)
    yield from _encryption(tree.get("listeners"))
    yield from _routes(tree.get("routes"), names, _listener_names(tree), suggestions)
    if isinstance(users, dict):
        for place, route in _items(tree.get("routes")):
            for below, user in _items(route.get("user") if isinstance(route, dict) else None):
                yield from _unknown(("user", "routes", *place, "user", *below), user, users, suggestions)


def _listener_names(tree: dict[str, Any]) -> _Names:
    """What a route's `listener` may say."""
    listeners = tree.get("listeners", [{}])
    if not isinstance(listeners, list) or not all(isinstance(item, dict) for item in listeners):
        return None
    found = (_text(item.get("name", item.get("bind", "127.0.0.1:2525"))) for item in listeners)
    return dict.fromkeys(name for name in found if name is not None)


def _aliases(aliases: Any) -> Iterator[Problem]:
    """Names that differ in the case of their letters alone, and so are one: the last would be all that is left."""
    seen: dict[str, str] = {}
    for name in aliases if isinstance(aliases, dict) else ():
        if (first := seen.setdefault(name.lower(), name)) != name:
            yield Problem(("aliases", name), f"is the same as {first!r}, as case does not matter here", at="key")


def _text(value: Any) -> str | None:
    value = as_written(value)
    return value if isinstance(value, str) else None


def _items(value: Any) -> Iterator[tuple[KeyPath, Any]]:
    """The values of a key that takes one or a list, each with what its path adds."""
    if isinstance(value, list):
        yield from (((place,), item) for place, item in enumerate(value))
    elif value is not None:
        yield (), value


def _login(path: KeyPath, upstream: dict[str, Any]) -> Iterator[Problem]:
    """A login with a password, with what the provider brings; that with a token is the business of `oauth`."""
    name, auth = upstream.get("provider"), upstream.get("auth", "auto")
    provider = PROVIDERS.get(name) if isinstance(name, str) else None
    settings = filled(upstream)
    username, password = (settings.get(key) is not None for key in ("username", "password"))
    if auth in ("none", "xoauth2") or settings.get("oauth2") is not None:
        return
    wanted = f" ({name}: {provider.login})" if provider is not None and provider.login else ""
    if username and not password and "username" not in upstream:
        yield Problem((*path, "password"), f"is missing{wanted}", at="missing")
    elif username and not password:
        yield Problem((*path, "username"), f"there is a username but no password{wanted}", at="key")
    elif password and not username:
        yield Problem((*path, "password"), f"there is a password but no username{wanted}", at="key")
    elif not username and auth in ("plain", "login", "cram-md5"):
        yield Problem((*path, "auth"), f"auth: {auth} needs a username and a password{wanted}")
    elif not username and provider is not None and provider.needs_login and "host" not in upstream:
        yield Problem((*path, "username"), f"is missing: {name} takes no mail without a login{wanted}", at="missing")


def _client_certificate(path: KeyPath, upstream: dict[str, Any]) -> Iterator[Problem]:
    given = [key for key in ("client_certificate", "client_key") if upstream.get(key) is not None]
    for key in given if upstream.get("security") == "none" else ():
        yield Problem((*path, key), f"{key} needs security: starttls or tls", at="key")
    if given == ["client_key"]:
        yield Problem((*path, "client_key"), "there is a client_key but no client_certificate", at="key")


def _listeners(listeners: Any) -> Iterator[Problem]:
    names: dict[str, int] = {}
    binds: dict[str, int] = {}
    for place, item in _items(listeners):
        if not isinstance(item, dict):
            continue
        bind = _text(item.get("bind", "127.0.0.1:2525"))
        name = _text(item.get("name", bind))
        # The kernel gives every listener on port 0 a port of its own.
        for key, value, seen in (("bind", bind, binds), ("name", name, names)):
            if value is None or (value == bind and (value.endswith(":0") or (key == "name" and "name" not in item))):
                continue
            if value in seen:
                at: Any = "value" if key in item else "missing"
                yield Problem(("listeners", *place, key), f"{value!r} is already taken by listeners[{seen[value]}]", at=at)
            seen.setdefault(value, place[0] if place and isinstance(place[0], int) else 0)


def _line_ends(listeners: Any) -> Iterator[Problem]:
    for place, item in _items(listeners):
        if isinstance(item, dict) and item.get("newlines") == "legacy" and not item.get("networks"):
            message = "legacy lets clients end mail in a way that can be abused: say in `networks` which"
            yield Problem(("listeners", *place, "newlines"), message)


def _doors(listeners: Any) -> Iterator[Problem]:
    """Keys about who connects that do not fit the kind of socket."""
    for place, item in _items(listeners):
        if not isinstance(item, dict):
            continue
        path: KeyPath = ("listeners", *place)
        bind = _text(item.get("bind", "")) or ""
        unix = bind.startswith("unix:")
        if "mode" in item and not unix:
            yield Problem((*path, "mode"), "only a Unix socket that the relay makes has a mode: bind: unix:/path", at="key")
        if unix and "networks" in item and not item.get("proxy_protocol"):
            message = "nobody comes to a Unix socket from a network: say with `mode` who may connect"
            yield Problem((*path, "networks"), message, at="key")
        for below, proxy in () if bind.startswith("systemd:") else _items(item.get("proxy_protocol")):
            user = isinstance(proxy, str) and proxy.startswith("uid:")
            if isinstance(proxy, str) and user is not unix:
                where = "a Unix socket is a user, as in uid:33" if unix else "the network has an address"
                yield Problem((*path, "proxy_protocol", *below), f"a proxy that comes over {where}")


def _encryption(listeners: Any) -> Iterator[Problem]:
    for place, item in _items(listeners):
        if not isinstance(item, dict):
            continue
        path: KeyPath = ("listeners", *place)
        if item.get("security", "none") == "none":
            for key in ("certificate", "key", "require_tls", "minimum_tls"):
                if item.get(key) not in (None, False):
                    yield Problem((*path, key), f"{key} needs security: starttls or tls", at="key")
            continue
        if item.get("key") is not None and item.get("certificate") is None:
            yield Problem((*path, "key"), "there is a key but no certificate", at="key")
        if _text(item.get("minimum_tls")) in ("1.0", "1.1") and "networks" not in item:
            yield Problem((*path, "minimum_tls"), "versions below 1.2 are broken: name with `networks` who may still use them")


def _logins(listeners: Any, users: Any) -> Iterator[Problem]:
    for place, item in _items(listeners):
        if isinstance(item, dict) and item.get("auth") in ("optional", "required") and users in ({}, None):
            yield Problem(("listeners", *place, "auth"), "nobody can log in: there are no `users`")


def _routes(routes: Any, upstreams: _Names, listeners: _Names, suggestions: Suggestions) -> Iterator[Problem]:
    names: dict[str, int] = {}
    for place, route in enumerate(routes if isinstance(routes, list) else []):
        if not isinstance(route, dict):
            continue
        path: KeyPath = ("routes", place)
        name = _text(route.get("name"))
        if name is not None:
            if name in names:
                yield Problem((*path, "name"), f"{name!r} is already the name of routes[{names[name]}]")
            names.setdefault(name, place)
        yield from _action(path, route)
        yield from _unknown(("upstream", *path, "upstream"), route.get("upstream"), upstreams, suggestions)
        for below, listener in _items(route.get("listener")):
            yield from _unknown(("listener", *path, "listener", *below), listener, listeners, suggestions)
        yield from _fallbacks(path, route, upstreams, suggestions)


def _action(path: KeyPath, route: dict[str, Any]) -> Iterator[Problem]:
    if _OTHER_ACTIONS & route.keys():
        return
    given = [key for key in ("upstream", "reject") if key in route]
    if len(given) == 2:
        yield Problem((*path, "reject"), "a route has either an upstream or reject", at="key")
    elif not given or route[given[0]] is None:
        at: Any = "key" if given else "missing"
        yield Problem((*path, *(given or ["upstream"])), "a route needs an upstream, or reject with a text", at=at)
    elif "reject" in route:
        for key in ("fallback", "rewrite", "retry", "wait", "verified_only"):
            if key in route:
                yield Problem((*path, key), f"a route that rejects has no {key}", at="key")
    elif route.get("verified_only") is True and not route.get("fallback"):
        message = "it needs a `fallback`, which takes the mail until `relay test` of the upstream has succeeded"
        yield Problem((*path, "verified_only"), message, at="key")


def _fallbacks(path: KeyPath, route: dict[str, Any], upstreams: _Names, suggestions: Suggestions) -> Iterator[Problem]:
    seen = {_text(route.get("upstream"))}
    for below, item in _items(route.get("fallback")):
        inside: KeyPath = ("upstream",) if isinstance(item, dict) else ()
        name = _text(item.get("upstream") if isinstance(item, dict) else item)
        if name is None:
            continue
        at = (*path, "fallback", *below, *inside)
        unknown = list(_unknown(("upstream", *at), name, upstreams, suggestions))
        yield from unknown
        if not unknown and name in seen:
            what = "the route's own upstream" if name == _text(route.get("upstream")) else "already a fallback of this route"
            yield Problem(at, f"{name!r} is {what}")
        seen.add(name)


def _unknown(place: KeyPath, value: Any, known: _Names, suggestions: Suggestions) -> Iterator[Problem]:
    """`place` begins with the word for what is looked for."""
    name = _text(value)
    if known is not None and name is not None and name not in known:
        yield Problem(place[1:], f"unknown {place[0]} {name!r}{suggestions.meant(name, known)}")
