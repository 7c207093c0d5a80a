"""Which upstreams are verified: a test has succeeded with exactly these settings. Routes with `verified_only` ask before they use one.

A mark is a file in the spool's directory, written by `relay test` and by the relay's own probes, whether a relay runs or not. It names
the settings by a fingerprint: host, port, security, trust, login, mechanism, source address and static secret.

State: what the marks said when they were last looked at. Laws: of a secret a mark has 16 bits of a salted digest, and always the same
16: enough to see that it has changed, and of no use to who tries out passwords. A mark that cannot be read is none.
"""

import contextlib
import hashlib
import hmac
import json
import os
import secrets
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Final, NamedTuple
from urllib.parse import quote

from relay.clock import Clock
from relay.config.upstreams import Upstream
from relay.mail.outcome import Outcome, Phase, Scope, Status
from relay.mail.reply import Reply

#: A mark that `relay test` has made is seen after so long, at most.
_LOOK_SECONDS: Final = 2.0
#: Mail that has nowhere else to go asks again after this.
_WAIT_SECONDS: Final = 30.0
_VERSION: Final = 1
_SALT_BYTES: Final = 16
_SECRET_BYTES: Final = 2
_NAME_LIMIT: Final = 200  # bytes of a file's name may be 255, and the temporary one is longer


class Mark(NamedTuple):
    """What a mark's file says."""

    salt: bytes
    settings: str
    secret: str


def fingerprint(name: str, upstream: Upstream, salt: bytes) -> Mark:
    """The mark that the settings of the upstream called `name` would have."""
    tokens = upstream.oauth2
    settings = {
        "host": upstream.host, "port": upstream.port, "security": upstream.security,
        "trust": [upstream.verify, *(_digest_of(path) for path in (upstream.ca_file, upstream.client_certificate, upstream.client_key))],
        "login": [upstream.username, upstream.auth], "source": upstream.source_address, "ehlo": upstream.ehlo,
        "oauth2": [
            tokens.provider, tokens.token_url, tokens.scope, tokens.tenant, tokens.client_id, tokens.client_credentials, tokens.subject
        ] if tokens is not None else None,
    }  # fmt: skip
    kept = [upstream.password, *((tokens.client_secret, tokens.service_account) if tokens is not None else ())]  # a refresh token rotates
    told = [name, *(secret.reveal() if secret is not None else None for secret in kept)]
    return Mark(salt, _keyed(salt, settings), _keyed(salt, told)[: 2 * _SECRET_BYTES])


def _keyed(salt: bytes, value: object) -> str:
    return hmac.new(salt, json.dumps(value, sort_keys=True).encode("utf-8", "surrogatepass"), hashlib.sha256).hexdigest()


def _digest_of(path: Path | None) -> str | None:
    if path is None:
        return None
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError:
        return ""


class Marks:
    """The marks below one spool directory. All of it blocks, for as long as a small file takes."""

    def __init__(self, directory: Path) -> None:
        self._spool = directory
        self._directory = directory / "verified"

    def stamp(self, name: str) -> tuple[int, int] | None:
        """What changes when the mark does; None where there is none."""
        try:
            found = os.stat(self._path(name))
        except OSError:
            return None
        return found.st_mtime_ns, found.st_ino

    def read(self, name: str) -> Mark | None:
        try:
            found = json.loads(self._path(name).read_bytes())
            if found["version"] != _VERSION or found["upstream"] != name:
                return None
            return Mark(bytes.fromhex(found["salt"]), str(found["settings"]), str(found["secret"]))
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def record(self, name: str, upstream: Upstream, *, now: float) -> None:
        """Note durably that a test of these settings has succeeded. Raises OSError whose text says what to do."""
        try:
            self._record(name, upstream, now)
        except PermissionError:
            raise PermissionError(f"{self._spool} belongs to {_owner(self._spool)}; run this as that user") from None
        except OSError as error:
            if error.errno is None:  # in our own words
                raise
            raise OSError(f"{self._directory}: {error.strerror}") from None

    def _record(self, name: str, upstream: Upstream, now: float) -> None:
        if not self._spool.is_dir() and os.geteuid() == 0:  # what root makes, the relay may not be able to use
            raise FileNotFoundError(f"{self._spool} does not exist yet: start the relay once, or run this as its user")
        self._spool.mkdir(mode=0o700, exist_ok=True)
        self._directory.mkdir(mode=0o700, exist_ok=True)
        directory = os.open(self._directory, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            self._write(directory, name, upstream, now)
        finally:
            os.close(directory)

    def _write(self, directory: int, name: str, upstream: Upstream, now: float) -> None:
        """Write the mark's file. It follows no link, for root may be the one who writes where the relay's user could have left one."""
        known = self.read(name)
        mark = fingerprint(name, upstream, known.salt if known is not None else secrets.token_bytes(_SALT_BYTES))
        content = {
            "version": _VERSION, "upstream": name, "verified": datetime.fromtimestamp(now, UTC).isoformat(timespec="seconds"),
            "salt": mark.salt.hex(), "settings": mark.settings, "secret": mark.secret,
        }  # fmt: skip
        file_name = self._path(name).name
        temporary = f"{file_name}.{secrets.token_hex(4)}.new"
        try:
            descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600, dir_fd=directory)
            with open(descriptor, "wb") as file:
                file.write(json.dumps(content, ensure_ascii=False).encode("utf-8", "surrogatepass") + b"\n")
                file.flush()
                os.fsync(descriptor)
                self._give_to_owner(directory, descriptor)
            os.replace(temporary, file_name, src_dir_fd=directory, dst_dir_fd=directory)
        except OSError:
            with contextlib.suppress(OSError):
                os.unlink(temporary, dir_fd=directory)
            raise
        os.fsync(directory)

    def _give_to_owner(self, *descriptors: int) -> None:
        """What root writes is for the relay to read, which is not root."""
        if os.geteuid() == 0:
            owner = os.stat(self._spool)
            for each in descriptors:
                os.fchown(each, owner.st_uid, owner.st_gid)

    def _path(self, name: str) -> Path:
        file = quote(name, safe="").replace(".", "%2E")
        return self._directory / (file if len(file) <= _NAME_LIMIT else hashlib.sha256(file.encode()).hexdigest())


def _owner(path: Path) -> str:
    import pwd  # for a message that is rare

    try:
        number = os.stat(path).st_uid
    except OSError:
        return "another user"
    try:
        return pwd.getpwuid(number).pw_name
    except KeyError:
        return f"uid {number}"


class _Known(NamedTuple):
    """What a look has found. `changed`: there is a mark, of other settings."""

    upstream: Upstream
    stamp: tuple[int, int] | None
    holds: bool
    changed: bool


class Verified:
    """What the marks say, for mail: looked at when somebody asks, and seldom. `changed` is told of upstreams to be tested again."""

    def __init__(self, marks: Marks, settings: Callable[[str], Upstream], clock: Clock) -> None:
        """`settings` answers those of an upstream as they are in use."""
        self.changed: Callable[[str], None] | None = None
        self._marks = marks
        self._settings = settings
        self._clock = clock
        self._known: dict[str, _Known] = {}
        self._looked: dict[str, float] = {}

    def objection(self, name: str) -> Outcome | None:
        """None: use it. Else the outcome for everybody, without touching the network."""
        known = self._look(name)
        if known.holds:
            return None
        text = f"not tried: {name} is not verified: run `relay test {name}`"
        if known.changed:
            text = (
                f"not tried: the settings of {name} have changed since it was verified, and the test of the new ones has not succeeded yet"
            )
        return Outcome(Status.DEFERRED, Scope.UPSTREAM, Phase.RESOLVE, Reply(0, "", text), fallback=True)

    def ready_at(self, name: str) -> float:
        """From when on it is worth asking (epoch); 0.0: it may be used."""
        return 0.0 if self._look(name).holds else self._clock.now() + _WAIT_SECONDS

    def is_changed(self, name: str) -> bool:
        """Whether it was verified, with other settings."""
        return self._look(name).changed

    def forget(self, name: str) -> None:
        """Look again when somebody asks."""
        self._looked.pop(name, None)

    def _look(self, name: str) -> _Known:
        known, upstream, now = self._known.get(name), self._settings(name), self._clock.monotonic()
        if known is not None and known.upstream is upstream and self._looked.get(name, -_LOOK_SECONDS) + _LOOK_SECONDS > now:
            return known
        self._looked[name] = now
        stamp = self._marks.stamp(name)
        if known is None or known.upstream is not upstream or known.stamp != stamp:
            mark = self._marks.read(name) if stamp is not None else None
            holds = mark is not None and mark == fingerprint(name, upstream, mark.salt)
            known = self._known[name] = _Known(upstream, stamp, holds, mark is not None and not holds)
        if known.changed and self.changed is not None:
            self.changed(name)
        return known
