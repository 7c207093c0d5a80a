"""A client that waits for the upstream's own verdict on the message it has just handed over, and how delivery answers it.

Beside the spool because it is the second thing that intake and delivery share: intake opens a wait and awaits its verdict, delivery
finds it by the message's id, whoever claims the message. A message that was split is one wait over all of its parts.

State: the open waits, none for nearly every message. Laws: whether the client or a bounce tells of a refusal is decided once, here;
the client hears of one only after every part is stored as ended (law 1), and from the first such part on there is no way back.
"""

import asyncio
from collections.abc import Sequence
from enum import Enum

from relay.mail.reply import Reply
from relay.spool.base import MessageId


class _State(Enum):
    OPEN = "open"
    SENT = "sent"
    REFUSING = "refusing"  # everybody is refused; the parts are being stored as ended, without a bounce
    REFUSED = "refused"
    OVER = "over"  # queued is all there is to say


class Wait:
    """One client's wait, at most so many seconds, for the fate of the messages `ids`, the parts of what it sent."""

    def __init__(self, ids: Sequence[MessageId], seconds: float) -> None:
        self.ids = ids
        self._seconds = seconds
        self._sent: dict[MessageId, Reply] = {}
        self._refused: dict[MessageId, Reply] = {}
        self._unstored = set(ids)
        self._state = _State.OPEN
        self._decided = asyncio.Event()  # OPEN no more
        self._ended = asyncio.Event()  # and REFUSING no more
        self.turn = asyncio.Lock()  # parts that are refused are stored one after the other

    # -- for intake -------------------------------------------------------------------------------------------------------

    async def verdict(self) -> Reply | None:
        """The upstream's reply: positive when everybody was sent to, 5xx when everybody is refused and stored as such. None: neither
        is known in time, or can become so."""
        timer = asyncio.get_running_loop().call_later(self._seconds, self.end)
        try:
            await self._ended.wait()
        finally:
            timer.cancel()
            self.end()
        replies = {_State.SENT: self._sent, _State.REFUSED: self._refused}.get(self._state)
        return replies[self.ids[0]] if replies is not None else None

    def end(self) -> None:
        """Nobody waits any longer: time is up, the client has gone, the relay stops, or an attempt has decided nothing."""
        if self._state is _State.OPEN:
            self._become(_State.OVER)

    # -- for delivery -----------------------------------------------------------------------------------------------------

    def sent(self, id: MessageId, reply: Reply) -> None:
        """Every recipient of this part was sent to."""
        self._sent[id] = reply
        self._hear()

    async def refused(self, id: MessageId, reply: Reply) -> bool:
        """Every recipient of this part is refused for good. Waits for the other parts, and answers whether the client shall be told
        of it and no bounce be made: the part is then to be stored as ended, in its `turn`."""
        self._refused[id] = reply
        self._hear()
        await self._decided.wait()
        return self.refusing

    @property
    def refusing(self) -> bool:
        return self._state is _State.REFUSING

    @property
    def binding(self) -> bool:
        """A part has been stored without a bounce: from here on the client is told that all are refused, or hears nothing."""
        return len(self._unstored) < len(self.ids)

    def stored(self, id: MessageId) -> None:
        """A refused part is durably at its end."""
        self._unstored.discard(id)
        if not self._unstored:
            self._become(_State.REFUSED)

    def give_up(self) -> None:
        """The first of the refused parts cannot be stored as ended: each is stored with its bounce, whenever that may be."""
        if not self.binding:
            self._become(_State.OVER)

    def _hear(self) -> None:
        if self._state is not _State.OPEN:
            return
        if self._sent and self._refused:
            self._become(_State.OVER)
        elif len(self._sent) == len(self.ids):
            self._become(_State.SENT)
        elif len(self._refused) == len(self.ids):
            self._become(_State.REFUSING)

    def _become(self, state: _State) -> None:
        self._state = state
        self._decided.set()
        if state is not _State.REFUSING:
            self._ended.set()


class Waits:
    """The clients that wait at the moment, by message."""

    def __init__(self) -> None:
        self._waits: dict[MessageId, Wait] = {}
        self._stopping = False

    def open(self, ids: Sequence[MessageId], seconds: float) -> Wait:
        """Open a wait: before the messages are in the spool, so that no attempt can miss it. `close` it in any case."""
        wait = Wait(ids, seconds)
        if self._stopping:
            wait.end()
        self._waits.update(dict.fromkeys(ids, wait))
        return wait

    def close(self, wait: Wait) -> None:
        wait.end()
        for each in wait.ids:
            self._waits.pop(each, None)

    def of(self, id: MessageId) -> Wait | None:
        """The wait for this message, if there is one."""
        return self._waits.get(id)

    def stop(self) -> None:
        """End every wait, and each that is opened from now on at once: the relay stops."""
        self._stopping = True
        for wait in self._waits.values():
            wait.end()
