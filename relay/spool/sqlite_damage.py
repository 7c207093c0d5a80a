"""Reading a table that is damaged in places: the rows before and behind a page that cannot be read.

SQLite fails the statement that comes upon such a page, and cannot say which rows were on it. So rows are read one by one up to the
damage, and behind it the first id is searched for from which reading succeeds again. No state.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import apsw

#: What a statement raises that meets a damaged page, or a text that is no UTF-8 any more.
DAMAGE = (apsw.CorruptError, UnicodeDecodeError)

#: `(after, limit)` -> rows in the order of their ids, which come first in each.
Fetch = Callable[[int, int], list[Any]]


def fetch_texts(fetch: Callable[[Mapping[str, str]], list[Any]], columns: Iterable[str]) -> list[Any]:
    """Rows with these columns of text, as well as they can be read where damage has made one something else than UTF-8.

    `fetch` is given what to select for each column.
    """
    try:
        return fetch({column: column for column in columns})
    except UnicodeDecodeError:
        rows = fetch({column: f"CAST({column} AS BLOB)" for column in columns})
        return [tuple(_text(value) for value in row) for row in rows]


def _text(value: Any) -> Any:
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else value


def read_page(fetch: Fetch, *, after: int, until: int, limit: int) -> tuple[list[Any], int, bool]:
    """Rows above `after`, at most `limit`; the id above which to go on, `until` when there is nothing more; and whether some before
    it were passed over as damaged."""
    try:
        rows = fetch(after, limit)
        return rows, rows[-1][0] if len(rows) == limit else until, False
    except DAMAGE:
        rows = []
    while len(rows) < limit:
        try:
            found = fetch(after, 1)
        except DAMAGE:
            return rows, _behind_damage(fetch, after, until), True
        if not found:
            return rows, until, False
        rows += found
        after = found[0][0]
    return rows, after, False


def _behind_damage(fetch: Fetch, bad: int, until: int) -> int:
    """The lowest id above which reading succeeds again; `until` when it does not.

    The steps double, as nothing is known of where the page ends. So what little lies between two damaged pages may be passed over.
    """
    step = 1
    while not _readable(fetch, good := min(bad + step, until)):
        if good == until:
            return until
        bad, step = good, step * 2
    while good - bad > 1:
        middle = (good + bad) // 2
        if _readable(fetch, middle):
            good = middle
        else:
            bad = middle
    return good


def _readable(fetch: Fetch, after: int) -> bool:
    try:
        fetch(after, 1)
    except DAMAGE:
        return False
    return True
