"""The operator's view of a spool directory: what is queued and what became of the rest. Reads only.

Works beside a relay that holds the directory and where none runs. Rows are read a page at a time, each page in a short transaction
of its own: a listing that somebody looks at for an hour must not keep the writer's log from being folded back. So a listing is no
snapshot: a message that leaves meanwhile may be in it or not, none is in it twice.

State: one read-only connection.
"""

import os
from collections.abc import Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import apsw

from relay.clock import Clock
from relay.mail.envelope import NO_SUMMARY, Envelope, Origin, Summary
from relay.spool.base import EVERYTHING, Content, Lane, LogEntry, Queued, Selection, SpoolError
from relay.spool.files import CONTENT_DIRECTORY
from relay.spool.records import id_of, number_of, unpack_envelope, unpack_facts, unpack_recipients, unpack_summary
from relay.spool.sqlite_damage import fetch_texts, read_page
from relay.spool.sqlite_schema import DATABASE, SCHEMA_VERSION, STATE, conditions

_PAGE_ROWS = 500
_BUSY_MILLISECONDS = 5000
_ADVICE = "; run this as the user that relay runs as"
# SQLite keeps an index of the log beside the database, also for those who only read; the last one to leave removes it.
_COPY = "; its file system is read-only: copy the directory to where you can write, and name the copy with --spool"

#: Schemas that can be read. The first had no `report` in its log, the second no table of what quotas have used.
_READABLE = (1, 2, SCHEMA_VERSION)

_QUEUE = f"""SELECT id, {STATE} AS state, {{upstream}}, {{route}}, {{sender}}, {{recipients}}, size, created, due, attempts, {{held}},
    {{reply}}, doubt FROM message WHERE id > :after {{conditions}} ORDER BY id LIMIT :page"""
_QUEUE_TEXTS = ("upstream", "route", "sender", "recipients", "held", "reply")
_LOG = """SELECT number, time, id, {upstream}, {route}, {sender}, {recipient}, {status}, attempt, size, {reply}, created, {summary},
    {report} FROM log WHERE number > :after AND number <= :until {conditions} ORDER BY number {order} LIMIT :page"""
_LOG_TEXTS = ("upstream", "route", "sender", "recipient", "status", "reply", "summary")
_END = "SELECT ifnull(max(number), 0) FROM log"
_DETAILS = "SELECT sender, recipients, facts, prefix, doubt FROM message WHERE id = :id"
_PLACE = "SELECT content, filed, size FROM message WHERE id = :id"
_OCTETS = "SELECT octets FROM content WHERE id = :id"
_KNOWN = "SELECT 1 FROM message WHERE id = :id UNION ALL SELECT 1 FROM log WHERE id = :id LIMIT 1"


class Details(NamedTuple):
    """What is stored of one message beside its content. `prefix`: the header fields that go before it."""

    envelope: Envelope
    origin: Origin
    summary: Summary
    prefix: bytes


class SqliteView:
    """What the spool in `directory` holds. Close it."""

    def __init__(self, directory: Path, clock: Clock) -> None:
        """Raises SpoolError where there is no spool, or none that can be read."""
        self.gaps = False  # whether a listing has passed damaged records over
        self._clock = clock
        self._directory = directory
        path = directory / DATABASE
        try:
            path.stat()
        except FileNotFoundError:
            raise SpoolError(
                f"there is no spool in {directory} (no {DATABASE}): no relay has run with this directory, --spool names another"
            ) from None
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
        self._report = "report" if version > 1 else "NULL"
        if version not in _READABLE:
            self._database.close()
            newer = f"was written by another version of relay (schema {version}, this one knows {SCHEMA_VERSION})"
            raise SpoolError(f"the spool in {directory} {newer if version else 'is empty: its relay has not finished starting'}")

    def close(self) -> None:
        self._database.close()

    def queued(self, selection: Selection = EVERYTHING) -> Iterator[Queued]:
        """The queued messages, oldest first. Those whose records are damaged are passed over, see `gaps`. Raises SpoolError."""
        chosen, values = conditions(selection, moment="created", state=STATE, now=self._clock.now())

        def fetch(after: int, limit: int) -> list[Any]:
            more = {**values, "after": after, "page": limit}
            return fetch_texts(
                lambda texts: self._database.execute(_QUEUE.format(conditions=chosen, **texts), more).fetchall(), _QUEUE_TEXTS
            )

        after, last = 0, 2**62
        while after < last:
            try:
                rows, after, damaged = read_page(fetch, after=after, until=last, limit=_PAGE_ROWS)
            except apsw.Error as error:
                raise _unreadable(self._directory, error) from error
            self.gaps |= damaged
            for queued in map(_queued, rows):
                if selection.admits(queued.sender, queued.recipients):
                    yield queued

    def message(self, id: str) -> Queued | None:
        """One queued message. Raises SpoolError."""
        return next(self.queued(Selection(ids=frozenset({id}))), None)

    def knows(self, id: str) -> bool:
        """Whether a message is queued, or was and the delivery log still knows. Raises SpoolError."""
        return bool(self._page(_KNOWN, {"id": number_of(id)}))

    def details(self, id: str) -> Details | None:
        """What is stored of a queued message beside its content. Raises SpoolError, also where damage has made it unreadable."""
        try:
            for sender, recipients, facts_text, prefix, doubt in self._page(_DETAILS, {"id": number_of(id)}):
                origin, summary, facts = unpack_facts(facts_text)
                envelope = unpack_envelope(sender, unpack_recipients(recipients, in_doubt=bool(doubt)), facts)
                return Details(envelope, origin, summary, prefix)
        except ValueError as error:
            raise SpoolError(f"the record of {id} is damaged: {error}") from error
        return None

    def content(self, id: str) -> Content | None:
        """The content of a queued message; a path is that of the spool's own file. Raises SpoolError, also where it is missing."""
        for number, filed, size in self._page(_PLACE, {"id": number_of(id)}):
            if filed:
                return Content(size, path=self._directory / CONTENT_DIRECTORY / id_of(number))
            for (octets,) in self._page(_OCTETS, {"id": number}):
                return Content(size, octets)
            raise SpoolError(f"the content of {id} is missing from the spool")
        return None

    def end_of_log(self) -> int:
        """The number of the newest line of the delivery log; 0 where it is empty."""
        return int(self._page(_END, {})[0][0])

    def log(self, selection: Selection = EVERYTHING, *, after: int = 0, until: int = 2**62, last: int | None = None) -> Iterator[LogEntry]:
        """Results, oldest first: those numbered above `after` and up to `until`; of these the `last` so many. Raises SpoolError."""
        if last is None:
            yield from self._results(selection, after, until)
        else:
            newest = self._results(selection, after, until, newest_first=True)
            yield from reversed(list(islice(newest, last)))

    def _results(self, selection: Selection, after: int, until: int, *, newest_first: bool = False) -> Iterator[LogEntry]:
        chosen, values = conditions(selection, moment="time", state="status", now=self._clock.now())
        order = "DESC" if newest_first else "ASC"

        def fetch(texts: Mapping[str, str]) -> list[Any]:
            text = _LOG.format(report=self._report, conditions=chosen, order=order, **texts)
            return self._page(text, {**values, "after": after, "until": until, "page": _PAGE_ROWS})

        while True:
            rows = fetch_texts(fetch, _LOG_TEXTS)
            for row in rows:
                number, time, id, upstream, route, sender, recipient, status, attempt, size, reply, created, summary, report = row
                after, until = (after, number - 1) if newest_first else (number, until)
                if selection.admits(sender, (recipient,)):
                    yield LogEntry(
                        time, id_of(id), Lane(upstream, route), sender, recipient, status, attempt, time - created, size, reply, created,
                        _summary(summary), id_of(report) if report is not None else "",
                    )  # fmt: skip
            if len(rows) < _PAGE_ROWS:
                return

    def _page(self, statement: str, values: dict[str, Any]) -> list[Any]:
        try:
            return self._database.execute(statement, values).fetchall()
        except apsw.Error as error:
            raise _unreadable(self._directory, error) from error


def _summary(text: str) -> Summary:
    try:
        return unpack_summary(text)
    except (ValueError, TypeError):  # of damage
        return NO_SUMMARY


def _queued(row: Any) -> Queued:
    number, state, upstream, route, sender, recipients, size, created, due, attempts, held, reply, doubt = row
    try:
        found = unpack_recipients(recipients, in_doubt=bool(doubt))
    except ValueError:
        found = ()
    addresses, in_doubt = tuple(r.address for r in found), any(r.in_doubt for r in found)
    return Queued(id_of(number), state, Lane(upstream, route), sender, addresses, size, created, due, attempts, held, reply, in_doubt)


def _unreadable(directory: Path, error: apsw.Error) -> SpoolError:
    advice = ""
    if isinstance(error, apsw.CantOpenError | apsw.ReadOnlyError | apsw.PermissionsError):
        advice = _COPY if os.statvfs(directory).f_flag & os.ST_RDONLY else _ADVICE
    return SpoolError(f"the spool in {directory} cannot be read: {error}{advice}")
