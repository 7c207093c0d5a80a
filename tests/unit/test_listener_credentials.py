"""Names and passwords against the users: who is right, what it costs, how failures slow down, and that a flood stalls nobody."""

import asyncio
import contextlib
import hashlib
import threading
import time
from base64 import b64encode
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest

from relay.clock import Clock, ManualClock, SystemClock
from relay.config.listeners import User
from relay.config.password import ScryptHash, hash_password
from relay.config.secrets import Secret
from relay.listener import credentials as module
from relay.listener.credentials import Credentials, Failures, LoginResult, growing_delay
from relay.listener.login import Given
from tests.support.eventually import eventually

CHEAP = "scrypt$16$8$1$MDEyMzQ1Njc4OWFiY2RlZg$MomXuMw9YekkEH5CXhpWEZ7aT3P7uIj0zEYtEnXoIY4"  # s3cret
DEAR = hash_password("s3cret")
PLAIN = {"erp": {"password": "s3cret"}}
MIXED = {**PLAIN, "crm": {"password_hash": CHEAP}, "dms": {"password_hash": DEAR}}
HOME = "192.0.2.1"

Make = Callable[..., Credentials]


@pytest.fixture
async def make() -> AsyncIterator[Make]:
    made: list[Credentials] = []

    def credentials(
        users: dict[str, dict[str, Any]], *, clock: Clock | None = None, delay: Callable[[int], float] = lambda failures: 0.0
    ) -> Credentials:
        models = {name: User.model_validate({"senders": "*", **keys}) for name, keys in users.items()}
        made.append(Credentials(models, clock or ManualClock(), delay=delay))
        return made[-1]

    yield credentials
    for item in made:
        item.close()


@pytest.fixture
def hashed(monkeypatch: pytest.MonkeyPatch) -> list[ScryptHash]:
    """Every hash that is computed."""
    seen: list[ScryptHash] = []
    real = ScryptHash.matches

    def matches(self: ScryptHash, password: str) -> bool:
        seen.append(self)
        return real(self, password)

    monkeypatch.setattr(ScryptHash, "matches", matches)
    return seen


@pytest.mark.parametrize(
    ("user", "password", "verdict"),
    [
        ("erp", "s3cret", LoginResult.RIGHT),
        ("crm", "s3cret", LoginResult.RIGHT),
        ("dms", "s3cret", LoginResult.RIGHT),
        ("erp", "wrong", LoginResult.WRONG),
        ("crm", "wrong", LoginResult.WRONG),
        ("ERP", "s3cret", LoginResult.WRONG),
        ("erp", "", LoginResult.WRONG),
        ("crm", "", LoginResult.WRONG),
        ("", "s3cret", LoginResult.WRONG),
        ("", "", LoginResult.WRONG),
        ("nobody", "s3cret", LoginResult.WRONG),
    ],
)
async def test_a_login_is_right_when_name_and_password_are(user: str, password: str, verdict: LoginResult, make: Make) -> None:
    assert await make(MIXED).verify(Given(user, password), HOME) is verdict


async def test_a_name_beyond_ascii_is_found_as_the_client_writes_it(make: Make) -> None:
    config = {"jürgen": {"password": "pa\u0308sswort"}}
    assert make(config).known(Given("jürgen", "pässwort"), HOME)


async def test_a_hash_of_nothing_lets_nobody_in(make: Make) -> None:
    digest = b64encode(hashlib.scrypt(b"", salt=b"12345678", n=16, r=8, p=1, dklen=32)).decode()
    stored = f"scrypt$16$8$1${b64encode(b'12345678').decode()}${digest}"
    credentials = make({"crm": {"password_hash": stored}})
    for _ in range(2):  # and it is not remembered
        assert not credentials.known(Given("crm", ""), HOME)
        assert await credentials.verify(Given("crm", ""), HOME) is LoginResult.WRONG


async def test_a_plain_password_is_answered_at_once_and_a_hash_is_not(make: Make) -> None:
    credentials = make(MIXED)
    assert credentials.known(Given("erp", "s3cret"), HOME)
    assert not credentials.known(Given("erp", "wrong"), HOME)
    assert not credentials.known(Given("crm", "s3cret"), HOME)
    assert not credentials.known(Given("nobody", "s3cret"), HOME)


async def test_a_right_password_is_remembered_for_five_minutes(make: Make, hashed: list[ScryptHash]) -> None:
    clock = ManualClock()
    credentials = make(MIXED, clock=clock)
    assert await credentials.verify(Given("crm", "s3cret"), HOME) is LoginResult.RIGHT
    clock.advance(299)
    assert credentials.known(Given("crm", "s3cret"), "198.51.100.9")
    assert not credentials.known(Given("crm", "s3crets"), HOME)
    assert not credentials.known(Given("dms", "s3cret"), HOME)
    clock.advance(2)
    assert not credentials.known(Given("crm", "s3cret"), HOME)
    assert len(hashed) == 1
    assert await credentials.verify(Given("crm", "s3cret"), HOME) is LoginResult.RIGHT
    assert len(hashed) == 2


async def test_what_is_wrong_costs_the_dearest_hash_whoever_it_is(make: Make, hashed: list[ScryptHash]) -> None:
    credentials = make(MIXED)
    work = []
    for name in ("nobody", "erp", "dms"):
        await credentials.verify(Given(name, "wrong"), HOME)
        work.append(hashed.pop().work)
    assert work == [2**18] * 3
    assert hashed == []


async def test_without_hashes_nothing_is_hashed(make: Make, hashed: list[ScryptHash]) -> None:
    credentials = make(PLAIN)
    assert await credentials.verify(Given("nobody", "x"), HOME) is LoginResult.WRONG
    assert await credentials.verify(Given("erp", "x"), HOME) is LoginResult.WRONG
    assert hashed == []


async def test_an_unknown_user_and_a_wrong_password_take_the_same_time(make: Make) -> None:
    credentials = make({"dms": {"password_hash": DEAR}})
    times: dict[str, list[float]] = {"dms": [], "nobody": []}
    for _ in range(5):
        for name, own in times.items():
            begun = time.process_time()  # all threads', and what else the machine does counts nothing
            await credentials.verify(Given(name, "wrong"), HOME)
            own.append(time.process_time() - begun)
    known, unknown = min(times["dms"]), min(times["nobody"])
    print(f"a wrong password took {known * 1000:.1f} ms, an unknown user {unknown * 1000:.1f} ms")
    assert known / 1.5 < unknown < known * 1.5


async def test_after_a_failure_also_the_right_password_waits_for_its_turn(make: Make) -> None:
    credentials = make(PLAIN, delay=lambda failures: 0.15 * failures)
    loop = asyncio.get_running_loop()
    begun = loop.time()
    assert await credentials.verify(Given("erp", "wrong"), HOME) is LoginResult.WRONG
    assert loop.time() - begun >= 0.14
    assert not credentials.known(Given("erp", "s3cret"), HOME)
    assert credentials.known(Given("erp", "s3cret"), "198.51.100.9")
    begun = loop.time()
    assert await credentials.verify(Given("erp", "s3cret"), HOME) is LoginResult.RIGHT
    assert loop.time() - begun >= 0.14
    assert credentials.known(Given("erp", "s3cret"), HOME)


async def test_guesses_sent_at_once_stand_in_line(make: Make) -> None:
    """What is told apart by silence: a right guess must not overtake the wrong ones before it."""
    credentials = make(PLAIN, clock=SystemClock(), delay=lambda failures: 0.05)
    await credentials.verify(Given("erp", "0"), HOME)
    begun = time.monotonic()
    took: dict[str, float] = {}

    async def guess(password: str) -> None:
        await credentials.verify(Given("erp", password), HOME)
        took[password] = time.monotonic() - begun

    await asyncio.gather(guess("1"), guess("2"), guess("s3cret"))
    assert took["1"] < took["2"]
    assert took["s3cret"] >= 0.09


async def test_a_line_that_is_too_long_is_not_joined(make: Make, hashed: list[ScryptHash]) -> None:
    credentials = make({"crm": {"password_hash": CHEAP}}, delay=lambda failures: 0.0 if failures < 2 else 20.0)
    await credentials.verify(Given("crm", "wrong"), HOME)
    tasks = [asyncio.create_task(credentials.verify(Given("crm", "wrong"), HOME)) for _ in range(3)]
    await eventually(lambda: len(hashed) == 4, "the others to be looked at")
    credentials._failures.add((HOME, "crm"), 60.0)
    assert await credentials.verify(Given("crm", "s3cret"), HOME) is LoginResult.BUSY
    credentials.stop()
    assert await asyncio.gather(*tasks) == [LoginResult.WRONG] * 3


async def test_a_stop_lets_nobody_wait(make: Make) -> None:
    credentials = make(PLAIN, delay=lambda failures: 25.0)
    task = asyncio.create_task(credentials.verify(Given("erp", "wrong"), HOME))
    await asyncio.sleep(0)
    waiting = asyncio.create_task(credentials.verify(Given("erp", "s3cret"), HOME))
    await asyncio.sleep(0)
    assert not task.done()
    credentials.stop()
    async with asyncio.timeout(20):
        assert await task is LoginResult.WRONG
        assert await waiting is LoginResult.BUSY


async def test_a_flood_from_one_address_leaves_room_for_the_others(make: Make) -> None:
    credentials = make({"crm": {"password_hash": CHEAP}})
    flood = [asyncio.create_task(credentials.verify(Given(f"user{number}", "guess"), "10.0.0.1")) for number in range(200)]
    await asyncio.sleep(0)
    async with asyncio.timeout(20):
        assert await credentials.verify(Given("crm", "s3cret"), "10.0.0.2") is LoginResult.RIGHT
        assert (await asyncio.gather(*flood)).count(LoginResult.BUSY) == 200 - module._QUEUE_OF_ONE
    async with asyncio.timeout(20):
        assert await credentials.verify(Given("nobody", "guess"), "10.0.0.1") is LoginResult.WRONG


async def test_a_flood_waits_in_a_short_queue_and_the_loop_goes_on(make: Make) -> None:
    credentials = make({"dms": {"password_hash": DEAR}, **PLAIN})
    lags: list[float] = []

    async def watch() -> None:
        while True:
            begun = time.perf_counter()
            await asyncio.sleep(0.001)
            lags.append(time.perf_counter() - begun - 0.001)
            assert credentials.known(Given("erp", "s3cret"), HOME)

    watcher = asyncio.create_task(watch())
    flood = [asyncio.create_task(credentials.verify(Given("dms", str(number)), f"10.0.0.{number}")) for number in range(module._QUEUE + 20)]
    done, pending = await asyncio.wait(flood, timeout=1)
    assert [task.result() for task in done].count(LoginResult.BUSY) == 20
    running = [thread for thread in threading.enumerate() if thread.name.startswith("logins")]
    assert 1 <= len(running) <= 2
    watcher.cancel()
    for task in pending:
        task.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await watcher
    await asyncio.gather(*pending, return_exceptions=True)
    lags.sort()
    print(f"{len(lags)} turns of the loop in a flood of logins: p99 {lags[len(lags) * 99 // 100] * 1000:.1f} ms late")
    assert lags[len(lags) // 2] < 0.05


async def test_addresses_of_one_subscriber_share_their_failures(make: Make) -> None:
    credentials = make(PLAIN, delay=lambda failures: 0.01)
    await credentials.verify(Given("erp", "wrong"), "2001:db8:1:2:3::4")
    await credentials.verify(Given("erp", "wrong"), "::ffff:192.0.2.7")
    await credentials.verify(Given("erp", "wrong"), "uid:1000")
    right = Given("erp", "s3cret")
    slowed = ("2001:db8:1:2:ffff::1", "2001:db8:1:2::%eth0", "192.0.2.7", "uid:1000")
    assert [client for client in slowed if credentials.known(right, client)] == []
    assert credentials.known(right, "2001:db8:1:3::1")
    assert credentials.known(right, "192.0.2.8")
    assert credentials.known(right, "uid:1001")


def test_the_delay_grows_up_to_a_bound() -> None:
    assert [growing_delay(failures) for failures in range(1, 8)] == [1, 2, 4, 8, 16, 16, 16]
    assert growing_delay(10**9) == 16


KEY = ("192.0.2.1", "erp")


def test_failures_are_forgotten_after_a_quarter_of_an_hour() -> None:
    failures = Failures(growing_delay)
    assert failures.add(KEY, 100.0) == 101
    assert failures.add(KEY, 101.0) == 103
    assert failures.weigh(KEY, 103.0 + 899)
    assert not failures.weigh(KEY, 103.0 + 900)
    assert failures.turn(KEY, 2000.0) == 2000
    assert failures.add(KEY, 2000.0) == 2001


def test_turns_come_one_after_the_other_until_the_line_is_too_long() -> None:
    failures = Failures(growing_delay)
    assert failures.turn(KEY, 0.0) == 0
    assert failures.turn(KEY, 0.0) == 0  # nobody has failed: an app may log in on many connections at once
    for _ in range(4):
        failures.add(KEY, 0.0)
    assert [failures.turn(KEY, 1.0) for _ in range(5)] == [8, 16, 24, None, None]
    assert failures.turn(("192.0.2.1", "crm"), 1.0) == 1
    failures.forget(KEY)
    assert failures.turn(KEY, 1.0) == 1


def test_the_table_is_bounded_and_loses_the_oldest() -> None:
    failures = Failures(growing_delay, limit=3)
    for name in ("a", "b", "c"):
        failures.add(("", name), 0.0)
    failures.add(("", "a"), 0.0)
    failures.add(("", "d"), 0.0)
    assert [name for name in "abcd" if failures.weigh(("", name), 1.0)] == ["a", "c", "d"]


# -- passwords that change -------------------------------------------------------------------------------------------------


def exchange(credentials: Credentials, value: str, *, user: str) -> bool:
    """Give a user another secret, as whoever finds it in its file does."""
    (use,) = (use for use in credentials.uses() if use.name.startswith(f"user {user}: "))
    return use.take(use.current(), Secret(value, use.current().source, read=lambda: value))


def in_files(directory: Path, users: dict[str, dict[str, str]]) -> dict[str, dict[str, Any]]:
    files: dict[str, dict[str, Any]] = {}
    for name, keys in users.items():
        ((key, value),) = keys.items()
        (directory / name).write_text(value)
        files[name] = {key: {"file": str(directory / name)}}
    return files


async def test_a_changed_password_and_a_changed_hash_are_right_and_the_old_ones_no_more(make: Make, tmp_path: Path) -> None:
    credentials = make(in_files(tmp_path, {**PLAIN, "crm": {"password_hash": CHEAP}}))
    assert [use.name for use in credentials.uses()] == ["user erp: its password", "user crm: its password_hash"]
    for user in ("erp", "crm"):
        assert await credentials.verify(Given(user, "s3cret"), HOME) is LoginResult.RIGHT
    assert exchange(credentials, "another", user="erp")
    assert exchange(credentials, hash_password("another"), user="crm")
    for user in ("erp", "crm"):
        assert not credentials.known(Given(user, "s3cret"), HOME)
        assert await credentials.verify(Given(user, "s3cret"), HOME) is LoginResult.WRONG
        assert await credentials.verify(Given(user, "another"), "198.51.100.9") is LoginResult.RIGHT


async def test_what_was_right_by_a_hash_that_has_changed_meanwhile_is_wrong_and_is_not_remembered(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun, go = threading.Event(), threading.Event()
    real = ScryptHash.matches

    def matches(self: ScryptHash, password: str) -> bool:
        begun.set()
        go.wait(10)
        return real(self, password)

    monkeypatch.setattr(ScryptHash, "matches", matches)
    credentials = make(in_files(tmp_path, {"crm": {"password_hash": CHEAP}}))
    verifying = asyncio.ensure_future(credentials.verify(Given("crm", "s3cret"), HOME))
    await eventually(begun.is_set, "the hash to be computed")
    assert exchange(credentials, hash_password("another"), user="crm")
    go.set()
    assert await verifying is LoginResult.WRONG
    assert not credentials.known(Given("crm", "s3cret"), "198.51.100.9")


async def test_who_has_read_an_older_one_does_not_take_a_newer_ones_place(make: Make, tmp_path: Path) -> None:
    credentials = make(in_files(tmp_path, PLAIN))
    (use,) = credentials.uses()
    first = use.current()
    assert exchange(credentials, "second", user="erp")
    assert not use.take(first, Secret("older"))
    assert credentials.known(Given("erp", "second"), HOME)


async def test_only_what_can_change_is_looked_after(make: Make) -> None:
    assert list(make(MIXED).uses()) == []


async def test_an_unknown_user_costs_as_much_as_the_costliest_hash_also_after_it_has_changed(
    make: Make, tmp_path: Path, hashed: list[ScryptHash]
) -> None:
    credentials = make(in_files(tmp_path, {"crm": {"password_hash": CHEAP}}))
    await credentials.verify(Given("nobody", "s3cret"), HOME)
    assert exchange(credentials, DEAR, user="crm")
    await credentials.verify(Given("nobody", "s3cret"), "198.51.100.9")
    assert [stored.cost for stored in hashed] == [16, 2**15]
