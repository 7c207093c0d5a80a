"""`relay queue`: its verbs, and of them `list`: what is waiting in the spool, since when, where for, and the upstream's last words.

Reads the spool itself, whether a relay runs or not. `active` means that an attempt is under way, or was when the relay ended.
"""

import argparse
import sys
import time
from typing import TYPE_CHECKING, Any

from relay.cli import queue_show, queue_verbs
from relay.cli.options import EX_TEMPFAIL
from relay.cli.selection import STATES, add_filters, selection, with_view

if TYPE_CHECKING:
    from relay.spool.base import Queued
    from relay.spool.sqlite_view import SqliteView

_COLUMNS = ("ID", "STATE", "AGE", "TRIES", "SIZE", "ROUTE", "UPSTREAM", "SENDER", "RECIPIENTS", "NEXT", "LAST REPLY")
_SHOWN_RECIPIENTS = 2


def add_parser(subparsers: Any) -> None:
    """Add `queue` to the commands."""
    parser = subparsers.add_parser(
        "queue", help="what is waiting, and what to do with it", description="Show what is waiting, and act on it."
    )
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    listing = verbs.add_parser("list", help="what is waiting, since when, and the last reply", description=__doc__.partition("\n\n")[2])
    add_filters(listing, states=STATES)
    listing.set_defaults(run=run)
    queue_show.add_parser(verbs)
    queue_verbs.add_parsers(verbs)


def run(options: argparse.Namespace) -> int:
    """List, and return the exit code."""
    return with_view(options, lambda view: _list(view, options))


def _list(view: "SqliteView", options: argparse.Namespace) -> int:
    from relay.cli.table import Table, as_json, counted, size
    from relay.spool.base import EVERYTHING

    wanted = selection(options)
    if options.json:
        for queued in view.queued(wanted):
            print(as_json(queue_show.fields(queued)))
        return _whole(view)
    messages = recipients = octets = 0

    def rows() -> Any:
        nonlocal messages, recipients, octets
        for queued in view.queued(wanted):
            messages, recipients, octets = messages + 1, recipients + len(queued.recipients), octets + queued.size
            yield _row(queued, time.time())

    for line in Table(_COLUMNS, right=("AGE", "TRIES", "SIZE")).lines(rows()):
        print(line)
    if messages:
        print(f"{counted(messages, 'message')}, {counted(recipients, 'recipient')}, {size(octets)}")
    elif not view.gaps:
        print("queue is empty" if wanted == EVERYTHING else "nothing in the queue is like that")
    return _whole(view)


def _whole(view: "SqliteView") -> int:
    """The exit code of a listing, and a word on what is missing from it."""
    if not view.gaps:
        return 0
    print("relay queue: the spool is damaged: some of what is waiting cannot be read and is not listed", file=sys.stderr)
    return EX_TEMPFAIL


def _row(queued: "Queued", now: float) -> tuple[str, ...]:
    from relay.cli.table import age, size, wait

    names = list(queued.recipients[:_SHOWN_RECIPIENTS])
    names += [f"and {len(queued.recipients) - len(names)} more"] if len(queued.recipients) > len(names) else []
    following = wait(queued.due - now) if queued.state in ("due", "deferred") else "-"
    reply = f"held: {queued.held}" if queued.held else queued.last_reply
    return (
        queued.id, queued.state, age(now - queued.created), str(queued.attempts), size(queued.size), queued.lane.route,
        queued.lane.upstream, queued.sender or "<>", ", ".join(names), following, f"in doubt: {reply}" if queued.in_doubt else reply,
    )  # fmt: skip
