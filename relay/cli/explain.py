"""`relay explain`: which route takes a message, which do not and why, and what the message looks like at each upstream.

Sends nothing and needs no running relay; it asks the same router and the same rewriting as the relay itself. With `--outcomes` it
prints the table of fates instead: what each reply or failure of an upstream leads to; with `--upstream` too, what replies of that
upstream's provider mean is told first. Exit code 1: the message would be refused.
"""

import argparse
import os
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from relay.cli.options import EX_CONFIG, EX_FAILED, EX_USAGE, fail

if TYPE_CHECKING:
    from relay.config.model import Config, Route
    from relay.config.upstreams import Upstream
    from relay.mail.envelope import Facts
    from relay.mail.outcome import Phase, Row
    from relay.routing import Judgement, Router

_SHOWN_JUDGEMENTS = 20  # for a person; --json has them all
_HEADER_LIMIT_OCTETS = 1024 * 1024  # what intake takes of a header block


def add_parser(subparsers: Any) -> None:
    """Add `explain` to the commands."""
    parser = subparsers.add_parser("explain", help="which route takes a message, and why", description=__doc__.splitlines()[0])
    parser.add_argument("--from", dest="sender", metavar="ADDRESS", help='the envelope sender; "<>" for the null sender')
    parser.add_argument("--to", dest="recipient", metavar="ADDRESS", help="one recipient")
    parser.add_argument(
        "--client", default="127.0.0.1", metavar="IP", help="where the app connects from, or uid:1000 (default: %(default)s)"
    )
    parser.add_argument("--user", metavar="NAME", help="as whom it logs in (default: nobody)")
    parser.add_argument("--listener", metavar="NAME", help="where it connects to (default: the first listener)")
    parser.add_argument("--message", metavar="FILE", help="a message whose header to use; - reads standard input")
    parser.add_argument("--outcomes", action="store_true", help="print what each reply or failure of an upstream leads to")
    parser.add_argument(
        "--upstream", metavar="NAME", help="with --outcomes: of this upstream's provider first (an upstream of the file, or a provider)"
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Answer, and return the exit code."""
    if options.outcomes:
        return _show_outcomes(options)
    if options.upstream is not None:
        return fail("--upstream goes with --outcomes", EX_USAGE)
    if options.sender is None or options.recipient is None:
        return fail("--from and --to are needed", EX_USAGE)
    from relay.config.findings import ConfigError
    from relay.config.load import find_config, load
    from relay.mail.address import AddressError
    from relay.routing import Router

    try:
        config = load(find_config(options.config, os.environ))
    except ConfigError as error:
        return fail("\n".join(map(str, error.findings)), EX_CONFIG)
    if unknown := _unknown(options, config):
        return fail(unknown, EX_USAGE)
    try:
        content = _read_message(options.message) if options.message else None
        router = Router(config)
        answers = [_answer(config, router, facts, content) for facts in _facts(config, options, content)]
    except AddressError as error:
        return fail(f"not an address: {error}", EX_USAGE)
    except OSError as error:
        return fail(f"cannot read {options.message}: {error.strerror}", EX_USAGE)
    print(_as_json(answers) if options.json else "\n\n".join(_as_text(answer) for answer in answers))
    return 0 if all(map(_is_taken, answers)) else EX_FAILED


def _unknown(options: argparse.Namespace, config: "Config") -> str:
    """What the configuration does not have of what was asked about: a mistyped name would be answered as one that no route wants."""
    from relay.config.values import client_of

    if options.user is not None and options.user not in config.users:
        return f"no such user: {options.user}"
    names = [listener.name for listener in config.listeners]
    if options.listener is not None and options.listener not in names:
        return f"no such listener: {options.listener}; there is {', '.join(names)}"
    return "" if client_of(options.client) is not None else f"not an IP address, nor a user such as uid:1000: {options.client}"


def _is_taken(answer: dict[str, Any]) -> bool:
    """Whether the relay would say 250."""
    return bool(answer["route"]) and not answer.keys() & {"reject", "not_the_users"} and not answer["upstreams"][0]["objection"]


def _facts(config: "Config", options: argparse.Namespace, content: bytes | None) -> "list[Facts]":
    """What the router will be asked: more than once where an alias stands for several recipients."""
    from relay.mail.address import AddressError
    from relay.mail.envelope import Facts, Origin
    from relay.mail.header import block_of, from_address, scan
    from relay.routing import expand_alias

    sender, recipient = _address(options.sender or "<>", config), _address(options.recipient, config)
    if not recipient:
        raise AddressError("a recipient is never null")
    header_from = from_address(scan(block_of(content)).get(b"from", ())) if content is not None else ""
    origin = Origin(options.listener or config.listeners[0].name, options.client, options.user or "", header_from=header_from)
    return [Facts(sender, address, origin) for address in expand_alias(recipient, config)]


def _address(text: str, config: "Config") -> str:
    """An address of the command line as the listener would take it."""
    from relay.mail.address import AddressError, parse_path
    from relay.routing import complete

    address, rest = parse_path(text)
    if rest:
        raise AddressError(f"{text!r} is more than one address")
    address = complete(address, config.domain)
    if address and "@" not in address:
        raise AddressError(f"{address} has no domain, and the configuration has none to complete it with")
    return address


def _answer(config: "Config", router: "Router", facts: "Facts", content: bytes | None) -> dict[str, Any]:
    """Everything to say about one recipient, in the form of the JSON output."""
    from relay.routing import upstreams_of

    judgements = router.explain(facts)
    route = judgements[-1].route if judgements and judgements[-1].matched else None
    answer: dict[str, Any] = {
        "sender": facts.sender,
        "recipient": facts.recipient,
        "route": route.name if route else None,
        "why": judgements[-1].why if route else "no route takes it",
        "considered": [_judgement(judgement) for judgement in judgements],
    }
    header = _header(facts, content)
    if reason := _not_the_users(config, facts, header):
        answer["not_the_users"] = reason
    if route and route.reject:
        answer["reject"] = route.reject
    if route:
        answer["upstreams"] = [_at_upstream(config, router, route, name, facts, header) for name in upstreams_of(route)]
    return answer


def _not_the_users(config: "Config", facts: "Facts", header: bytes) -> str | None:
    """Why the user may not send this."""
    from relay.mail.header import scan
    from relay.mail.permission import user_objection

    user = facts.origin.user
    return user_objection(config.users[user].senders, facts.sender, scan(header)) if user else None


def _judgement(judgement: "Judgement") -> dict[str, Any]:
    return {"route": judgement.route.name, "matched": judgement.matched, "why": judgement.why}


def _at_upstream(config: "Config", router: "Router", route: "Route", name: str, facts: "Facts", header: bytes) -> dict[str, Any]:
    """How the message arrives at one upstream, and whether its credential may send it."""
    from relay.mail.header import scan
    from relay.mail.permission import objection
    from relay.mail.rewrite import envelope_sender, rewrite_header

    upstream = config.upstreams[name]
    rules = router.rewrite_for(route, name)
    sender = envelope_sender(facts.sender, rules)
    if not sender and upstream.null_sender != "keep":
        sender = upstream.null_sender
    rewritten = rewrite_header(header, rules)
    return {
        "name": name,
        "hosts": [f"{host}:{upstream.port}" for host in upstream.host],
        "security": upstream.security,
        "provider": _provider_of(upstream),
        "credential": upstream.username,
        "sender": sender,
        "bcc": rules.bcc if rules else None,
        "objection": objection(upstream.senders, sender, scan(rewritten)),
        "header": list(_difference(header, rewritten)),
    }


def _provider_of(upstream: "Upstream") -> str | None:
    """Which provider it is: the one that the file names, or the one that the host belongs to."""
    from relay.config.providers import PROVIDERS

    name = next(name for name, known in PROVIDERS.items() if known is upstream.known)
    return None if name == "generic" else name


def _header(facts: "Facts", content: bytes | None) -> bytes:
    """The header block of the message, or a made-up one as an app would write it."""
    from relay.mail.header import block_of

    if content is not None:
        return block_of(content)
    lines = (f"From: {facts.sender or 'MAILER-DAEMON'}", f"To: {facts.recipient}", "Subject: An example", "")
    return "\r\n".join(lines).encode()


def _difference(before: bytes, after: bytes) -> Iterable[str]:
    import difflib

    old, new = (block.decode("utf-8", "replace").splitlines() for block in (before, after))
    return difflib.unified_diff(old, new, "as it came", "as it leaves", lineterm="", n=1)


def _read_message(name: str) -> bytes:
    """The message with CRLF line ends, whichever it has in the file."""
    if name == "-":
        content = sys.stdin.buffer.read(_HEADER_LIMIT_OCTETS)
    else:
        with Path(name).open("rb") as file:
            content = file.read(_HEADER_LIMIT_OCTETS)
    return content.replace(b"\r\n", b"\n").replace(b"\n", b"\r\n")


def _as_text(answer: dict[str, Any]) -> str:
    """The answer for a person: what happens first, then why."""
    lines = [f"{answer['sender'] or '<>'} to {answer['recipient']}"]
    if reason := answer.get("not_the_users"):
        lines.append(f"  not one of the senders of this user: refused with 553 5.7.1: {reason}")
    if not answer["route"]:
        lines.append("  no route takes it: refused with 550 5.7.1")
    elif "reject" in answer:
        lines.append(f"  route {answer['route']} refuses it: 550 5.7.1 {answer['reject']}")
    else:
        lines.append(f"  route {answer['route']}: {answer['why']}")
    for place, upstream in enumerate(answer.get("upstreams", ())):
        hosts = ", ".join(upstream["hosts"])
        lines.append(f"  {'fallback' if place else 'upstream'} {upstream['name']} ({hosts}, {upstream['security']})")
        lines += [f"    provider         {upstream['provider']}"] if upstream["provider"] else []
        lines.append(f"    credential       {upstream['credential'] or 'none'}")
        lines.append(f"    envelope sender  {upstream['sender'] or '<>'}")
        lines += [f"    extra recipient  {upstream['bcc']}"] if upstream["bcc"] else []
        fate = "held" if place else "refused with 550 5.7.1"
        lines += [f"    NOT PERMITTED    {upstream['objection']}: {fate}"] if upstream["objection"] else []
        lines += [f"    {line}" for line in upstream["header"]] or ["    header           unchanged"]
    others = [judgement for judgement in answer["considered"] if not judgement["matched"]]
    lines += ["  routes before it that did not match:" if answer["route"] else "  routes that did not match:"] if others else []
    lines += [f"    {judgement['route']}: {judgement['why']}" for judgement in others[:_SHOWN_JUDGEMENTS]]
    lines += [f"    and {len(others) - _SHOWN_JUDGEMENTS} more (--json lists them)"] if len(others) > _SHOWN_JUDGEMENTS else []
    return "\n".join(lines)


def _as_json(value: object) -> str:
    import json

    return json.dumps(value, indent=2, ensure_ascii=False)


def _show_outcomes(options: argparse.Namespace) -> int:
    """The table of fates in the order of a session, and before it what a provider's own replies mean."""
    from relay.config.findings import ConfigError
    from relay.mail.outcome import SAYINGS, rows_by_phase

    try:
        provider, own = _own_rows(options) if options.upstream is not None else ("", ())
    except ConfigError as error:
        return fail("\n".join(map(str, error.findings)), EX_CONFIG)
    except LookupError:
        return fail(f"no such upstream or provider: {options.upstream}", EX_USAGE)
    tables = [(provider, list(rows_by_phase(own)))] if own else []
    tables.append(("", list(rows_by_phase())))
    names = ("phase", "event", "status", "scope", "then", "why")
    if options.json:
        rows = ((name, phase, row) for name, table in tables for phase, row in table)
        print(
            _as_json(
                [
                    {**dict(zip(names, _columns(phase, row), strict=True)), "meaning": row.meaning.value, "provider": name or None}
                    for name, phase, row in rows
                ]
            )
        )
        return 0
    if options.upstream is not None:
        print(
            f"First what {provider} says itself, in words that its replies contain:\n" if own else "Nothing is known of its own replies.\n"
        )
    for place, (_, table) in enumerate(tables):
        print("\nThen, of every upstream:\n\n" if place else "", end="")
        columns = [_columns(phase, row) for phase, row in table]
        widths = [max(len(line[column]) for line in (names, *columns)) for column in range(len(names) - 1)]
        print("\n".join(_row(line, widths) for line in (names, *columns)))
    for saying, phrases in SAYINGS.items():
        print(f'\n"{saying}": the reply says {", ".join(phrases[:-1])} or {phrases[-1]}')
    return 0


def _own_rows(options: argparse.Namespace) -> "tuple[str, Sequence[Row]]":
    """The provider that `--upstream` means, and what is known of its replies. Raises LookupError and ConfigError."""
    from relay.config.findings import ConfigError
    from relay.config.load import find_config, load
    from relay.config.providers import PROVIDERS

    try:
        upstreams = load(find_config(options.config, os.environ)).upstreams
    except ConfigError:
        if options.upstream not in PROVIDERS:
            raise
        upstreams = {}
    if (upstream := upstreams.get(options.upstream)) is not None:
        return _provider_of(upstream) or "", upstream.replies
    return options.upstream, PROVIDERS[options.upstream].replies


def _columns(phase: "Phase", row: "Row") -> tuple[str, ...]:
    """One row of the table of fates in words."""
    from relay.mail.outcome import Failure

    if isinstance(row.event, Failure):
        event = row.event.value
    else:
        code, enhanced, said = row.event
        phrases = (said,) if isinstance(said, str) and said else said
        event = " ".join(part for part in (code, enhanced, " or ".join(f'"{phrase}"' for phrase in phrases)) if part)
    words = (("in doubt", row.in_doubt), ("slow down", row.throttled), ("fallback", row.fallback))
    then = [word for word, holds in words if holds]
    return phase.value, event, row.status.value, row.scope.value, ", ".join(then) or "-", row.why


def _row(line: Sequence[str], widths: Sequence[int]) -> str:
    return "  ".join([*(text.ljust(width) for text, width in zip(line, widths, strict=False)), line[-1]]).rstrip()
