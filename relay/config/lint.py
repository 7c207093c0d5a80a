"""What is allowed and probably not meant: routes never taken, upstreams never used, secrets and mail less guarded than they look. And,
as an error, what no file can mean: an upstream that is the relay itself, two listeners in one place.

Every finding is a fact about the configuration alone; none looks at the network. Pure. The search for unreachable routes asks for
every route which conditions could cover its own, and looks these up: its time grows with the file, not with its square.
"""

from collections.abc import Iterator
from functools import lru_cache
from ipaddress import IPv4Address, IPv6Address, ip_address
from itertools import product
from math import prod
from typing import Final

from relay.config.findings import Problem
from relay.config.listeners import Listener
from relay.config.model import Config, Route, effective_rewrite
from relay.config.providers import PROVIDERS
from relay.config.quantities import Rate
from relay.config.secrets import Secret
from relay.config.upstreams import Upstream
from relay.config.values import Network, Uid
from relay.mail.address import domain_of, local_of
from relay.mail.permission import may_send

_COMBINATIONS: Final = 2000  # a route with more of them than this is not looked at
_NAMES: Final = 5
_PROBE_SECONDS: Final = 60.0
_SMALLEST_SIZE_OCTETS: Final = 65536  # RFC 5321 section 4.5.3.1.7
_EXPOSED: Final = "a secret in a file that others can read: chmod o-r, or use {env: …}, {file: …} or {credential: …}"
_BLANK_ENDS: Final = "begins or ends with a blank, which is taken for a part of it"
_Case = tuple[str, str, str, str, Network | Uid | None]  # sender, recipient, user and listener ("": any), client


def unguarded(config: Config, *, exposed: bool) -> Iterator[Problem]:
    """Where secrets and mail can be read by strangers. `exposed`: others than its owner may read the file."""
    for name, upstream in config.upstreams.items():
        for key, message in _unguarded(upstream, exposed=exposed):
            yield Problem(("upstreams", name, key), message, "warning")
    for name, user in config.users.items():
        if user.password is not None and _has_blank_ends(user.password):
            yield Problem(("users", name, "password"), _BLANK_ENDS, "warning")
        if exposed and user.password is not None and user.password.is_plain:
            yield Problem(("users", name, "password"), f"{_EXPOSED}, or a password_hash", "warning")
    for place, listener in enumerate(config.listeners):
        if listener.auth != "none" and listener.auth_without_tls and listener.security != "tls" and not _is_local(listener):
            message = "passwords of apps may come over the network in clear text"
            yield Problem(("listeners", place, "auth_without_tls"), message, "warning")


def improbable(config: Config) -> Iterator[Problem]:
    """What nobody writes on purpose."""
    yield from _unused(config)
    yield from _useless_logins(config)
    yield from _proxied(config)
    yield from _shut(config)
    yield from _provided(config)
    yield from _too_often(config)
    yield from _never_reached(config)
    yield from _open_senders(config)
    yield from _not_allowed(config)
    yield from _too_small(config)
    yield from _ports(config)
    yield from _unreachable(config.routes)
    yield from _too_late(config)


def circular(config: Config) -> Iterator[Problem]:
    """Upstreams that are one of our own listeners, as far as addresses tell: a name that leads here is found when mail comes back."""
    for name, upstream in config.upstreams.items():
        for listener in config.listeners:
            if upstream.port == listener.port and any(_reaches(host, listener.host) for host in upstream.host):
                yield Problem(("upstreams", name, "host"), f"this is the relay itself: mail would go in circles through {listener.bind}")
                break


def colliding(config: Config) -> Iterator[Problem]:
    """Listeners that would want what an earlier one has: Linux gives a port of all addresses and of one of them to one socket alone."""
    for place, listener in enumerate(config.listeners):
        for earlier, other in enumerate(config.listeners[:place]):
            if listener.port == other.port != 0 and listener.bind != other.bind and _overlap(listener.host, other.host):
                message = f"{other.bind} of listeners[{earlier}] takes this address and port, too: leave one out, or change a port"
                yield Problem(("listeners", place, "bind"), message)
                break


def _overlap(one: str, other: str) -> bool:
    """Whether two hosts to bind to have an address in common; of a name only what can be told without a resolver."""
    for address, another in zip(_addresses(one), _addresses(other), strict=False):
        if address.version == another.version and (address == another or address.is_unspecified or another.is_unspecified):
            return True
    return False


def _reaches(host: str, bound: str) -> bool:
    """Whether who connects to `host` finds what listens on `bound`."""
    for target in _addresses(host):
        for address in _addresses(bound):
            if target == address or (target.version == address.version and address.is_unspecified and target.is_loopback):
                return True
    return False


@lru_cache(maxsize=1024)
def _addresses(host: str) -> tuple[IPv4Address | IPv6Address, ...]:
    """The addresses of a host that is one, or this machine. Kept, as thousands of tenants may use one host."""
    if host == "localhost" or host.endswith(".localhost"):
        return ip_address("127.0.0.1"), ip_address("::1")
    try:
        return (ip_address(host),)
    except ValueError:
        return ()


def _unguarded(upstream: Upstream, *, exposed: bool) -> Iterator[tuple[str, str]]:
    local = all(_is_loopback(host) for host in upstream.host)
    if upstream.password is not None and _has_blank_ends(upstream.password):
        yield "password", _BLANK_ENDS
    if exposed and upstream.password is not None and upstream.password.is_plain:
        yield "password", _EXPOSED
    if upstream.security == "none" and upstream.password is not None and upstream.auth != "none" and not local:
        yield "security", "the password goes over the network in clear text"
    if not upstream.verify and upstream.security != "none" and not local:
        yield "verify", "the certificate is not checked: whoever is on the way can read the password and the mail"


def _has_blank_ends(secret: Secret) -> bool:
    """Whether blanks that nobody sees came with it from elsewhere: in the file itself they would have been quoted."""
    return not secret.is_plain and secret.reveal() != secret.reveal().strip()


def _is_loopback(host: str) -> bool:
    return any(address.is_loopback for address in _addresses(host))


def _unused(config: Config) -> Iterator[Problem]:
    used = {route.upstream for route in config.routes} | {item.upstream for route in config.routes for item in route.fallback}
    for name in config.upstreams:
        if name not in used:
            yield Problem(("upstreams", name), "no route uses this upstream", "warning", at="key")


def _useless_logins(config: Config) -> Iterator[Problem]:
    """Logins that nobody is asked for, and those that nobody is offered."""
    if config.users and all(listener.auth == "none" for listener in config.listeners):
        yield Problem(("users",), "no listener takes logins: set `auth` on one", "warning", at="key")
    for place, listener in enumerate(config.listeners):
        if listener.auth_exempt and listener.auth != "required":
            message = "nobody needs a login here: auth_exempt says nothing without `auth: required`"
            yield Problem(("listeners", place, "auth_exempt"), message, "warning")
        if listener.auth != "none" and listener.security == "none" and not listener.auth_without_tls and not _is_local(listener):
            message = "AUTH is offered only under TLS or from this machine: set `security`, or no other client can log in"
            yield Problem(("listeners", place, "auth"), message, "warning")


def _is_local(listener: Listener) -> bool:
    """Whether all its clients are on this machine."""
    return listener.bind.startswith("unix:") or _is_loopback(listener.host) or all(network.is_loopback for network in listener.networks)


def _proxied(config: Config) -> Iterator[Problem]:
    """Proxies that could as well not be there."""
    for place, listener in enumerate(config.listeners):
        if listener.proxy_protocol and "networks" not in listener.model_fields_set and listener.auth != "required":
            message = "clients behind the proxy are known by their own addresses, and without `networks` only loopback may connect"
            yield Problem(("listeners", place, "proxy_protocol"), message, "warning")


def _shut(config: Config) -> Iterator[Problem]:
    """Listeners that the network reaches, and that then let nobody in from there. A name may be this machine alone: ip6-localhost."""
    for place, listener in enumerate(config.listeners):
        by_default = "networks" not in listener.model_fields_set and listener.auth != "required"
        if by_default and not listener.proxy_protocol and _addresses(listener.host) and not _is_loopback(listener.host):
            message = "without `networks` only this machine may connect: name those of your apps, or bind to 127.0.0.1"
            yield Problem(("listeners", place, "bind"), message, "warning")


def _open_senders(config: Config) -> Iterator[Problem]:
    """Upstreams that would send for anybody, where one configuration serves several tenants.

    An upstream that the file itself gives to every sender is meant to: there is nothing `senders` could say.
    """
    tenants = {route.upstream for route in config.routes if route.upstream and "*" not in route.sender}
    general = [route for route in config.routes if "*" in route.sender]
    shared = {name for route in general for name in (route.upstream, *(item.upstream for item in route.fallback))}
    without = [name for name, upstream in config.upstreams.items() if not upstream.senders and name not in shared]
    if len(tenants) < 2 or not without:
        return
    names = ", ".join(without[:_NAMES]) + (f" and {len(without) - _NAMES} more" if len(without) > _NAMES else "")
    message = f"several tenants, and no `senders` at {names}: a wrong route sends one tenant's mail with another's credential"
    yield Problem(("upstreams",), message, "warning", at="key")


def _not_allowed(config: Config) -> Iterator[Problem]:
    """Routes to upstreams that may not send what comes or what is made of it: the mail is refused, or held when it falls back."""
    for place, route in enumerate(config.routes):
        for below, name in enumerate((route.upstream, *(item.upstream for item in route.fallback)), -1):
            if name is None or not (senders := config.upstreams[name].senders):
                continue
            own = () if below < 0 else ("fallback", below)
            over = route.fallback[below].rewrite if below >= 0 else None
            rules = effective_rewrite(route, name)
            given = {"from": rules.from_ and rules.from_.address, "envelope_sender": rules.envelope_sender}
            then = "mail that falls back to it is held" if own else "such mail is refused with 550"
            for key, address in given.items():
                if address and not may_send(senders, address):
                    theirs = over is not None and key.replace("from", "from_") in over.model_fields_set
                    path = ("routes", place, *(own if theirs else ()), "rewrite", key)
                    yield Problem(path, f"{address} is not one of the `senders` of {name}: {then}", "warning")
            sender = next((item for item in route.sender if not _may_come_from(item, senders)), None)
            if sender is not None and not all(given.values()):
                advice = "add it there, or rewrite `from` and `envelope_sender`"
                message = f"{sender} is not one of the `senders` of {name}: {then}; {advice}"
                yield Problem(("routes", place, *own, "upstream"), message, "warning")


def _may_come_from(condition: str, senders: tuple[str, ...]) -> bool:
    """Whether some mail that meets this condition on the sender is allowed: what is for everybody may be meant for them alone."""
    if condition in ("*", "<>"):
        return True
    if "@" in condition:
        return may_send(senders, condition)
    domains = (sender.rpartition("@")[2] for sender in senders)
    return any(domain.endswith(condition[1:]) if condition.startswith("*.") else domain == condition for domain in domains)


def _ports(config: Config) -> Iterator[Problem]:
    """Ports on which the other side of the connection waits for something else (RFC 8314 section 3)."""
    found: list[tuple[str, str | int, Upstream | Listener]] = [("upstreams", name, one) for name, one in config.upstreams.items()]
    found += (("listeners", place, one) for place, one in enumerate(config.listeners))
    for section, name, one in found:
        path, port, security = (section, name), one.port, one.security
        if port == 465 and security != "tls":
            yield Problem((*path, "security"), "on port 465 TLS begins at once: write security: tls, or another port", "warning")
        elif port in (25, 587) and security == "tls":
            message = f"on port {port} a session begins in clear: write security: starttls, or port 465"
            yield Problem((*path, "security"), message, "warning")


def _too_small(config: Config) -> Iterator[Problem]:
    """Sizes that were to have a unit."""
    for place, listener in enumerate(config.listeners):
        if listener.message_size < _SMALLEST_SIZE_OCTETS:
            message = f"{listener.message_size} bytes, and every server takes 64 KiB at least: write 50MB for megabytes"
            yield Problem(("listeners", place, "message_size"), message, "warning")
        elif config.spool.max_size is not None and config.spool.max_size < listener.message_size:
            message = f"less than the `message_size` of listener {listener.name}: such a message is never taken"
            yield Problem(("spool", "max_size"), message, "warning")


def _never_reached(config: Config) -> Iterator[Problem]:
    """Limits behind narrower ones."""
    for place, listener in enumerate(config.listeners):
        if listener.connections_per_client is not None and listener.connections_per_client > listener.connections:
            message = f"is never reached: the listener has {listener.connections} connections in all"
            yield Problem(("listeners", place, "connections_per_client"), message, "warning")
    for name, upstream in config.upstreams.items():
        for key, rates in (("rate", upstream.limits.rate), ("recipient_rate", upstream.limits.recipient_rate)):
            for place, narrower in _needless(rates) if len(rates) > 1 else ():
                message = f"{rates[place]} is never reached: {narrower} comes before it"
                yield Problem(("upstreams", name, "limits", key, place), message, "warning")


def _needless(rates: tuple[Rate, ...]) -> Iterator[tuple[int, Rate]]:
    """Rates that another one keeps anyhow: it allows as few over a longer time, or over a shorter one too few to get there."""
    for place, rate in enumerate(rates):
        for other_place, other in enumerate(rates):
            times = max(1, rate.seconds // other.seconds)
            if other_place != place and other.number * times <= rate.number and (other != rate or other_place < place):
                yield place, other
                break


def _provided(config: Config) -> Iterator[Problem]:
    """What a provider is known not to take."""
    for name, upstream in config.upstreams.items():
        path, known = ("upstreams", name), upstream.known
        if known.takes_null_sender is False and upstream.null_sender == "keep":
            message = "is missing: bounces have a null sender, which this provider refuses; name an address that may send there"
            yield Problem((*path, "null_sender"), message, "warning", at="missing")
        if known is PROVIDERS["google-relay"] and upstream.ehlo is None and not upstream.logs_in and upstream.null_sender == "keep":
            message = "is missing: Google knows by it whose bounces these are; name a domain of the organization"
            yield Problem((*path, "ehlo"), message, "warning", at="missing")
        wanted = known.settings.get("username")
        if wanted is not None and upstream.logs_in and upstream.username != wanted:
            yield Problem((*path, "username"), f"here this is the word {wanted}", "warning")


def _too_often(config: Config) -> Iterator[Problem]:
    """Logins that a provider may take for an attack."""
    for name, upstream in config.upstreams.items():
        if upstream.probe is not None and upstream.probe < _PROBE_SECONDS:
            message = "a login every few seconds, and providers lock accounts for less: an hour is often enough"
            yield Problem(("upstreams", name, "probe"), message, "warning")


def _too_late(config: Config) -> Iterator[Problem]:
    """Fallbacks for which nothing is left to send."""
    for place, route in enumerate(config.routes):
        expire = (route.retry or config.retry).expire
        if names := [item.upstream for item in route.fallback if item.after >= expire]:
            message = f"mail expires before the fallback {names[0]} may be used: `after` must be less than `expire`"
            yield Problem(("routes", place, "fallback"), message, "warning")


def _unreachable(routes: tuple[Route, ...]) -> Iterator[Problem]:
    taken: dict[_Case, int] = {}
    lengths: set[tuple[int, int]] = {
        (client.version, client.prefixlen) for route in routes for client in route.client if not isinstance(client, Uid)
    }
    for place, route in enumerate(routes):
        others = (route.recipient or ("",), route.user or ("",), route.listener or ("",), route.client or (None,))
        if prod(map(len, (route.sender, *others))) > _COMBINATIONS:
            continue
        cases: list[_Case] = list(product(route.sender, *others))
        covering = [_covering(case, taken, lengths) for case in cases]
        if None not in covering:
            before = sorted({earlier for earlier in covering if earlier is not None})
            names = ", ".join(routes[earlier].name for earlier in before[:_NAMES])
            message = f"this route is never taken: {names} before it takes the same mail"
            yield Problem(("routes", place), message, "warning")
        for case in cases:
            taken.setdefault(case, place)


def _covering(case: _Case, taken: dict[_Case, int], lengths: set[tuple[int, int]]) -> int | None:
    """The earlier route that takes everything this case speaks of."""
    sender, recipient, user, listener, client = case
    wider = product(
        _wider_addresses(sender),
        (*_wider_addresses(recipient), "") if recipient else ("",),
        (user, "") if user else ("",),
        (listener, "") if listener else ("",),
        (*_wider_sources(client, lengths), None) if client else (None,),
    )
    return next((taken[candidate] for candidate in wider if candidate in taken), None)


def _wider_addresses(condition: str) -> list[str]:
    """The condition itself and all that hold whenever it does."""
    if condition in ("*", "<>"):
        return list(dict.fromkeys((condition, "*")))
    found = [condition]
    domain = condition
    if "@" in condition:
        domain = domain_of(condition)
        local = local_of(condition)
        if "+" in local:
            found.append(f"{local.partition('+')[0]}@{domain}")
        found.append(domain)
    parent = domain.removeprefix("*.")
    while "." in parent:
        parent = parent.partition(".")[2]
        found.append(f"*.{parent}")
    return [*found, "*"]


def _wider_sources(client: Network | Uid, lengths: set[tuple[int, int]]) -> Iterator[Network | Uid]:
    if isinstance(client, Uid):
        yield client
        return
    for version, length in lengths:
        if version == client.version and length <= client.prefixlen:
            yield client.supernet(new_prefix=length)
