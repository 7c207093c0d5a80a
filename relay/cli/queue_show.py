"""`relay queue show`: one queued message: who sent it and how it came, where it goes, why it waits; its header, or all of it.

Reads the spool itself, whether a relay runs or not. What a stranger wrote is made harmless for a terminal; a file gets it as it is.
Exit code 1: the message is not in the queue.
"""

import argparse
import os
import sys
import time
from collections.abc import Iterator
from itertools import chain
from math import inf
from typing import TYPE_CHECKING, Any

from relay.cli.options import EX_FAILED, fail
from relay.cli.selection import add_places, message_id, with_view

if TYPE_CHECKING:
    from relay.spool.base import Content, Queued
    from relay.spool.sqlite_view import Details, SqliteView

_HEAD_OCTETS = 1024 * 1024 + 64 * 1024  # a header block may have 1 MiB
_SLICE_OCTETS = 1024 * 1024


def add_parser(verbs: Any) -> None:
    """Add `show` to the verbs of `relay queue`."""
    parser = verbs.add_parser("show", help="one message, and why it waits", description=__doc__.partition("\n\n")[2])
    parser.add_argument("id", metavar="ID", type=message_id)
    part = parser.add_mutually_exclusive_group()
    part.add_argument("--headers", action="store_true", help="its header block, with the fields that relay put before it")
    part.add_argument("--content", action="store_true", help="all of it, as it is stored")
    add_places(parser)
    part.add_argument("--json", action="store_true", help="one JSON object")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Show it, and return the exit code."""
    return with_view(options, lambda view: _show(view, options))


def _show(view: "SqliteView", options: argparse.Namespace) -> int:
    queued, details, content = view.message(options.id), None, None
    if queued is not None:
        details = view.details(options.id)
    if details is not None and (options.headers or options.content):
        content = view.content(options.id)
    if queued is None or details is None or (content is None and (options.headers or options.content)):
        return fail(f"relay queue: {options.id} is not in the queue; `relay trace {options.id}` says what became of it", EX_FAILED)
    if content is not None:
        _write(details.prefix, _slices(content), headers_only=options.headers)
    elif options.json:
        from relay.cli.table import as_json

        print(as_json(_fields(queued, details)))
    else:
        rows = _rows(queued, details, time.time())
        print("\n".join(f"{name:<12}  {value}" for name, value in rows))
    return 0


def _rows(queued: "Queued", details: "Details", now: float) -> Iterator[tuple[str, str]]:
    """What there is to say, for a person."""
    from relay.cli.table import age, moment, size

    envelope, origin, summary = details.envelope, details.origin, details.summary
    yield "id", queued.id
    yield "state", waits(queued, now)
    yield "accepted", f"{moment(queued.created)}, {age(now - queued.created)} ago"
    came = (("from", origin.client), ("as user", origin.user), ("at listener", origin.listener), ("in session", origin.session))
    yield "came", " ".join(f"{word} {value}" for word, value in came if value) or "from relay itself"
    yield "sender", f"{queued.sender or '<>'}{f' (header From: {origin.header_from})' if origin.header_from else ''}"
    for place, recipient in enumerate(envelope.recipients):
        notes = [f"NOTIFY={recipient.notify}"] if recipient.notify else []
        notes += ["in doubt: the upstream may have it"] if recipient.in_doubt else []
        yield "" if place else "recipients", " ".join([recipient.address, *([f"({', '.join(notes)})"] if notes else [])])
    yield from ((name, value) for name, value in zip(("To", "Cc", "Subject"), summary, strict=True) if value)
    yield "size", size(queued.size)
    yield "route", queued.lane.route
    yield "upstream", queued.lane.upstream
    yield "attempts", str(queued.attempts)
    yield "last reply", queued.last_reply or "-"


def waits(queued: "Queued", now: float) -> str:
    """The state of a queued message and what happens to it next, for a person."""
    from relay.cli.table import wait

    soon = wait(queued.due - now)
    if queued.state == "active":
        return f"active: being attempted at {queued.lane.upstream}"
    if queued.state != "held":
        return f"{queued.state}: to be tried {soon} at {queued.lane.upstream}"
    return f"held: {queued.held}; {'until it is released' if queued.due == inf else f'given up {soon}'}"


def fields(queued: "Queued") -> dict[str, object]:
    """One message for a script. `due` of held mail: when it is given up; null: never by itself."""
    from relay.cli.table import moment

    return {
        "id": queued.id,
        "state": queued.state,
        "route": queued.lane.route,
        "upstream": queued.lane.upstream,
        "sender": queued.sender,
        "recipients": list(queued.recipients),
        "size": queued.size,
        "created": moment(queued.created),
        "due": moment(queued.due) if queued.due < inf else None,
        "attempts": queued.attempts,
        "held": queued.held,
        "reply": queued.last_reply,
        "in_doubt": queued.in_doubt,
    }


def _fields(queued: "Queued", details: "Details") -> dict[str, object]:
    """All that is stored of it, for a script."""
    envelope, origin, summary = details.envelope, details.origin, details.summary
    return {
        **fields(queued),
        "in_doubt_recipients": [recipient.address for recipient in envelope.recipients if recipient.in_doubt],
        "notify": {recipient.address: recipient.notify for recipient in envelope.recipients if recipient.notify},
        "ret": envelope.ret,
        "envid": envelope.envid,
        "listener": origin.listener,
        "client": origin.client,
        "user": origin.user,
        "session": origin.session,
        "from": origin.header_from,
        "to": summary.to,
        "cc": summary.cc,
        "subject": summary.subject,
    }


def _slices(content: "Content") -> Iterator[bytes]:
    """The stored octets, a header block's worth first. Raises SpoolError."""
    from relay.spool.base import SpoolError

    if content.path is None:
        yield content.octets or b""
        return
    try:
        with content.path.open("rb") as file:
            yield file.read(_HEAD_OCTETS)
            while octets := file.read(_SLICE_OCTETS):
                yield octets
    except OSError as error:
        raise SpoolError(f"the content cannot be read: {error.strerror}") from error


def _write(prefix: bytes, slices: Iterator[bytes], *, headers_only: bool) -> None:
    """To standard output: as it is, or for a terminal line by line without what would command it."""
    from relay.mail.header import block_of

    head = next(slices)
    sys.stdout.flush()
    for octets in (prefix, block_of(head)) if headers_only else chain((prefix, head), slices):
        if os.isatty(1):
            octets = _harmless(octets)
        sys.stdout.buffer.write(octets)


def _harmless(octets: bytes) -> bytes:
    from relay.mail.reply import printable

    return "\n".join(printable(line.replace("\t", " ")) for line in octets.decode("utf-8", "replace").split("\n")).encode()
