"""Print listings for a person: columns as wide as what they hold, sizes and ages in words; and moments for scripts.

Rows are laid out a page at a time, so that a listing of any length begins at once; columns only ever grow from page to page.
"""

import json
from collections.abc import Iterable, Iterator, Sequence
from datetime import UTC, datetime
from itertools import islice

_PAGE_ROWS = 200
_AGES = ((86400.0, "d"), (3600.0, "h"), (60.0, "min"))


class Table:
    """Rows under a header line. Columns named in `right` are aligned to the right; the last column is never padded."""

    def __init__(self, columns: Sequence[str], *, right: Sequence[str] = ()) -> None:
        self._columns = columns
        self._right = [column in right for column in columns]
        self._widths = [0] * len(columns)
        self._begun = False

    def lines(self, rows: Iterable[Sequence[str]]) -> Iterator[str]:
        """The rows as lines; before the first one ever, the header."""
        rows = iter(rows)
        while page := list(islice(rows, _PAGE_ROWS)):
            shown = page if self._begun else [self._columns, *page]
            self._begun = True
            self._widths = [max(width, *(len(row[place]) for row in shown)) for place, width in enumerate(self._widths)]
            for row in shown:
                yield self._line(row)

    def _line(self, row: Sequence[str]) -> str:
        cells = zip(row, self._widths, self._right, strict=True)
        return "  ".join(text.rjust(width) if right else text.ljust(width) for text, width, right in cells).rstrip()


def size(octets: int) -> str:
    """`312 B`, `4.1 kB`, `52 MB`: powers of ten, as in the configuration."""
    amount, unit = float(octets), "B"
    for larger in ("kB", "MB", "GB", "TB"):
        if amount < 999.5:
            break
        amount, unit = amount / 1000, larger
    return f"{octets} B" if unit == "B" else f"{amount:.1f} {unit}" if amount < 9.95 else f"{amount:.0f} {unit}"


def age(seconds: float) -> str:
    """`now`, `12 s`, `5 min`, `3 h`, `4 d`."""
    if seconds < 1:
        return "now"
    for length, unit in _AGES:
        if seconds >= length:
            return f"{seconds / length:.0f} {unit}"
    return f"{seconds:.0f} s"


def wait(seconds: float) -> str:
    """`now`, `in 12 s`: as `age`, of what is still to come."""
    return "now" if seconds < 1 else f"in {age(seconds)}"


def moment(seconds: float) -> str:
    """ISO 8601, UTC, with milliseconds."""
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def counted(number: int, word: str) -> str:
    return f"{number} {word}{'' if number == 1 else 's'}"


def as_json(fields: dict[str, object]) -> str:
    """One line."""
    return json.dumps(fields, ensure_ascii=False)
