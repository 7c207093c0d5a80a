"""What `relay queue` and `relay log` share: the filters, where the spool is, and the spool opened for reading.

The spool is found through the configuration file, of which only `spool` is looked at: the shell of an operator need not have the
secrets that the service has. `--spool` names the directory without any file.
"""

import argparse
import os
import sys
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from relay.cli.options import add_config

if TYPE_CHECKING:
    from relay.spool.sqlite_view import Selection, SqliteView

_T = TypeVar("_T")

_EX_TEMPFAIL, _EX_CONFIG = 75, 78

# What `spool.sqlite_view` knows; written here again because importing it costs more than the rest of `relay --help`.
STATES = ("due", "active", "deferred", "held")
RESULTS = ("sent", "deferred", "failed")


def add_filters(parser: argparse.ArgumentParser, *, states: tuple[str, ...]) -> None:
    """Add the ids and the filters; all that are given must hold."""
    address = "user@example.com, example.com or '*.example.com'"
    parser.add_argument("ids", nargs="*", metavar="ID", type=_message_id, help="messages by their ids")
    parser.add_argument("--route", metavar="NAME")
    parser.add_argument("--upstream", metavar="NAME")
    parser.add_argument("--sender", metavar="ADDRESS", type=_condition, help=f"{address}; '<>' is the null sender")
    parser.add_argument("--recipient", metavar="ADDRESS", type=_condition, help=address)
    parser.add_argument("--state", choices=states)
    parser.add_argument("--older-than", metavar="TIME", type=_duration, help="such as 30m, 2h or 4d")
    add_config(parser)
    parser.add_argument("--spool", metavar="DIR", type=Path, help="the spool's directory; default: as the configuration says")
    parser.add_argument("--json", action="store_true", help="one JSON object a line")


def selection(options: argparse.Namespace) -> "Selection":
    """The filters as given."""
    from relay.spool.sqlite_view import Selection

    return Selection(
        ids=frozenset(options.ids),
        route=options.route or "",
        upstream=options.upstream or "",
        sender=options.sender or "",
        recipient=options.recipient or "",
        state=options.state or "",
        older_than=options.older_than,
    )


def with_view(options: argparse.Namespace, work: "Callable[[SqliteView], None]") -> int:
    """Open the spool, let `work` read it, and answer the exit code."""
    from relay.clock import SystemClock
    from relay.config.findings import ConfigError
    from relay.config.load import find_config, spool_directory
    from relay.spool.base import SpoolError
    from relay.spool.sqlite_view import SqliteView

    try:
        directory = options.spool or spool_directory(find_config(options.config, os.environ))
        with closing(SqliteView(directory, SystemClock())) as view:
            work(view)
    except ConfigError as error:
        print(error, file=sys.stderr)
        return _EX_CONFIG
    except SpoolError as error:
        print(f"relay {options.command}: {error}", file=sys.stderr)
        return _EX_TEMPFAIL
    return 0


def _message_id(text: str) -> str:
    try:
        return f"{int(text, 16):013X}"
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not the id of a message, such as 649D2A1B3C4D5") from None


def _condition(text: str) -> str:
    from relay.config.values import parse_condition

    return _parsed(parse_condition, text)


def _duration(text: str) -> float:
    from relay.config.values import parse_duration

    return _parsed(parse_duration, text)


def _parsed(parse: Callable[[str], _T], text: str) -> _T:
    try:
        return parse(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
