"""What a request on the control socket says: one line of JSON becomes an order, or words about what is wrong with it. Pure.

    {"version": 1, "verb": "hold", "selection": {"route": "acme", "older_than": 7200}, "reason": "invoices are wrong"}

A selection is always written out; one without conditions is everything. The verb `count` changes nothing and asks only how many.
"""

import json
from collections.abc import Callable, Mapping
from typing import Any, Final

from relay.admin.operator import Order, Verb
from relay.config.values import parse_condition, parse_text
from relay.mail.reply import printable
from relay.spool.base import STATES, Selection
from relay.spool.records import parse_id

VERSION: Final = 1
_COUNT: Final = "count"
_VERBS: Final = (*(verb.value for verb in Verb), _COUNT)
_KEYS: Final = ("version", "verb", "selection", "reason")
_IDS_LIMIT: Final = 10_000  # more than xargs puts into one command
_REASON_LIMIT: Final = 500  # characters: it is a column of the delivery log and a line of a bounce


class Refused(ValueError):
    """The request cannot be understood; the text says why."""


def parse_request(line: bytes, *, by: str) -> Order | Selection:
    """The order, or the selection that shall be counted. Raises Refused."""
    request = _object(line)
    if request.get("version") != VERSION:
        raise Refused(f"this relay speaks version {VERSION} of the control language, not {_shown(request.get('version'))}")
    if unknown := sorted(request.keys() - set(_KEYS)):
        raise Refused(f"unknown key {_shown(unknown[0])}; there are {', '.join(_KEYS)}")
    verb = request.get("verb")
    if verb not in _VERBS:
        raise Refused(f"unknown verb {_shown(verb)}; there are {', '.join(_VERBS)}")
    selection = _selection(request.get("selection"))
    if verb == _COUNT:
        return selection
    return Order(Verb(verb), selection, parse_reason(request.get("reason", "")), by)


def _object(line: bytes) -> dict[str, Any]:
    try:
        request = json.loads(line)
        json.dumps(request, ensure_ascii=False).encode()  # escapes can spell half a character, which nothing can store
    except (ValueError, RecursionError):
        raise Refused("the request is not a line of JSON") from None
    if not isinstance(request, dict):
        raise Refused("the request is not a JSON object")
    return request


def _selection(value: object) -> Selection:
    if not isinstance(value, dict):
        raise Refused("selection must be an object; {} selects everything")
    if unknown := sorted(value.keys() - _CONDITIONS.keys()):
        raise Refused(f"unknown condition {_shown(unknown[0])}; there are {', '.join(_CONDITIONS)}")
    return Selection(**{key: _CONDITIONS[key](key, given) for key, given in value.items()})


def _text(key: str, value: object) -> str:
    if not isinstance(value, str) or not value:
        raise Refused(f"{key} must be text")
    return value


def _address(key: str, value: object) -> str:
    text = _text(key, value)
    try:
        return parse_condition(text)
    except ValueError as error:
        raise Refused(f"{key}: {error}") from None


def _state(key: str, value: object) -> str:
    text = _text(key, value)
    if text not in STATES:
        raise Refused(f"{key} must be one of {', '.join(STATES)}")
    return text


def _seconds(key: str, value: object) -> float:
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 <= value < 1e12:
        raise Refused(f"{key} must be a number of seconds")
    return float(value)


def _ids(key: str, value: object) -> frozenset[str]:
    if not isinstance(value, list) or not value:  # none is not all: scripts come by empty lists
        raise Refused(f"{key} must be a list of messages' ids, and not empty")
    if len(value) > _IDS_LIMIT:
        raise Refused(f"{key} must have at most {_IDS_LIMIT} of them")
    return frozenset(_id(item) for item in value)


def _id(value: object) -> str:
    try:
        return parse_id(value if isinstance(value, str) else "")
    except ValueError:
        raise Refused(f"{_shown(value)} is not the id of a message") from None


_CONDITIONS: Final[Mapping[str, Callable[[str, object], Any]]] = {
    "ids": _ids,
    "route": _text,
    "upstream": _text,
    "sender": _address,
    "recipient": _address,
    "state": _state,
    "older_than": _seconds,
}


def parse_reason(value: object) -> str:
    """Why an operator does something, for a line of the logs and of a report. Raises Refused."""
    if not isinstance(value, str):
        raise Refused("reason must be text")
    if len(value) > _REASON_LIMIT:
        raise Refused(f"the reason must have at most {_REASON_LIMIT} characters")
    try:
        return printable(parse_text(value)).strip()
    except ValueError as error:
        raise Refused(f"the reason {error}") from None


def _shown(value: object) -> str:
    """What somebody sent, short enough for an answer."""
    return json.dumps(value)[:100]
