"""A listener's certificate as OpenSSL has it, made again when its files change.

The files are looked at every few seconds, in a thread, by what `stat` says of them behind all links: so a renewal by writing, renaming or
swapping a link is seen. A pair that cannot be used changes nothing; it is told once, and only when the next look finds the same,
as certificate and key are often renewed one after the other.

State: the context in use, what its files looked like, and the timer of the next look.
"""

import asyncio
import ssl
from pathlib import Path
from typing import Final, NamedTuple

from relay.config.listeners import Listener
from relay.config.machine import pair_fault, stamp_of
from relay.observe.journal import Journal

#: So often the files are looked at.
LOOK_SECONDS = 10.0

_VERSIONS: Final = {
    "1.0": ssl.TLSVersion.TLSv1,
    "1.1": ssl.TLSVersion.TLSv1_1,
    "1.2": ssl.TLSVersion.TLSv1_2,
    "1.3": ssl.TLSVersion.TLSv1_3,
}
# Versions before 1.2 sign with SHA-1, which OpenSSL does at no higher level.
_OLD_CIPHERS: Final = "DEFAULT:@SECLEVEL=0"

_Stamp = tuple[tuple[int, ...], ...]


class Pair(NamedTuple):
    """The files of a certificate and its key, None where both are in one."""

    certificate: Path
    key: Path | None


class Loaded(NamedTuple):
    """What the files came to: a context, or what is wrong with them."""

    stamp: _Stamp
    context: ssl.SSLContext | None
    fault: str = ""


class Certificate:
    """The certificate of one listener with TLS. `context` is for its next handshake."""

    context: ssl.SSLContext

    def __init__(self, settings: Listener, journal: Journal, *, hostname: str, directory: Path) -> None:
        """`directory`: where a certificate of our own making is kept."""
        self._settings = settings
        self._journal = journal
        self._hostname = hostname
        self._directory = directory
        self._old = settings.minimum_tls in ("1.0", "1.1")
        self._pair: Pair | None = None
        self._stamp: _Stamp = ()
        self._suspect: _Stamp = ()
        self._told = ""
        self._timer: asyncio.TimerHandle | None = None
        self._looking: asyncio.Future[Loaded | None] | None = None

    async def open(self) -> None:
        """Load it, and look at its files from now on. Raises OSError."""
        loop = asyncio.get_running_loop()
        self._pair = await loop.run_in_executor(None, self._chosen)
        look = await loop.run_in_executor(None, _look, self._pair, self._settings.minimum_tls, ())
        if look is None or look.context is None:
            raise OSError(f"listener {self._settings.name}: {look.fault if look else ''}")
        self.context, self._stamp = look.context, look.stamp
        self._timer = loop.call_later(LOOK_SECONDS, self._look)

    def close(self) -> None:
        """Look no more."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._looking is not None:
            self._looking.cancel()

    def _chosen(self) -> Pair:
        settings = self._settings
        if settings.certificate is not None:
            return Pair(settings.certificate, settings.key)
        from relay.listener.selfsigned import fingerprint, self_signed  # 50 ms, for those who need it

        path = self_signed(self._directory, self._hostname, old=self._old)
        self._journal.note(
            "warning",
            f"listener {settings.name} names no certificate: it uses {path}, which is self-signed (SHA-256 {fingerprint(path)}), "
            "and clients that check certificates refuse it",
        )
        return Pair(path, None)

    def _look(self) -> None:
        assert self._pair is not None, "open has chosen it"
        loop = asyncio.get_running_loop()
        self._timer = loop.call_later(LOOK_SECONDS, self._look)  # whatever comes of this look
        if self._looking is not None:
            return  # the file system hangs, and one thread that waits for it is enough
        try:
            self._looking = loop.run_in_executor(None, _look, self._pair, self._settings.minimum_tls, self._stamp)
        except RuntimeError as error:  # the system has no thread left
            self._fail(error)
        else:
            self._looking.add_done_callback(self._looked)

    def _fail(self, error: BaseException) -> None:
        self._journal.fault(f"looking at the certificate of listener {self._settings.name}", error)

    def _looked(self, looking: "asyncio.Future[Loaded | None]") -> None:
        self._looking = None
        if self._timer is None or looking.cancelled():
            return
        if (error := looking.exception()) is not None:
            self._fail(error)
            return
        look = looking.result()
        if look is None:  # the files are those in use, perhaps again
            self._suspect, self._told = (), ""
        elif look.context is not None:
            self.context, self._stamp = look.context, look.stamp
            self._suspect, self._told = (), ""
            self._journal.note("info", f"listener {self._settings.name}: its certificate has changed on disk, and the new one is in use")
        elif look.stamp != self._suspect:
            self._suspect = look.stamp
        elif look.fault != self._told:
            self._told = look.fault
            what = f"listener {self._settings.name}: its certificate has changed on disk and cannot be used, so the old one stays"
            self._journal.note("error", f"{what}: {look.fault}")


def _look(pair: Pair, minimum: str, known: _Stamp) -> Loaded | None:
    """The files as they are now; None when they are those that are known. In a thread."""
    stamp = _stamp(pair)
    if stamp == known:
        return None
    if fault := pair_fault(*pair):
        return Loaded(stamp, None, fault)
    try:
        context = _context(pair, minimum)
    except OSError as error:  # changed since then
        return Loaded(stamp, None, str(error))
    return Loaded(stamp, context) if _stamp(pair) == stamp else Loaded(stamp, None, "its files change while they are read")


def _stamp(pair: Pair) -> _Stamp:
    return tuple(stamp_of(path) for path in pair if path is not None)


def _context(pair: Pair, minimum: str) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = _VERSIONS[minimum]
    if context.minimum_version < ssl.TLSVersion.TLSv1_2:
        context.set_ciphers(_OLD_CIPHERS)
    context.options |= ssl.OP_NO_RENEGOTIATION  # a client that asks for it again and again is after our processor
    context.load_cert_chain(pair.certificate, pair.key, password="")  # what has a passphrase after all asks nobody
    return context
