"""Claims of the embedded spool: which messages are claimed, how they are read, and what becomes of those that cannot be read.

A message that damage has made unreadable is held without end, with the reason, and the others of its lane go on. Where not even that
can be written, because its own row is what is damaged, it is remembered here and not read again while this process lives; after an
I/O error, which may pass, for some minutes. After SQLite has met damage a transaction can write no more, so what was learnt about it
is kept, the transaction given up, and the same operation asked again (`Again`).

Runs in the writer thread, inside a batch's transaction. State: the tokens given out, which kind of mail has the next turn, what is
known to be damaged, and news of it, which the loop picks up.
"""

import itertools
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import apsw

from relay.clock import Clock
from relay.spool import sqlite_schema as sql
from relay.spool.base import Claim, Content, Lane, SpoolError
from relay.spool.records import id_of, unpack_envelope, unpack_facts, unpack_recipients
from relay.spool.sqlite_damage import DAMAGE, read_page

#: An attempt may wait ten minutes after the final dot (RFC 5321 section 4.5.3.2.6) on top of a slow upload; the scheduler renews.
LEASE_SECONDS = 15 * 60

_READ_AGAIN_SECONDS = 5 * 60
_FOREVER = float("inf")
_UNKNOWN = Lane("", "")
#: What `MESSAGE` gives. One bit of a record's header says whether a value is text, a number, octets or nothing.
_KINDS = [str, str, int, int, int, int, int, float, str, str, str, bytes, int, str]
_OF_ANOTHER_KIND = "a value is of another kind than it was"
_PAGE_ROWS = 500
_LOOK_ROWS = 200


#: Where a message's content is: its number, whether it is a file, and whether other messages may have it.
Place = tuple[int, bool, bool]


class Lease(NamedTuple):
    """One claim of ours: the message's number, until when (monotonic seconds: a clock that is set forward ends no lease), and where
    its content is."""

    number: int
    token: int
    until: float
    place: Place


class Again(Exception):
    """Damage was met, and is known by now: the same operation, asked again, goes around it; with `argument`, if there is one."""

    def __init__(self, argument: object = None) -> None:
        self.argument = argument


class _Unsound(Exception):
    """An index has values that no record of ours can have."""


class Claims:
    """Makes claims. `path` says where a content file is, `backoff(attempts)` how long to wait after that many."""

    def __init__(
        self, database: apsw.Connection, clock: Clock, *, backoff: Callable[[int], float], path: Callable[[int], Path]
    ) -> None:  # fmt: skip
        self._database = database
        self._clock = clock
        self._backoff = backoff
        self._path = path
        self._retried_first: set[Lane] = set()
        self._broken_index = False
        self._mended = False
        self._misnamed = False
        self._damaged: dict[int, str] = {}  # message -> why it is to be held
        self._unreadable: dict[int, float] = {}  # message -> when it may be read again (monotonic seconds)
        self.tokens = itertools.count(1)
        self.news: dict[int, tuple[Lane, str]] = {}  # message -> its lane, where it is known, and why it was put aside

    def take_over(self) -> None:
        """End all claims of an earlier process. Outside of a transaction. Raises apsw.Error."""
        try:
            self._database.execute(sql.TAKE_OVER)
            return
        except apsw.CorruptError:
            after, last = 0, 2**62
        while after < last:
            rows, following, damaged = read_page(self._claimed, after=after, until=last, limit=_PAGE_ROWS)
            with self._database:
                self._database.executemany(sql.TAKE_OVER_ONE, [(number,) for number, claimed in rows if claimed])
            if damaged:
                start = rows[-1][0] if rows else after
                self.news[start] = _UNKNOWN, f"records behind this one, up to {id_of(following)}, are damaged and cannot be read"
            after = following

    def _claimed(self, after: int, limit: int) -> list[Any]:
        return self._database.execute(sql.CLAIMED, (after, limit)).fetchall()

    def claim(self, arguments: list[tuple[Lane, int, float]]) -> list[list[tuple[Claim, Lease]]]:
        """Due messages of a lane, so many, at this time: fresh and retried mail in turn."""
        return [self._claim_some(lane, limit, now) for lane, limit, now in arguments]

    def overdue(self, arguments: list[tuple[int, float]]) -> list[list[tuple[Claim, Lease]]]:
        """Held messages whose time was up at this time, so many, for ending them."""
        return [self._take_some(self._find(sql.OVERDUE, (now, limit + len(self._unreadable)))[:limit], now) for limit, now in arguments]

    def late(self, arguments: list[tuple[Sequence[int], float]]) -> list[list[tuple[Claim, Lease]]]:
        """Those of these messages that still wait and are due, now, for something else than an attempt."""
        return [self._take_some(self._find(sql.LATE, (json.dumps(numbers), now)), now) for numbers, now in arguments]

    def hasten(self, arguments: list[tuple[Lane, float]]) -> list[int]:
        """Make one page of what waits in a lane due at this time; answers how much that was."""
        return [sum(self._hasten_some(lane, kind, now) for kind in (0, 1)) for lane, now in arguments]

    def _hasten_some(self, lane: Lane, kind: int, now: float) -> int:
        numbers = self._find(sql.LATER, (*lane, kind, now, _PAGE_ROWS + len(self._unreadable)))[:_PAGE_ROWS]
        for number in numbers:
            try:
                self._database.execute(sql.RESCHEDULE, (now, number))
            except apsw.CorruptError as error:
                self._lose(number, lane, sql.LOST)
                raise Again from error
        return len(numbers)

    def take(self, number: int, now: float) -> tuple[Claim, Lease] | None:
        """Claim one message for ending it; None where it cannot be read."""
        return self._begin(number, now, _UNKNOWN, ending=True)

    def next_due(self, arguments: list[list[tuple[int, int]]]) -> list[dict[Lane, float]]:
        """End the claims that have expired, given as message and token; then tell when each lane is due."""
        for number, token in itertools.chain.from_iterable(arguments):
            if self._unreadable.get(number) != _FOREVER:
                try:
                    self._database.execute(sql.EXPIRE, (number, token))
                except apsw.CorruptError as error:
                    self._lose(number, _UNKNOWN, sql.LOST)
                    raise Again from error
        now = self._clock.monotonic()
        if self._misnamed:
            self._misnamed = False
            self._put_misnamed_aside()
        self._unreadable = {number: until for number, until in self._unreadable.items() if until > now}
        if self._unreadable:
            rows = self._rows(sql.NEXT_DUE_BUT, (json.dumps(list(self._unreadable)),))
            due = {Lane(upstream, route): due for upstream, route, due in rows}
        else:
            due = self._lanes_due()
        return [due] * len(arguments)

    def _lanes_due(self) -> dict[Lane, float]:
        """The lanes and their first times from the beginning of each lane alone: one may be a hundred thousand messages deep."""
        due: dict[Lane, float] = {}
        lane, full = _UNKNOWN, True
        while full:
            rows = self._rows(sql.FURTHER_ROUTES, (*lane, _LOOK_ROWS))
            rows += self._rows(sql.FURTHER_UPSTREAMS, (lane.upstream, _LOOK_ROWS - len(rows)))
            for upstream, route, when in rows:
                lane = Lane(upstream, route)
                due[lane] = min(when, due.get(lane, when))
            if full := len(rows) == _LOOK_ROWS:  # there may be more of the last one, and behind it those that were tried
                due[lane] = min([due[lane], *(when for (when,) in self._rows(sql.FIRST_RETRIED, lane))])
        return due

    def step(self, arguments: list[tuple[float, float]]) -> list[None]:
        """Wall time was set by so many seconds, and is now this."""
        for step, now in arguments:
            self._database.execute(sql.STEP_FORWARD if step > 0 else sql.STEP_BACK, {"step": step, "now": now})
        return [None] * len(arguments)

    def created(self, numbers: list[int]) -> list[float | None]:
        """When each of these messages was accepted; None for what is gone."""
        rows: list[Any] = [self._database.execute(sql.CREATED, (number,)).fetchone() for number in numbers]
        return [row[0] if row is not None else None for row in rows]

    def leave(self, number: int, reason: str) -> None:
        """Mark a message as held where it stands, without touching more of the database than its own page."""
        if self._unreadable.get(number) == _FOREVER:
            return
        try:
            self._database.execute(sql.LEAVE, (reason, number))
        except apsw.CorruptError as error:
            self._lose(number, _UNKNOWN, reason)
            raise Again from error

    def mend(self, orders: list[None]) -> list[None]:
        """Make the indexes of messages anew, once, for damage that may be in them."""
        if not self._mended:
            self._mended, self._broken_index = True, False
            sql.rebuild_indexes(self._database)
        return orders

    def _claim_some(self, lane: Lane, limit: int, now: float) -> list[tuple[Claim, Lease]]:
        claims: list[tuple[Claim, Lease]] = []
        while True:
            numbers = self._claimable(lane, limit - len(claims), now)
            begun = [claim for number in numbers if (claim := self._begin(number, now, lane)) is not None]
            claims += begun
            if len(begun) == len(numbers):
                return claims

    def _claimable(self, lane: Lane, limit: int, now: float) -> list[int]:
        fresh = self._find(sql.CLAIMABLE, (*lane, 0, now, limit + len(self._unreadable)))
        retried = self._find(sql.CLAIMABLE, (*lane, 1, now, limit + len(self._unreadable)))
        first, second = (retried, fresh) if lane in self._retried_first else (fresh, retried)
        self._retried_first ^= {lane}
        return [number for pair in itertools.zip_longest(first, second) for number in pair if number is not None][:limit]

    def _take_some(self, numbers: Sequence[int], now: float) -> list[tuple[Claim, Lease]]:
        return [claim for number in numbers if (claim := self.take(number, now)) is not None]

    def _find(self, statement: str, values: Sequence[object]) -> list[int]:
        """Ids of readable messages, from an index alone."""
        return [number for (number,) in self._rows(statement, values) if number not in self._unreadable]

    def _rows(self, statement: str, values: Sequence[object]) -> Any:
        """Rows from an index. One that is damaged is made anew, once."""
        if self._broken_index:
            self.mend([None])
        try:
            rows = self._database.execute(statement, values).fetchall()
            if any(value is None or type(value) is bytes for row in rows for value in row):
                raise _Unsound
            return rows
        except (*DAMAGE, _Unsound) as error:
            if self._mended and isinstance(error, apsw.CorruptError):
                raise
            self._broken_index, self._misnamed = not self._mended, self._mended
            raise Again from error

    def _put_misnamed_aside(self) -> None:
        """What names no lane that could be claimed, as the text of its upstream or route is none any more."""
        found = False
        rows: Any = self._database.execute(sql.NAMES).fetchall()
        for number, sound, upstream, route in rows:
            try:
                if not sound:
                    raise ValueError(_OF_ANOTHER_KIND)
                _ = upstream.decode(), route.decode()
            except ValueError as error:
                found = True
                self._put_aside(number, _UNKNOWN, f"its record in the spool is damaged: {error}")
        if not found:
            raise SpoolError("an index of the spool is damaged again; a restart makes it anew")

    def _begin(self, number: int, now: float, lane: Lane, *, ending: bool = False) -> tuple[Claim, Lease] | None:
        if number in self._damaged:
            self._put_aside(number, lane, self._damaged[number])
            return None
        try:
            row = self._database.execute(sql.MESSAGE, (number,)).fetchone()
            if row is None:
                raise ValueError("it is in an index only")
            token = -next(self.tokens) if ending else next(self.tokens)
            claim, lease = self._read(number, row, token, now)
            if ending:
                self._database.execute(sql.TAKE, (token, number))
            else:
                self._database.execute(sql.CLAIM, (token, now + self._backoff(claim.attempt), number))
        except apsw.CorruptError as error:
            self._damaged[number] = f"its record in the spool is damaged: {error}"
            raise Again from error
        except apsw.IOError:  # SQLite has given up the whole transaction
            self._unreadable[number] = self._clock.monotonic() + _READ_AGAIN_SECONDS
            raise
        except ValueError as error:
            self._put_aside(number, lane, f"its record in the spool is damaged: {error}")
            return None
        return claim, lease

    def _read(self, number: int, row: Any, token: int, now: float) -> tuple[Claim, Lease]:
        """Raises ValueError, Again and apsw.Error."""
        if list(map(type, row)) != _KINDS:
            raise ValueError(_OF_ANOTHER_KIND)
        upstream, route, content_number, filed, shared, attempts, doubt, created, sender, recipients, facts_text, prefix, size, held = row
        origin, summary, facts = unpack_facts(facts_text)
        envelope = unpack_envelope(sender, unpack_recipients(recipients, in_doubt=bool(doubt)), facts)
        octets = None if filed else self._octets(number, content_number, size)
        path = self._path(content_number) if filed else None
        content = Content(size, octets, path, bool(facts.get("8bit")), bool(facts.get("dots")))
        claim = Claim(
            id_of(number), token, Lane(upstream, route), envelope, content, created, attempts + (token > 0), now + LEASE_SECONDS, prefix,
            origin, summary, held,
        )  # fmt: skip
        return claim, Lease(number, token, self._clock.monotonic() + LEASE_SECONDS, (content_number, bool(filed), bool(shared)))

    def _octets(self, number: int, content: int, size: int) -> bytes:
        try:
            found = self._database.execute(sql.CONTENT, (content,)).fetchone()
        except apsw.CorruptError as error:
            self._damaged[number] = f"its content in the spool is damaged: {error}"
            raise Again from error
        octets = found[0] if found is not None else None
        if not isinstance(octets, bytes) or len(octets) != size:
            self._damaged[number] = sql.MISSING if octets is None else "its content in the spool is damaged: it has another length"
            raise Again
        return octets

    def _put_aside(self, number: int, lane: Lane, reason: str) -> None:
        try:
            self._database.execute(sql.QUARANTINE, (reason, number))
        except apsw.CorruptError as error:
            self._lose(number, lane, reason)
            raise Again from error
        if not self._database.changes():
            self._unreadable[number] = _FOREVER
        self.news[number] = lane, reason

    def _lose(self, number: int, lane: Lane, reason: str) -> None:
        self._unreadable[number] = _FOREVER
        self.news[number] = lane, reason
