"""The log: one function per event, one line per event, fixed fields.

The loop only formats; a thread writes what has gathered every 50 ms, so that a blocked pipe never stalls mail. Third parties' `logging`
records come in through `capture_logging`.

State: the lines not yet written. Laws: a secret is never a field; text of strangers is made printable before it gets here.
"""

import contextlib
import json
import logging
import os
import queue
import re
import select
import threading
import traceback
from asyncio import AbstractEventLoop, TimerHandle
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from functools import lru_cache
from typing import Literal

from relay.clock import Clock

Level = Literal["debug", "info", "warning", "error"]
_LEVELS: dict[str, int] = {"debug": 10, "info": 20, "warning": 30, "error": 40}
_FLUSH_SECONDS = 0.05

_MILLISECONDS = tuple(f".{number:03}Z" for number in range(1000))

# Text values that need no quotes: anything printable without blanks, quotes and '='.
_PLAIN = re.compile(r'[^\s"=\\]+')

#: While so much waits for a reader who does not read, what comes is counted and not kept (law 8).
_WAITING_CHARACTERS = 16 * 1024 * 1024

#: Text up to this length is remembered with its quotes; a thousand recipients in one line do not come again.
_KNOWN_CHARACTERS = 300


class Journal:
    """Writes events to a file descriptor, standard error in production. Close it, or the last lines are lost."""

    def __init__(self, clock: Clock, *, format: Literal["text", "json"], level: Level, descriptor: int = 2) -> None:
        self._clock = clock
        self._json = format == "json"
        self._threshold = _LEVELS[level]
        self._descriptor = descriptor
        self._loop: AbstractEventLoop | None = None
        self._lines: list[str] = []
        self._timer: TimerHandle | None = None
        self._second = 0.0
        self._second_text = ""
        self._chunks: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        self._handed = self._taken = 0  # characters, to the thread and by it: what is between waits for the reader
        self._lost = 0
        self._thread = threading.Thread(target=self._write, name="journal", daemon=True)
        self._thread.start()

    def attach(self, loop: AbstractEventLoop) -> None:
        """From now on gather lines and write them from time to time instead of one by one."""
        self._loop = loop

    def close(self) -> None:
        """Write what is left and end the thread."""
        self._flush()
        self._loop = None
        self._chunks.put(None)
        self._thread.join(timeout=5)

    # -- the events -----------------------------------------------------------------------------------------------------

    def listening(self, *, listener: str, address: str) -> None:
        self._event("info", "listening", {"listener": listener, "address": address})

    # The two events of nearly every message are put together without the detour over a mapping: it would be a tenth of their cost.
    # `_known` takes what cannot be long there: names of the configuration, and an address.

    def accepted(
        self, *, id: str, session: str, listener: str, client: str, user: str, route: str, upstream: str, sender: str, recipients: str,
        size: int,
    ) -> None:  # fmt: skip
        if self._threshold > _LEVELS["info"]:
            return
        if self._json:
            fields = {"id": id, "session": session, "listener": listener, "client": client, "user": user, "route": route,
                      "upstream": upstream, "sender": sender, "recipients": recipients, "size": size}  # fmt: skip
            self._event("info", "accepted", fields)
            return
        who = f" user={_quoted(user)}" if user else ""
        self._append(
            f"{self._time()} info accepted id={id} session={session} listener={_known(listener)} client={client}{who} "
            f"route={_known(route)} upstream={_known(upstream)} sender={_known(sender)} recipients={_quoted(recipients)} size={size}"
        )

    def refused(self, *, session: str, listener: str, client: str, sender: str, recipients: str, reply: str) -> None:
        self._event(
            "info", "refused",
            {"session": session, "listener": listener, "client": client, "sender": sender, "recipients": recipients, "reply": reply},
        )  # fmt: skip

    def sent(
        self, *, id: str, session: str, route: str, upstream: str, sender: str, recipients: str, size: int, reply: str, attempt: int,
        delay: float,
    ) -> None:  # fmt: skip
        if self._threshold > _LEVELS["info"]:
            return
        if self._json:
            self._event("info", "sent", _attempt(id, session, route, upstream, sender, recipients, size, reply, "sent", attempt, delay))
            return
        self._append(
            f"{self._time()} info sent id={id} session={session} route={_known(route)} upstream={_known(upstream)} "
            f"sender={_known(sender)} recipients={_quoted(recipients)} size={size} reply={_quoted(reply)} status=sent "
            f"attempt={attempt} delay={delay:.3f}"
        )

    def deferred(
        self, *, id: str, session: str, route: str, upstream: str, sender: str, recipients: str, size: int, reply: str, attempt: int,
        delay: float, next_try: str, in_doubt: bool,
    ) -> None:  # fmt: skip
        fields = _attempt(id, session, route, upstream, sender, recipients, size, reply, "deferred", attempt, delay)
        self._event("warning", "deferred", fields | {"next": next_try, "in_doubt": "yes" if in_doubt else ""})

    def failed(
        self, *, id: str, session: str, route: str, upstream: str, sender: str, recipients: str, size: int, reply: str, attempt: int,
        delay: float,
    ) -> None:  # fmt: skip
        fields = _attempt(id, session, route, upstream, sender, recipients, size, reply, "failed", attempt, delay)
        self._event("warning", "failed", fields)

    def bounced(self, *, id: str, bounce: str, recipients: str, failed: str, delayed: str = "", relayed: str = "") -> None:
        """A report about those who `failed` and the others is queued as message `bounce` to `recipients`."""
        fates = {"failed": failed, "delayed": delayed, "relayed": relayed}
        self._event("info", "bounced", {"id": id, "bounce": bounce, "recipients": recipients, **fates})

    def unbounced(self, *, id: str, sender: str, recipients: str, reason: str) -> None:
        """Mail is lost to its sender on purpose: nobody may be told. This line is the only notice."""
        fields = {"id": id, "sender": sender, "recipients": recipients, "status": "failed, nobody told", "reply": reason}
        self._event("warning", "failed", fields)

    def held(self, *, id: str, route: str, upstream: str, sender: str, recipients: str, reason: str) -> None:
        self._event(
            "warning", "held",
            {"id": id, "route": route, "upstream": upstream, "sender": sender, "recipients": recipients, "reply": reason},
        )  # fmt: skip

    def degraded(self, *, route: str, upstream: str, fallback: str, reply: str) -> None:
        self._event("warning", "degraded", {"route": route, "upstream": upstream, "fallback": fallback, "reply": reply})

    def recovered(self, *, route: str, upstream: str) -> None:
        self._event("info", "recovered", {"route": route, "upstream": upstream})

    def throttled(self, *, upstream: str, reply: str, pace: str = "", next: str = "") -> None:
        """An upstream asks us to slow down: to `pace`, after a pause."""
        self._event("warning", "throttled", {"upstream": upstream, "reply": reply, "pace": pace, "next": next})

    def auth_failed(self, *, upstream: str, user: str, reply: str) -> None:
        self._event("error", "auth-failed", {"upstream": upstream, "user": user, "reply": reply})

    def login_failed(self, *, session: str, listener: str, client: str, user: str, reply: str) -> None:
        """An app could not log in to us. fail2ban reads this line: its fields keep their order."""
        fields = {"session": session, "listener": listener, "client": client, "user": user, "reply": reply}
        self._event("warning", "auth-failed", fields)

    def draining(self, *, sessions: int, attempts: int) -> None:
        self._event("info", "draining", {"sessions": sessions, "attempts": attempts})

    def stopped(self, *, reason: str) -> None:
        self._event("info", "stopped", {"reason": reason})

    def fault(self, what: str, error: BaseException | None, *, id: str = "", session: str = "") -> None:
        """Something that should not happen: told with its traceback, and what it was doing."""
        trace = "".join(traceback.format_exception(error)) if error is not None else ""
        self._event("error", "fault", {"id": id, "session": session, "what": what, "traceback": trace})

    def note(self, level: Level, what: str) -> None:
        """A sentence for the operator that is no event of a message."""
        self._event(level, "note", {"what": what})

    # -- writing ----------------------------------------------------------------------------------------------------------

    def _event(self, level: Level, event: str, fields: Mapping[str, object]) -> None:
        if _LEVELS[level] < self._threshold:
            return
        time = self._time()
        if self._json:
            kept = {key: value for key, value in fields.items() if value != ""}
            self._append(json.dumps({"time": time, "level": level, "event": event, **kept}, ensure_ascii=False))
        else:
            words = [f"{key}={_quoted(value) if isinstance(value, str) else value}" for key, value in fields.items() if value != ""]
            self._append(f"{time} {level} {event} {' '.join(words)}")
        if level == "error":
            self._flush()

    def _append(self, line: str) -> None:
        self._lines.append(line)
        if self._timer is not None:
            return
        if self._loop is None or self._loop.is_closed():  # before the loop runs, and after it
            self._flush()
        else:
            self._timer = self._loop.call_later(_FLUSH_SECONDS, self._flush)

    def _time(self) -> str:
        now = self._clock.now()
        if not 0.0 <= now - self._second < 1.0:
            self._second = float(int(now))
            self._second_text = datetime.fromtimestamp(self._second, UTC).strftime("%Y-%m-%dT%H:%M:%S")
        return self._second_text + _MILLISECONDS[int((now - self._second) * 1000.0)]

    def _flush(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._handed - self._taken > _WAITING_CHARACTERS:
            self._lost += len(self._lines)
            self._lines.clear()
            return
        if self._lost:
            lost, self._lost = self._lost, 0
            self.note("error", f"{lost} lines of this log are lost, for nobody read it; `relay log` has what became of mail")
        if self._lines:
            lines, self._lines = self._lines, []
            chunk = "\n".join(lines) + "\n"
            self._handed += len(chunk)
            self._chunks.put(chunk)

    def _write(self) -> None:
        while (chunk := self._chunks.get()) is not None:
            octets = chunk.encode("utf-8", "backslashreplace")
            with contextlib.suppress(OSError):  # nobody reads the log any more; mail goes on
                while octets:
                    try:
                        octets = octets[os.write(self._descriptor, octets) :]
                    except BlockingIOError:  # somebody else who has this pipe or terminal does not want to wait for it
                        select.select((), (self._descriptor,), ())
            self._taken += len(chunk)


def _attempt(
    id: str, session: str, route: str, upstream: str, sender: str, recipients: str, size: int, reply: str, status: str, attempt: int,
    delay: float,
) -> dict[str, object]:  # fmt: skip
    return {
        "id": id, "session": session, "route": route, "upstream": upstream, "sender": sender, "recipients": recipients, "size": size,
        "reply": reply, "status": status, "attempt": attempt, "delay": f"{delay:.3f}",
    }  # fmt: skip


def _quoted(text: str) -> str:
    return _known(text) if len(text) <= _KNOWN_CHARACTERS else _known.__wrapped__(text)


@lru_cache(maxsize=8192)  # the same routes, clients and addresses come again and again
def _known(text: str) -> str:
    return text if _PLAIN.fullmatch(text) else json.dumps(text, ensure_ascii=False)


class _Handler(logging.Handler):
    """Carries what libraries log into the journal."""

    def __init__(self, note: Callable[[Level, str], None]) -> None:
        super().__init__(logging.WARNING)
        self._note = note

    def emit(self, record: logging.LogRecord) -> None:
        level: Level = "error" if record.levelno >= logging.ERROR else "warning"
        text = record.getMessage()
        if record.exc_info and record.exc_info[1] is not None:
            text += "\n" + "".join(traceback.format_exception(record.exc_info[1]))
        self._note(level, f"{record.name}: {text}")


def capture_logging(journal: Journal) -> None:
    """Send warnings and errors of every library to the journal. `mail.log` is aiosmtpd's, and names addresses below warnings."""
    logging.basicConfig(handlers=[_Handler(journal.note)], level=logging.WARNING, force=True)
