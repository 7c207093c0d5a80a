"""`relay hash-password`: from a terminal and from a pipe, and nothing of the password where it does not belong."""

import io
import sys

import pytest

from relay.cli import main
from relay.config.password import parse_hash


class Input:
    """Standard input: `octets` from a pipe, or a person at a terminal."""

    def __init__(self, octets: bytes = b"", *, terminal: bool = False) -> None:
        self.buffer = io.BytesIO(octets)
        self._terminal = terminal

    def isatty(self) -> bool:
        return self._terminal


def run(monkeypatch: pytest.MonkeyPatch, given: Input, *typed: str) -> int:
    answers = iter(typed)
    monkeypatch.setattr(sys, "stdin", given)
    monkeypatch.setattr("getpass.getpass", lambda prompt: next(answers))
    return main(["hash-password"])


@pytest.mark.parametrize(("octets", "password"), [(b"s3cret\n", "s3cret"), (b"s3cret", "s3cret"), ("pä ss\r\nmore\n".encode(), "pä ss")])
def test_a_line_of_a_pipe_becomes_a_hash(
    octets: bytes, password: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, Input(octets)) == 0
    printed = capsys.readouterr()
    assert parse_hash(printed.out.removesuffix("\n")).matches(password)
    assert printed.err == ""


def test_a_person_is_asked_twice(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(monkeypatch, Input(terminal=True), "s3cret", "s3cret") == 0
    assert parse_hash(capsys.readouterr().out.removesuffix("\n")).matches("s3cret")
    assert run(monkeypatch, Input(terminal=True), "s3cret", "secret") == 64
    assert capsys.readouterr() == ("", "relay hash-password: the two were not the same\n")


def test_a_person_who_ends_the_input_is_told(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def ends(prompt: str) -> str:
        raise EOFError

    monkeypatch.setattr(sys, "stdin", Input(terminal=True))
    monkeypatch.setattr("getpass.getpass", ends)
    assert main(["hash-password"]) == 64
    assert capsys.readouterr() == ("", "relay hash-password: nothing was typed\n")


@pytest.mark.parametrize(
    ("octets", "why"),
    [(b"\n", "empty"), (b"", "empty"), (b"hunter2" * 40, "255 bytes"), (b"hunter2\xff\n", "characters"), (b"hunter2\t", "control")],
)
def test_what_no_app_can_send_is_refused_without_being_repeated(
    octets: bytes, why: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, Input(octets)) == 64
    printed = capsys.readouterr()
    assert why in printed.err
    assert "hunter2" not in printed.err
    assert printed.out == ""


def test_a_password_is_no_argument(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="64"):
        main(["hash-password", "hunter2"])
