"""`relay trace`: one message's whole story: every attempt with the reply to it, what operators did, what happens next, its reports.

Reads the spool itself, whether a relay runs or not. Exit code 1: nothing is known of the message.
"""

import argparse
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from relay.cli.options import EX_FAILED, fail
from relay.cli.selection import add_places, message_id, with_view

if TYPE_CHECKING:
    from relay.spool.base import LogEntry, Queued
    from relay.spool.sqlite_view import SqliteView

_COLUMNS = ("TIME", "WHAT", "TRY", "DELAY", "ROUTE", "UPSTREAM", "RECIPIENT", "REPLY")
_SHOWN_RECIPIENTS = 5


class Story(NamedTuple):
    """What is known of one message. `queued` is None when it has left the queue."""

    id: str
    queued: "Queued | None"
    entries: "Sequence[LogEntry]"

    @property
    def known(self) -> bool:
        return self.queued is not None or bool(self.entries)

    @property
    def reports(self) -> list[str]:
        """The reports about it, in the order in which they were made."""
        return list(dict.fromkeys(entry.report for entry in self.entries if entry.report))


def add_parser(subparsers: Any) -> None:
    """Add `trace` to the commands."""
    parser = subparsers.add_parser("trace", help="the whole story of one message", description=__doc__.partition("\n\n")[0])
    parser.add_argument("id", metavar="ID", type=message_id)
    add_places(parser)
    parser.add_argument("--json", action="store_true", help="one JSON object")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Tell it, and return the exit code."""
    return with_view(options, lambda view: _tell(view, options))


def _tell(view: "SqliteView", options: argparse.Namespace) -> int:
    story = _story(view, options.id)
    if not story.known:
        return fail(f"relay trace: nothing is known of {options.id}: it is not queued, nor in the delivery log", EX_FAILED)
    reports = [_story(view, report) for report in story.reports]
    if options.json:
        from relay.cli.table import as_json

        print(as_json({**_fields(story), "reports": [_fields(report) for report in reports]}))
    else:
        now = time.time()
        for line in (*_heading(story), "", *_table(story), *_ending(story, now), *(_report(report, now) for report in reports)):
            print(line)
    return 0


def _story(view: "SqliteView", id: str) -> Story:
    from relay.spool.base import Selection

    return Story(id, view.message(id), list(view.log(Selection(ids=frozenset({id})))))


def _heading(story: Story) -> list[str]:
    """Who wrote to whom about what, as far as it is still known."""
    from relay.cli.table import moment, size

    first = story.queued or story.entries[0]
    names = list(dict.fromkeys((*(entry.recipient for entry in story.entries), *(story.queued.recipients if story.queued else ()))))
    lines = [
        f"{story.id}, {size(first.size)}, accepted {moment(first.created)}",
        f"from {first.sender or '<>'} to {_few(names)}",
    ]
    subject = story.entries[0].summary.subject if story.entries else ""
    return [*lines, *([f"Subject: {subject}"] if subject else [])]


def _few(addresses: Sequence[str]) -> str:
    more = f" and {len(addresses) - _SHOWN_RECIPIENTS} more" if len(addresses) > _SHOWN_RECIPIENTS else ""
    return ", ".join(addresses[:_SHOWN_RECIPIENTS]) + more


def _table(story: Story) -> list[str]:
    from relay.cli.table import Table, moment

    rows = (
        (
            moment(entry.time), entry.status, str(entry.attempt) if entry.attempt else "-", f"{entry.delay:.1f} s", entry.lane.route,
            entry.lane.upstream, entry.recipient, entry.reply,
        )
        for entry in story.entries
    )  # fmt: skip
    lines = list(Table(_COLUMNS, right=("TRY", "DELAY")).lines(rows))
    return [*lines, ""] if lines else []


def _ending(story: Story, now: float) -> list[str]:
    """What is next."""
    from relay.cli.queue_show import waits

    if story.queued is None:
        return ["no longer queued: every recipient has its result"]
    doubt = ["in doubt: an upstream may have it already, so it goes to the same one again"] if story.queued.in_doubt else []
    return [f"queued for {_few(story.queued.recipients)}", waits(story.queued, now), *doubt]


def _report(report: Story, now: float) -> str:
    """What became of one report to the sender."""
    from relay.cli.queue_show import waits

    if report.queued is not None:
        fate = waits(report.queued, now)
    elif report.entries:
        fate = f"{report.entries[-1].status}: {report.entries[-1].reply}"
    else:
        fate = "no longer queued"
    return f"report {report.id} to the sender: {fate}"


def _fields(story: Story) -> dict[str, Any]:
    """The story for a script. `queued`: as `relay queue list --json` has it, or null."""
    from relay.cli import log, queue_show

    return {
        "id": story.id,
        "queued": queue_show.fields(story.queued) if story.queued is not None else None,
        "log": [log.fields(entry) for entry in story.entries],
    }
