"""What the commands about mail share: the filters, where the spool and the control socket are, and the spool opened for reading.

They are found through the configuration file, of which only `spool` and `control` are looked at: the shell of an operator need not
have the secrets that the service has. `--spool` names the directory without any file; a relay that has its control socket elsewhere
leaves a link to it there.
"""

import argparse
import os
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from relay.cli.options import EX_CONFIG, EX_TEMPFAIL, add_config, fail

if TYPE_CHECKING:
    from relay.config.machine import Places
    from relay.spool.base import Selection
    from relay.spool.sqlite_view import SqliteView

_T = TypeVar("_T")

# What `spool.base` and the delivery log know; written here again because importing them costs more than the rest of `relay --help`.
STATES = ("due", "active", "deferred", "held")
RESULTS = ("sent", "deferred", "failed", "held", "released", "dropped")


def add_filters(parser: argparse.ArgumentParser, *, states: tuple[str, ...]) -> None:
    """Add the ids and the filters; all that are given must hold."""
    address = "user@example.com, example.com or '*.example.com'"
    parser.add_argument("ids", nargs="*", metavar="ID", type=message_id, help="messages by their ids")
    parser.add_argument("--route", metavar="NAME", type=_name)
    parser.add_argument("--upstream", metavar="NAME", type=_name)
    parser.add_argument("--sender", metavar="ADDRESS", type=_condition, help=f"{address}; '<>' is the null sender")
    parser.add_argument("--recipient", metavar="ADDRESS", type=_condition, help=address)
    parser.add_argument("--state", choices=states)
    parser.add_argument("--older-than", metavar="TIME", type=_duration, help="such as 30m, 2h or 4d")
    add_places(parser)
    parser.add_argument("--json", action="store_true", help="one JSON object a line")


def add_places(parser: argparse.ArgumentParser) -> None:
    """Add what says where the spool is."""
    add_config(parser)
    parser.add_argument("--spool", metavar="DIR", type=Path, help="the spool's directory; default: as the configuration says")


def selection(options: argparse.Namespace) -> "Selection":
    """The filters as given."""
    from relay.spool.base import Selection

    return Selection(
        ids=frozenset(options.ids),
        route=options.route or "",
        upstream=options.upstream or "",
        sender=options.sender or "",
        recipient=options.recipient or "",
        state=options.state or "",
        older_than=options.older_than,
    )


def with_places(options: argparse.Namespace, work: "Callable[[Places], int]") -> int:
    """Find the spool and the control socket, and answer what `work` makes of them: the exit code."""
    from relay.config.machine import CONTROL, Places

    if options.spool is not None:  # without the configuration, whose model takes three times as long to load as all the rest
        return work(Places(options.spool, options.spool / CONTROL))
    from relay.config.findings import ConfigError
    from relay.config.load import find_config, places

    try:
        found = places(find_config(options.config, os.environ))
    except ConfigError as error:
        return fail(str(error), EX_CONFIG)
    return work(found)


def with_view(options: argparse.Namespace, work: "Callable[[SqliteView], int]") -> int:
    """Open the spool, let `work` read it, and answer the exit code."""
    from relay.clock import SystemClock
    from relay.spool.base import SpoolError
    from relay.spool.sqlite_view import SqliteView

    def read(found: "Places") -> int:
        try:
            with closing(SqliteView(found.spool, SystemClock())) as view:
                return work(view)
        except SpoolError as error:
            return fail(f"relay {options.command}: {error}", EX_TEMPFAIL)

    return with_places(options, read)


def message_id(text: str) -> str:
    """Read one id."""
    from relay.spool.records import parse_id

    try:
        return parse_id(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not the id of a message, such as 649D2A1B3C4D5") from None


def _name(text: str) -> str:
    if not text:
        raise argparse.ArgumentTypeError("must not be empty")
    return text


def _condition(text: str) -> str:
    from relay.config.values import parse_condition

    return _parsed(parse_condition, text)


def _duration(text: str) -> float:
    from relay.config.quantities import parse_duration

    return _parsed(parse_duration, text)


def _parsed(parse: Callable[[str], _T], text: str) -> _T:
    try:
        return parse(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
