"""The refresh tokens that the relay was given itself: rotated ones, and those of `relay oauth login`. One file an upstream, encrypted.

A file is replaced whole and durably: written aside, fsync, renamed, fsync of the directory. Whoever asks for a token with a stored one
holds the file's lock, so that no two processes show one refresh token at a time: some servers take that for theft.

State: none but the files. Where no key is configured, one is made beside them: that keeps the tokens from backups and from who sees a
single file, not from who has the whole directory.
"""

import contextlib
import errno
import fcntl
import json
import os
import stat
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final, NamedTuple

from relay.config.encryption import Keyring, Keys, new_key
from relay.config.oauth import stored_at
from relay.config.secrets import SecretError

_LOCK_SECONDS: Final = 40.0  # as long as a request may take, and more
_LOCK_STEP_SECONDS: Final = 0.05
_ROOM_OCTETS: Final = 64 * 1024  # more than any refresh token has once it is encrypted
_KEY: Final = "%key"  # no upstream's file is called so
_VERSION: Final = 1


class Chain(NamedTuple):
    """A refresh token and where it comes from.

    `began`: the configured one that the first was got with, or that was configured at the sign-in; `""`: none. `client`: whose it is.
    `signed`: names the sign-in that it comes from, whatever it has become by rotation; `""`: the configured one.
    """

    refresh_token: str
    began: str
    client: str
    signed: str = ""

    def __repr__(self) -> str:
        return "Chain(…)"


class StoreError(Exception):
    """The stored token cannot be read or written now. The text says why."""


class Unreadable(Exception):
    """There is a stored token, and no key that opens it, or it is damaged. The text says which."""


class TokenStore:
    """The stored tokens below a spool's directory. Blocks. `note` is told when a key is made."""

    def __init__(self, spool: Path, keys: Keys, *, note: Callable[[str], None]) -> None:
        self._spool = spool
        self._keys = keys
        self._note = note

    def path(self, upstream: str) -> Path:
        return stored_at(self._spool, upstream)

    def signed(self, upstream: str) -> str:
        """Which sign-in its token comes from; `""` where there is none, or none that a key opens. Raises SecretError."""
        path = self.path(upstream)
        try:
            chain = self.read(path)
        except Unreadable:
            return ""
        except OSError as error:
            raise SecretError(f"cannot read {path}: {error.strerror}") from None
        return chain.signed if chain is not None else ""

    def read(self, path: Path) -> Chain | None:
        """What is stored in a file. Raises Unreadable and OSError."""
        try:
            text = path.read_text("ascii", "replace")
        except FileNotFoundError:
            return None
        try:
            version, chain = json.loads(self.decrypt(text))
            if version != _VERSION:
                raise Unreadable(f"{path} was written by another version of relay")
            return Chain(*map(str, chain))
        except SecretError as error:
            raise Unreadable(f"{path}: {error}") from None
        except (ValueError, TypeError):
            raise Unreadable(f"{path} is damaged") from None

    @contextmanager
    def slot(self, upstream: str) -> "Iterator[Slot]":
        """The place of one upstream's token, locked. Raises StoreError."""
        path = self.path(upstream)
        with self._failing(path), self._locked(path):
            slot = Slot(self, path)
            try:
                yield slot
            finally:
                slot.close()

    @contextmanager
    def _failing(self, path: Path) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise StoreError(f"{path}: {error.strerror or error}") from None

    @contextmanager
    def _locked(self, path: Path) -> Iterator[None]:
        self._make_directory(path.parent)
        lock = os.open(path.with_name(f"{path.name}%lock"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        try:
            self._own(lock)
            deadline = time.monotonic() + _LOCK_SECONDS
            while True:
                try:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    if time.monotonic() > deadline:
                        raise OSError(errno.EBUSY, "another process is using it") from None
                    time.sleep(_LOCK_STEP_SECONDS)
            yield
        finally:
            os.close(lock)

    def _make_directory(self, directory: Path) -> None:
        if not directory.is_dir():
            directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC | os.O_NOFOLLOW)
            try:
                self._own(descriptor)
            finally:
                os.close(descriptor)
            sync_directory(directory.parent)
        elif os.geteuid() == 0 and directory.is_symlink():
            raise OSError(errno.ELOOP, f"{directory} is a symbolic link, which root does not follow")

    def _own(self, descriptor: int) -> None:
        """Give root's files to the spool's owner: an operator signs in, and the service must read it. Not what has a name elsewhere, too:
        the directory is the service's, and root's power is not."""
        if os.geteuid() == 0:
            status = os.fstat(descriptor)
            if stat.S_ISREG(status.st_mode) and status.st_nlink != 1:
                raise OSError(errno.EMLINK, "it has another link elsewhere")
            owner = os.stat(self._spool)
            os.fchown(descriptor, owner.st_uid, owner.st_gid)

    # -- the keys ---------------------------------------------------------------------------------------------------------

    def encrypt(self, text: str) -> str:
        """Raises SecretError and OSError."""
        if self._keys.path is not None:
            return self._keys.ring().encrypt(text)
        path = self._own_key
        if not path.exists():
            self._make_key(path)
            self._note(f"a key for refresh tokens was made: {path}; `relay secret keygen` and secrets.key_file keep it elsewhere")
        return Keyring.from_file(path).encrypt(text)

    def decrypt(self, text: str) -> str:
        """With the configured keys, or with the one that was made before there were any. Raises SecretError."""
        own = self._own_key
        if self._keys.path is None:
            return Keyring.from_file(own).decrypt(text)
        try:
            return self._keys.ring().decrypt(text)
        except SecretError:
            if not own.exists():
                raise
            with contextlib.suppress(SecretError):
                return Keyring.from_file(own).decrypt(text)
            raise

    @property
    def _own_key(self) -> Path:
        return stored_at(self._spool, "x").with_name(_KEY)

    def _make_key(self, path: Path) -> None:
        """Linked into place, so that two who make one at a time use the same."""
        aside = path.with_name(f"{path.name}%{os.getpid()}")
        aside.unlink(missing_ok=True)
        descriptor = self.create(aside)
        try:
            os.write(descriptor, f"{new_key()}\n".encode())
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        with contextlib.suppress(FileExistsError):
            os.link(aside, path)
        aside.unlink()
        sync_directory(path.parent)

    def create(self, path: Path) -> int:
        """A new file that nobody else may read."""
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        self._own(descriptor)
        return descriptor


class Slot:
    """One upstream's token, while its lock is held."""

    def __init__(self, store: TokenStore, path: Path) -> None:
        self._store = store
        self._path = path
        self._aside = path.with_name(f"{path.name}%new")
        self._descriptor: int | None = None

    def load(self) -> Chain | None:
        """What is stored. Raises Unreadable and OSError."""
        return self._store.read(self._path)

    def prepare(self) -> None:
        """Make sure of the room and of the key before a server is asked that may end the token at hand. Raises OSError."""
        self._seal("")
        self._aside.unlink(missing_ok=True)  # of somebody who was killed
        self._descriptor = self._store.create(self._aside)
        os.posix_fallocate(self._descriptor, 0, _ROOM_OCTETS)

    def save(self, chain: Chain) -> None:
        """Store it for good. Raises OSError."""
        text = f"{self._seal(json.dumps([_VERSION, chain]))}\n".encode()
        if self._descriptor is None:
            self.prepare()
        assert self._descriptor is not None, "it was prepared"
        rest = memoryview(text)
        while rest:
            rest = rest[os.write(self._descriptor, rest) :]
        os.ftruncate(self._descriptor, len(text))
        os.fsync(self._descriptor)
        os.rename(self._aside, self._path)
        self.close()
        sync_directory(self._path.parent)

    def close(self) -> None:
        """Leave nothing behind that was not used."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None
            self._aside.unlink(missing_ok=True)

    def _seal(self, text: str) -> str:
        try:
            return self._store.encrypt(text)
        except SecretError as error:
            raise OSError(errno.EINVAL, f"cannot be encrypted: {error}") from None


def sync_directory(directory: Path) -> None:
    """Make the names in it durable."""
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
