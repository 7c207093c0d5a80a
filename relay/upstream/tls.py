"""TLS settings for upstreams: one SSLContext for each distinct combination of trust and client certificate, shared by all who use it.

A context costs 0.9 MB and 24 ms, so ten thousand tenants cannot have one each (law 7). Made at first use, in a thread, and made again
when its files have changed; files that cannot be used then change nothing, and are told of once they have stayed so for a second look.

TLS sessions are not resumed. The loops could be made to, but Python copies a session when it is taken and when it is used, which costs
the millisecond that resumption spares; and so every connection checks the certificate.

State: the contexts in use and what their files looked like, and the certificates that were seen last.
"""

import asyncio
import ssl
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

from relay.clock import Clock
from relay.config.machine import pair_fault, stamp_of
from relay.config.upstreams import Upstream
from relay.upstream.watch import Note, Readers

#: So often, at most, the files are looked at: when a session is opened.
LOOK_SECONDS = 10.0

#: A new context is waited for so long where there is one to go on with: a file system may hang.
_PATIENCE_SECONDS = 1.0

#: So many certificates of others are remembered; one with a few hundred names takes 30 kB.
_CERTIFICATES_LIMIT = 200

_Stamp = tuple[tuple[int, ...], ...]


class _Remembering(ssl.SSLObject):
    """One that takes a certificate apart once. Both event loops ask for that at each handshake, and with a few hundred names it is a
    tenth of the work of opening a session. Only for contexts that verify: without that, nothing is taken apart."""

    _known: ClassVar[dict[bytes, Any]] = {}

    def getpeercert(self, binary_form: bool = False) -> Any:
        octets = super().getpeercert(binary_form=True)
        if binary_form or octets is None:
            return octets
        if octets not in self._known:
            if len(self._known) >= _CERTIFICATES_LIMIT:
                self._known.clear()
            self._known[octets] = super().getpeercert()
        return self._known[octets]


class Unusable(Exception):
    """There are no TLS settings for an upstream; the text names the file and says what is wrong with it."""


class Trust(NamedTuple):
    """What distinguishes one context from another. The key may be in the certificate's file."""

    ca_file: Path | None
    verify: bool
    certificate: Path | None
    key: Path | None

    def __str__(self) -> str:
        return " and ".join(str(path) for path in (self.ca_file, self.certificate, self.key) if path) or "the system's trust store"


class _Look(NamedTuple):
    """What the files came to: a context, or what is wrong with them."""

    stamp: _Stamp
    context: ssl.SSLContext | None
    fault: str = ""


@dataclass(slots=True, eq=False)
class _Kept:
    """What is in use for one Trust, and how the last look at its files ended."""

    context: ssl.SSLContext | None = None
    stamp: _Stamp = ()
    looked: float = 0.0
    looking: asyncio.Future[None] | None = None
    suspect: _Stamp = ()
    fault: str = ""


class Contexts:
    """Contexts by Trust."""

    def __init__(self, *, clock: Clock, note: Note) -> None:
        self._clock = clock
        self._note = note
        self._kept: dict[Trust, _Kept] = {}
        self._readers = Readers()  # not the loop's own threads, for these may hang, and others' mail is read in those

    async def get(self, upstream: Upstream) -> ssl.SSLContext | None:
        """The context for `upstream`, or None where it uses no TLS. Raises Unusable."""
        if upstream.security == "none":
            return None
        trust = Trust(upstream.ca_file, upstream.verify, upstream.client_certificate, upstream.client_key)
        kept = self._kept.setdefault(trust, _Kept())
        if kept.context is None:
            await asyncio.wait([self._look(trust, kept)], timeout=upstream.timeouts.connect)
            if kept.context is None:
                raise Unusable(kept.fault or f"{trust} could not be read within {upstream.timeouts.connect:g} s")
        elif kept.looking is None and self._clock.monotonic() - kept.looked >= LOOK_SECONDS:
            await asyncio.wait([self._look(trust, kept)], timeout=_PATIENCE_SECONDS)
        return kept.context

    def _look(self, trust: Trust, kept: _Kept) -> asyncio.Future[None]:
        """One look for all who ask at the same time; in a thread, for as long as it takes."""
        if kept.looking is None:
            kept.looking, kept.looked = asyncio.get_running_loop().create_future(), self._clock.monotonic()
            self._readers.run(partial(_look, trust, kept.stamp)).add_done_callback(partial(self._looked, trust, kept))
        return kept.looking

    def _looked(self, trust: Trust, kept: _Kept, looking: "asyncio.Future[_Look | None]") -> None:
        assert kept.looking is not None, "somebody has looked"
        kept.looking.set_result(None)
        kept.looking = None
        look = looking.result()
        if look is None:  # the files are those in use, perhaps again
            kept.suspect, kept.fault = (), ""
        elif look.context is not None:
            if kept.context is not None:
                self._note("info", f"upstreams: {trust} changed on disk, and new connections use what is there now")
            kept.context, kept.stamp, kept.suspect, kept.fault = look.context, look.stamp, (), ""
        elif kept.context is None:
            kept.fault = look.fault
        elif look.stamp != kept.suspect:
            kept.suspect = look.stamp
        elif look.fault != kept.fault:
            kept.fault = look.fault
            self._note("warning", f"upstreams: {trust} changed on disk and cannot be used, so what was there stays in use: {look.fault}")


def _look(trust: Trust, known: _Stamp) -> _Look | None:
    """The files as they are now; None when they are those that are known. In a thread."""
    stamp = _stamp(trust)
    if stamp == known:
        return None
    try:
        context = _make(trust)
    except (OSError, ValueError) as error:
        return _Look(stamp, None, str(error))
    return _Look(stamp, context) if _stamp(trust) == stamp else _Look(stamp, None, f"{trust}: it changes while it is read")


def _stamp(trust: Trust) -> _Stamp:
    """What the files look like. Without a CA file it is the system's, which a long-lived process should not have for ever."""
    system = ssl.get_default_verify_paths().cafile if trust.ca_file is None and trust.verify else None
    return (0,), *(stamp_of(path) for path in (trust.ca_file, trust.certificate, trust.key, system) if path is not None)


def _make(trust: Trust) -> ssl.SSLContext:
    """With a CA file, that file alone is trusted: a tenant who names his own CA wants no other to vouch for it. Raises ValueError."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_2  # RFC 8996 retired older ones
    if trust.verify:
        context.sslobject_class = _Remembering
    else:
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    if trust.ca_file is not None:
        try:
            context.load_verify_locations(cafile=trust.ca_file)
        except OSError as error:
            raise ValueError(f"the CA file {trust.ca_file} cannot be loaded: {error.strerror or error}") from None
    elif trust.verify:
        context.load_default_certs()
    if trust.certificate is not None:
        fault = pair_fault(trust.certificate, trust.key, called="client_key")
        if fault:
            raise ValueError(f"the client certificate cannot be used: {fault}")
        context.load_cert_chain(trust.certificate, trust.key, password="")  # what has a passphrase after all asks nobody
    return context
