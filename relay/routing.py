"""Which route takes a message for one recipient, and why: the first one whose conditions all hold.

Pure: the same configuration and facts always give the same route. Every route is filed under the patterns it names, and an
address knows the few patterns that can match it, so that a look-up costs the same with ten routes and with a hundred thousand.
Also here: what completes and multiplies recipients before they are routed, and what a route changes at each of its upstreams.
Conditions come from `config` in the form in which they compare: lower case, domains as A-labels.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import chain

from relay.config.model import Config, Retry, Route, effective_rewrite
from relay.config.model import Rewrite as RewriteSettings
from relay.config.values import client_of, is_from
from relay.mail.address import folded, patterns_for
from relay.mail.envelope import Facts, Origin
from relay.mail.rewrite import Rewrite

_NO_RULES = Rewrite()
_NO_ROUTE = "no route takes this sender"
_client_of = lru_cache(maxsize=8192)(client_of)


@dataclass(frozen=True, slots=True)
class Judgement:
    """What one route made of the facts."""

    route: Route
    matched: bool
    why: str


class Router:
    """The routes of one configuration, indexed. A reload makes a new one."""

    def __init__(self, config: Config) -> None:
        self._routes = config.routes
        self._retry = config.retry
        self._by_name = {route.name: route for route in config.routes}
        self._by_sender: dict[str, list[int]] = {}
        self._by_recipient: dict[str, list[int]] = {}
        # Routes for every sender and some recipients are filed by recipient: there may be as many of them as of tenants.
        self._with_recipient: list[int] = []
        for number, route in enumerate(config.routes):
            if "*" in route.sender and route.recipient and "*" not in route.recipient:
                self._with_recipient.append(number)
                _file(self._by_recipient, route.recipient, number)
            else:
                _file(self._by_sender, ("*",) if "*" in route.sender else route.sender, number)
        self._rewrites: dict[tuple[str, str], Rewrite | None] = {}

    def choose(self, sender: str, recipient: str, origin: Origin) -> Route | None:
        """The first route whose conditions all hold, or None: no route takes it."""
        for number in self._candidates(sender, origin, recipient):
            route = self._routes[number]
            if route.recipient and not _meets(route.recipient, recipient):
                continue
            if _admits(route, origin):
                return route
        return None

    def report_route(self, recipient: str, origin: Origin, *, came_by: str) -> Route | None:
        """The route of a report of ours to `recipient`, who sent what it is about and whose address is `origin.header_from`.

        That of a null sender with his address in From; where there is none, that of his own mail; and where this is only for other
        recipients, the route that his message `came_by`, if it is still one of his.
        """
        route = self.choose("", recipient, origin)
        if route is None or route.upstream is None:  # a route that rejects what apps send from <> says nothing about our reports
            route = self.choose(origin.header_from, recipient, origin)
        if route is not None:
            return route
        known = self._by_name.get(came_by)
        if known is None or known.upstream is None or not _admits(known, origin):
            return None
        return known if "*" in known.sender or _meets(known.sender, origin.header_from) else None

    def route(self, name: str) -> Route | None:
        """The route of that name."""
        return self._by_name.get(name)

    def retry_of(self, name: str) -> Retry:
        """When deferred mail of the route of that name is tried again: as it says itself, else as the file says for all."""
        route = self._by_name.get(name)
        return route.retry if route is not None and route.retry is not None else self._retry

    def explain(self, facts: Facts) -> list[Judgement]:
        """Every route up to the first match, with the condition that failed or all that held. Slow: for people."""
        judgements = []
        for route in self._routes:
            failed = next(_failures(route, facts), "")
            judgements.append(Judgement(route, not failed, failed or describe(route)))
            if not failed:
                break
        return judgements

    def foresee(self, sender: str, origin: Origin) -> Route | str | None:
        """What is known at MAIL: the route of all recipients, why none can be taken, or None where some might, and some might not.

        Why is the text of the route that rejects, or that there is no route. Of a null sender nothing is known before its header.
        """
        if not sender and not origin.header_from and self._routes:
            return None
        decided, refusal, rejects_some = len(self._routes), _NO_ROUTE, False
        for number in self._candidates(sender, origin):
            route = self._routes[number]
            if not _admits(route, origin):
                continue
            if route.recipient and "*" not in route.recipient:
                if not route.reject:
                    return None
                rejects_some = True
                continue
            if not route.reject:
                return None if rejects_some or (self._with_recipient and self._with_recipient[0] < number) else route
            decided, refusal = number, route.reject
            break
        for number in self._with_recipient:
            if number >= decided:
                break
            if not self._routes[number].reject and _admits(self._routes[number], origin):
                return None
        return refusal

    def rewrite_for(self, route: Route, upstream: str) -> Rewrite | None:
        """What `route` changes at `upstream`, or None: its own rules, with those of the fallback laid over them key by key."""
        key = (route.name, upstream)
        if key not in self._rewrites:
            rules = rules_of(effective_rewrite(route, upstream))
            self._rewrites[key] = None if rules == _NO_RULES else rules
        return self._rewrites[key]

    def _candidates(self, sender: str, origin: Origin, recipient: str = "") -> list[int]:
        """The numbers, ascending, of the routes that are filed under the sender, or under the recipient where it is known."""
        lists = []
        for pattern in patterns_for(sender) if sender else ("<>", *patterns_for(origin.header_from)):
            if pattern in self._by_sender:
                lists.append(self._by_sender[pattern])
        if recipient and self._by_recipient:
            lists += filter(None, map(self._by_recipient.get, patterns_for(recipient)))
        # One may come twice: asking a route again is cheaper than a set.
        return lists[0] if len(lists) == 1 else sorted(chain.from_iterable(lists))


def upstreams_of(route: Route) -> tuple[str, ...]:
    """The route's upstream and its fallbacks in order; none for a route that rejects."""
    return () if route.upstream is None else (route.upstream, *(fallback.upstream for fallback in route.fallback))


def rules_of(settings: RewriteSettings) -> Rewrite:
    """The configuration's rewrite in the form that `mail.rewrite` applies."""
    return Rewrite(
        from_name=settings.from_.name if settings.from_ else None,
        from_address=settings.from_.address if settings.from_ else None,
        reply_to=settings.reply_to,
        envelope_sender=settings.envelope_sender,
        set_headers=tuple(settings.set_headers.items()),
        add_headers=tuple(settings.add_headers.items()),
        remove_headers=settings.remove_headers,
        subject_prefix=settings.subject_prefix,
        bcc=settings.bcc,
    )


def complete(address: str, domain: str | None) -> str:
    """A bare address with our domain; without one it stays bare, which the caller refuses."""
    return address if not address or domain is None or "@" in address else f"{address}@{domain}"


def expand_alias(address: str, config: Config) -> tuple[str, ...]:
    """The recipients that a completed address stands for: itself, or what its alias says, and so on.

    An alias that leads back to a name already on the way ends there, as that name itself: nobody is lost in a circle.
    """
    if not config.aliases:
        return (address,)
    found: dict[str, str] = {}
    _follow(address, config, found, (), set())
    return tuple(found.values())


def describe(route: Route) -> str:
    """The conditions of a route in words."""
    parts = ["every sender" if "*" in route.sender else f"sender {', '.join(route.sender)}"]
    parts += [f"recipient {', '.join(route.recipient)}"] if route.recipient else []
    parts += [f"client {', '.join(map(str, route.client))}"] if route.client else []
    parts += [f"user {', '.join(route.user)}"] if route.user else []
    parts += [f"listener {', '.join(route.listener)}"] if route.listener else []
    return "; ".join(parts)


def _file(index: dict[str, list[int]], patterns: tuple[str, ...], number: int) -> None:
    for pattern in patterns:
        index.setdefault(pattern, []).append(number)


def _meets(conditions: tuple[str, ...], address: str) -> bool:
    return any(pattern in conditions for pattern in patterns_for(address))


def _admits(route: Route, origin: Origin) -> bool:
    """Whether the conditions hold that are about where the message came from."""
    if route.listener and origin.listener not in route.listener:
        return False
    if route.user and origin.user not in route.user:
        return False
    return not route.client or is_from(_client_of(origin.client), route.client)


def _failures(route: Route, facts: Facts) -> Iterator[str]:
    """The conditions of a route that do not hold, in words."""
    origin = facts.origin
    if "*" not in route.sender:
        wanted = ", ".join(route.sender)
        if facts.sender:
            if not _meets(route.sender, facts.sender):
                yield f"sender {facts.sender} is not {wanted}"
        elif "<>" not in route.sender and not origin.header_from:
            yield f"the null sender, without a From that can be read, is not {wanted}"
        elif "<>" not in route.sender and not _meets(route.sender, origin.header_from):
            yield f"the null sender, with {origin.header_from} in From, is not {wanted}"
    if route.recipient and not _meets(route.recipient, facts.recipient):
        yield f"recipient {facts.recipient} is not {', '.join(route.recipient)}"
    if route.user and origin.user not in route.user:
        yield f"user {origin.user or '(none)'} is not {', '.join(route.user)}"
    if route.listener and origin.listener not in route.listener:
        yield f"listener {origin.listener or 'unknown'} is not {', '.join(route.listener)}"
    elsewhere = Origin((*route.listener, "")[0], origin.client, (*route.user, "")[0])
    if route.client and not _admits(route, elsewhere):
        yield f"client {origin.client or 'unknown'} is not in {', '.join(map(str, route.client))}"


def _follow(address: str, config: Config, found: dict[str, str], path: tuple[str, ...], followed: set[str]) -> bool:
    """Answers whether nothing led back to the path: then the alias is `followed`, and would lead to the same from anywhere else."""
    name = folded(address)
    local, _, domain = name.rpartition("@")
    targets = config.aliases.get(name) or (config.aliases.get(local) if domain == config.domain else None)
    if not targets or name in path:
        found.setdefault(name, address)
        return not targets
    if name not in followed:
        ends = [_follow(target, config, found, (*path, name), followed) for target in targets]
        if all(ends):
            followed.add(name)
    return name in followed
