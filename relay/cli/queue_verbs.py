"""`relay queue retry`, `hold`, `release`, `drop` and `bounce`: act on queued mail through the relay that has it.

What shall be changed must be said: ids, filters, or `--all`. Each message gets a line that says what came of it. Exit code 1: a message
that was named was left alone; 75: no relay runs, or it could not do it.
"""

import argparse
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from relay.cli.options import EX_FAILED, EX_TEMPFAIL, EX_USAGE, fail, write_no_more
from relay.cli.selection import STATES, add_filters, with_places

if TYPE_CHECKING:
    from relay.config.machine import Places

#: Each verb with what came of a message, and what the verb is for.
_VERBS = (
    ("retry", "due now", "have waiting mail tried now"),
    ("hold", "held", "have nobody try it until it is released"),
    ("release", "released", "have held mail tried now"),
    ("drop", "dropped", "throw mail away; nobody is told"),
    ("bounce", "given up", "give mail up; its sender gets a report"),
)
_FINAL = {"drop": "Throw away {}?", "bounce": "Give up {} and send the reports?"}
_CONDITIONS = ("ids", "route", "upstream", "sender", "recipient", "state", "older_than")


def add_parsers(verbs: Any) -> None:
    """Add the verbs to those of `relay queue`."""
    details = __doc__.partition("\n\n")[2]
    for verb, done, purpose in _VERBS:
        parser = verbs.add_parser(verb, help=purpose, description=f"{purpose.capitalize()}. {details}")
        add_filters(parser, states=STATES)
        parser.add_argument("--all", action="store_true", help="all that is queued")
        parser.add_argument(
            "--reason", metavar="TEXT", type=_reason, default="", help="why, for the logs; with hold and bounce also in the report"
        )
        if verb in _FINAL:
            parser.add_argument("--yes", action="store_true", help="do not ask, also on a terminal")
        parser.set_defaults(run=run, done=done)


def _reason(text: str) -> str:
    from relay.admin.request import parse_reason

    try:
        return parse_reason(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def run(options: argparse.Namespace) -> int:
    """Have it done, and return the exit code."""
    conditions = {name: value for name in _CONDITIONS if (value := getattr(options, name)) not in (None, [])}
    if bool(conditions) is options.all:
        words = "--all goes without ids and filters" if options.all else "name messages by their ids or by filters, or say --all"
        return fail(f"relay queue {options.verb}: {words}", EX_USAGE)
    return with_places(options, lambda places: _order(places, conditions, options))


def _order(places: "Places", conditions: dict[str, Any], options: argparse.Namespace) -> int:
    from relay.cli.control import ControlError

    try:
        if options.verb in _FINAL and not options.yes and sys.stdin.isatty() and not _confirmed(places.control, conditions, options.verb):
            return fail("nothing was done", EX_FAILED)
        return _carry_out(places.control, conditions, options)
    except ControlError as error:
        return fail(f"relay queue {options.verb}: {error}", EX_TEMPFAIL)


def _confirmed(control: Path, conditions: dict[str, Any], verb: str) -> bool:
    from relay.cli.control import ask
    from relay.cli.table import counted

    (answer,) = ask(control, {"verb": "count", "selection": conditions})
    if not answer["matched"]:
        return True  # nothing to lose, and the relay says why
    print(_FINAL[verb].format(counted(answer["matched"], "message")), "[y/N] ", end="", file=sys.stderr, flush=True)
    return sys.stdin.readline().strip().lower() in ("y", "yes")


def _carry_out(control: Path, conditions: dict[str, Any], options: argparse.Namespace) -> int:
    from relay.cli.control import ask
    from relay.cli.table import as_json, counted

    changed, skipped = 0, set()
    for answer in ask(control, {"verb": options.verb, "selection": conditions, "reason": options.reason}):
        lines: list[str] = []
        for message, result, why in _results(answer, options.done):
            if why:
                skipped.add(message)
            else:
                changed += 1
            lines.append(
                as_json({"id": message, "result": result, "why": why}) if options.json else f"{message}  {result}{': ' if why else ''}{why}"
            )
        _print(lines)
    if not options.json:
        rest = f", {len(skipped)} left alone" if skipped else ""
        nothing = "queue is empty" if options.all else "nothing in the queue is like that"
        _print([f"{counted(changed, 'message')} {options.done}{rest}" if changed or skipped else nothing])
    return EX_FAILED if skipped & set(options.ids) else 0


def _print(lines: Iterable[str]) -> None:
    """Tell it now. Where the reader has gone, such as `head`, the order is carried out and the exit code says how it ended."""
    try:
        for line in lines:
            print(line)
        sys.stdout.flush()
    except BrokenPipeError:
        write_no_more()


def _results(answer: dict[str, Any], done: str) -> Iterator[tuple[str, str, str]]:
    """One page of results, oldest message first: the message, what came of it, and why if it was left alone."""
    found = [(message, done, "") for message in answer.get("changed", ())]
    found += [(message, "left alone", why) for message, why in answer.get("skipped", {}).items()]
    yield from sorted(found)
