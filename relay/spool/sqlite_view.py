"""The operator's view of a spool directory: what is queued and what became of the rest. Reads only.

Works beside a relay that holds the directory and where none runs. Rows are read a page at a time, each page in a short transaction
of its own: a listing that somebody looks at for an hour must not keep the writer's log from being folded back. So a listing is no
snapshot: a message that leaves meanwhile may be in it or not, none is in it twice.

State: one read-only connection.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import apsw

from relay.clock import Clock
from relay.mail.address import patterns_for
from relay.spool.base import Lane, LogEntry, Queued, SpoolError
from relay.spool.records import id_of, number_of, unpack_recipients, unpack_summary
from relay.spool.sqlite_schema import DATABASE, SCHEMA_VERSION

_PAGE_ROWS = 500
_BUSY_MILLISECONDS = 5000
_ADVICE = "; run this as the user that relay runs as"

#: The states of a queued message, and the results that the delivery log knows.
STATES = ("due", "active", "deferred", "held")
RESULTS = ("sent", "deferred", "failed")

# A row can be claimed and held: damage that was found while claiming it. Held is what the operator must hear.
_STATE = """CASE WHEN held != '' THEN 'held' WHEN token IS NOT NULL THEN 'active' WHEN attempts > 0 THEN 'deferred' ELSE 'due' END"""
_QUEUE = f"""SELECT id, {_STATE} AS state, upstream, route, sender, recipients, size, created, due, attempts, held, reply, doubt
    FROM message WHERE id > :after {{conditions}} ORDER BY id LIMIT :page"""
_LOG = """SELECT number, time, id, upstream, route, sender, recipient, status, attempt, size, reply, created, summary
    FROM log WHERE number > :after AND number <= :until {conditions} ORDER BY number {order} LIMIT :page"""
_END = "SELECT ifnull(max(number), 0) FROM log"


@dataclass(frozen=True, slots=True)
class Selection:
    """Which messages or results an operator asks for; what is left empty selects all.

    `sender` and `recipient` are conditions as routes have them, in the form in which they compare: an address, a domain, `*.domain`
    or `<>`. `state`: one of STATES, or of RESULTS in the delivery log. `older_than`: seconds since acceptance or since the result.
    """

    ids: frozenset[str] = frozenset()
    route: str = ""
    upstream: str = ""
    sender: str = ""
    recipient: str = ""
    state: str = ""
    older_than: float | None = None


EVERYTHING = Selection()


class SqliteView:
    """What the spool in `directory` holds. Close it."""

    def __init__(self, directory: Path, clock: Clock) -> None:
        """Raises SpoolError where there is no spool, or none that can be read."""
        self._clock = clock
        self._directory = directory
        path = directory / DATABASE
        try:
            path.stat()
        except FileNotFoundError:
            raise SpoolError(f"there is no spool in {directory} (no {DATABASE}): no relay has run with this directory") from None
        except OSError as error:
            raise SpoolError(f"the spool in {directory} cannot be read: {error.strerror}{_ADVICE}") from error
        uri = f"{path.absolute().as_uri()}?mode=ro"
        try:
            self._database = apsw.Connection(uri, flags=apsw.SQLITE_OPEN_READONLY | apsw.SQLITE_OPEN_URI)
            self._database.set_busy_timeout(_BUSY_MILLISECONDS)
            self._database.pragma("wal_autocheckpoint", 0)
            version = self._database.pragma("user_version")
        except apsw.Error as error:
            raise _unreadable(directory, error) from error
        if version != SCHEMA_VERSION:
            self._database.close()
            newer = f"was written by another version of relay (schema {version}, this one knows {SCHEMA_VERSION})"
            raise SpoolError(f"the spool in {directory} {newer if version else 'is empty: its relay has not finished starting'}")

    def close(self) -> None:
        self._database.close()

    def queued(self, selection: Selection = EVERYTHING) -> Iterator[Queued]:
        """The queued messages, oldest first. Raises SpoolError."""
        conditions, values = self._conditions(selection, "created")
        after = 0
        while True:
            rows = self._page(_QUEUE.format(conditions=conditions), {**values, "after": after})
            for row in rows:
                after, state, upstream, route, sender, recipients, size, created, due, attempts, held, reply, doubt = row
                found = unpack_recipients(recipients, in_doubt=bool(doubt))
                addresses = tuple(r.address for r in found)
                if _meets(selection.sender, sender) and any(_meets(selection.recipient, address) for address in addresses):
                    in_doubt = any(r.in_doubt for r in found)
                    yield Queued(
                        id_of(after), state, Lane(upstream, route), sender, addresses, size, created, due, attempts, held, reply, in_doubt
                    )  # fmt: skip
            if len(rows) < _PAGE_ROWS:
                return

    def end_of_log(self) -> int:
        """The number of the newest line of the delivery log; 0 where it is empty."""
        return int(self._page(_END, {})[0][0])

    def log(self, selection: Selection = EVERYTHING, *, after: int = 0, until: int = 2**62, last: int | None = None) -> Iterator[LogEntry]:
        """Results, oldest first: those numbered above `after` and up to `until`; of these the `last` so many. Raises SpoolError."""
        if last is None:
            yield from self._results(selection, after, until)
        else:
            newest = self._results(selection, after, until, newest_first=True)
            yield from reversed([entry for entry, _ in zip(newest, range(last), strict=False)])

    def _results(self, selection: Selection, after: int, until: int, *, newest_first: bool = False) -> Iterator[LogEntry]:
        conditions, values = self._conditions(selection, "time")
        text = _LOG.format(conditions=conditions, order="DESC" if newest_first else "ASC")
        while True:
            rows = self._page(text, {**values, "after": after, "until": until})
            for row in rows:
                number, time, id, upstream, route, sender, recipient, status, attempt, size, reply, created, summary = row
                after, until = (after, number - 1) if newest_first else (number, until)
                if _meets(selection.sender, sender) and _meets(selection.recipient, recipient):
                    yield LogEntry(
                        time, id_of(id), Lane(upstream, route), sender, recipient, status, attempt, time - created, size, reply, created,
                        unpack_summary(summary),
                    )  # fmt: skip
            if len(rows) < _PAGE_ROWS:
                return

    def _conditions(self, selection: Selection, moment: str) -> tuple[str, dict[str, Any]]:
        """What SQL can decide of a selection. Addresses are compared here, where folding is known."""
        values: dict[str, Any] = {"page": _PAGE_ROWS}
        wanted = []
        for column, value in (("route", selection.route), ("upstream", selection.upstream)):
            if value:
                wanted.append(f"{column} = :{column}")
                values[column] = value
        if selection.state:
            wanted.append(f"{_STATE if moment == 'created' else 'status'} = :state")
            values["state"] = selection.state
        if selection.older_than is not None:
            wanted.append(f"{moment} <= :moment")
            values["moment"] = self._clock.now() - selection.older_than
        if selection.ids:
            names = {f"id{place}": number_of(id) for place, id in enumerate(sorted(selection.ids))}
            wanted.append(f"id IN ({','.join(f':{name}' for name in names)})")
            values |= names
        return "".join(f" AND {condition}" for condition in wanted), values

    def _page(self, statement: str, values: dict[str, Any]) -> list[Any]:
        try:
            return self._database.execute(statement, values).fetchall()
        except apsw.Error as error:
            raise _unreadable(self._directory, error) from error


def _meets(condition: str, address: str) -> bool:
    if condition == "<>":
        return not address
    return not condition or condition in patterns_for(address)


def _unreadable(directory: Path, error: apsw.Error) -> SpoolError:
    advice = _ADVICE if isinstance(error, apsw.CantOpenError | apsw.ReadOnlyError | apsw.PermissionsError) else ""
    return SpoolError(f"the spool in {directory} cannot be read: {error}{advice}")
