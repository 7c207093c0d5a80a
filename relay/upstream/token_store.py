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


class Folder(NamedTuple):
    """The directory of the tokens, opened, and what is done in it. `path`: where it was, for people. All methods raise OSError."""

    path: Path
    descriptor: int

    def open(self, name: str, flags: int) -> int:
        return os.open(name, flags | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600, dir_fd=self.descriptor)

    def read(self, name: str) -> str:
        """All of a file. A pipe that somebody has put there is empty."""
        with open(self.open(name, os.O_RDONLY | os.O_NONBLOCK), "rb") as file:
            return file.read().decode("ascii", "replace")

    def remove(self, name: str) -> None:
        """Also where it is gone already."""
        with contextlib.suppress(FileNotFoundError):
            os.unlink(name, dir_fd=self.descriptor)


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
            with self._opened(path.parent) as folder:
                chain = self.read(folder, path.name)
        except (Unreadable, FileNotFoundError):
            return ""
        except OSError as error:
            raise SecretError(f"cannot read {path}: {error.strerror}") from None
        return chain.signed if chain is not None else ""

    def read(self, folder: Folder, name: str) -> Chain | None:
        """What is stored in a file. Raises Unreadable and OSError."""
        path = folder.path / name
        try:
            text = folder.read(name)
        except FileNotFoundError:
            return None
        try:
            version, chain = json.loads(self._decrypt(text, folder))
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
        with self._failing(path):
            self._make_directory(path.parent)
            with self._opened(path.parent) as folder, self._locked(folder, path.name):
                slot = Slot(self, folder, path.name)
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
    def _locked(self, folder: Folder, name: str) -> Iterator[None]:
        lock = folder.open(f"{name}%lock", os.O_RDWR | os.O_CREAT)
        try:
            self.own(lock)
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
        if os.path.lexists(directory):
            return
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        with self._opened(directory) as folder:
            self.own(folder.descriptor)
        sync_directory(directory.parent)

    @contextmanager
    def _opened(self, directory: Path) -> Iterator[Folder]:
        """The directory itself: what a name leads to may change at any moment, and root's power must not follow."""
        flags = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
        try:
            descriptor = os.open(directory, flags | (os.O_NOFOLLOW if os.geteuid() == 0 else 0))
        except NotADirectoryError:
            if directory.is_symlink():
                raise OSError(errno.ELOOP, f"{directory} is a symbolic link, which root does not follow") from None
            raise
        try:
            yield Folder(directory, descriptor)
        finally:
            os.close(descriptor)

    def own(self, descriptor: int) -> None:
        """Give root's files to the spool's owner: an operator signs in, and the service must read it. Not what has a name elsewhere, too:
        the directory is the service's, and root's power is not."""
        if os.geteuid() == 0:
            status = os.fstat(descriptor)
            if stat.S_ISREG(status.st_mode) and status.st_nlink != 1:
                raise OSError(errno.EMLINK, "it has another link elsewhere")
            owner = os.stat(self._spool)
            os.fchown(descriptor, owner.st_uid, owner.st_gid)

    def create(self, folder: Folder, name: str) -> int:
        """A new file that nobody else may read."""
        descriptor = folder.open(name, os.O_WRONLY | os.O_CREAT | os.O_EXCL)
        self.own(descriptor)
        return descriptor

    # -- the keys ---------------------------------------------------------------------------------------------------------

    def encrypt(self, text: str, folder: Folder) -> str:
        """Raises SecretError and OSError."""
        if self._keys.path is not None:
            return self._keys.ring().encrypt(text)
        try:
            ring = _own_ring(folder)
        except FileNotFoundError:
            self._make_key(folder)
            path = folder.path / _KEY
            self._note(f"a key for refresh tokens was made: {path}; `relay secret keygen` and secrets.key_file keep it elsewhere")
            ring = _own_ring(folder)
        return ring.encrypt(text)

    def _decrypt(self, text: str, folder: Folder) -> str:
        """With the configured keys, or with the one that was made before there were any. Raises SecretError."""
        try:
            return (_own_ring(folder) if self._keys.path is None else self._keys.ring()).decrypt(text)
        except FileNotFoundError as error:
            raise SecretError(f"cannot read {folder.path / _KEY}: {error.strerror}") from None
        except SecretError:
            if self._keys.path is None:
                raise
            with contextlib.suppress(SecretError, OSError):
                return _own_ring(folder).decrypt(text)
            raise

    def _make_key(self, folder: Folder) -> None:
        """Linked into place, so that two who make one at a time use the same."""
        aside = f"{_KEY}%{os.getpid()}"
        folder.remove(aside)
        descriptor = self.create(folder, aside)
        try:
            os.write(descriptor, f"{new_key()}\n".encode())
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        with contextlib.suppress(FileExistsError):
            os.link(aside, _KEY, src_dir_fd=folder.descriptor, dst_dir_fd=folder.descriptor)
        folder.remove(aside)
        os.fsync(folder.descriptor)


def _own_ring(folder: Folder) -> Keyring:
    """The key that was made beside the tokens. Raises SecretError and OSError."""
    return Keyring.from_text(folder.read(_KEY), folder.path / _KEY)


class Slot:
    """One upstream's token, while its lock is held."""

    def __init__(self, store: TokenStore, folder: Folder, name: str) -> None:
        self._store = store
        self._folder = folder
        self._name = name
        self._aside = f"{name}%new"
        self._descriptor: int | None = None

    def load(self) -> Chain | None:
        """What is stored. Raises Unreadable and OSError."""
        return self._store.read(self._folder, self._name)

    def prepare(self) -> None:
        """Make sure of the room and of the key before a server is asked that may end the token at hand. Raises OSError."""
        self._seal("")
        self._folder.remove(self._aside)  # of somebody who was killed
        self._descriptor = self._store.create(self._folder, self._aside)
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
        os.rename(self._aside, self._name, src_dir_fd=self._folder.descriptor, dst_dir_fd=self._folder.descriptor)
        self.close()
        os.fsync(self._folder.descriptor)

    def close(self) -> None:
        """Leave nothing behind that was not used."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None
            self._folder.remove(self._aside)

    def _seal(self, text: str) -> str:
        try:
            return self._store.encrypt(text, self._folder)
        except SecretError as error:
            raise OSError(errno.EINVAL, f"cannot be encrypted: {error}") from None


def sync_directory(directory: Path) -> None:
    """Make the names in it durable."""
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
