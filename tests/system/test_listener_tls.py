"""TLS at the listeners of a real relay: a certificate of its own making, a renewed one, a broken one, and what a session costs."""

import asyncio
import os
import smtplib
import socket
import ssl
import time
from pathlib import Path

import pytest

from tests.support.certificates import Authority
from tests.support.eventually import eventually
from tests.support.process import RelayDied, RelayProcess
from tests.support.upstream import unused_port

SESSIONS = 300
#: 300 new sessions a second, with one core for the relay. In processor time, as the machine may be busy with other tests.
CPU_LIMIT_SECONDS = SESSIONS / 300

CONFIG = """
hostname: relay.test
listeners:
  - {{bind: "127.0.0.1:0", name: starttls, security: starttls, require_tls: true{certificate}}}
  - {{bind: "127.0.0.1:0", name: tls, security: tls{certificate}}}
upstreams:
  up: {{host: 127.0.0.1, port: {port}, security: none}}
routes:
  - {{sender: "*", upstream: up}}
spool: {{directory: {directory}}}
log: {{format: json}}
"""


def config(directory: Path, *, certificate: Path | None = None) -> str:
    named = f", certificate: {certificate}" if certificate else ""
    return CONFIG.format(port=unused_port(), directory=directory / "spool", certificate=named)


def unverified() -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    return context


def shown(address: tuple[str, int]) -> bytes:
    with socket.create_connection(address, timeout=60) as connection, unverified().wrap_socket(connection) as secured:
        octets = secured.getpeercert(binary_form=True)
        assert octets is not None
        return octets


async def test_a_relay_without_a_certificate_encrypts_all_the_same_and_says_so(tmp_path: Path) -> None:
    relay = RelayProcess(config(tmp_path), directory=tmp_path)
    seen = set()
    for _ in range(2):
        async with relay:
            host, port = relay.address("starttls")

            def send(host: str = host, port: int = port) -> None:
                with smtplib.SMTP(host, port, timeout=60) as client:
                    with pytest.raises(smtplib.SMTPSenderRefused) as refused:
                        client.sendmail("app@acme.example", ["you@example.org"], b"Subject: hi\r\n\r\nhi\r\n")
                    assert refused.value.smtp_code == 530
                    client.starttls(context=unverified())
                    client.sendmail("app@acme.example", ["you@example.org"], b"Subject: hi\r\n\r\nhi\r\n")

            await asyncio.to_thread(send)
            seen.add(await asyncio.to_thread(shown, relay.address("tls")))
            assert await relay.terminate() == 0
    assert len(seen) == 1
    assert len(relay.events("accepted")) == 2
    notes = [event["what"] for event in relay.events("note", level="warning")]
    assert [note.partition(" names")[0] for note in notes] == ["listener starttls", "listener tls"] * 2
    assert all("self-signed" in note for note in notes)
    assert relay.events("fault") == []


async def test_a_renewed_certificate_is_used_by_a_running_relay(tmp_path: Path, tls: Authority) -> None:
    pem = tmp_path / "relay.pem"

    def renew(name: str) -> None:
        files = tls.files(name)
        new = tmp_path / "relay.new"
        new.write_bytes(files.certificate.read_bytes() + files.key.read_bytes())
        new.replace(pem)

    renew("one.example")
    async with RelayProcess(config(tmp_path, certificate=pem), directory=tmp_path) as relay:
        before = await asyncio.to_thread(shown, relay.address("tls"))
        renew("two.example")
        await eventually(lambda: shown(relay.address("tls")) != before, "the new one", within=60)
        await relay.event("note", count=2, level="info", within=60)
        assert await relay.terminate() == 0


async def test_a_relay_whose_certificate_cannot_be_used_does_not_start(tmp_path: Path, tls: Authority) -> None:
    pem = tmp_path / "relay.pem"
    pem.write_bytes(tls.files("one.example").certificate.read_bytes() + tls.files("two.example").key.read_bytes())
    relay = RelayProcess(config(tmp_path, certificate=pem), directory=tmp_path)
    with pytest.raises(RelayDied):
        await relay.start()
    assert await relay.exited() == 75
    assert f"the key in {pem} is another's" in relay.log()


async def test_three_hundred_new_sessions_cost_less_than_a_second_of_processor_time(tmp_path: Path) -> None:
    async with RelayProcess(config(tmp_path), directory=tmp_path) as relay:
        await asyncio.to_thread(begin_sessions, relay.address("tls"), 10)
        cpu, clock = cpu_seconds(relay.pid), time.monotonic()
        await asyncio.gather(*(asyncio.to_thread(begin_sessions, relay.address("tls"), SESSIONS // 3) for _ in range(3)))
        cpu, seconds = cpu_seconds(relay.pid) - cpu, time.monotonic() - clock
        print(f"{SESSIONS / seconds:.0f} sessions a second, {cpu / SESSIONS * 1000:.2f} ms of processor time each")
        assert cpu < CPU_LIMIT_SECONDS


def begin_sessions(address: tuple[str, int], count: int) -> None:
    context = unverified()  # without a session of before: each handshake is a whole one
    for _ in range(count):
        with socket.create_connection(address, timeout=60) as connection, context.wrap_socket(connection) as secured:
            assert secured.recv(100).startswith(b"220 ")
            assert secured.version() == "TLSv1.3"
            assert not secured.session_reused
            secured.sendall(b"QUIT\r\n")
            assert secured.recv(100).startswith(b"221 ")


def cpu_seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
