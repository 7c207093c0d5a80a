"""Secrets come from where the file says, and are seen nowhere on the way."""

import logging
import os
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
    os.mkfifo(tmp_path / "pipe")
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
        ({"env": "LATIN_1"}, "the secret from env LATIN_1 is not UTF-8 text"),
        ({"env": ""}, "must name one thing"),
        ({"env": ["A"]}, "must name one thing"),
        ({"file": "missing"}, "No such file or directory"),
        ({"file": "directory"}, "Is a directory"),
        ({"file": "empty"}, "is empty"),
        ({"file": "binary"}, "is not UTF-8 text"),
        ({"file": "large"}, "is too large for a secret"),
        ({"file": "a\0b"}, "not a usable file name"),
        ({"file": "pipe"}, "is empty"),
        ({"file": "~relay-no-such-user/x"}, "No such file or directory"),
        ({"credential": "../plain"}, "must be a name, not a path"),
        ({"credential": "missing"}, "No such file or directory"),
        ({"command": "pass show x"}, "must be a list of words"),
        ({"command": []}, "must be a list of words"),
        ({"command": ["relay-no-such-command"]}, "cannot be run: No such file or directory"),
        ({"command": [sys.executable, "-c", "print('hunter2'); raise SystemExit('hunter2')"]}, "failed with exit code 1"),
        ({"command": [sys.executable, "-c", "import os; os.kill(os.getpid(), 9)"]}, "was killed by signal 9"),
        ({"command": ["true"]}, "is empty"),
        ({"command": ["yes", "hunter2"]}, "the command yes prints too much for a secret"),
        ({"encrypted": "hunter2"}, "there is no key"),
        ({"encrypted": ["hunter2"]}, "must be a text from `relay secret encrypt`"),
        ({"hunter2": None}, "must be text, or one of"),
        ({"env": "PASSWORD", "file": "plain"}, "must be text, or one of"),
        (["hunter2"], "must be text, or one of"),
        (None, "must be text, or one of"),
    ],
)
def test_a_secret_that_cannot_be_had_says_why_and_not_what(source: Any, reason: str, vault: Path) -> None:
    environ = {"PASSWORD": VALUE, "EMPTY": "", "LATIN_1": "p\udce4ss", "CREDENTIALS_DIRECTORY": str(vault)}
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


# -- read again ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["file", "credential", "command"])
def test_a_secret_is_read_again_from_where_it_was(form: str, vault: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source: Any = {form: ["cat", str(vault / "line")] if form == "command" else "line"}
    environ = {"CREDENTIALS_DIRECTORY": "."}
    monkeypatch.chdir(vault)
    secret = resolve(source, environ)
    monkeypatch.chdir("/")
    environ.clear()
    assert secret.read_again() is secret
    (vault / "line").write_text("another\n")
    again = secret.read_again()
    assert (again.reveal(), again.source) == ("another", secret.source)
    assert secret.reveal() == VALUE
    assert again.read_again() is again
    (vault / "line").unlink()
    with pytest.raises(SecretError) as caught:
        again.read_again()
    assert "another" not in "".join(traceback.format_exception(caught.value))


def test_text_and_the_environment_stay_as_they_are() -> None:
    environ = {"PASSWORD": VALUE}
    secret = resolve({"env": "PASSWORD"}, environ)
    environ["PASSWORD"] = "another"
    assert secret.read_again() is secret
    assert Secret(VALUE).read_again().reveal() == VALUE


def test_a_secret_of_no_use_is_none_the_second_time_either(vault: Path) -> None:
    def check(value: str) -> None:
        if "\n" in value:
            raise ValueError("one line")

    with pytest.raises(ValueError, match="one line"):
        resolve({"file": "two"}, {}, base=vault, check=check)
    secret = resolve({"file": "line"}, {}, base=vault, check=check)
    (vault / "line").write_text("a\nb\n")
    with pytest.raises(ValueError, match="one line"):
        secret.read_again()


def test_a_secret_that_was_read_again_is_as_shy_as_before(vault: Path) -> None:
    secret = resolve({"file": "line"}, {}, base=vault)
    (vault / "line").write_text("another")
    again = secret.read_again()
    assert repr(again) == repr(secret) == "Secret(from file line)"
    assert VALUE not in repr(secret._read)
    with pytest.raises(TypeError):
        pickle.dumps(again)


@pytest.mark.parametrize(
    ("source", "changes", "path"),
    [
        ({"file": "line"}, True, "line"),
        ({"credential": "line"}, True, "line"),
        ({"command": ["printf", "hunter2"]}, True, None),
        ({"env": "PASSWORD"}, False, None),
        ({"encrypted": "hunter2"}, False, None),
        (VALUE, False, None),
    ],
)
def test_a_secret_says_whether_it_can_change_and_where(source: Any, changes: bool, path: str | None, vault: Path) -> None:
    environ = {"CREDENTIALS_DIRECTORY": str(vault), "PASSWORD": VALUE}
    secret = resolve(source, environ, base=vault, decrypt=lambda text: text)
    assert (secret.can_change, secret.path) == (changes, vault / path if path else None)
    assert secret.read_again().path == secret.path
