"""The SMTP server side of one session: verbs and replies (RFC 5321). The only user of aiosmtpd.

A subclass that keeps aiosmtpd's protocol object and replaces its session loop, its parsers and its life cycle: the stock ones reflect
over themselves for each connection, parse addresses leniently and slowly, buffer content line by line, answer our faults with 5xx and
cancel the work when a client half-closes. Here the end of the connection is just something that reading meets: it never cancels.

State: one Session per connection, and its transaction.
"""

import asyncio
from collections.abc import Awaitable, Callable
from functools import lru_cache
from typing import TYPE_CHECKING, ClassVar, cast

from aiosmtpd import smtp

from relay.intake import Transaction
from relay.listener.data import Disconnected, LineTooLong, Reader
from relay.mail.address import AddressError, ParameterError, parse_parameters, parse_path
from relay.mail.envelope import Origin, Recipient
from relay.mail.reply import Reply
from relay.spool.base import SpoolFull

if TYPE_CHECKING:
    from relay.listener.door import Door

#: RFC 5321 section 4.5.3.2.7: a server waits five minutes for the next command, and as long for the next piece of content.
IDLE_SECONDS = 300.0

# RFC 5321 section 4.5.3.1.4 has 512 octets; extensions' parameters and UTF-8 addresses need more. Postfix allows 2048.
_LINE_LIMIT_BYTES = 4096
_ERRORS_LIMIT = 10

_GREETING = b"220 %b ESMTP relay\r\n"
_OK = Reply(250, "2.0.0", "Ok")
_SENDER_OK = Reply(250, "2.1.0", "Ok")
_RECIPIENT_OK = Reply(250, "2.1.5", "Ok")
_GO_AHEAD = Reply(354, "", "End data with <CR><LF>.<CR><LF>")
_BYE = Reply(221, "2.0.0", "Bye")
_STOPPING = Reply(421, "4.3.2", "Service shutting down")
_TOO_MANY_ERRORS = Reply(421, "4.7.0", "Too many errors")
_IDLE = Reply(421, "4.4.2", "Idle for too long")
_FAULT = Reply(451, "4.3.0", "Local error, try again later")
_NO_SPACE = Reply(452, "4.3.1", "Insufficient storage, try again later")
_UNKNOWN = Reply(500, "5.5.2", "Unknown command")
_LINE_TOO_LONG = Reply(500, "5.5.2", "Line too long")
_SYNTAX = Reply(501, "5.5.4", "Syntax error in the arguments")
_NEED_MAIL = Reply(503, "5.5.1", "MAIL first")
_NEED_RCPT = Reply(503, "5.5.1", "RCPT first")
_NESTED_MAIL = Reply(503, "5.5.1", "A transaction is already open")
_NEED_HELLO = Reply(503, "5.5.1", "EHLO or HELO first")
_UNKNOWN_PARAMETER = Reply(555, "5.5.4", "Unknown parameter")
_TOO_LARGE = Reply(552, "5.3.4", "Message too large")
_LONG_CONTENT_LINE = Reply(554, "5.6.0", "A line of the message is too long")
_VRFY = Reply(252, "2.5.0", "Cannot verify, but will take mail")
_HELP = Reply(214, "2.0.0", "EHLO HELO MAIL RCPT DATA RSET NOOP VRFY QUIT")

_Verb = Callable[["Session", str], Awaitable[Reply]]


class Session(smtp.SMTP):
    """One connection from one client. Its owner is the Door that it came through."""

    verbs: ClassVar[dict[bytes, _Verb]]

    def __init__(self, door: "Door", loop: asyncio.AbstractEventLoop) -> None:
        # Not SMTP.__init__: it reflects over the class for each connection, which costs more than a whole message.
        asyncio.StreamReaderProtocol.__init__(self, Reader(loop), client_connected_cb=self._cb_client_connected, loop=loop)
        self.loop = loop
        self.transport = None
        self._door = door
        self._settings = door.settings
        self._original_transport = None
        self._timeout_handle = None
        self._deadline = 0.0
        self._task: asyncio.Task[None] | None = None
        self._origin = Origin()
        self._client_name = ""
        self._extended = False
        self._transaction: Transaction | None = None
        self._errors = 0
        self._reading = False
        self._admitted = False

    # -- the connection's life --------------------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        asyncio.StreamReaderProtocol.connection_made(self, transport)
        self.transport = transport
        peer = transport.get_extra_info("peername")
        client = peer[0] if isinstance(peer, tuple) else ""
        self._origin = Origin(self._settings.name, client, "", self._door.new_session_id())
        self._deadline = self.loop.time() + IDLE_SECONDS
        self._timeout_handle = self.loop.call_at(self._deadline, self._expire)
        self._task = self.loop.create_task(self._run(), name=f"session {self._origin.session}")
        self._door.opened(self)

    def connection_lost(self, error: Exception | None) -> None:
        if self._timeout_handle is not None:
            self._timeout_handle.cancel()
        asyncio.StreamReaderProtocol.connection_lost(self, error)
        self.transport = None

    def eof_received(self) -> bool:
        """A half-closed client still gets its replies; what it had pipelined is still done."""
        asyncio.StreamReaderProtocol.eof_received(self)
        return True

    def stop(self) -> None:
        """End as soon as nothing is under way: at once when waiting for a command, else after the one at hand."""
        if self._reading and self._input.idle and self.transport is not None:
            self._writer.write(_line(_STOPPING))
            self.transport.close()

    @property
    def task(self) -> "asyncio.Task[None] | None":
        return self._task

    @property
    def _input(self) -> Reader:
        return cast(Reader, self._reader)

    def _expire(self) -> None:
        """One timer a session: it looks whether there was progress since it was set, and sets itself again."""
        if self.loop.time() < self._deadline:
            self._timeout_handle = self.loop.call_at(self._deadline, self._expire)
        elif self.transport is not None:
            self._writer.write(_line(_IDLE))
            self.transport.close()

    def _progress(self) -> None:
        self._deadline = self.loop.time() + IDLE_SECONDS

    # -- the session ------------------------------------------------------------------------------------------------------

    async def _run(self) -> None:
        refusal = self._door.access.enter(self._origin.client)
        self._admitted = refusal is None
        try:
            if refusal is not None:
                await self._say(self._refuse(refusal))
            else:
                await self._converse()
        except (Disconnected, ConnectionError):
            pass  # nothing was promised that is not kept
        except Exception as error:
            self._door.journal.fault("a session", error, session=self._origin.session)
        finally:
            if self._admitted:
                self._door.access.leave()
            if self.transport is not None:
                self.transport.close()
            self._door.closed(self)

    async def _converse(self) -> None:
        self._writer.write(_GREETING % self._door.hostname)
        while self.transport is not None:
            if self._door.stopping:
                await self._say(_STOPPING)
                return
            reply = await self._answer()
            if reply.code >= 500:
                self._errors += 1
                if self._errors >= _ERRORS_LIMIT:
                    await self._say(reply)
                    reply = _TOO_MANY_ERRORS
            await self._say(reply)
            if reply.code in (221, 421):
                return

    async def _answer(self) -> Reply:
        """Read one command and do it."""
        self._reading = True
        try:
            line = await self._input.line(limit_bytes=_LINE_LIMIT_BYTES)
        except LineTooLong:
            return _LINE_TOO_LONG
        finally:
            self._reading = False
        self._progress()
        word, _, argument = line.rstrip(b"\r").partition(b" ")
        verb = self.verbs.get(word.upper())
        if verb is None:
            return _UNKNOWN
        try:
            return await verb(self, argument.decode("utf-8", "surrogateescape"))
        except (Disconnected, ConnectionError):
            raise
        except Exception as error:  # law 9: temporary to the client, loud in the log
            self._door.journal.fault(f"{word.decode('ascii', 'replace')[:10]} from a client", error, session=self._origin.session)
            return _FAULT

    async def _say(self, reply: Reply) -> None:
        self._writer.write(_line(reply))
        await self._writer.drain()
        self._progress()

    def _refuse(self, reply: Reply, sender: str = "", recipients: str = "") -> Reply:
        origin = self._origin
        self._door.journal.refused(
            session=origin.session, listener=origin.listener, client=origin.client, sender=sender, recipients=recipients, reply=str(reply)
        )  # fmt: skip
        return reply

    # -- verbs ------------------------------------------------------------------------------------------------------------

    async def _ehlo(self, argument: str) -> Reply:
        if not argument.strip():
            return _SYNTAX
        self._begin(argument, extended=True)
        extensions = ("PIPELINING", f"SIZE {self._settings.message_size}", "8BITMIME", "SMTPUTF8")
        self._writer.write(b"250-%b\r\n" % self._door.hostname + b"".join(b"250-%b\r\n" % e.encode() for e in extensions))
        return Reply(250, "", "ENHANCEDSTATUSCODES")

    async def _helo(self, argument: str) -> Reply:
        if not argument.strip():
            return _SYNTAX
        self._begin(argument, extended=False)
        return Reply(250, "", self._door.hostname.decode())

    def _begin(self, name: str, *, extended: bool) -> None:
        self._client_name, self._extended, self._transaction = name.strip()[:255], extended, None

    async def _mail(self, argument: str) -> Reply:
        if not self._client_name:
            return _NEED_HELLO
        if self._transaction is not None:
            return _NESTED_MAIL
        try:
            sender, text = _path_after("FROM:", argument)
            parameters = parse_parameters(text) if text else {}
        except AddressError as error:
            return Reply(501, "5.1.7", f"Bad sender address: {error}")
        except ParameterError:
            return _SYNTAX
        if (reply := self._check_parameters(parameters)) is not None:
            return reply
        smtputf8 = "SMTPUTF8" in parameters
        if not smtputf8 and not sender.isascii():
            return Reply(550, "5.6.7", "A non-ASCII address needs SMTPUTF8")
        protocol = "UTF8SMTP" if smtputf8 else "ESMTP" if self._extended else "SMTP"
        opened = self._door.intake.begin(self._origin, self._client_name, protocol, sender, smtputf8=smtputf8)
        if isinstance(opened, Reply):
            return self._refuse(opened, sender or "<>")
        self._transaction = opened
        return _SENDER_OK

    def _check_parameters(self, parameters: dict[str, str]) -> Reply | None:
        for keyword, value in parameters.items():
            if keyword == "SIZE":  # RFC 1870
                if not (value.isascii() and value.isdigit() and len(value) <= 20):
                    return _SYNTAX
                if int(value) > self._settings.message_size:
                    return _TOO_LARGE
            elif keyword == "BODY":  # RFC 6152
                if value.upper() not in ("7BIT", "8BITMIME"):
                    return _SYNTAX
            elif keyword == "SMTPUTF8":  # RFC 6531
                if value:
                    return _SYNTAX
            else:
                return _UNKNOWN_PARAMETER
        return None

    async def _rcpt(self, argument: str) -> Reply:
        transaction = self._transaction
        if transaction is None:
            return _NEED_MAIL
        try:
            address, text = _path_after("TO:", argument)
            if text and parse_parameters(text):
                return _UNKNOWN_PARAMETER
        except AddressError as error:
            return Reply(501, "5.1.3", f"Bad recipient address: {error}")
        except ParameterError:
            return _SYNTAX
        if not address:
            return Reply(501, "5.1.3", "Bad recipient address: it is empty")
        if not transaction.smtputf8 and not address.isascii():
            return Reply(550, "5.6.7", "A non-ASCII address needs SMTPUTF8")
        reply = self._door.intake.add(transaction, Recipient(address), limit=self._settings.recipients)
        return _RECIPIENT_OK if reply is None else self._refuse(reply, transaction.sender or "<>", address)

    async def _data(self, argument: str) -> Reply:
        transaction = self._transaction
        if argument.strip():
            return _SYNTAX
        if transaction is None:
            return _NEED_MAIL
        if not transaction.recipients:
            return _NEED_RCPT
        if (obstacle := self._door.intake.obstacle()) is not None:
            return obstacle
        self._writer.write(_line(_GO_AHEAD))
        await self._writer.drain()
        received = await self._input.content(
            limit_bytes=self._settings.message_size, spill=self._door.intake.spill, progress=self._progress
        )
        self._transaction = None
        if received.trouble is None:
            self._deadline = self.loop.time() + IDLE_SECONDS * 2  # ours to answer now; the client waits ten minutes (RFC 5321)
            reply = await self._door.intake.accept(transaction, received.content, received.head)
        elif received.trouble == "too large":
            reply = _TOO_LARGE
        elif received.trouble == "line too long":
            reply = _LONG_CONTENT_LINE
        else:
            reply = _NO_SPACE if isinstance(received.trouble, SpoolFull) else _FAULT
            self._door.journal.note("error", f"receiving content: {received.trouble}")
        return reply if reply.positive else self._refuse(reply, transaction.sender or "<>", ",".join(transaction.recipients))

    async def _rset(self, argument: str) -> Reply:
        self._transaction = None
        return _OK

    async def _noop(self, argument: str) -> Reply:
        return _OK

    async def _vrfy(self, argument: str) -> Reply:
        return _VRFY if argument.strip() else _SYNTAX

    async def _help(self, argument: str) -> Reply:
        return _HELP

    async def _quit(self, argument: str) -> Reply:
        return _SYNTAX if argument.strip() else _BYE


Session.verbs = {
    b"EHLO": Session._ehlo,
    b"HELO": Session._helo,
    b"MAIL": Session._mail,
    b"RCPT": Session._rcpt,
    b"DATA": Session._data,
    b"RSET": Session._rset,
    b"NOOP": Session._noop,
    b"VRFY": Session._vrfy,
    b"HELP": Session._help,
    b"QUIT": Session._quit,
}


def _path_after(keyword: str, argument: str) -> tuple[str, str]:
    """The address and the parameters of MAIL or RCPT. Raises AddressError."""
    argument = argument.lstrip(" \t")
    if argument[: len(keyword)].upper() != keyword:
        raise AddressError(f"{keyword} expected")
    return parse_path(argument[len(keyword) :])


@lru_cache(maxsize=256)
def _line(reply: Reply) -> bytes:
    return reply.line() + b"\r\n"
