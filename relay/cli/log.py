"""`relay log`: what became of every recipient, one line for each result of an attempt, oldest first.

Reads the delivery log in the spool, whether a relay runs or not. `--follow` asks once a second for what is new, until Ctrl-C.
"""

import argparse
import sys
import time
from typing import TYPE_CHECKING, Any

from relay.cli.selection import RESULTS, add_filters, selection, with_view

if TYPE_CHECKING:
    from collections.abc import Iterable

    from relay.cli.table import Table
    from relay.spool.base import LogEntry
    from relay.spool.sqlite_view import SqliteView

_COLUMNS = ("TIME", "ID", "STATUS", "TRY", "DELAY", "ROUTE", "UPSTREAM", "SENDER", "RECIPIENT", "REPLY")
_FOLLOW_SECONDS = 1.0
_LINES_BEFORE_FOLLOWING = 10


def add_parser(subparsers: Any) -> None:
    """Add `log` to the commands."""
    parser = subparsers.add_parser("log", help="what became of each recipient", description="Show the delivery log, oldest line first.")
    add_filters(parser, states=RESULTS)
    parser.add_argument("-n", dest="lines", metavar="N", type=_whole, help="the last N only (default: all, with --follow 10)")
    parser.add_argument("-f", "--follow", action="store_true", help="go on with what is new, until Ctrl-C")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Print, and return the exit code."""
    try:
        return with_view(options, lambda view: _show(view, options))
    except KeyboardInterrupt:
        if options.follow:
            return 0
        raise


def _show(view: "SqliteView", options: argparse.Namespace) -> int:
    from relay.cli.table import Table, counted
    from relay.spool.base import EVERYTHING

    table, wanted = Table(_COLUMNS, right=("TRY", "DELAY")), selection(options)
    end = view.end_of_log()
    last = options.lines if options.lines is not None or not options.follow else _LINES_BEFORE_FOLLOWING
    shown = _print(view.log(wanted, until=end, last=last), table, as_json=options.json)
    if not options.follow:
        if not options.json:
            none = "the log is empty" if wanted == EVERYTHING and end == 0 else "nothing in the log is like that"
            print(counted(shown, "line") if shown else none)
        return 0
    while True:
        time.sleep(_FOLLOW_SECONDS)
        after, end = end, view.end_of_log()
        after = min(after, end)  # numbers begin again where every line had grown too old to be kept
        _print(view.log(wanted, after=after, until=end), table, as_json=options.json)


def _print(entries: "Iterable[LogEntry]", table: "Table", *, as_json: bool) -> int:
    from relay.cli import table as tables

    shown = 0

    def noted() -> Any:
        nonlocal shown
        for entry in entries:
            shown += 1
            yield entry

    lines = (tables.as_json(fields(entry)) for entry in noted()) if as_json else table.lines(_row(entry) for entry in noted())
    for line in lines:
        print(line)
    sys.stdout.flush()
    return shown


def _row(entry: "LogEntry") -> tuple[str, ...]:
    from relay.cli.table import moment

    return (
        moment(entry.time), entry.id, entry.status, str(entry.attempt), f"{entry.delay:.1f} s", entry.lane.route, entry.lane.upstream,
        entry.sender or "<>", entry.recipient, entry.reply,
    )  # fmt: skip


def fields(entry: "LogEntry") -> dict[str, object]:
    """One result for a script."""
    from relay.cli.table import moment

    return {
        "time": moment(entry.time),
        "id": entry.id,
        "status": entry.status,
        "route": entry.lane.route,
        "upstream": entry.lane.upstream,
        "sender": entry.sender,
        "recipient": entry.recipient,
        "attempt": entry.attempt,
        "delay": round(entry.delay, 3),
        "size": entry.size,
        "reply": entry.reply,
        "created": moment(entry.created),
        "to": entry.summary.to,
        "cc": entry.summary.cc,
        "subject": entry.summary.subject,
        "report": entry.report,
    }


def _whole(text: str) -> int:
    if not text.isascii() or not text.isdigit():
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of lines")
    return int(text)
