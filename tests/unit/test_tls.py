"""TLS settings: as many contexts as there are kinds of trust, and none that trusts more than it was told to."""

import asyncio
import ssl
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from relay.clock import ManualClock
from relay.config.upstreams import Upstream
from relay.mail.outcome import Phase, Status
from relay.upstream import tls as tls_module
from relay.upstream.pool import Pool
from relay.upstream.tls import LOOK_SECONDS, Contexts, Unusable
from tests.support.certificates import Authority, CertificateFiles
from tests.support.eventually import eventually
from tests.support.upstream import ScriptedUpstream
from tests.system.upstreams import all_sent, outgoing, pool_to, secured, words


def upstream(**keys: Any) -> Upstream:
    return Upstream.model_validate({"host": "smtp.acme.example", **keys})


def made(notes: list[str] | None = None, clock: ManualClock | None = None) -> Contexts:
    told = [] if notes is None else notes
    return Contexts(clock=clock or ManualClock(), note=lambda level, what: told.append(f"{level}: {what}"))


async def test_upstreams_with_the_same_trust_share_one_context(tls: Authority) -> None:
    contexts = made()
    first = await contexts.get(upstream(ca_file=str(tls.ca_file)))
    assert first is not None
    assert await contexts.get(upstream(ca_file=str(tls.ca_file), security="tls", host="other.example", username="x", password="y")) is first
    assert await contexts.get(upstream(ca_file=str(tls.ca_file), verify=False)) is not first
    assert await contexts.get(upstream()) is not first


async def test_a_context_is_made_once_also_for_those_who_ask_at_the_same_time(tls: Authority) -> None:
    contexts = made()
    many = await asyncio.gather(*(contexts.get(upstream(ca_file=str(tls.ca_file))) for _ in range(10)))
    assert len({id(context) for context in many}) == 1


async def test_without_tls_there_is_no_context() -> None:
    assert await made().get(upstream(security="none")) is None


async def test_a_named_ca_alone_is_trusted(tls: Authority) -> None:
    context = await made().get(upstream(ca_file=str(tls.ca_file)))
    assert context is not None
    assert len(context.get_ca_certs()) == 1
    assert (context.check_hostname, context.verify_mode) == (True, ssl.CERT_REQUIRED)
    assert context.minimum_version is ssl.TLSVersion.TLSv1_2


async def test_the_systems_trust_store_is_the_default_and_verifies() -> None:
    context = await made().get(upstream())
    assert context is not None
    assert (context.check_hostname, context.verify_mode) == (True, ssl.CERT_REQUIRED)


async def test_verification_can_be_switched_off_and_old_tls_stays_off() -> None:
    context = await made().get(upstream(verify=False))
    assert context is not None
    assert (context.check_hostname, context.verify_mode) == (False, ssl.CERT_NONE)
    assert context.minimum_version is ssl.TLSVersion.TLSv1_2


async def test_a_ca_file_that_cannot_be_loaded_is_an_error_every_time(tmp_path: Path) -> None:
    contexts = made()
    broken = tmp_path / "ca.pem"
    for _ in range(2):
        broken.write_text("no certificate")
        with pytest.raises(Unusable, match=f"the CA file {broken} cannot be loaded: "):
            await contexts.get(upstream().model_copy(update={"ca_file": broken}))
    with pytest.raises(Unusable, match=r"gone\.pem cannot be loaded: No such file or directory"):
        await contexts.get(upstream().model_copy(update={"ca_file": tmp_path / "gone.pem"}))


# -- client certificates -----------------------------------------------------------------------------------------------------


def demanding(tls: Authority) -> ssl.SSLContext:
    """A server that wants to see a certificate of this CA's."""
    context = tls.context()
    context.verify_mode = ssl.CERT_REQUIRED
    context.load_verify_locations(str(tls.ca_file))
    return context


def in_one(files: CertificateFiles, path: Path) -> Path:
    path.write_bytes(files.certificate.read_bytes() + files.key.read_bytes())
    return path


@pytest.mark.both_loops
@pytest.mark.parametrize("security", ["starttls", "tls"])
@pytest.mark.parametrize("where", ["two files", "one file"])
async def test_a_client_certificate_is_shown(tls: Authority, tmp_path: Path, security: Any, where: str) -> None:
    files = tls.files("relay.example.net")
    keys = {"client_certificate": str(files.certificate), "client_key": str(files.key)}
    if where == "one file":
        keys = {"client_certificate": str(in_one(files, tmp_path / "both.pem"))}
    async with ScriptedUpstream(security=security, tls=demanding(tls)) as server:
        async with pool_to(acme=secured(server, tls, security, **keys)) as pool:
            assert all_sent(await pool.send("acme", outgoing()))
        async with pool_to(acme=secured(server, tls, security)) as pool:
            (outcome,) = await pool.send("acme", outgoing())
    assert (outcome.status, outcome.fallback, outcome.in_doubt) == (Status.DEFERRED, True, False)
    assert len(server.accepted) == 1


@pytest.mark.both_loops
@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
@pytest.mark.parametrize("security", ["starttls", "tls"])
@pytest.mark.parametrize("shown", ["none", "a stranger's", "an expired one"])
async def test_a_server_that_wants_another_client_certificate_is_quoted(
    tls: Authority, security: Any, version: ssl.TLSVersion, shown: str
) -> None:
    """With TLS 1.3 the refusal comes only after our side of the handshake is done."""
    context = demanding(tls)
    context.maximum_version = version
    keys = {}
    if shown != "none":
        files = tls.stranger().files("relay.example.net") if shown == "a stranger's" else tls.files("relay.example.net", expired=True)
        keys = {"client_certificate": str(files.certificate), "client_key": str(files.key)}
    async with ScriptedUpstream(security=security, tls=context) as server, pool_to(acme=secured(server, tls, security, **keys)) as pool:
        (outcome,) = await pool.send("acme", outgoing())
    assert words([outcome]) == ["deferred upstream tls fallback"]
    assert {
        "none": "wants a client certificate, see client_certificate",
        "a stranger's": "it does not trust who issued our client certificate",
        "an expired one": "it says that our client certificate has expired",
    }[shown] in outcome.reply.text


async def test_each_client_certificate_has_a_context_of_its_own(tls: Authority) -> None:
    contexts = made()
    one, two = tls.files("one.example"), tls.files("two.example")
    keys: dict[str, Any] = {"ca_file": str(tls.ca_file), "client_certificate": str(one.certificate), "client_key": str(one.key)}
    first = await contexts.get(upstream(**keys))
    assert await contexts.get(upstream(**keys, host="other.example")) is first
    assert await contexts.get(upstream(**keys | {"client_certificate": str(two.certificate), "client_key": str(two.key)})) is not first
    assert await contexts.get(upstream(ca_file=str(tls.ca_file))) is not first


@pytest.mark.parametrize("fault", ["passphrase", "another's key", "no key", "gone", "nonsense"])
async def test_a_client_certificate_that_cannot_be_used_is_told_with_its_file(tls: Authority, tmp_path: Path, fault: str) -> None:
    mine, other = tls.files("one.example"), tls.files("two.example")
    certificate, key = tmp_path / "client.pem", tmp_path / "client.key"
    certificate.write_bytes(mine.certificate.read_bytes())
    key.write_bytes(mine.key.read_bytes())
    settings = upstream(ca_file=str(tls.ca_file), client_certificate=str(certificate), client_key=None if fault == "no key" else str(key))
    said = f"{certificate}"
    if fault == "passphrase":
        from cryptography.hazmat.primitives import serialization as form

        private = form.load_pem_private_key(mine.key.read_bytes(), None)
        key.write_bytes(private.private_bytes(form.Encoding.PEM, form.PrivateFormat.PKCS8, form.BestAvailableEncryption(b"s")))
        said = f"the key in {key} has a passphrase, and nobody is there to type it: store it without one"
    elif fault == "another's key":
        key.write_bytes(other.key.read_bytes())
        said = f"the key in {key} is not that of the certificate in {certificate}"
    elif fault == "no key":
        said = f"name its file with `client_key`, or add it to {certificate}"
    elif fault == "gone":
        key.unlink()
        said = "No such file or directory"
    elif fault == "nonsense":
        certificate.write_text("-----BEGIN CERTIFICATE-----\n!\n-----END CERTIFICATE-----\n")
    async with ScriptedUpstream(security="tls", tls=demanding(tls)) as server:
        there = settings.model_copy(update={"host": ("127.0.0.1",), "port": server.port, "security": "tls"})
        async with pool_to(acme=there) as pool:
            (outcome,) = await pool.send("acme", outgoing())
        assert server.connections == []
    assert (outcome.phase, outcome.status) == (Phase.TLS, Status.DEFERRED)
    assert outcome.reply.text.startswith("the client certificate cannot be used: ")
    assert said in outcome.reply.text


# -- files that change -------------------------------------------------------------------------------------------------------


async def test_files_that_change_are_used_for_the_next_connection(tls: Authority, tmp_path: Path) -> None:
    notes: list[str] = []
    clock = ManualClock()
    contexts, path = made(notes, clock), tmp_path / "both.pem"
    settings = upstream(client_certificate=str(in_one(tls.files("one.example"), path)))
    first = await contexts.get(settings)
    clock.advance(LOOK_SECONDS)
    assert await contexts.get(settings) is first, "nothing has changed"
    in_one(tls.files("two.example"), path)
    assert await contexts.get(settings) is first, "it is not looked at with every connection"
    clock.advance(LOOK_SECONDS)
    assert await contexts.get(settings) is not first
    assert notes == [f"info: upstreams: {path} changed on disk, and new connections use what is there now"]


async def test_a_ca_file_that_changes_is_trusted_from_then_on(tls: Authority, tmp_path: Path) -> None:
    clock, ca_file = ManualClock(), tmp_path / "ca.pem"
    stranger = tls.stranger()
    ca_file.write_bytes(tls.ca_file.read_bytes())
    async with ScriptedUpstream(security="tls", tls=stranger.server) as server:
        settings = secured(server, tls, "tls", ca_file=str(ca_file))
        pool = Pool({"acme": settings}, hostname="relay.example.net", clock=clock)
        assert not all_sent(await pool.send("acme", outgoing()))
        ca_file.write_bytes(stranger.ca_file.read_bytes())
        clock.advance(LOOK_SECONDS)
        assert all_sent(await pool.send("acme", outgoing()))
        await pool.close()


async def test_a_renewal_that_is_half_done_changes_nothing_and_is_told_when_it_stays_so(tls: Authority, tmp_path: Path) -> None:
    notes: list[str] = []
    clock = ManualClock()
    contexts, one, two = made(notes, clock), tls.files("one.example"), tls.files("two.example")
    certificate, key = tmp_path / "client.pem", tmp_path / "client.key"
    certificate.write_bytes(one.certificate.read_bytes())
    key.write_bytes(one.key.read_bytes())
    settings = upstream(client_certificate=str(certificate), client_key=str(key))
    first = await contexts.get(settings)
    certificate.write_bytes(two.certificate.read_bytes())
    for told in (0, 1, 1):
        clock.advance(LOOK_SECONDS)
        assert await contexts.get(settings) is first
        assert len(notes) == told
    assert notes[0].startswith(f"warning: upstreams: {certificate} and {key} changed on disk and cannot be used, so what was there stays")
    key.write_bytes(two.key.read_bytes())
    clock.advance(LOOK_SECONDS)
    assert await contexts.get(settings) is not first
    certificate.unlink()
    for _ in range(2):
        clock.advance(LOOK_SECONDS)
        assert await contexts.get(settings) is not None
    assert "No such file" in notes[-1]


async def test_files_on_a_file_system_that_hangs_hold_up_nobody_for_long(
    tls: Authority, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tls_module, "_PATIENCE_SECONDS", 0.01)
    clock, hanging, real = ManualClock(), threading.Event(), tls_module._stamp
    contexts = made(clock=clock)
    settings = upstream(ca_file=str(tls.ca_file))
    first = await contexts.get(settings)
    asked: list[int] = []

    def stamp(trust: Any) -> Any:
        asked.append(1)
        hanging.wait(60)
        return real(trust)

    monkeypatch.setattr(tls_module, "_stamp", stamp)
    clock.advance(LOOK_SECONDS)
    try:
        assert await asyncio.gather(*(contexts.get(settings) for _ in range(3))) == [first] * 3
        clock.advance(LOOK_SECONDS)
        assert await contexts.get(settings) is first
        await eventually(lambda: asked, "the thread to begin")
        assert len(asked) == 1, "one thread, not one for every connection"
        new = upstream(ca_file=str(tls.ca_file), verify=False, timeouts={"connect": "50ms"})
        with pytest.raises(Unusable, match=r"ca\.pem could not be read within 0\.05 s"):
            await contexts.get(new)
    finally:
        hanging.set()
    await eventually(lambda: not any(kept.looking for kept in contexts._kept.values()), "the threads to return")
    assert await contexts.get(new) is not None


async def test_many_files_that_hang_take_no_thread_from_who_reads_content(
    tls: Authority, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hanging, asked = threading.Event(), []
    monkeypatch.setattr(tls_module, "_stamp", lambda trust: asked.append(trust) or hanging.wait(60))
    contexts, loop = made(), asyncio.get_running_loop()
    executor = ThreadPoolExecutor(4)
    loop.set_default_executor(executor)
    files = [tmp_path / f"{number}.pem" for number in range(8)]
    for path in files:
        path.write_bytes(tls.ca_file.read_bytes())
    tries = [asyncio.ensure_future(contexts.get(upstream(ca_file=str(path)))) for path in files]
    try:
        await eventually(lambda: len(asked) >= 4, "threads that hang")
        async with asyncio.timeout(30):
            assert await asyncio.to_thread(tls.ca_file.exists)
    finally:
        hanging.set()
        await asyncio.gather(*tries, return_exceptions=True)
        executor.shutdown()


@pytest.mark.both_loops
async def test_a_host_that_has_a_new_certificate_of_a_stranger_is_not_trusted_for_an_old_session(tls: Authority) -> None:
    server = ScriptedUpstream(security="tls", tls=tls.context())
    async with server, pool_to(acme=secured(server, tls, "tls", limits={"messages_per_connection": 1})) as pool:
        assert all_sent(await pool.send("acme", outgoing()))
        server._offer = replace(server._offer, tls=tls.stranger().context())
        (outcome,) = await pool.send("acme", outgoing())
        assert (outcome.phase, outcome.status) == (Phase.TLS, Status.DEFERRED)
        server._offer = replace(server._offer, tls=tls.context())
        assert all_sent(await pool.send("acme", outgoing()))


# -- the certificate on the other side -------------------------------------------------------------------------------------------


def shaken(context: ssl.SSLContext, server: ssl.SSLContext) -> ssl.SSLObject:
    """The client's side of a handshake in memory."""
    to_client, to_server = ssl.MemoryBIO(), ssl.MemoryBIO()
    ours = context.wrap_bio(to_client, to_server, server_hostname="localhost")
    theirs = server.wrap_bio(to_server, to_client, server_side=True)
    for side in (ours, theirs, ours, theirs):
        with suppress(ssl.SSLWantReadError):
            side.do_handshake()
    return ours


async def test_a_certificate_is_taken_apart_once(tls: Authority, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tls_module, "_CERTIFICATES_LIMIT", 2)
    context = await made().get(upstream(ca_file=str(tls.ca_file)))
    assert context is not None
    servers = [tls.context("localhost", f"{number}.example") for number in range(3)]
    seen = [shaken(context, server).getpeercert() for server in (*servers, *servers)]
    for number, certificate in enumerate(seen):
        assert certificate is not None
        assert ("DNS", f"{number % 3}.example") in certificate["subjectAltName"]  # type: ignore[operator]
    again = shaken(context, servers[2])
    assert again.getpeercert() is seen[5]
    assert again.getpeercert(binary_form=True) == ssl.SSLObject.getpeercert(again, True)
    assert again.getpeercert() == ssl.SSLObject.getpeercert(again)


async def test_a_certificate_that_is_not_verified_is_never_taken_apart(tls: Authority) -> None:
    server = tls.context("localhost")
    verifying, blind = await made().get(upstream(ca_file=str(tls.ca_file))), await made().get(upstream(verify=False))
    assert verifying is not None
    assert blind is not None
    assert shaken(verifying, server).getpeercert()
    assert shaken(blind, server).getpeercert() == {}
