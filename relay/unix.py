"""Unix sockets at a path: whose the path is, how a socket gets there, and that it goes again.

State: a lock beside the socket for as long as the path is held, since another relay could come between the question whether a socket is
dead and its replacement. Laws: the socket of a program that lives is never replaced, that of a dead one always; it is never open to
more than its mode says, whatever the umask; what is taken away is our own.
"""

import contextlib
import errno
import fcntl
import os
import socket
import struct
from pathlib import Path

_PEER = struct.Struct("3i")  # pid, uid, gid of unix(7)


class SocketInUse(OSError):
    """The path belongs to somebody who lives."""


class SocketPath:
    """A path for one socket. `name` is what errors call it: `the control socket`."""

    def __init__(self, path: Path, *, mode: int, name: str) -> None:
        self._path = path
        self._mode = mode
        self._name = name
        self._lock: int | None = None
        self._inode = 0

    def bind(self) -> socket.socket:
        """A socket at the path, not listening yet. Raises SocketInUse, or OSError with the path in its words."""
        try:
            self._lock = self._take()
            bound = self._bound()
        except SocketInUse:
            self.release()
            raise
        except OSError as error:
            self.release()
            raise OSError(f"{self._name} {self._path} cannot be made: {error.strerror}") from error
        self._inode = os.lstat(self._path).st_ino
        return bound

    def release(self) -> None:
        """Take the socket away, if it is ours, and let others have the path."""
        with contextlib.suppress(OSError):
            if self._inode and os.lstat(self._path).st_ino == self._inode:
                self._path.unlink()
        if self._lock is not None:
            os.close(self._lock)
        self._inode, self._lock = 0, None

    def _take(self) -> int:
        descriptor = os.open(f"{self._path}.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            raise SocketInUse(f"{self._name} {self._path} belongs to another relay") from None
        return descriptor

    def _bound(self) -> socket.socket:
        path = self._path
        if path.is_socket():
            _make_sure_it_is_dead(path)
            path.unlink()
        elif path.is_symlink():
            path.unlink()
        bound = socket.socket(socket.AF_UNIX)
        try:
            os.fchmod(bound.fileno(), self._mode)
            bound.bind(str(path))
            path.chmod(self._mode)
        except OSError:
            bound.close()
            raise
        return bound


def _make_sure_it_is_dead(path: Path) -> None:
    """Nobody listens there only when the kernel says so: a program that is busy has a full queue, and lives."""
    with socket.socket(socket.AF_UNIX) as probe:
        probe.setblocking(False)
        said = probe.connect_ex(str(path))
    if said in (0, errno.EAGAIN):
        raise SocketInUse(f"another program listens at {path}")
    if said != errno.ECONNREFUSED:
        raise OSError(said, os.strerror(said))


def uid_of_peer(connection: socket.socket) -> int:
    """Whose the process is that connected."""
    octets = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _PEER.size)
    uid: int = _PEER.unpack(octets)[1]
    return uid
