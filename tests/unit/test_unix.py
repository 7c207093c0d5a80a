"""A path for a Unix socket: whose it is, what may be replaced, and what is left when it is given back."""

import os
import socket
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest

from relay.unix import SocketInUse, SocketPath, uid_of_peer


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "s.sock"


@pytest.fixture
def place(path: Path) -> Iterator[SocketPath]:
    place = at(path)
    yield place
    place.release()


def at(path: Path, *, mode: int = 0o660) -> SocketPath:
    return SocketPath(path, mode=mode, name="the socket")


@pytest.mark.parametrize("mode", [0o600, 0o660, 0o666])
@pytest.mark.parametrize("mask", [0o000, 0o077])
def test_the_mode_is_as_asked_whatever_the_umask(path: Path, mode: int, mask: int) -> None:
    before = os.umask(mask)
    place = at(path, mode=mode)
    try:
        with place.bind():
            assert stat.S_IMODE(path.stat().st_mode) == mode
    finally:
        os.umask(before)
        place.release()
    assert not path.exists()


def test_the_socket_of_a_dead_program_is_replaced(path: Path, place: SocketPath) -> None:
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(path))
        dead.listen()
    with place.bind() as bound, socket.socket(socket.AF_UNIX) as client:
        bound.listen()
        client.connect(str(path))


def test_who_holds_the_path_keeps_it(path: Path, place: SocketPath) -> None:
    with place.bind():  # it does not even listen yet
        with pytest.raises(SocketInUse, match=r"the socket .*s\.sock belongs to another relay"):
            at(path).bind()
        assert path.is_socket()


def test_a_program_that_lives_but_is_too_busy_to_answer_is_left_alone(path: Path, place: SocketPath) -> None:
    clients = [socket.socket(socket.AF_UNIX) for _ in range(3)]
    try:
        with socket.socket(socket.AF_UNIX) as busy:
            busy.bind(str(path))
            busy.listen(0)
            for client in clients:
                client.setblocking(False)
            assert any(client.connect_ex(str(path)) for client in clients), "its queue is full"
            inode = path.stat().st_ino
            with pytest.raises(SocketInUse, match="another program listens at"):
                place.bind()
            assert path.stat().st_ino == inode
    finally:
        for client in clients:
            client.close()


@pytest.mark.parametrize("kind", [socket.SOCK_DGRAM, socket.SOCK_SEQPACKET])
def test_a_socket_of_another_kind_is_left_alone(path: Path, place: SocketPath, kind: int) -> None:
    with socket.socket(socket.AF_UNIX, kind) as other:
        other.bind(str(path))
        if kind == socket.SOCK_SEQPACKET:
            other.listen()
        with pytest.raises(OSError, match="cannot be made"):
            place.bind()
        assert path.is_socket()


def test_a_file_is_left_alone(path: Path, place: SocketPath) -> None:
    path.write_text("precious")
    with pytest.raises(OSError, match=r"the socket .*s\.sock cannot be made: Address already in use"):
        place.bind()
    place.release()
    assert path.read_text() == "precious"


def test_after_a_failure_the_path_is_free(tmp_path: Path, path: Path) -> None:
    path.mkdir()
    with pytest.raises(OSError, match="cannot be made"):
        at(path).bind()
    path.rmdir()
    place = at(path)
    place.bind().close()
    place.release()


def test_what_somebody_else_has_put_there_is_not_taken_away(path: Path) -> None:
    place = at(path)
    with place.bind():
        path.unlink()
        path.write_text("precious")
        place.release()
    assert path.read_text() == "precious"


def test_a_path_given_back_can_be_had_again(path: Path) -> None:
    first, second = at(path), at(path)
    with first.bind():
        first.release()
        with second.bind():
            first.release()
            assert path.is_socket()
        second.release()
    assert not path.exists()


def test_the_uid_of_who_connects_is_known() -> None:
    one, other = socket.socketpair()
    with one, other:
        assert uid_of_peer(one) == os.getuid()
