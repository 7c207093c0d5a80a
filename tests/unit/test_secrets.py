"""Secrets come from where the file says, and are seen nowhere on the way."""

import logging
import pickle
import sys
import traceback
from pathlib import Path
from typing import Any

import pytest

from relay.config.secrets import Secret, SecretError, resolve

VALUE = "hunter2"


@pytest.fixture
def vault(tmp_path: Path) -> Path:
    for name, content in (("plain", b"hunter2"), ("line", b"hunter2\n"), ("dos", b"hunter2\r\n"), ("two", b"hunter2\n\n")):
        (tmp_path / name).write_bytes(content)
    (tmp_path / "empty").write_bytes(b"\n")
    (tmp_path / "binary").write_bytes(b"\xff\xfe")
    (tmp_path / "large").write_bytes(b"x" * 70_000)
    (tmp_path / "directory").mkdir()
    return tmp_path


@pytest.mark.parametrize(
    ("source", "value"),
    [
        (VALUE, VALUE),
        ({"env": "PASSWORD"}, VALUE),
        ({"file": "plain"}, VALUE),
        ({"file": "line"}, VALUE),
        ({"file": "dos"}, VALUE),
        ({"file": "two"}, VALUE + "\n"),
        ({"credential": "line"}, VALUE),
        ({"command": [sys.executable, "-c", "print('hunter2')"]}, VALUE),
        ({"command": ["printf", "%s", "$HOME; hunter2"]}, "$HOME; hunter2"),
    ],
)
def test_a_secret_comes_from_its_source(source: Any, value: str, vault: Path) -> None:
    secret = resolve(source, {"PASSWORD": VALUE, "CREDENTIALS_DIRECTORY": str(vault)}, base=vault)
    assert secret.reveal() == value


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("", "the secret is empty"),
        ({"env": "MISSING"}, "the environment variable MISSING is not set"),
        ({"env": "EMPTY"}, "the secret from env EMPTY is empty"),
        ({"env": ""}, "must name one thing"),
        ({"env": ["A"]}, "must name one thing"),
        ({"file": "missing"}, "No such file or directory"),
        ({"file": "directory"}, "Is a directory"),
        ({"file": "empty"}, "is empty"),
        ({"file": "binary"}, "is not UTF-8 text"),
        ({"file": "large"}, "is too large for a secret"),
        ({"file": "a\0b"}, "not a usable file name"),
        ({"credential": "../plain"}, "must be a name, not a path"),
        ({"credential": "missing"}, "No such file or directory"),
        ({"command": "pass show x"}, "must be a list of words"),
        ({"command": []}, "must be a list of words"),
        ({"command": ["relay-no-such-command"]}, "cannot be run: No such file or directory"),
        ({"command": [sys.executable, "-c", "print('hunter2'); raise SystemExit('hunter2')"]}, "failed with exit code 1"),
        ({"command": [sys.executable, "-c", "import os; os.kill(os.getpid(), 9)"]}, "was killed by signal 9"),
        ({"command": ["true"]}, "is empty"),
        ({"encrypted": "hunter2"}, "not available yet"),
        ({"hunter2": None}, "must be text, or one of"),
        ({"env": "PASSWORD", "file": "plain"}, "must be text, or one of"),
        (["hunter2"], "must be text, or one of"),
        (None, "must be text, or one of"),
    ],
)
def test_a_secret_that_cannot_be_had_says_why_and_not_what(source: Any, reason: str, vault: Path) -> None:
    environ = {"PASSWORD": VALUE, "EMPTY": "", "CREDENTIALS_DIRECTORY": str(vault)}
    with pytest.raises(SecretError) as caught:
        resolve(source, environ, base=vault)
    assert reason in str(caught.value)
    assert VALUE not in "".join(traceback.format_exception(caught.value))


def test_a_credential_needs_systemd() -> None:
    with pytest.raises(SecretError, match=r"\$CREDENTIALS_DIRECTORY is not set"):
        resolve({"credential": "mail"}, {})


def test_a_command_that_does_not_end_is_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("relay.config.secrets._COMMAND_TIMEOUT_SECONDS", 0.05)
    with pytest.raises(SecretError, match=r"sleep took longer than 0\.05 s"):
        resolve({"command": ["sleep", "30"]}, {})


def test_a_secret_shows_itself_to_nobody(caplog: pytest.LogCaptureFixture) -> None:
    secret = Secret(VALUE, "env PASSWORD")
    logging.getLogger().error("%s %r", secret, {"password": secret})
    shown = [str(secret), repr(secret), f"{secret}", f"{[secret]}", caplog.text]
    assert all(VALUE not in text for text in shown)
    assert str(secret) == "Secret(from env PASSWORD)"
    with pytest.raises(TypeError):
        pickle.dumps(secret)


def test_secrets_compare_by_value_and_can_be_keys() -> None:
    assert Secret(VALUE, "env A") == Secret(VALUE, "file b")
    assert Secret(VALUE) != Secret("other")
    assert Secret(VALUE) != VALUE
    assert len({Secret(VALUE), Secret(VALUE, "env A"), Secret("other")}) == 2


def test_only_text_in_the_file_is_plain() -> None:
    assert resolve(VALUE, {}).is_plain
    assert not resolve({"env": "A"}, {"A": VALUE}).is_plain
