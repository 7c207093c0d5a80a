"""A listener's certificate: loaded, renewed on disk in every way in which people renew, kept when the new one is broken, self-signed."""

import asyncio
import json
import os
import ssl
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import serialization

from relay.clock import ManualClock
from relay.config.listeners import Listener
from relay.listener import certificate, selfsigned
from relay.listener.certificate import Certificate
from relay.observe.journal import Journal
from tests.support.certificates import Authority, CertificateFiles
from tests.support.eventually import eventually

pytestmark = pytest.mark.both_loops


@pytest.fixture(autouse=True)
def often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(certificate, "LOOK_SECONDS", 0.01)


class Log:
    def __init__(self, directory: Path) -> None:
        self.path = directory / "journal.log"
        self._descriptor = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        self._open = True
        self.journal = Journal(ManualClock(), format="json", level="debug", descriptor=self._descriptor)

    @property
    def notes(self) -> list[str]:
        events = [json.loads(line) for line in self.path.read_text().splitlines()]
        return [event.get("what", event["event"]) for event in events]

    def close(self) -> list[str]:
        """All that was said; nothing can be after this."""
        if self._open:
            self._open = False
            self.journal.close()
            os.close(self._descriptor)
        return self.notes


@pytest.fixture
def log(tmp_path: Path) -> Iterator[Log]:
    log = Log(tmp_path)
    yield log
    log.close()


@asynccontextmanager
async def opened(log: Log, directory: Path, **keys: Any) -> AsyncIterator[Certificate]:
    settings = Listener.model_validate({"bind": "127.0.0.1:0", "name": "local", "security": "tls", **keys})
    held = Certificate(settings, log.journal, hostname="relay.example.net", directory=directory)
    await held.open()
    try:
        yield held
    finally:
        held.close()


def shown(held: Certificate) -> x509.Certificate:
    """What a client sees, by a handshake in memory."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
    client = context.wrap_bio(to_client, to_server)
    server = held.context.wrap_bio(to_server, to_client, server_side=True)
    for side in (client, server, client, server):
        try:
            side.do_handshake()
        except ssl.SSLWantReadError:
            continue
    octets = client.getpeercert(binary_form=True)
    assert octets is not None
    return x509.load_der_x509_certificate(octets)


def names(held: Certificate) -> list[str]:
    found = shown(held).extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    return found.get_values_for_type(x509.DNSName)


class Pair:
    """Certificate and key in a directory of their own, where a test renews them."""

    def __init__(self, directory: Path, authority: Authority) -> None:
        self.directory = directory
        self._authority = authority
        directory.mkdir()
        self.certificate, self.key = directory / "cert.pem", directory / "key.pem"

    def made(self, name: str) -> CertificateFiles:
        return self._authority.files(name)

    def write(self, name: str) -> None:
        files = self.made(name)
        self.certificate.write_bytes(files.certificate.read_bytes())
        self.key.write_bytes(files.key.read_bytes())

    def rename(self, name: str) -> None:
        files = self.made(name)
        for source, target in ((files.certificate, self.certificate), (files.key, self.key)):
            new = target.with_suffix(".new")
            new.write_bytes(source.read_bytes())
            new.replace(target)

    def swap(self, name: str) -> None:
        """As a volume of Kubernetes does, and certbot with its `live`."""
        files, version = self.made(name), self.directory / name
        version.mkdir()
        (version / "cert.pem").write_bytes(files.certificate.read_bytes())
        (version / "key.pem").write_bytes(files.key.read_bytes())
        link = self.directory / "..data.new"
        link.symlink_to(version)
        link.replace(self.directory / "..data")
        for path in (self.certificate, self.key):
            if not path.is_symlink():
                path.symlink_to(Path("..data") / path.name)


@pytest.fixture
def pair(tmp_path: Path, tls: Authority) -> Pair:
    return Pair(tmp_path / "pair", tls)


@pytest.mark.parametrize("renew", [Pair.write, Pair.rename, Pair.swap])
async def test_a_renewed_certificate_is_used(log: Log, tmp_path: Path, pair: Pair, renew: Callable[[Pair, str], None]) -> None:
    renew(pair, "one.example")
    async with opened(log, tmp_path, certificate=pair.certificate, key=pair.key) as held:
        assert names(held) == ["one.example"]
        renew(pair, "two.example")
        await eventually(lambda: names(held) == ["two.example"])
        renew(pair, "three.example")
        await eventually(lambda: names(held) == ["three.example"])
    assert log.close() == ["listener local: its certificate has changed on disk, and the new one is in use"] * 2


async def test_a_system_that_had_no_thread_for_a_moment_is_asked_again(log: Log, tmp_path: Path, pair: Pair) -> None:
    class Starved(ThreadPoolExecutor):
        left = 3

        def submit(self, *arguments: Any, **options: Any) -> Any:
            Starved.left -= 1
            if Starved.left >= 0:
                raise RuntimeError("can't start new thread")
            return super().submit(*arguments, **options)

    pair.write("one.example")
    async with opened(log, tmp_path, certificate=pair.certificate, key=pair.key) as held:
        asyncio.get_running_loop().set_default_executor(Starved(1))
        await eventually(lambda: Starved.left < 0, "a look again")
        pair.write("two.example")
        await eventually(lambda: names(held) == ["two.example"])
    notes = log.close()
    assert len([note for note in notes if note.startswith("looking at the certificate of listener local")]) == 3


async def test_a_certificate_that_has_not_changed_is_left_alone(log: Log, tmp_path: Path, pair: Pair) -> None:
    pair.write("one.example")
    async with opened(log, tmp_path, certificate=pair.certificate, key=pair.key) as held:
        context = held.context
        timers: set[object] = set()
        while len(timers) < 5:
            timers.add(held._timer)
            await asyncio.sleep(0)
        assert held.context is context
    assert log.close() == []


def mismatch(pair: Pair) -> str:
    pair.key.write_bytes(pair.made("other.example").key.read_bytes())
    return f"the key in {pair.key} is not that of the certificate in {pair.certificate}"


def no_certificate(pair: Pair) -> str:
    pair.certificate.write_text("nonsense")
    return f"OpenSSL cannot use {pair.certificate} with {pair.key}"


def gone(pair: Pair) -> str:
    pair.key.unlink()
    return "No such file or directory"


def passphrase(pair: Pair) -> str:
    key = serialization.load_pem_private_key(pair.key.read_bytes(), None)
    secret = serialization.BestAvailableEncryption(b"hunter2")
    pair.key.write_bytes(key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, secret))
    return f"the key in {pair.key} has a passphrase, and nobody is there to type it: store it without one"


@pytest.mark.parametrize("breaks", [mismatch, no_certificate, gone, passphrase])
async def test_a_broken_renewal_keeps_the_old_one_and_is_told_once(
    log: Log, tmp_path: Path, pair: Pair, breaks: Callable[[Pair], str]
) -> None:
    pair.write("one.example")
    async with opened(log, tmp_path, certificate=pair.certificate, key=pair.key) as held:
        words = breaks(pair)
        await eventually(lambda: log.notes, "the fault to be told")
        assert names(held) == ["one.example"]
        timers: set[object] = set()
        while len(timers) < 5:
            timers.add(held._timer)
            await asyncio.sleep(0)
        (note,) = log.notes
        assert note.startswith("listener local: its certificate has changed on disk and cannot be used, so the old one stays: ")
        assert words in note
        pair.write("two.example")
        await eventually(lambda: names(held) == ["two.example"])
        breaks(pair)
        await eventually(lambda: len(log.notes) >= 3 and log.notes[-1] == note)
    said = log.close()
    # On a busy machine it is looked twice while the pair is half written, which is another fault.
    (mended,) = (place for place, line in enumerate(said) if "has changed on disk, and the new one is in use" in line)
    assert said[mended + 1 :] == [note]


async def test_a_key_that_comes_a_moment_after_its_certificate_alarms_nobody(
    log: Log, tmp_path: Path, pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    pair.write("one.example")
    async with opened(log, tmp_path, certificate=pair.certificate, key=pair.key) as held:
        files = pair.made("two.example")
        pair.certificate.write_bytes(files.certificate.read_bytes())
        await eventually(lambda: held._suspect, "a look at half the renewal")
        pair.key.write_bytes(files.key.read_bytes())
        await eventually(lambda: names(held) == ["two.example"])
    assert log.close()[-1].endswith("the new one is in use")


async def test_one_file_may_hold_both(log: Log, tmp_path: Path, pair: Pair) -> None:
    files = pair.made("one.example")
    pair.certificate.write_bytes(files.key.read_bytes() + files.certificate.read_bytes())
    async with opened(log, tmp_path, certificate=pair.certificate) as held:
        assert names(held) == ["one.example"]


async def test_what_cannot_be_loaded_at_the_start_ends_it(log: Log, tmp_path: Path, pair: Pair) -> None:
    pair.write("one.example")
    words = mismatch(pair)
    with pytest.raises(OSError, match=f"listener local: {words}"):
        async with opened(log, tmp_path, certificate=pair.certificate, key=pair.key):
            raise AssertionError("it cannot be used")


async def test_a_listener_without_a_certificate_signs_its_own_and_keeps_it(log: Log, tmp_path: Path) -> None:
    shows = []
    for _ in range(2):
        async with opened(log, tmp_path) as held:
            shows.append(shown(held))
            assert names(held) == ["relay.example.net"]
    assert shows[0] == shows[1]
    file = tmp_path / "self-signed.pem"
    assert file.stat().st_mode & 0o777 == 0o600
    first, second = log.close()
    assert first == second
    assert first.startswith(f"listener local names no certificate: it uses {file}, which is self-signed (SHA-256 ")
    assert selfsigned.fingerprint(file) in first
    assert not list(tmp_path.glob("*.new"))


@pytest.mark.parametrize("how", ["nonsense", "other name", "expired", "key of another", "half a file"])
async def test_a_self_signed_one_that_serves_no_more_is_made_anew(
    log: Log, tmp_path: Path, tls: Authority, how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "self-signed.pem"
    match how:
        case "nonsense":
            file.write_bytes(b"\0\xff")
        case "other name":
            selfsigned.self_signed(tmp_path, "old.example.net", old=False)
        case "expired":
            with monkeypatch.context() as patch:
                patch.setattr(selfsigned, "_DAYS", 29)
                selfsigned.self_signed(tmp_path, "relay.example.net", old=False)
        case "key of another":
            selfsigned.self_signed(tmp_path, "relay.example.net", old=False)
            certificate_alone = file.read_bytes().partition(b"-----BEGIN PRIVATE")[0]
            file.write_bytes(certificate_alone + tls.files().key.read_bytes())
        case _:
            selfsigned.self_signed(tmp_path, "relay.example.net", old=False)
            file.write_bytes(file.read_bytes()[:-40])
    before = file.read_bytes()
    async with opened(log, tmp_path) as held:
        assert names(held) == ["relay.example.net"]
    assert file.read_bytes() != before


async def test_where_nothing_can_be_written_the_reason_is_told(log: Log, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        async with opened(log, tmp_path / "none"):
            raise AssertionError("it cannot be made")
