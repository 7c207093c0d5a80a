"""Access tokens: asked for once, early enough, anew when refused; and what is said and kept when a token server will not give one."""

import asyncio
import fcntl
import json
import os
import stat
import threading
import time
from base64 import urlsafe_b64decode
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.padding import PKCS1v15
from cryptography.hazmat.primitives.asymmetric.rsa import RSAPublicKey, generate_private_key
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

from relay.clock import ManualClock
from relay.config.encryption import Keys, new_key
from relay.config.oauth import OAuth2, token_server
from relay.config.secrets import Secret
from relay.config.upstreams import Upstream
from relay.mail.outcome import Failure, Outcome, Status
from relay.upstream import oauth2 as oauth2_module
from relay.upstream import token_request
from relay.upstream.oauth2 import Found, Tokens
from relay.upstream.pool import Pool
from relay.upstream.token_error import TokenError
from relay.upstream.token_store import Chain, Slot, StoreError, TokenStore, Unreadable
from relay.upstream.token_threads import TokenThreads
from relay.upstream.xoauth2 import initial_response
from tests.support.certificates import Authority
from tests.support.eventually import eventually
from tests.support.token_server import FIRST, Answer, Close, Drip, Flood, Hang, Hold, TokenServer, refused
from tests.support.upstream import ScriptedUpstream, unused_port
from tests.system.upstreams import all_sent, open_sessions, outgoing, settings, words

REFUSED = ["deferred credential auth fallback"]
UNSEEN = "unseen"


@pytest.fixture(autouse=True)
def trusted(tls: Authority, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("SSL_CERT_FILE", str(tls.ca_file))
    yield


@pytest.fixture
async def server(tls: Authority) -> AsyncIterator[TokenServer]:
    async with TokenServer(tls.server) as server:
        yield server


class House:
    """One upstream's tokens, and what they need."""

    def __init__(self, spool: Path, server: TokenServer, *, keys: Path | None = None, **oauth2: Any) -> None:
        spool.mkdir(exist_ok=True)
        self.notes: list[str] = []
        self.clock = ManualClock()
        self.store = TokenStore(spool, Keys(keys), note=self.notes.append)
        section = {"client_id": None, "client_secret": None, "refresh_token": None} if "service_account" in oauth2 else {}
        self.settings: dict[str, Any] = {
            "host": "127.0.0.1",
            "username": "mailer@globex.example",
            "oauth2": server.settings(**section | oauth2),
        }
        self.tokens = self.restart()

    def restart(self) -> Tokens:
        upstream = Upstream.model_validate(self.settings)
        self.tokens = Tokens("globex", upstream, store=self.store, threads=TokenThreads(), clock=self.clock, note=self._note)
        return self.tokens

    def _note(self, level: str, what: str) -> None:
        self.notes.append(what)

    def stored(self) -> Chain | None:
        with self.store.slot("globex") as slot:
            return slot.load()

    async def trouble(self) -> TokenError:
        with pytest.raises(TokenError) as caught:
            await self.tokens.get()
        assert UNSEEN not in str(caught.value)
        return caught.value


@pytest.fixture
def house(tmp_path: Path, server: TokenServer) -> House:
    return House(tmp_path / "spool", server)


# -- one request ------------------------------------------------------------------------------------------------------------


async def test_twenty_at_once_make_one_request(house: House, server: TokenServer) -> None:
    tokens = await asyncio.gather(*(house.tokens.get() for _ in range(20)))
    assert {token.reveal() for token in tokens} == set(server.given)
    assert server.asked == [
        {"client_id": "relay-client", "client_secret": "client-secret-unseen", "scope": "mail", "grant_type": "refresh_token",
         "refresh_token": FIRST}
    ]  # fmt: skip


async def test_a_token_is_used_again_until_some_time_before_it_expires(house: House, server: TokenServer) -> None:
    first = await house.tokens.get()
    house.clock.advance(3299)
    assert await house.tokens.get() is first
    house.clock.advance(1)
    assert await house.tokens.get() != first
    assert len(server.asked) == 2


@pytest.mark.parametrize(
    ("lifetime", "used_for"),
    [
        (60, 48),
        ("120", 96),
        (86400 * 30, 86400 - 300),
        (0, 480),
        (-5, 480),
        (None, 480),
        ("soon", 480),
        (True, 480),
        (float("nan"), 480),
        (10**400, 86400 - 300),
    ],
)
async def test_how_long_a_token_is_used(house: House, server: TokenServer, lifetime: Any, used_for: int) -> None:
    server.script(Answer(200, json.dumps({"access_token": "t", "token_type": "bearer", "expires_in": lifetime}).encode()))
    await house.tokens.get()
    house.clock.advance(used_for - 1)
    await house.tokens.get()
    assert len(server.asked) == 1
    house.clock.advance(1)
    await house.tokens.get()
    assert len(server.asked) == 2


async def test_a_server_that_is_down_near_the_end_of_a_token_costs_nothing_while_it_is_good(house: House, server: TokenServer) -> None:
    first = await house.tokens.get()
    server.script(Answer(503, b"later"))
    house.clock.advance(3400)
    assert await house.tokens.get() is first
    assert await house.tokens.get() is first
    assert len(server.asked) == 2  # not one for each message
    house.clock.advance(6)
    assert await house.tokens.get() is first
    assert len(server.asked) == 3
    house.clock.advance(200)
    assert (await house.trouble()).failure is Failure.UNREACHABLE
    server.heal()
    house.clock.advance(6)
    assert await house.tokens.get() != first


async def test_who_gives_up_waiting_takes_the_token_from_nobody(house: House, server: TokenServer) -> None:
    go = asyncio.Event()
    server.rotates = True
    server.script(Hold(go), times=1)
    first, second = (asyncio.ensure_future(house.tokens.get()) for _ in range(2))
    await eventually(lambda: len(server.asked) == 1, "the request")
    first.cancel()
    go.set()
    await second
    assert len(server.asked) == 1
    chain = house.stored()
    assert chain is not None and chain.refresh_token in server.refresh_tokens


async def test_a_request_whose_askers_have_all_gone_is_not_lost(house: House, server: TokenServer) -> None:
    go = asyncio.Event()
    server.rotates = True
    server.script(Hold(go), times=1)
    only = asyncio.ensure_future(house.tokens.get())
    await eventually(lambda: len(server.asked) == 1, "the request")
    only.cancel()
    go.set()
    await house.tokens.settled()
    assert (await house.tokens.get()).reveal() == server.given[0]
    assert len(server.asked) == 1


async def test_who_comes_after_a_change_does_not_share_the_fate_of_what_was_asked_before_it(house: House, server: TokenServer) -> None:
    go = asyncio.Event()
    right = Upstream.model_validate(house.settings).oauth2
    assert right is not None
    house.tokens.use(right.model_copy(update={"client_secret": Secret("an-old-one-unseen")}))
    server.script(Hold(go), times=1)
    before = asyncio.ensure_future(house.tokens.get())
    await eventually(lambda: len(server.asked) == 1, "the request with the old secret")
    house.tokens.use(right)
    after = asyncio.ensure_future(house.tokens.get())
    go.set()
    assert (await before).reveal() == (await after).reveal() == server.given[0]
    assert [asked["client_secret"] for asked in server.asked] == ["an-old-one-unseen", "client-secret-unseen"]


async def test_who_comes_after_a_new_sign_in_does_not_share_the_fate_of_the_one_before_it(house: House, server: TokenServer) -> None:
    go = asyncio.Event()
    server.script(Hold(go), times=1)
    before = asyncio.ensure_future(house.tokens.get())
    await eventually(lambda: len(server.asked) == 1, "the request with the old sign-in")
    assert house.tokens.take(Found(house.tokens._oauth2, "another sign-in"))
    after = asyncio.ensure_future(house.tokens.get())
    go.set()
    assert (await before).reveal() == (await after).reveal() == server.given[-1]
    assert len(server.asked) == 2


# -- what servers do wrong --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("action", "failure", "said"),
    [
        (Answer(503, b"<html>"), Failure.UNREACHABLE, "says 503"),
        (Answer(500, b'{"error": "server_error"}'), Failure.UNREACHABLE, "says 500 server_error"),
        (refused("temporarily_unavailable"), Failure.UNREACHABLE, "says 400 temporarily_unavailable"),
        (Answer(429, b"", (("Retry-After", "7"),)), Failure.SLOWED, "says 429"),
        (refused("slow_down"), Failure.SLOWED, "slow_down"),
        (Answer(404, b"not here"), Failure.NONSENSE, "says 404: is the address right?"),
        (Answer(302, b"", (("Location", "https://elsewhere.example/"),)), Failure.NONSENSE, "sends us elsewhere (302)"),
        (Answer(200, b"<html>"), Failure.NONSENSE, "does not answer in JSON"),
        (Answer(200, b"[" * 100_000), Failure.NONSENSE, "does not answer in JSON"),
        (Answer(200, b"[]"), Failure.NONSENSE, "does not answer in JSON"),
        (Answer(200, b"\xff\xfe"), Failure.NONSENSE, "does not answer in JSON"),
        (Answer(200, b"{}"), Failure.NONSENSE, "without a usable access_token"),
        (Answer(200, b'{"access_token": "a b"}'), Failure.NONSENSE, "without a usable access_token"),
        (Answer(200, b'{"access_token": "a\\u0001auth=x"}'), Failure.NONSENSE, "without a usable access_token"),
        (Answer(200, b'{"access_token": "a", "token_type": "mac"}'), Failure.NONSENSE, "another type than Bearer"),
        (Answer(200, b'{"access_token": "a", "token_type": ["Bearer"]}'), Failure.NONSENSE, "another type than Bearer"),
        (Answer(400, b"no length\r\n", (("Transfer-Encoding", "chunked"),)), Failure.NONSENSE, "does not answer in HTTP"),
        (Flood(), Failure.NONSENSE, "more than 256 KiB"),
        (Close(), Failure.UNREACHABLE, "cannot be reached"),
        (refused("invalid_grant", "Token has been expired or revoked."), Failure.REFUSED, "sign in again with `relay oauth login globex`"),
        (refused("interaction_required"), Failure.REFUSED, "relay oauth login globex"),
        (refused("invalid_client", status=401), Failure.REFUSED, "the client_id or client_secret is wrong or has expired"),
        (refused("unauthorized_client"), Failure.REFUSED, "may not ask for tokens in this way"),
        (refused("invalid_scope"), Failure.REFUSED, "the scope is unknown there"),
        (refused("invalid_client", error_codes=[7000222]), Failure.REFUSED, "the client_secret has expired"),
        (refused("something\r\nnew: \x1b[31m"), Failure.REFUSED, "says 400 something new:  [31m"),
    ],
    ids=repr,
)
async def test_what_a_token_server_does_wrong_is_told_apart(
    house: House, server: TokenServer, action: Any, failure: Failure, said: str
) -> None:
    server.script(action)
    trouble = await house.trouble()
    assert (trouble.failure, said in str(trouble)) == (failure, True), trouble
    assert str(trouble).isprintable()
    assert len(str(trouble)) < 600


async def test_a_server_that_is_not_there_or_not_trusted_is_said_so(house: House, server: TokenServer, tls: Authority) -> None:
    await server.stop()
    assert (await house.trouble()).failure is Failure.UNREACHABLE
    assert "cannot be reached: Connection refused" in str(await house.trouble())
    server.tls = tls.stranger().server
    await server.start()
    house.clock.advance(6)
    trouble = await house.trouble()
    assert (trouble.failure, "is not trusted" in str(trouble)) == (Failure.UNTRUSTED, True)


async def test_a_name_that_is_not_known_is_said_so(house: House, server: TokenServer) -> None:
    house.settings["oauth2"]["token_url"] = "https://nowhere.invalid/token"
    house.restart()
    trouble = await house.trouble()
    assert (trouble.failure, "nowhere.invalid cannot be reached: " in str(trouble)) == (Failure.UNREACHABLE, True)


@pytest.mark.parametrize("action", [Hang(), Hang(b"HTTP/1.1 503 X\r\nContent-Length: 9\r\n\r\n"), Drip()], ids=repr)
async def test_a_server_that_stalls_is_given_up(house: House, server: TokenServer, action: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(token_request, "_STEP_SECONDS", 0.3)
    monkeypatch.setattr(token_request, "_ANSWER_SECONDS", 1.0)
    monkeypatch.setattr(oauth2_module, "_WAIT_SECONDS", 0.6)
    server.script(action, times=1)
    trouble = await house.trouble()
    assert (trouble.failure, str(trouble)) == (Failure.TIMEOUT, "the token server 127.0.0.1 did not answer in time")
    await asyncio.wait_for(house.tokens.settled(), 10)  # its thread does not wait for ever, either


async def test_a_server_that_hangs_holds_its_own_share_of_the_threads(
    tmp_path: Path, server: TokenServer, tls: Authority, monkeypatch: pytest.MonkeyPatch
) -> None:
    threads, held = TokenThreads(), asyncio.Event()
    monkeypatch.setattr(oauth2_module, "_WAIT_SECONDS", 0.2)
    server.script(Hold(held))
    store = TokenStore(tmp_path, Keys(None), note=lambda _: None)

    def tokens(name: str, url: str) -> Tokens:
        section = server.settings(token_url=url)
        upstream = Upstream.model_validate({"host": "127.0.0.1", "username": "u", "oauth2": section})
        return Tokens(name, upstream, store=store, threads=threads, clock=ManualClock(), note=lambda *_: None)

    async with TokenServer(tls.server) as other:
        hung = [tokens(f"hung{number}", server.url()) for number in range(30)]
        results = await asyncio.gather(*(each.get() for each in hung), return_exceptions=True)
        assert all(isinstance(result, TokenError) for result in results)
        await eventually(lambda: len(server.asked) == 8, "as many requests as one server is asked at once")
        others = [tokens(f"other{number}", f"https://localhost:{other.port}/token") for number in range(30)]
        monkeypatch.setattr(oauth2_module, "_WAIT_SECONDS", 30.0)
        assert len({token.reveal() for token in await asyncio.gather(*(each.get() for each in others))}) == 30
        held.set()
        for each in hung:
            await each.settled()


async def test_a_system_without_threads_is_asked_again(house: House, server: TokenServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("relay.upstream.token_threads._AGAIN_SECONDS", 0.01)
    start, refusals = threading.Thread.start, 3

    def scarce(thread: threading.Thread) -> None:
        nonlocal refusals
        if thread.name == "tokens" and refusals:
            refusals -= 1
            raise RuntimeError("can't start new thread")
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", scarce)
    await house.tokens.get()
    assert (refusals, len(server.asked)) == (0, 1)


async def test_a_system_without_threads_is_asked_by_one_timer_however_many_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    asked, loop = 0, asyncio.get_running_loop()

    def scarce(thread: threading.Thread) -> None:
        nonlocal asked
        asked += 1
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr("relay.upstream.token_threads._AGAIN_SECONDS", 0.0)
    monkeypatch.setattr(threading.Thread, "start", scarce)
    threads = TokenThreads()
    for number in range(10):
        threads.run(f"server{number}", lambda: None)
    before = asked
    turn = loop.create_future()
    loop.call_later(0.0, turn.set_result, None)
    await turn
    assert asked - before == 1


async def test_who_comes_soon_after_a_failure_shares_it(house: House, server: TokenServer) -> None:
    server.script(Answer(429, b"", (("Retry-After", "90"),)), times=1)
    for _ in range(5):
        assert (await house.trouble()).failure is Failure.SLOWED
    house.clock.advance(89)
    await house.trouble()
    assert len(server.asked) == 1
    house.clock.advance(2)
    await house.tokens.get()


async def test_nothing_that_was_shown_is_repeated(house: House, server: TokenServer) -> None:
    server.refresh_tokens.clear()
    assert "The token (secret) is over." in str(await house.trouble())
    house.settings["oauth2"]["client_secret"] = "wrong and unseen"
    house.restart()
    assert "bad secret (secret)" in str(await house.trouble())


def test_what_a_server_says_at_length_costs_little() -> None:
    """The loop waits for a thread that reckons."""
    secrets = ("a-secret-unseen", FIRST * 500)
    started = time.process_time()
    said = token_request._words(f"The token {FIRST} is over. " * 10_000, secrets)
    assert time.process_time() - started < 0.2  # it takes 10 ms, and a second where all of it is looked through
    assert said.startswith("The token (secret) is over. The token (secret) is over. ") and len(said) == 300


# -- rotation ---------------------------------------------------------------------------------------------------------------


async def test_a_rotated_token_is_stored_encrypted_and_used_next_time_also_by_another_process(house: House, server: TokenServer) -> None:
    server.rotates = True
    for number in range(1, 4):
        await house.tokens.get()
        assert house.stored() == Chain(f"refresh-token-unseen-{number}", FIRST, f"relay-client {server.url()}")
        house.clock.advance(3600)
    house.restart()
    await house.tokens.get()
    assert [asked["refresh_token"] for asked in server.asked] == [FIRST, *(f"refresh-token-unseen-{number}" for number in (1, 2, 3))]
    folder = house.store.path("globex").parent
    assert UNSEEN not in "".join(path.read_text() for path in folder.iterdir())
    assert {stat.S_IMODE(path.stat().st_mode) for path in folder.iterdir()} == {0o600}
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert sorted(path.name for path in folder.iterdir()) == ["%key", "globex", "globex%lock"]
    assert [note.partition(":")[0] for note in house.notes] == ["a key for refresh tokens was made"]


async def test_a_rotated_token_is_stored_also_beside_an_access_token_of_no_use(house: House, server: TokenServer) -> None:
    server.script(Answer(200, b'{"refresh_token": "rotated-unseen"}'))
    assert (await house.trouble()).failure is Failure.NONSENSE
    chain = house.stored()
    assert chain is not None and chain.refresh_token == "rotated-unseen"


async def test_a_token_that_does_not_rotate_is_not_stored(house: House) -> None:
    await house.tokens.get()
    assert house.stored() is None


async def test_the_configured_token_wins_once_it_is_another_one(house: House, server: TokenServer) -> None:
    server.rotates = True
    await house.tokens.get()
    house.settings["oauth2"]["refresh_token"] = "replaced-unseen"
    server.refresh_tokens.add("replaced-unseen")
    house.restart()
    await house.tokens.get()
    assert server.asked[-1]["refresh_token"] == "replaced-unseen"
    chain = house.stored()
    assert chain is not None and chain.began == "replaced-unseen"
    house.restart()
    await house.tokens.get()
    assert server.asked[-1]["refresh_token"] == chain.refresh_token


async def test_a_stored_token_of_another_client_is_not_shown(house: House, server: TokenServer) -> None:
    with house.store.slot("globex") as slot:
        slot.save(Chain("stored-unseen", "", "another-client https://elsewhere.example/"))
    house.settings["oauth2"]["refresh_token"] = None
    house.settings["oauth2"] = {key: value for key, value in house.settings["oauth2"].items() if value is not None}
    house.restart()
    trouble = await house.trouble()
    assert "another client's" in str(trouble) and "relay oauth login globex" in str(trouble)
    assert server.asked == []


async def test_without_any_refresh_token_it_says_how_to_get_one(tmp_path: Path, server: TokenServer) -> None:
    house = House(tmp_path / "spool", server, refresh_token=None)
    trouble = await house.trouble()
    assert str(trouble) == "there is no refresh token; sign in with `relay oauth login globex`"
    assert (trouble.failure, trouble.sign_in) == (Failure.REFUSED, True)


@pytest.mark.parametrize("damage", [b"", b"garbage", b"01234567.gAAAAA==", b"\xff\xfe"])
async def test_a_stored_token_that_cannot_be_read_is_told_and_the_configured_one_used(
    house: House, server: TokenServer, damage: bytes
) -> None:
    server.rotates = True
    await house.tokens.get()
    house.store.path("globex").write_bytes(damage)
    house.restart()
    server.refresh_tokens.add(FIRST)
    await house.tokens.get()
    assert server.asked[-1]["refresh_token"] == FIRST
    assert "the stored refresh token cannot be read" in house.notes[-1]
    house.settings["oauth2"] = {key: value for key, value in house.settings["oauth2"].items() if key != "refresh_token"}
    house.store.path("globex").write_bytes(damage)
    house.restart()
    assert "relay oauth login globex" in str(await house.trouble())


async def test_a_key_that_is_configured_later_opens_what_was_stored_before(tmp_path: Path, house: House, server: TokenServer) -> None:
    server.rotates = True
    await house.tokens.get()
    key = tmp_path / "key"
    key.write_text(new_key())
    house.store = TokenStore(tmp_path / "spool", Keys(key), note=house.notes.append)
    house.restart()
    await house.tokens.get()
    (tmp_path / "spool/oauth/%key").unlink()
    house.restart()
    await house.tokens.get()
    assert len(server.asked) == 3
    key.write_text(new_key())
    house.store = TokenStore(tmp_path / "spool", Keys(key), note=house.notes.append)
    with pytest.raises(Unreadable, match="not in"):
        house.stored()


async def test_the_server_is_not_asked_when_there_is_no_room_for_its_answer(house: House, server: TokenServer, tmp_path: Path) -> None:
    (tmp_path / "spool/oauth").write_text("a file where a directory should be")
    trouble = await house.trouble()
    assert (trouble.failure, "no place for the refresh token" in str(trouble)) == (Failure.UNREACHABLE, True)
    assert server.asked == []


def full(*_: Any) -> None:
    raise OSError(28, "No space left on device")


async def test_a_new_token_that_cannot_be_stored_is_loud_and_not_used_before_it_is(
    house: House, server: TokenServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.rotates = True
    with house.store.slot("globex") as slot:
        slot.prepare()  # there is a key
    with monkeypatch.context() as patch:
        patch.setattr("relay.upstream.token_store.os.fsync", full)
        assert (await house.tokens.get()).reveal() in server.valid
        assert "its new refresh token cannot be stored, and is lost when the relay ends: No space left" in house.notes[-1]
        house.clock.advance(3600)
        assert "No space left" in str(await house.trouble())
        assert len(server.asked) == 1
    house.clock.advance(6)
    await house.tokens.get()
    assert [asked["refresh_token"] for asked in server.asked] == [FIRST, "refresh-token-unseen-1"]


async def test_a_new_token_that_could_not_be_stored_takes_no_sign_in_away(
    house: House, server: TokenServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.rotates = True
    await house.tokens.get()
    house.clock.advance(3600)
    with monkeypatch.context() as patch:
        patch.setattr(Slot, "save", full)
        await house.tokens.get()
    with house.store.slot("globex") as slot:
        chain = slot.load()
        assert chain is not None
        slot.save(chain._replace(refresh_token="signed-in-unseen", signed="by the operator"))
    server.refresh_tokens = {"signed-in-unseen"}
    house.clock.advance(3600)
    await house.tokens.get()
    assert server.asked[-1]["refresh_token"] == "signed-in-unseen"


@pytest.mark.parametrize("key", [None, "configured"])
def test_a_directory_that_is_exchanged_meanwhile_leads_root_nowhere_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, key: str | None
) -> None:
    """Whoever owns the spool may put a link in the place of its directory at any moment."""
    elsewhere, folder = tmp_path / "elsewhere", tmp_path / "spool/oauth"
    elsewhere.mkdir()
    if key:
        (tmp_path / key).write_text(new_key())
        (tmp_path / key).chmod(0o600)
    store = TokenStore(tmp_path / "spool", Keys(tmp_path / key if key else None), note=lambda _: None)
    lock = fcntl.flock

    def exchange(*arguments: int) -> None:
        lock(*arguments)
        folder.rename(tmp_path / "spool/before")
        folder.symlink_to(elsewhere)

    monkeypatch.setattr("relay.upstream.token_store.fcntl.flock", exchange)
    with store.slot("globex") as slot:
        slot.prepare()
        slot.save(Chain("a", "b", "c"))
        assert slot.load() == Chain("a", "b", "c")
    assert list(elsewhere.iterdir()) == []


@pytest.mark.parametrize("trap", ["directory", "lock", "link"])
def test_no_link_leads_root_to_files_elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, trap: str) -> None:
    """The spool is the service's, which may have been taken over; root signs in."""
    elsewhere, spool = tmp_path / "elsewhere", tmp_path / "spool"
    elsewhere.mkdir()
    spool.mkdir()
    store = TokenStore(spool, Keys(None), note=print)
    path = store.path("globex")
    given: list[int] = []
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    monkeypatch.setattr(os, "fchown", lambda descriptor, *_: given.append(os.fstat(descriptor).st_ino))
    if trap == "directory":
        path.parent.symlink_to(elsewhere)
    else:
        path.parent.mkdir(parents=True)
        (elsewhere / "secret").touch()
        (os.link if trap == "lock" else os.symlink)(elsewhere / "secret", path.with_name(f"{path.name}%lock"))
    with pytest.raises(StoreError, match="link"), store.slot("globex"):
        pass
    assert given == []
    assert {each.name for each in elsewhere.iterdir()} <= {"secret"}


def test_a_pipe_in_the_place_of_a_token_holds_nobody_up(tmp_path: Path) -> None:
    store = TokenStore(tmp_path, Keys(None), note=lambda _: None)
    path = store.path("globex")
    path.parent.mkdir(parents=True)
    os.mkfifo(path)
    assert store.signed("globex") == ""
    with store.slot("globex") as slot, pytest.raises(Unreadable):
        slot.load()


def test_a_token_is_on_disk_before_it_is_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its content before it has its name, and the name before anything else: the one before is worth nothing any more."""
    done: list[str] = []
    sync, rename = os.fsync, os.rename

    def note_sync(descriptor: int) -> None:
        sync(descriptor)
        done.append("directory" if stat.S_ISDIR(os.fstat(descriptor).st_mode) else "file")

    def note_rename(*arguments: Any, **more: Any) -> None:
        rename(*arguments, **more)
        done.append("rename")

    with TokenStore(tmp_path, Keys(None), note=lambda _: None).slot("globex") as slot:
        slot.prepare()
        monkeypatch.setattr(os, "fsync", note_sync)
        monkeypatch.setattr(os, "rename", note_rename)
        slot.save(Chain("a", "b", "c"))
        assert done == ["file", "rename", "directory"]


async def test_two_processes_never_show_one_token_at_a_time(house: House, server: TokenServer) -> None:
    server.rotates = True
    other = House(house.store.path("globex").parents[1], server)
    await asyncio.gather(house.tokens.get(), other.tokens.get())
    assert [asked["refresh_token"] for asked in server.asked] == [FIRST, "refresh-token-unseen-1"]


async def test_a_new_sign_in_is_noticed_and_what_the_relay_stores_itself_is_not(house: House, server: TokenServer) -> None:
    server.rotates = True
    restarted: list[None] = []
    (use,) = house.tokens.sign_in(lambda: restarted.append(None))

    def look() -> bool:
        old = use.current()
        return (new := old.read_again()) is not old and use.take(old, new)

    assert not look()
    first = await house.tokens.get()
    assert not look()
    house.clock.advance(3600)
    await house.tokens.get()
    assert not look()
    with house.store.slot("globex") as slot:
        chain = slot.load()
        assert chain is not None
        slot.save(chain._replace(signed="by the operator"))
    assert look()
    assert (restarted, look()) == ([None], False)
    assert await house.tokens.get() != first
    assert not look()
    house.store.path("globex").unlink()
    house.store.path("globex").mkdir()
    with pytest.raises(ValueError, match="cannot read"):
        look()


@pytest.mark.parametrize("name", ["a/b", "..", ".hidden", "a%lock", "ü" * 100, "%key", "x" * 200])
def test_any_name_of_an_upstream_has_a_file_of_its_own(tmp_path: Path, name: str) -> None:
    store = TokenStore(tmp_path, Keys(None), note=lambda _: None)
    with store.slot(name) as slot:
        slot.save(Chain("a", "b", "c"))
    with store.slot(name) as slot:
        assert slot.load() == Chain("a", "b", "c")
    assert store.path(name).parent == tmp_path / "oauth"
    assert store.path(name).name not in ("%key", "a%lock")
    assert len(list((tmp_path / "oauth").iterdir())) == 3


# -- the other grants -------------------------------------------------------------------------------------------------------


async def test_client_credentials(tmp_path: Path, server: TokenServer) -> None:
    house = House(tmp_path / "spool", server, refresh_token=None, client_credentials=True)
    await house.tokens.get()
    assert server.asked == [
        {"client_id": "relay-client", "client_secret": "client-secret-unseen", "scope": "mail", "grant_type": "client_credentials"}
    ]
    assert not (tmp_path / "spool/oauth").exists()


@pytest.fixture(scope="module")
def account() -> tuple[dict[str, str], RSAPublicKey]:
    """The key of a service account as Google hands it out, and what it is verified with."""
    private = generate_private_key(65537, 2048)
    pem = private.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()).decode()
    key = {"type": "service_account", "client_email": "mail@project.example", "private_key": pem, "private_key_id": "k1"}
    return key, private.public_key()


async def test_a_service_account_signs_who_it_is_and_for_whom_it_speaks(
    tmp_path: Path, server: TokenServer, account: tuple[dict[str, str], RSAPublicKey]
) -> None:
    key, public = account
    shown: list[dict[str, Any]] = []

    def verified(assertion: str) -> bool:
        parts = [urlsafe_b64decode(part + "=" * (-len(part) % 4)) for part in assertion.split(".")]
        shown.extend(json.loads(part) for part in parts[:2])
        public.verify(parts[2], assertion.rpartition(".")[0].encode(), PKCS1v15(), SHA256())
        return True

    server.verify = verified
    file = tmp_path / "key.json"
    file.write_text(json.dumps(key, indent=2))
    house = House(tmp_path / "spool", server, service_account={"file": str(file)}, subject="boss@acme.example")
    await house.tokens.get()
    (asked,) = server.asked
    assert asked.keys() == {"grant_type", "assertion"}
    header, claims = shown
    assert header == {"alg": "RS256", "typ": "JWT", "kid": "k1"}
    assert claims["exp"] - claims["iat"] == 3600
    assert 0 <= house.clock.now() - claims["iat"] <= 60
    del claims["exp"], claims["iat"]
    assert claims == {"iss": "mail@project.example", "sub": "boss@acme.example", "aud": server.url(), "scope": "mail"}


async def test_a_service_account_that_is_refused_or_cannot_be_read_says_so(
    tmp_path: Path, server: TokenServer, account: tuple[dict[str, str], RSAPublicKey]
) -> None:
    house = House(tmp_path / "spool", server, service_account=json.dumps(account[0]))
    assert "invalid_grant (Invalid JWT Signature.)" in str(await house.trouble())
    assert "relay oauth login" not in str(await house.trouble())  # nobody can sign in for it
    broken = account[0] | {"private_key": account[0]["private_key"].replace("M", "!")}
    house = House(tmp_path / "spool", server, service_account=json.dumps(broken))
    trouble = await house.trouble()
    assert (trouble.failure, str(trouble)) == (Failure.REFUSED, "the private_key of the service account cannot be read")


# -- where tokens come from -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("upstream_provider", "oauth2", "expected"),
    [
        ("google", {}, ("google", "https://oauth2.googleapis.com/token", "https://mail.google.com/", False)),
        (None, {"provider": "google"}, ("google", "https://oauth2.googleapis.com/token", "https://mail.google.com/", False)),
        (
            "microsoft365",
            {"tenant": "a.onmicrosoft.com"},
            (
                "microsoft",
                "https://login.microsoftonline.com/a.onmicrosoft.com/oauth2/v2.0/token",
                "https://outlook.office.com/SMTP.Send offline_access",
                True,
            ),
        ),
        (
            None,
            {"provider": "microsoft", "client_credentials": True},
            (
                "microsoft",
                "https://login.microsoftonline.com/organizations/oauth2/v2.0/token",
                "https://outlook.office365.com/.default",
                True,
            ),
        ),
        ("microsoft365", {"token_url": "https://b.example/", "scope": "x"}, ("microsoft", "https://b.example/", "x", True)),
        ("yahoo", {"token_url": "https://b.example/"}, ("", "https://b.example/", "", False)),
    ],
)
def test_where_tokens_come_from(upstream_provider: str | None, oauth2: dict[str, Any], expected: tuple[str, str, str, bool]) -> None:
    found = token_server(OAuth2.model_validate({"client_id": "x"} | oauth2), upstream_provider)
    assert (found.provider, found.token_url, found.scope, found.device_url is not None) == expected


# -- at an upstream ---------------------------------------------------------------------------------------------------------


@asynccontextmanager
async def pool_to(tmp_path: Path, smtp: ScriptedUpstream, server: TokenServer, **oauth2: Any) -> AsyncIterator[Pool]:
    notes: list[str] = []
    store = TokenStore(tmp_path, Keys(None), note=notes.append)
    upstream = settings(smtp, username="mailer@globex.example", oauth2=server.settings(**oauth2), limits={"connections": 20})
    pool = Pool({"globex": upstream}, hostname="relay.test", clock=ManualClock(), note=lambda _, what: notes.append(what), store=store)
    try:
        yield pool
    finally:
        await pool.close()
        assert UNSEEN not in "".join(notes)


async def send(pool: Pool, count: int = 1) -> list[Outcome]:
    results = await asyncio.gather(*(pool.send("globex", outgoing(f"{number}@example.org")) for number in range(count)))
    outcomes = [outcome for outcomes in results for outcome in outcomes]
    assert UNSEEN not in "".join(str(outcome.reply) for outcome in outcomes)
    return outcomes


async def test_mail_goes_with_a_token_and_its_sessions_are_kept(tmp_path: Path, server: TokenServer) -> None:
    async with ScriptedUpstream(tokens=server.valid) as smtp, pool_to(tmp_path, smtp, server) as pool:
        await open_sessions(pool, smtp, 20, "globex")
        assert all_sent(await send(pool))
        assert {(login.mechanism, login.user, login.password) for login in smtp.logins} == {
            ("XOAUTH2", "mailer@globex.example", "access-token-unseen-1")
        }
        assert (len(server.asked), len(smtp.connections)) == (1, 20)


async def test_a_token_that_has_ended_early_is_refreshed_once_for_all(tmp_path: Path, server: TokenServer) -> None:
    async with ScriptedUpstream(tokens=server.valid) as smtp, pool_to(tmp_path, smtp, server) as pool:
        assert all_sent(await send(pool))
        server.expire()
        smtp.script("mail", b"421 4.3.0 closing", times=1)
        assert all_sent(await send(pool, 20))
        assert len(server.asked) == 2


async def test_a_fresh_token_that_is_refused_costs_one_more_and_no_hammering(tmp_path: Path, server: TokenServer) -> None:
    async with ScriptedUpstream(tokens=()) as smtp, pool_to(tmp_path, smtp, server) as pool:
        outcomes = await send(pool, 20)
        assert words(outcomes) == REFUSED * 20
        assert (len(server.asked), len(smtp.logins)) == (2, 2)
        (said,) = {str(outcome.reply) for outcome in outcomes}
        assert said == "535 5.7.8 Wrong user or password (status 401: the token has expired, was revoked, or is for something else)"


async def test_a_token_server_that_is_down_is_no_fault_of_the_credential(tmp_path: Path, server: TokenServer) -> None:
    server.script(Answer(503, b""))
    async with ScriptedUpstream(tokens=server.valid) as smtp, pool_to(tmp_path, smtp, server) as pool:
        assert words(await send(pool, 20)) == ["deferred upstream auth fallback"] * 20
        assert (len(server.asked), len(smtp.connections)) == (1, 0)


async def test_a_throttling_token_server_slows_down(tmp_path: Path, server: TokenServer) -> None:
    server.script(Answer(429, b""))
    async with ScriptedUpstream(tokens=server.valid) as smtp, pool_to(tmp_path, smtp, server) as pool:
        assert words(await send(pool, 5)) == ["deferred upstream auth throttled"] * 5
        assert len(server.asked) == 1


async def test_a_server_that_is_down_after_a_refusal_says_so(tmp_path: Path, server: TokenServer) -> None:
    async with ScriptedUpstream(tokens=server.valid) as smtp, pool_to(tmp_path, smtp, server) as pool:
        assert all_sent(await send(pool))
        server.expire()
        server.script(Answer(503, b""))
        smtp.script("mail", b"421 4.3.0 closing", times=1)
        assert words(await send(pool)) == ["deferred upstream auth fallback"]


async def test_a_sign_in_that_was_missing_is_found_at_the_next_attempt(tmp_path: Path, server: TokenServer) -> None:
    async with ScriptedUpstream(tokens=server.valid) as smtp, pool_to(tmp_path, smtp, server, refresh_token=None) as pool:
        changed: list[str] = []
        pool.secret_changed = changed.append
        (outcome,) = await send(pool)
        assert words([outcome]) == REFUSED
        assert str(outcome.reply) == "there is no refresh token; sign in with `relay oauth login globex`"
        store = TokenStore(tmp_path, Keys(None), note=lambda _: None)
        with store.slot("globex") as slot:
            slot.save(Chain(FIRST, "", f"relay-client {server.url()}", signed="1"))
        assert all_sent(await send(pool))
        assert changed == ["globex"]


async def test_odd_recipients_and_blocked_accounts_cost_no_token(tmp_path: Path, server: TokenServer) -> None:
    async with ScriptedUpstream(tokens=server.valid) as smtp, pool_to(tmp_path, smtp, server) as pool:
        smtp.script("rcpt", b"554 5.7.1 Relay access denied", times=3)
        for _ in range(3):
            assert words(await send(pool)) == ["deferred credential rcpt fallback"]
        smtp.script("final", b"550 5.1.8 Access denied, bad outbound sender", times=3)
        for _ in range(3):
            assert words(await send(pool)) == ["deferred credential final fallback"]
        assert len(server.asked) == 1


async def test_passwords_are_never_fallen_back_to(tmp_path: Path, server: TokenServer) -> None:
    async with ScriptedUpstream(users={"mailer@globex.example": "x"}) as smtp, pool_to(tmp_path, smtp, server) as pool:
        (outcome,) = await send(pool)
        assert (outcome.status, smtp.logins) == (Status.DEFERRED, [])
        assert "none of xoauth2 is offered" in str(outcome.reply)


@pytest.mark.parametrize("shown", [slice(None), slice(60), slice(48, 70)])
async def test_a_token_that_is_repeated_does_not_come_into_the_log(tmp_path: Path, server: TokenServer, shown: slice) -> None:
    async with ScriptedUpstream(tokens=server.valid) as smtp, pool_to(tmp_path, smtp, server) as pool:
        assert all_sent(await send(pool))
        line = initial_response("mailer@globex.example", server.given[0])[shown]
        smtp.script("mail", b"421 4.3.0 closing", times=1)
        smtp.script("auth", b"501 5.5.2 Bad line: " + line)
        (outcome,) = await send(pool)
        assert "Bad line: " in outcome.reply.text and "(secret)" in outcome.reply.text
        assert not any(line[start : start + 8].decode() in outcome.reply.text for start in range(len(line) - 7))


async def test_the_pool_waits_at_its_end_for_a_request_under_way(tmp_path: Path, server: TokenServer) -> None:
    server.rotates = True
    go = asyncio.Event()
    server.script(Hold(go), times=1)
    async with ScriptedUpstream(tokens=server.valid) as smtp:
        async with pool_to(tmp_path, smtp, server) as pool:
            sending = asyncio.ensure_future(send(pool))
            await eventually(lambda: len(server.asked) == 1, "the request")
            sending.cancel()
            closing = asyncio.ensure_future(pool.close())
            go.set()
            await closing
        store = TokenStore(tmp_path, Keys(None), note=lambda _: None)
        with store.slot("globex") as slot:
            assert slot.load() is not None


async def test_no_address_is_asked_that_nobody_listens_on(tmp_path: Path, server: TokenServer) -> None:
    nobody = f"https://127.0.0.1:{unused_port()}/"
    async with ScriptedUpstream(tokens=server.valid) as smtp, pool_to(tmp_path, smtp, server, token_url=nobody) as pool:
        assert words(await send(pool)) == ["deferred upstream auth fallback"]
        assert smtp.connections == []
