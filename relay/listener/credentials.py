"""Whether a client's name and password are right, and how long it has to wait to hear it.

Hashes are verified in threads of their own, few of them and with a short queue, so that a flood of logins takes neither the loop's
time nor every core. A right password is remembered for some minutes as a digest under a key of this process. Failures slow down whoever
tries the same user from the same address, more each time: also the attempt that would be right, or silence would tell the wrong ones.

State: the users, what was right lately, and the failures. Laws: an unknown user takes the same way and the same time as a wrong password;
nothing is compared before its turn; the table of failures is bounded.
"""

import asyncio
import contextlib
import hmac
import os
import secrets
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from enum import Enum
from functools import partial
from ipaddress import IPv6Address, IPv6Network, ip_address

from relay.clock import Clock
from relay.config.listeners import User
from relay.config.password import ScryptHash, parse_hash, prepared
from relay.config.secrets import Secret, Use
from relay.listener.login import Given

#: An application that logs in for every message costs one hash in so many seconds.
_REMEMBER_SECONDS = 300.0

# So many logins wait for a thread: some five seconds' work, half of it for one address, as it may be guessing. The others are asked to
# come again (454).
_QUEUE = 40
_QUEUE_OF_ONE = 20

# After failures the next attempt waits 1 s, 2, 4 and so on: clients' own time limits begin at 30 s.
_LONGEST_DELAY_SECONDS = 16.0
_PATIENCE_SECONDS = 30.0
_FORGET_SECONDS = 900.0
_FAILURES = 4096


class LoginResult(Enum):
    """What became of a login."""

    RIGHT = "right"
    WRONG = "wrong"
    BUSY = "busy"  # not looked at: too many wait


def growing_delay(failures: int) -> float:
    """Seconds that each of so many failures in a row costs."""
    return float(min(2.0 ** min(failures - 1, 10), _LONGEST_DELAY_SECONDS))


class Credentials:
    """The users of one configuration. Close it, or its threads stay."""

    def __init__(self, users: Mapping[str, User], clock: Clock, *, delay: Callable[[int], float] = growing_delay) -> None:
        self._clock = clock
        self._key = secrets.token_bytes(32)
        self._right: dict[str, tuple[bytes, float]] = {}
        self._hashes: dict[str, ScryptHash] = {}
        self._decoy: ScryptHash | None = None
        self._secrets: dict[str, Secret] = {}
        for name, user in users.items():
            if user.password is not None:
                self._use_password(name, user.password)
            elif user.password_hash is not None:
                self._use_hash(name, user.password_hash)
        self._nobody = (secrets.token_bytes(32), 0.0)
        self._failures = Failures(delay)
        self._threads = ThreadPoolExecutor(2 if (os.cpu_count() or 1) > 2 else 1, thread_name_prefix="logins")
        self._queued: Counter[str] = Counter()
        self._stopped = asyncio.Event()

    def uses(self) -> Iterator[Use]:
        """The passwords and hashes that can change. Who is logged in stays so."""
        for name, secret in self._secrets.items():
            if secret.can_change:
                use = self._use_hash if name in self._hashes else self._use_password
                word = "password_hash" if name in self._hashes else "password"
                yield Use(f"user {name}: its {word}", partial(self._secrets.__getitem__, name), partial(self._exchange, name, use))

    def known(self, given: Given, client: str) -> bool:
        """Whether this is right, as far as that can be told at once."""
        return not self._failures.weigh(_key(given, client), self._clock.monotonic()) and self._is_known(given)

    async def verify(self, given: Given, client: str) -> LoginResult:
        """Look at a login in its turn. Wrong ones are told when their time has come."""
        if self.known(given, client):
            return LoginResult.RIGHT
        key, now = _key(given, client), self._clock.monotonic()
        turn = self._failures.turn(key, now)
        if turn is None:
            return LoginResult.BUSY
        await self._pause(turn - now)
        begun = max(turn, self._clock.monotonic())
        right = None if self._stopped.is_set() else await self._is_right(given, key[0])
        if right is None:
            return LoginResult.BUSY
        if right:
            self._failures.forget(key)
            return LoginResult.RIGHT
        until = self._failures.add(key, begun)
        await self._pause(until - self._clock.monotonic())
        return LoginResult.WRONG

    def stop(self) -> None:
        """Let nobody wait any longer."""
        self._stopped.set()

    def close(self) -> None:
        self._stopped.set()
        self._threads.shutdown(wait=False, cancel_futures=True)

    def _exchange(self, name: str, use: Callable[[str, Secret], None], old: Secret, new: Secret) -> bool:
        if self._secrets[name] is not old:
            return False
        use(name, new)
        return True

    def _use_password(self, name: str, secret: Secret) -> None:
        self._secrets[name] = secret
        self._right[name] = (self._digest(prepared(secret.reveal())), float("inf"))

    def _use_hash(self, name: str, secret: Secret) -> None:
        """What was right by the hash before is not remembered."""
        self._secrets[name] = secret
        self._hashes[name] = parse_hash(secret.reveal())
        self._right.pop(name, None)
        self._decoy = None

    def _stored(self, user: str) -> ScryptHash | None:
        """The user's hash, or one as costly as any and nobody's, where there are hashes at all."""
        stored = self._hashes.get(user)
        if stored is not None or not self._hashes:
            return stored
        if self._decoy is None:
            costliest = max(self._hashes.values(), key=lambda stored: stored.work)
            self._decoy = costliest._replace(salt=secrets.token_bytes(16), digest=secrets.token_bytes(32))
        return self._decoy

    def _is_known(self, given: Given) -> bool:
        digest, until = self._right.get(given.user, self._nobody)
        same = hmac.compare_digest(self._digest(given.password), digest)
        return same and given.password != "" and self._clock.monotonic() < until

    async def _is_right(self, given: Given, address: str) -> bool | None:
        """None when there is no room to find out. What is wrong costs a hash, whoever it is, once any user has one."""
        if self._is_known(given):
            return True
        stored = self._stored(given.user)
        if stored is None:
            return False
        if self._queued.total() >= _QUEUE or self._queued[address] >= _QUEUE_OF_ONE:
            return None
        self._queued[address] += 1
        try:
            matches = await asyncio.get_running_loop().run_in_executor(self._threads, stored.matches, given.password)
        finally:
            self._queued -= Counter((address,))
        if not (matches and given.password and self._hashes.get(given.user) is stored):  # nobody's, or changed meanwhile
            return False
        self._right[given.user] = (self._digest(given.password), self._clock.monotonic() + _REMEMBER_SECONDS)
        return True

    async def _pause(self, seconds: float) -> None:
        if seconds > 0:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(seconds):
                    await self._stopped.wait()

    def _digest(self, password: str) -> bytes:
        return hmac.digest(self._key, password.encode("utf-8"), "sha256")


class Failures:
    """Who has failed lately, and when he may try again. Times are seconds of a monotonic clock."""

    def __init__(self, delay: Callable[[int], float], *, limit: int = _FAILURES) -> None:
        self._delay = delay
        self._limit = limit
        self._entries: dict[tuple[str, str], tuple[int, float]] = {}  # how many, and until when the next one waits; oldest first

    def weigh(self, key: tuple[str, str], now: float) -> bool:
        """Whether there are failures that still count."""
        entry = self._entries.get(key)
        if entry is None:
            return False
        if now < entry[1] + _FORGET_SECONDS:
            return True
        del self._entries[key]
        return False

    def turn(self, key: tuple[str, str], now: float) -> float | None:
        """When an attempt may begin; the one after it waits for it. None when that would be too long."""
        if not self.weigh(key, now):
            return now
        failures, free = self._entries[key]
        begin = max(now, free)
        if begin - now > _PATIENCE_SECONDS:
            return None
        self._put(key, failures, begin + self._delay(failures))
        return begin

    def add(self, key: tuple[str, str], begun: float) -> float:
        """Note a failure, and say when it may be told."""
        failures, free = self._entries.get(key, (0, 0.0))
        until = begun + self._delay(failures + 1)
        self._put(key, failures + 1, max(free, until))
        return until

    def forget(self, key: tuple[str, str]) -> None:
        self._entries.pop(key, None)

    def _put(self, key: tuple[str, str], failures: int, free: float) -> None:
        self._entries.pop(key, None)
        self._entries[key] = (failures, free)
        if len(self._entries) > self._limit:
            del self._entries[next(iter(self._entries))]


def _key(given: Given, client: str) -> tuple[str, str]:
    """Whose failures are counted together: of one user from one address, or from one IPv6 network of a subscriber."""
    try:
        address = ip_address(client.partition("%")[0])
    except ValueError:  # a process on this machine
        return client, given.user
    if isinstance(address, IPv6Address):
        address = address.ipv4_mapped or IPv6Network((address, 64), strict=False).network_address
    return str(address), given.user
