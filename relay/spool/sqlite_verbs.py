"""The operator's verbs on the embedded spool: hold, release, reschedule, drop, take.

A verb goes through the queue in pages, each an operation of its own in the spool's batches: a hundred thousand messages keep nobody
waiting for longer than one page takes. What happened to a message is in the delivery log, one row for each recipient.

Runs in the writer thread, inside a batch's transaction. State: what damage keeps from being removed.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import apsw

from relay.spool import sqlite_schema as sql
from relay.spool.base import Claim, Lane, Next, Selection, Waiting
from relay.spool.records import addresses_of, id_of, is_unwarned, recipients_of, summary_of
from relay.spool.sqlite_claims import Again, Claims, Lease
from relay.spool.sqlite_damage import fetch_texts, read_page
from relay.spool.sqlite_rows import Rows

_PAGE_ROWS = 200  # about 20 ms of work, for which mail that comes in has to wait
_PAGE_LOG_ROWS = 5000  # messages may have a thousand recipients each

_ANY = "token IS NULL"
_WAITING = "token IS NULL AND held = ''"
_DUE = f"{_WAITING} AND due <= :now"
_HELD = "token IS NULL AND held != ''"
_ENDING = "token IS NULL AND (held = '' OR due < 9e999)"  # all but what is held without end

_PAGE = """SELECT id, ({wanted}{conditions}), {upstream}, {route}, content, filed, shared, attempts, created, {sender}, {recipients},
    {facts}, size, {held} FROM message WHERE id > :after AND id <= :until {ids} ORDER BY id LIMIT :limit"""


_TEXTS = ("upstream", "route", "sender", "recipients", "facts", "held")


class Page(NamedTuple):
    """Where a verb has got to: messages above `after` and up to `until` are still to be looked at.

    `limit`: how many messages to take at most. `hole`: so many rows can be read before damage, as we know by now,
    and those above that id behind it.
    """

    selection: Selection
    until: int
    now: float
    reason: str = ""
    limit: int = 0
    after: int = 0
    hole: tuple[int, int] | None = None


class Step(NamedTuple):
    """What one page came to: what the verb answers for it, the page after it, and, where messages are gone,
    the content files that nobody needs any more and how much less waits."""

    answers: Sequence[Any]
    following: Page | None
    files: Sequence[int] = ()
    octets: int = 0


class _Row(NamedTuple):
    number: int
    wanted: int
    upstream: str
    route: str
    content: int
    filed: int
    shared: int
    attempts: int
    created: float
    sender: str
    recipients: str
    facts: str
    size: int
    held: str


_KINDS = [int, int, str, str, int, int, int, int, float, str, str, str, int, str]


def _row_of(values: Sequence[Any]) -> _Row:
    """The row, with nothing in place of a value that damage has made one of another kind."""
    if list(map(type, values)) != _KINDS:
        values = [value if type(value) is kind else kind() for value, kind in zip(values, _KINDS, strict=True)]
    return _Row(*values)


class Verbs:
    """Applies pages. Every method takes those of one batch and gives one step for each."""

    def __init__(self, database: apsw.Connection, claims: Claims, rows: Rows) -> None:
        self._database = database
        self._claims = claims
        self._rows = rows
        self._stuck_messages: set[int] = set()  # they cannot be removed, for damage in their neighbourhood
        self._stuck_contents: set[int] = set()

    def hold(self, pages: list[Page]) -> list[Step]:
        return [self._hold(page) for page in pages]

    def _hold(self, page: Page) -> Step:
        rows, following = self._read(page, _ENDING)
        self._database.executemany(sql.HOLD, [(page.reason, row.number) for row in rows])
        self._log(page, rows, "held", lambda _: page.reason)
        return Step([id_of(row.number) for row in rows], following)

    def release(self, pages: list[Page]) -> list[Step]:
        return [self._release(page) for page in pages]

    def _release(self, page: Page) -> Step:
        rows, following = self._read(page, _HELD)
        self._database.executemany(sql.RELEASE, [(page.now, row.number) for row in rows])
        self._log(page, rows, "released", lambda row: f"was held: {row.held}")
        return Step([Next(page.now, Lane(row.upstream, row.route)) for row in rows], following)

    def reschedule(self, pages: list[Page]) -> list[Step]:
        return [self._reschedule(page) for page in pages]

    def _reschedule(self, page: Page) -> Step:
        rows, following = self._read(page, _WAITING)
        self._database.executemany(sql.RESCHEDULE, [(page.now, row.number) for row in rows])
        return Step([Next(page.now, Lane(row.upstream, row.route)) for row in rows], following)

    def drop(self, pages: list[Page]) -> list[Step]:
        return [self._drop(page) for page in pages]

    def _drop(self, page: Page) -> Step:
        rows, following = self._read(page, _ANY)
        gone: list[_Row] = []
        for row in rows:
            if row.number in self._stuck_messages:
                self._claims.leave(row.number, sql.STUCK)
            else:
                self._remove(row)
                gone.append(row)
        files = [file for row in gone if row.content not in self._stuck_contents for file in self._forget(row)]
        self._log(page, gone, "dropped", lambda row: f"was held: {row.held}" if row.held else "by the operator")
        return Step([id_of(row.number) for row in gone], following, files, sum(row.size for row in gone))

    def _remove(self, row: _Row) -> None:
        try:
            self._database.execute(sql.DROP, (row.number,))
        except apsw.CorruptError as error:
            self._stuck_messages.add(row.number)
            raise Again from error

    def _forget(self, row: _Row) -> list[int]:
        try:
            return self._rows.forget([(row.content, bool(row.filed), bool(row.shared))])[0]
        except apsw.CorruptError as error:
            self._stuck_contents.add(row.content)
            raise Again from error

    def look(self, pages: list[Page]) -> list[Step]:
        """What waits and is due; nothing is changed. Ends where what was accepted after the time that is asked for begins."""
        return [self._look(page) for page in pages]

    def _look(self, page: Page) -> Step:
        assert page.selection.older_than is not None, "a page of what is old"
        rows, after = self._read_rows(page, _DUE)
        waiting = [
            Waiting(id_of(row.number), Lane(row.upstream, row.route), row.created, is_unwarned(row.sender, recipients_of(row.recipients)))
            for row in rows
            if row.wanted
        ]
        ends = after >= page.until or (rows and rows[-1].created > page.now - page.selection.older_than)
        return Step(waiting, None if ends else page._replace(after=after, hole=None))

    def take(self, pages: list[Page]) -> list[Step]:
        return [self._take(page) for page in pages]

    def _take(self, page: Page) -> Step:
        rows, following = self._read(page, _ANY)
        taken: list[tuple[Claim, Lease]] = []
        for row in rows:
            if len(taken) == page.limit:
                return Step(taken, None)
            if (claim := self._claims.take(row.number, page.now)) is not None:
                taken.append(claim)
        left = page.limit - len(taken)
        return Step(taken, following._replace(limit=left) if following is not None and left else None)

    def _read(self, page: Page, wanted: str) -> tuple[list[_Row], Page | None]:
        """The messages of one page that are as they must be and as was asked for, and the page after it."""
        found, after = self._read_rows(page, wanted)
        chosen: list[_Row] = []
        recipients = 0
        for row in found:
            if row.wanted and page.selection.admits(row.sender, addresses := addresses_of(row.recipients)):
                chosen.append(row)
                recipients += len(addresses)
                if recipients >= _PAGE_LOG_ROWS:
                    return chosen, page._replace(after=row.number, hole=None)
        return chosen, page._replace(after=after, hole=None) if after < page.until else None

    def _read_rows(self, page: Page, wanted: str) -> tuple[list[_Row], int]:
        """All messages of one page, and the id above which the next one begins. A statement that meets damage ends the transaction's
        right to write: so where it is must be known before."""
        selection = page.selection
        conditions, values = sql.conditions(selection, moment="created", state=sql.STATE, now=page.now)
        text = partial(_PAGE.format, wanted=wanted, conditions=conditions, ids=conditions if selection.ids else "")

        def fetch(after: int, limit: int) -> list[Any]:
            more = {**values, "now": page.now, "after": after, "until": page.until, "limit": limit}
            return fetch_texts(lambda texts: self._database.execute(text(**texts), more).fetchall(), _TEXTS)

        if page.hole is not None:
            count, after = page.hole
            found = fetch(page.after, count) if count else []
        else:
            found, after, damaged = read_page(fetch, after=page.after, until=page.until, limit=_PAGE_ROWS)
            if damaged:
                raise Again(page._replace(hole=(len(found), after)))
        return [_row_of(values) for values in found], after

    def _log(self, page: Page, rows: Sequence[_Row], status: str, reason: Callable[[_Row], str]) -> None:
        lines: list[tuple[object, ...]] = []
        for row in rows:
            summary = summary_of(row.facts)
            lines += [
                (
                    page.now, row.number, row.created, row.upstream, row.route, row.sender, address, status, row.attempts, row.size,
                    reason(row), summary, None,
                )
                for address in addresses_of(row.recipients) or ("",)
            ]  # fmt: skip
        self._database.executemany(sql.PUT_LOG, lines)
