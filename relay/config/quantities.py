"""Read how long, how large and how often: durations in seconds, sizes in octets, rates.

As in `config.values`, every function takes what the file says, or raises ValueError with words for the person who wrote it. Pure.
"""

import re
from dataclasses import dataclass
from typing import Any, Final

from relay.config.values import Decimal, Whole

_DURATION = re.compile(r"(\d{1,9}(?:\.\d{1,9})?) ?(ms|s|m|h|d)")
_DURATION_UNITS: Final = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}
_SIZE = re.compile(r"(\d{1,15}(?:\.\d{1,9})?) ?([kKMGT]i?)?B")
_SIZE_POWERS: Final = {"K": 1, "M": 2, "G": 3, "T": 4}
_RATE_UNITS: Final = {1: "s", 60: "m", 3600: "h", 86400: "d"}
_RATE = re.compile(r"(\d{1,9}) ?/ ?([smhd])")


def parse_duration(value: Any) -> float:
    """Seconds from `30s 5m 2h 4d 500ms`. Numbers from code, not from a file, already are seconds."""
    if isinstance(value, Whole | Decimal):
        raise ValueError(f"a duration needs a unit: write {value.written}s (or ms, m, h, d)")
    if isinstance(value, int | float) and not isinstance(value, bool):
        return float(value)
    match = _DURATION.fullmatch(value) if isinstance(value, str) else None
    if not match:
        raise ValueError("must be a duration such as 30s, 5m, 2h, 4d or 500ms")
    return float(match[1]) * _DURATION_UNITS[match[2]]


@dataclass(frozen=True, slots=True)
class Rate:
    """At most `number` in any `seconds`."""

    number: int
    seconds: int

    def __str__(self) -> str:
        return f"{self.number}/{_RATE_UNITS[self.seconds]}"


def parse_rate(value: Any) -> Rate:
    """A rate from `10/s 30/m 500/h 2000/d`."""
    if isinstance(value, Rate):
        return value
    match = _RATE.fullmatch(value) if isinstance(value, str) else None
    if not match or not int(match[1]):
        raise ValueError("must be a rate such as 10/s, 30/m, 500/h or 2000/d")
    return Rate(int(match[1]), int(_DURATION_UNITS[match[2]]))


def bounded_wait(seconds: float) -> float:
    """So long a client may be held: it waits ten minutes for this reply (RFC 5321 section 4.5.3.2.6), an application often one."""
    if seconds > 60:
        raise ValueError("must be at most 60s")
    return seconds


def parse_size(value: Any) -> int:
    """Octets from `50MB` (10^6), `50MiB` (2^20) or a whole number."""
    if isinstance(value, int) and not isinstance(value, bool):
        return int(value)
    match = _SIZE.fullmatch(value) if isinstance(value, str) else None
    if not match:
        raise ValueError("must be a size such as 50MB (10^6), 50MiB (2^20) or a whole number of bytes")
    unit = match[2] or ""
    base = 1024 if unit.endswith("i") else 1000
    return int(float(match[1]) * base ** (_SIZE_POWERS[unit[0].upper()] if unit else 0))
