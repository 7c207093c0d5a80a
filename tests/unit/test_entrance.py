"""The ways in: Unix sockets and who comes by them, sockets that systemd hands over, and proxies that say for whom they connect."""

import asyncio
import os
import resource
import socket
import stat
import struct
from collections.abc import Awaitable, Callable
from ipaddress import ip_address
from pathlib import Path
from typing import Any

import pytest

from relay.listener import arrival
from relay.listener.sockets import Inherited, address_of
from tests.support.certificates import Authority
from tests.support.client import Client
from tests.support.front import Front

pytestmark = pytest.mark.both_loops

Eventually = Callable[..., Awaitable[None]]
MESSAGE = b"From: app@acme.example\r\nSubject: hi\r\n\r\nhello\r\n"
ME = f"uid:{os.getuid()}"
V1 = b"PROXY TCP4 192.0.2.7 203.0.113.1 40000 25\r\n"
BEHIND_PROXY = {"proxy_protocol": "127.0.0.1", "networks": ["192.0.2.0/24", "2001:db8::/32"]}


def v2(client: str = "192.0.2.7", *, tlvs: bytes = b"", local: bool = False) -> bytes:
    packed = ip_address(client).packed
    block = packed * 2 + struct.pack("!HH", 40000, 25) + tlvs
    family = 0x11 if len(packed) == 4 else 0x21
    return b"\r\n\r\n\0\r\nQUIT\n" + struct.pack("!BBH", 0x20 if local else 0x21, family, len(block)) + block


async def deliver(client: Client, *, greet: bool = True) -> None:
    if greet:
        await client.greet()
    await client.deliver("app@acme.example", ["you@example.org"], MESSAGE)
    await client.quit()


def listening(family: int, address: object) -> socket.socket:
    made = socket.socket(family)
    made.bind(address)  # type: ignore[arg-type]
    made.listen()
    return made


# -- addresses ------------------------------------------------------------------------------------------------------------


def resolving_to(*addresses: tuple[object, ...]) -> Any:
    async def resolved(host: str, port: int, **_: object) -> list[object]:
        kinds = (socket.SOCK_STREAM, socket.IPPROTO_TCP, "")
        return [(socket.AF_INET6 if ":" in str(address[0]) else socket.AF_INET, *kinds, address) for address in addresses]

    return resolved


async def test_a_name_is_bound_at_all_its_addresses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    addresses = (("127.0.0.1", 0), ("::1", 0, 0, 0)) * 2
    monkeypatch.setattr(asyncio.get_running_loop(), "getaddrinfo", resolving_to(*addresses), raising=True)
    async with Front(tmp_path, listener={"bind": "mail.example:0"}) as front:
        monkeypatch.undo()
        first, second = (address.rpartition(":") for address in front.address.split(", "))
        for host, _, port in (first, second):
            async with Client(host.strip("[]"), int(port)) as client:
                await deliver(client)
    assert [taken.draft.origin.client for taken in front.taken] == ["127.0.0.1", "::1"]


async def test_a_name_is_bound_without_its_ipv6_address_where_there_is_no_ipv6(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As `localhost` in a container without IPv6, whose /etc/hosts gives it ::1 all the same."""
    monkeypatch.setattr(asyncio.get_running_loop(), "getaddrinfo", resolving_to(("2001:db8::1", 0, 0, 0), ("127.0.0.1", 0)), raising=True)
    async with Front(tmp_path, listener={"bind": "localhost:0"}) as front:
        monkeypatch.undo()
        assert front.address.startswith("127.0.0.1:")
        async with front.client() as client:
            await deliver(client)


@pytest.mark.parametrize("address", [("2001:db8::1", 0, 0, 0), ("192.0.2.1", 0)])
async def test_an_address_that_is_not_ours_alone_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, address: Any) -> None:
    front = Front(tmp_path, listener={"bind": "mail.example:0"})
    monkeypatch.setattr(asyncio.get_running_loop(), "getaddrinfo", resolving_to(address), raising=True)
    with pytest.raises(OSError, match=r"cannot listen on mail\.example port 0: Cannot assign requested address"):
        await front.door.open()
    monkeypatch.undo()
    await front.close()


async def test_a_name_without_an_address_is_an_error_that_says_so(tmp_path: Path) -> None:
    front = Front(tmp_path, listener={"bind": "nobody.invalid:0"})
    with pytest.raises(OSError, match=r"cannot listen on nobody\.invalid port 0"):
        await front.door.open()
    await front.close()


# -- Unix sockets ---------------------------------------------------------------------------------------------------------


async def test_mail_comes_over_a_unix_socket_and_is_its_users(tmp_path: Path) -> None:
    path = tmp_path / "smtp.sock"
    async with Front(tmp_path, listener={"bind": f"unix:{path}"}) as front:
        assert front.address == f"unix:{path}"
        assert stat.S_IMODE(path.stat().st_mode) == 0o666
        async with Client(str(path)) as client:
            await deliver(client)
    (taken,) = front.taken
    assert taken.draft.origin.client == ME
    assert f"from client.test ({ME})\r\n".encode() in taken.prefix
    (event,) = front.events("accepted")
    assert event["client"] == ME
    assert not path.exists()


async def test_routes_can_ask_for_the_user_of_a_unix_socket(tmp_path: Path) -> None:
    routes = [{"sender": "acme.example", "client": ["uid:4242", "10.0.0.0/8"], "upstream": "acme"}]
    path = tmp_path / "smtp.sock"
    async with Front(tmp_path, {"routes": routes}, listener={"bind": f"unix:{path}"}) as front, Client(str(path)) as client:
        await client.greet()
        await client.command("MAIL FROM:<app@acme.example>", 550, "5.7.1")
    routes[0]["client"] = ME
    other = tmp_path / "other"
    other.mkdir()
    async with Front(other, {"routes": routes}, listener={"bind": f"unix:{path}"}) as front, Client(str(path)) as client:
        await deliver(client)
    assert len(front.taken) == 1


async def test_the_mode_of_the_socket_is_as_configured(tmp_path: Path) -> None:
    async with Front(tmp_path, listener={"bind": f"unix:{tmp_path}/s", "mode": "0600"}):
        assert stat.S_IMODE((tmp_path / "s").stat().st_mode) == 0o600


async def test_the_socket_is_gone_once_it_has_stopped_and_its_sessions_still_end(tmp_path: Path) -> None:
    path = tmp_path / "smtp.sock"
    async with Front(tmp_path, listener={"bind": f"unix:{path}"}) as front, Client(str(path)) as client:
        await client.greet()
        await client.command("MAIL FROM:<app@acme.example>", 250)
        await client.command("RCPT TO:<you@example.org>", 250)
        await client.command("DATA", 354)
        front.door.stop()
        assert not path.exists()
        await client.send(MESSAGE + b".\r\n")
        await client.expect(250, "queued as")
    assert len(front.taken) == 1


async def test_a_path_that_somebody_has_is_an_error_and_stays_his(tmp_path: Path) -> None:
    path = tmp_path / "smtp.sock"
    with listening(socket.AF_UNIX, str(path)):
        front = Front(tmp_path, listener={"bind": f"unix:{path}"})
        with pytest.raises(OSError, match="another program listens at"):
            await front.door.open()
        front.door.stop()
        await front.close()
        assert path.is_socket()


async def test_connections_are_limited_for_each_user(tmp_path: Path) -> None:
    path = tmp_path / "smtp.sock"
    async with Front(tmp_path, listener={"bind": f"unix:{path}", "connections_per_client": 1}), Client(str(path)) as first:
        await first.greet()
        async with Client(str(path)) as second:
            await second.expect(421, "4.7.0")


# -- sockets that systemd hands over --------------------------------------------------------------------------------------


async def test_sockets_of_one_name_are_one_listener(tmp_path: Path) -> None:
    made = [listening(socket.AF_INET, ("127.0.0.1", 0)), listening(socket.AF_INET6, ("::1", 0)), listening(socket.AF_UNIX, f"{tmp_path}/s")]
    addresses = [address_of(each) for each in made]
    front = Front(tmp_path, listener={"bind": "systemd:smtp"})
    front.inherited = Inherited({"smtp": [each.detach() for each in made]})
    async with front:
        assert front.address == ", ".join(addresses)
        ports = [int(address.rpartition(":")[2]) for address in addresses[:2]]
        for client in (Client("127.0.0.1", ports[0]), Client("::1", ports[1]), Client(f"{tmp_path}/s")):
            async with client:
                await deliver(client)
    assert [taken.draft.origin.client for taken in front.taken] == ["127.0.0.1", "::1", ME]
    assert {taken.draft.origin.listener for taken in front.taken} == {"local"}
    assert (tmp_path / "s").is_socket(), "what systemd has made is not ours to take away"


async def test_a_dual_stack_socket_knows_ipv4_clients_by_their_own_addresses(tmp_path: Path) -> None:
    made = socket.create_server(("::", 0), family=socket.AF_INET6, dualstack_ipv6=True)
    port = made.getsockname()[1]
    front = Front(tmp_path, listener={"bind": "systemd:smtp"})
    front.inherited = Inherited({"smtp": [made.detach()]})
    async with front, Client("127.0.0.1", port) as client:
        await deliver(client)
    assert front.taken[0].draft.origin.client == "127.0.0.1"
    assert b"([127.0.0.1])" in front.taken[0].prefix


async def test_a_name_that_systemd_does_not_know_is_said_with_those_it_does(tmp_path: Path) -> None:
    front = Front(tmp_path, listener={"bind": "systemd:smtp"})
    made = listening(socket.AF_INET, ("127.0.0.1", 0))
    with pytest.raises(OSError, match="no socket named smtp: it has handed over submission"):
        await front.door.open(Inherited({"submission": [made.fileno()]}))
    with pytest.raises(OSError, match="no socket named smtp: it has handed over none"):
        await front.door.open(Inherited())
    made.close()
    await front.close()


@pytest.mark.parametrize("kind", ["datagram", "connected"])
async def test_a_socket_that_takes_no_connections_is_an_error(tmp_path: Path, kind: str) -> None:
    made, other = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM if kind == "connected" else socket.SOCK_DGRAM)
    front = Front(tmp_path, listener={"bind": "systemd:smtp"})
    with other, pytest.raises(OSError, match="must be a ListenStream= with Accept=no"):
        await front.door.open(Inherited({"smtp": [made.detach()]}))
    await front.close()


@pytest.mark.parametrize(
    ("environ", "names"),
    [
        ({"LISTEN_PID": str(os.getpid()), "LISTEN_FDS": "0", "LISTEN_FDNAMES": ""}, []),
        ({"LISTEN_PID": str(os.getpid() + 1), "LISTEN_FDS": "1", "LISTEN_FDNAMES": "smtp"}, []),
        ({"LISTEN_PID": str(os.getpid()), "LISTEN_FDS": "many"}, []),
        ({"LISTEN_FDS": "1", "LISTEN_FDNAMES": "smtp"}, []),
        ({}, []),
    ],
)
async def test_what_is_not_meant_for_this_process_is_left_alone_and_not_passed_on(environ: dict[str, str], names: list[str]) -> None:
    given = {"PATH": "/bin", **environ}
    assert Inherited.from_environment(given).names == names
    assert given == {"PATH": "/bin"}


# -- proxies --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("header", "client"),
    [
        (V1, "192.0.2.7"),
        (v2(), "192.0.2.7"),
        (v2("2001:db8::7"), "2001:db8::7"),
        (v2("::ffff:192.0.2.7"), "192.0.2.7"),
        (v2(tlvs=b"\x04\x02\x00" + b"x" * 512), "192.0.2.7"),
        (v2(tlvs=b"\x04\xc3\x50" + b"x" * 50000), "192.0.2.7"),
    ],
)
@pytest.mark.parametrize("chunk", [0, 1, 7])
async def test_the_client_is_who_the_proxy_says(tmp_path: Path, header: bytes, client: str, chunk: int) -> None:
    if chunk and len(header) > 1000:
        chunk *= 1000
    async with Front(tmp_path, listener=BEHIND_PROXY) as front, front.client(chunk=chunk) as app:
        await app.send(header)
        await deliver(app)
    (taken,) = front.taken
    assert taken.draft.origin.client == client
    literal = f"IPv6:{client}" if ":" in client else client
    assert f"([{literal}])".encode() in taken.prefix
    assert front.events("accepted")[0]["client"] == client


@pytest.mark.parametrize("header", [V1, v2()])
async def test_who_talks_right_behind_the_header_talks_before_the_greeting(tmp_path: Path, header: bytes) -> None:
    async with Front(tmp_path, listener=BEHIND_PROXY) as front, front.client() as app:
        await app.send(header + b"EHLO app.example\r\nMAIL FROM:<app@acme.example>\r\nRCPT TO:<you@example.org>\r\nDATA\r\n")
        await app.expect(554, "5.5.1")
        await app.expect_close()
    assert front.taken == []


@pytest.mark.parametrize("together", [True, False])
async def test_a_tls_handshake_may_follow_the_header_at_once(tmp_path: Path, tls: Authority, together: bool) -> None:
    files = tls.files()
    listener = {**BEHIND_PROXY, "security": "tls", "certificate": str(files.certificate), "key": str(files.key)}
    async with Front(tmp_path, listener=listener) as front, front.client() as app:
        await app.send(V1)
        if not together:
            await asyncio.sleep(0)
        await app.shake_hands(tls.client_context())
        await deliver(app)
    assert front.taken[0].draft.origin.client == "192.0.2.7"


@pytest.mark.parametrize(
    "octets",
    [
        b"EHLO app.example\r\n",
        b"PROXY TCP4 192.0.2.7 203.0.113.1 40000\r\n",
        b"\r\n\r\n\0\r\nQUIT\n\x31\x11\0\x0c" + b"\0" * 12,
        b"\x16\x03\x01\x02\x00\x01",
    ],
)
async def test_without_a_header_there_is_no_session(tmp_path: Path, octets: bytes) -> None:
    async with Front(tmp_path, listener=BEHIND_PROXY) as front, front.client() as app:
        await app.send(octets)
        await app.expect(554, "5.7.1")
        await app.expect_close()
        assert front.door.sessions == 0
    (event,) = front.events("refused")
    assert event["client"] == "127.0.0.1" and "PROXY" in event["reply"]


async def test_a_proxy_that_says_nothing_is_cut_off(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(arrival, "HEADER_SECONDS", 0.05)
    async with Front(tmp_path, listener=BEHIND_PROXY) as front, front.client() as app:
        await app.send(V1[:-1])
        await app.expect(554)
        await app.expect_close()
    assert "no PROXY header in 0.05 s" in front.events("refused")[0]["reply"]


async def test_only_trusted_proxies_connect_whatever_they_say(tmp_path: Path) -> None:
    listener = {"proxy_protocol": "192.0.2.1", "networks": "127.0.0.0/8"}
    async with Front(tmp_path, listener=listener) as front, front.client() as app:
        await app.send(b"PROXY TCP4 127.0.0.1 127.0.0.1 1 1\r\n")
        await app.expect(554, "5.7.1")
    (event,) = front.events("refused")
    assert (event["client"], event["reply"]) == ("127.0.0.1", "closed: not a trusted proxy")


async def test_networks_are_about_the_client_behind_the_proxy(tmp_path: Path) -> None:
    async with Front(tmp_path, listener=BEHIND_PROXY) as front:
        for header in (b"PROXY TCP4 198.51.100.1 203.0.113.1 1 25\r\n", v2("198.51.100.1"), v2("127.0.0.1")):
            async with front.client() as app:
                await app.send(header)
                await app.expect(554, "5.7.1")
                await app.expect_close()


async def test_limits_are_about_the_client_behind_the_proxy(tmp_path: Path) -> None:
    front = Front(tmp_path, listener={**BEHIND_PROXY, "connections_per_client": 1})
    async with front, front.client() as first, front.client() as second, front.client() as third:
        await first.send(v2("192.0.2.7"))
        await first.expect(220)
        await second.send(v2("::ffff:192.0.2.7"))
        await second.expect(421)
        await third.send(v2("192.0.2.8"))
        await third.expect(220)


async def test_routes_are_about_the_client_behind_the_proxy(tmp_path: Path) -> None:
    routes = [{"sender": "acme.example", "client": "192.0.2.7", "upstream": "acme"}]
    async with Front(tmp_path, {"routes": routes}, listener=BEHIND_PROXY) as front:
        async with front.client() as other:
            await other.send(v2("192.0.2.8"))
            await other.greet()
            await other.command("MAIL FROM:<app@acme.example>", 550, "5.7.1")
        async with front.client() as app:
            await app.send(v2("192.0.2.7"))
            await deliver(app)
    assert len(front.taken) == 1


@pytest.mark.parametrize(
    "header", [v2(local=True), b"\r\n\r\n\0\r\nQUIT\n\x20\x00\0\0", b"PROXY UNKNOWN\r\n", b"PROXY UNKNOWN ::1 ::1 1 1\r\n"]
)
@pytest.mark.parametrize("networks", ["192.0.2.0/24", "127.0.0.0/8"])
async def test_a_proxy_that_speaks_for_nobody_may_look_and_sends_nothing(tmp_path: Path, header: bytes, networks: str) -> None:
    async with Front(tmp_path, listener={**BEHIND_PROXY, "networks": networks}) as front, front.client() as app:
        await app.send(header)
        await app.greet()
        await app.command("NOOP", 250)
        await app.command("MAIL FROM:<app@acme.example>", 554, "5.7.1")
        await app.command("RCPT TO:<you@example.org>", 503)
        await app.quit()
    assert front.taken == []


async def test_starttls_works_behind_the_header(tmp_path: Path, tls: Authority) -> None:
    files = tls.files()
    listener = {**BEHIND_PROXY, "security": "starttls", "certificate": str(files.certificate), "key": str(files.key)}
    async with Front(tmp_path, listener=listener) as front, front.client() as app:
        await app.send(v2())
        await app.greet()
        await app.start_tls(tls.client_context())
        await app.hello()
        await deliver(app, greet=False)
    assert front.taken[0].draft.origin.client == "192.0.2.7"


async def test_who_is_exempt_from_logins_is_so_by_his_own_address(tmp_path: Path) -> None:
    users = {"erp": {"password": "secret", "senders": "acme.example"}}
    listener = {"proxy_protocol": "127.0.0.1", "auth": "required", "auth_exempt": ["192.0.2.7", "127.0.0.1"]}
    async with Front(tmp_path, {"users": users}, listener=listener) as front:
        for header, code in ((v2("192.0.2.7"), 250), (v2("192.0.2.8"), 530), (b"PROXY UNKNOWN\r\n", 554), (v2(local=True), 554)):
            async with front.client() as app:
                await app.send(header)
                await app.greet()
                await app.command("MAIL FROM:<app@acme.example>", code)


async def test_a_user_of_a_unix_socket_may_log_in_in_clear(tmp_path: Path) -> None:
    users = {"erp": {"password": "secret", "senders": "acme.example"}}
    listener = {"bind": f"unix:{tmp_path}/s", "auth": "required"}
    async with Front(tmp_path, {"users": users}, listener=listener) as front, Client(f"{tmp_path}/s") as app:
        await app.greet()
        assert "AUTH PLAIN LOGIN" in app.extensions
        await app.command("MAIL FROM:<app@acme.example>", 530)
        await app.command("AUTH PLAIN AGVycABzZWNyZXQ=", 235)
        await deliver(app, greet=False)
    assert (front.taken[0].draft.origin.user, front.taken[0].draft.origin.client) == ("erp", ME)


@pytest.mark.parametrize(("octets", "lines"), [(b"", 0), (V1[:9], 1)])
@pytest.mark.parametrize("end", [Client.close, Client.reset])
async def test_a_look_without_a_word_is_not_worth_a_line(
    tmp_path: Path, eventually: Eventually, octets: bytes, lines: int, end: Callable[[Client], None]
) -> None:
    async with Front(tmp_path, listener=BEHIND_PROXY) as front:
        client = front.client()
        await client.connect()
        await client.send(octets)
        await eventually(lambda: front.door._entrance._arrivals[0]._tasks)
        end(client)
        await eventually(lambda: not front.door._entrance._arrivals[0]._tasks)
    assert [event["client"] for event in front.events("refused")] == ["127.0.0.1"] * lines


async def test_who_is_accepted_in_the_moment_of_the_stop_is_let_go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(arrival, "HEADER_SECONDS", 60.0)
    async with Front(tmp_path, listener=BEHIND_PROXY) as front, front.client() as app:
        arrivals = front.door._entrance._arrivals[0]
        if not arrivals._tasks:
            arrivals._accept()
        front.door.stop()
        async with asyncio.timeout(20):
            await front.door.drained()
        await app.expect_close()


async def test_a_proxy_may_come_over_a_unix_socket(tmp_path: Path) -> None:
    listener = {"bind": f"unix:{tmp_path}/s", "proxy_protocol": ME, "networks": "192.0.2.0/24"}
    async with Front(tmp_path, listener=listener) as front, Client(f"{tmp_path}/s") as app:
        await app.send(v2())
        await deliver(app)
    assert front.taken[0].draft.origin.client == "192.0.2.7"


async def test_a_user_who_is_no_trusted_proxy_does_not_pass_for_one(tmp_path: Path) -> None:
    listener = {"bind": f"unix:{tmp_path}/s", "proxy_protocol": "uid:4242", "networks": "192.0.2.0/24"}
    async with Front(tmp_path, listener=listener) as front, Client(f"{tmp_path}/s") as app:
        await app.expect(554)
    assert front.events("refused")[0]["client"] == ME


async def test_proxies_that_say_nothing_yet_are_limited_and_the_others_come_in_later(tmp_path: Path, eventually: Eventually) -> None:
    async with Front(tmp_path, listener={**BEHIND_PROXY, "connections": 2}) as front:
        arrivals = front.door._entrance._arrivals[0]
        silent = [front.client(), front.client()]
        for each in silent:
            await each.connect()
        await eventually(lambda: len(arrivals._tasks) == 2)
        async with front.client() as app:
            await app.send(V1)
            assert len(arrivals._tasks) == 2
            silent[0].close()
            await deliver(app)
        silent[1].close()


async def test_out_of_descriptors_it_waits_and_goes_on(tmp_path: Path, eventually: Eventually, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(arrival, "_RETRY_SECONDS", 0.01)
    async with Front(tmp_path, listener=BEHIND_PROXY) as front:
        arrivals = front.door._entrance._arrivals[0]
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        spare = os.dup(0)
        os.close(spare)
        with socket.socket() as app:
            resource.setrlimit(resource.RLIMIT_NOFILE, (spare + 1, hard))  # `app` has the last one
            try:
                app.connect(("127.0.0.1", front.port))
                await eventually(lambda: not arrivals._accepting)
            finally:
                resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
            app.setblocking(False)
            loop = asyncio.get_running_loop()
            await loop.sock_sendall(app, V1)
            async with asyncio.timeout(20):
                assert (await loop.sock_recv(app, 100)).startswith(b"220 ")


async def test_a_stop_waits_for_nobody_who_has_not_said_who_he_is(
    tmp_path: Path, eventually: Eventually, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(arrival, "HEADER_SECONDS", 60.0)
    async with Front(tmp_path, listener=BEHIND_PROXY) as front, front.client() as app:
        await app.send(V1[:10])
        await eventually(lambda: front.door._entrance._arrivals[0]._tasks)
        front.door.stop()
        async with asyncio.timeout(20):
            await front.door.drained()
        await app.expect_close()


async def test_the_stream_of_a_proxied_client_survives_many_at_once(tmp_path: Path) -> None:
    async with Front(tmp_path, listener=BEHIND_PROXY) as front:

        async def one(number: int) -> None:
            async with front.client(chunk=number % 5) as app:
                await app.send(v2(f"192.0.2.{number}") if number % 2 else b"PROXY TCP4 192.0.2.%d 10.0.0.1 1 1\r\n" % number)
                await deliver(app)

        async with asyncio.TaskGroup() as group:
            for number in range(40):
                group.create_task(one(number))
    assert {taken.draft.origin.client for taken in front.taken} == {f"192.0.2.{number}" for number in range(40)}
