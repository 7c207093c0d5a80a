"""`relay secret`: keys that are never overwritten, secrets that come from no argument, and files in which only the secrets change."""

import io
import os
import stat
import sys
from pathlib import Path

import pytest

from relay.cli import main
from relay.config.encryption import Keyring, new_key
from relay.config.load import load

VALUE = "hunter2-unseen"
CONFIG = """\
# ours: ünd all that
upstreams:
  acme:   {{host: smtp.acme.example, username: acme, password: {{encrypted: "{0}"}}}}   # since May
  globex: {{host: smtp.globex.example, username: globex, password: {{encrypted: {1}}}}}
routes:
  - {{upstream: acme, fallback: globex}}
secrets:
  key_file: relay.key
"""


class Input:
    """Standard input: `octets` from a pipe, or a person at a terminal."""

    def __init__(self, octets: bytes = b"", *, terminal: bool = False) -> None:
        self.buffer = io.BytesIO(octets)
        self._terminal = terminal

    def isatty(self) -> bool:
        return self._terminal


@pytest.fixture(autouse=True)
def directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("RELAY_CONFIG", raising=False)
    monkeypatch.delenv("RELAY_SECRET_KEY_FILE", raising=False)
    monkeypatch.setattr("relay.config.load._SYSTEM_FILE", tmp_path / "etc.yaml")
    return tmp_path


def run(monkeypatch: pytest.MonkeyPatch, *words: str, given: bytes = b"", typed: tuple[str, ...] = ()) -> int:
    answers = iter(typed)
    monkeypatch.setattr(sys, "stdin", Input(given, terminal=bool(typed)))
    monkeypatch.setattr("getpass.getpass", lambda prompt: next(answers))
    return main(["secret", *words])


def key_file(path: str = "relay.key", *older: str) -> Keyring:
    """A new key on top of the others."""
    Path(path).touch(mode=0o600)
    Path(path).write_text("\n".join([new_key(), *older]) + "\n")
    return Keyring.from_file(Path(path))


def encrypted(line: str) -> str:
    return line.removeprefix('{encrypted: "').removesuffix('"}\n')


# -- keygen ------------------------------------------------------------------------------------------------------------------


def test_a_key_is_printed_or_kept_where_only_its_owner_reads_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, "keygen") == 0
    Path("printed").write_text(capsys.readouterr().out)
    old = os.umask(0)
    try:
        assert run(monkeypatch, "keygen", "--out", "kept") == 0
    finally:
        os.umask(old)
    assert capsys.readouterr() == ("", "")
    assert stat.S_IMODE(Path("kept").stat().st_mode) == 0o600
    for name in ("printed", "kept"):
        ring = Keyring.from_file(Path(name))
        assert ring.decrypt(ring.encrypt(VALUE)) == VALUE
    assert Path("printed").read_text() != Path("kept").read_text()


def test_a_key_is_never_overwritten(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    Path("there").write_text("precious")
    Path("link").symlink_to("nowhere")
    for name in ("there", "link"):
        assert run(monkeypatch, "keygen", "--out", name) == 1
        assert f"{name} exists already, and keys are never overwritten" in capsys.readouterr().err
    assert Path("there").read_text() == "precious"
    assert not Path("nowhere").exists()
    assert run(monkeypatch, "keygen", "--out", "no/such/directory") == 1
    assert "cannot write no/such/directory: No such file or directory" in capsys.readouterr().err


# -- encrypt -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("octets", "secret"),
    [(b"s3cret\n", "s3cret"), (b"s3cret", "s3cret"), ("pä ss\r\n".encode(), "pä ss"), (b'{\n "key": 1\n}\n', '{\n "key": 1\n}')],
)
def test_what_comes_by_a_pipe_is_printed_as_it_goes_into_the_file(
    octets: bytes, secret: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ring = key_file()
    assert run(monkeypatch, "encrypt", "--key-file", "relay.key", given=octets) == 0
    printed = capsys.readouterr()
    assert ring.decrypt(encrypted(printed.out)) == secret
    assert printed.err == ""


def test_more_than_a_secret_has_is_none(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    key_file()
    assert run(monkeypatch, "encrypt", "--key-file", "relay.key", given=b"x" * 65537) == 1
    assert capsys.readouterr() == ("", "relay secret: standard input is too large for a secret\n")


def test_a_person_is_asked_twice(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    ring = key_file()
    monkeypatch.setenv("RELAY_SECRET_KEY_FILE", "relay.key")
    assert run(monkeypatch, "encrypt", typed=(VALUE, VALUE)) == 0
    assert ring.decrypt(encrypted(capsys.readouterr().out)) == VALUE
    assert run(monkeypatch, "encrypt", typed=(VALUE, "other")) == 1
    assert capsys.readouterr() == ("", "relay secret: the two were not the same\n")


@pytest.mark.parametrize(
    ("error", "why"), [(EOFError(), "nothing was typed"), (UnicodeDecodeError("utf-8", b"hunter2", 0, 1, "x"), "UTF-8")]
)
def test_a_person_who_ends_the_input_or_types_no_text_is_told(
    error: Exception, why: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    key_file()

    def ends(prompt: str) -> str:
        raise error

    monkeypatch.setattr(sys, "stdin", Input(terminal=True))
    monkeypatch.setattr("getpass.getpass", ends)
    assert main(["secret", "encrypt", "--key-file", "relay.key"]) == 1
    printed = capsys.readouterr()
    assert why in printed.err
    assert "hunter2" not in printed.err + printed.out


def test_a_secret_is_no_argument(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    key_file()
    assert run(monkeypatch, "encrypt", "--key-file", "relay.key", VALUE) == 64
    printed = capsys.readouterr()
    assert printed.out == ""
    assert "a secret is no argument" in printed.err
    assert VALUE not in printed.err


def test_the_key_is_where_the_configuration_says_however_broken_that_is(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("etc").mkdir()
    ring = key_file("etc/relay.key")
    key_file("other.key")
    monkeypatch.setenv("RELAY_SECRET_KEY_FILE", "other.key")
    Path("etc/config.yaml").write_text(CONFIG.format("not yet", "@") + "unknown: 1\n")
    assert run(monkeypatch, "encrypt", "-c", "etc/config.yaml", given=b"s3cret") == 0
    assert ring.decrypt(encrypted(capsys.readouterr().out)) == "s3cret"


@pytest.mark.parametrize(
    ("config", "words", "code", "why"),
    [
        (None, (), 1, "there is no key: name its file with secrets.key_file or $RELAY_SECRET_KEY_FILE"),
        ("secrets: {key_file: gone}\n", (), 1, "cannot read gone: No such file or directory"),
        (None, ("--key-file", "gone"), 1, "cannot read gone: No such file or directory"),
        ("secrets: {key_file: [a]}\n", (), 78, "config.yaml:1:21: secrets.key_file: must be the name of a file"),
        (None, ("-c", "gone.yaml"), 78, "gone.yaml: there is no such file"),
    ],
)
def test_without_a_key_nothing_is_encrypted(
    config: str | None, words: tuple[str, ...], code: int, why: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    if config is not None:
        Path("config.yaml").write_text(config)
    assert run(monkeypatch, "encrypt", *words, given=VALUE.encode()) == code
    printed = capsys.readouterr()
    assert why in printed.err
    assert (printed.out, VALUE in printed.err) == ("", False)


@pytest.mark.parametrize(("given", "why"), [(b"", "empty"), (b"\n", "empty"), (b"hunter2\xff", "not UTF-8")])
def test_what_is_no_secret_is_refused(given: bytes, why: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    key_file()
    assert run(monkeypatch, "encrypt", "--key-file", "relay.key", given=given) == 1
    printed = capsys.readouterr()
    assert why in printed.err
    assert "hunter2" not in printed.err


# -- encrypt --rotate --------------------------------------------------------------------------------------------------------


def rotated_key() -> tuple[Keyring, Keyring]:
    """The ring before and after a new key was put on top of the file."""
    before = key_file()
    return before, key_file("relay.key", *Path("relay.key").read_text().split())


def test_rotation_changes_the_secrets_in_a_file_and_nothing_else(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    before, after = rotated_key()
    texts = [before.encrypt("one"), after.encrypt("two")]
    path = Path("config.yaml")
    example = '# {encrypted: "4be0bc86.gAAAAABo..."}\n# and {encrypted: "4be0bc86.gAAAAABo..."}\n'
    content = (example + CONFIG.format(*texts)).replace("\n", "\r\n")
    path.write_bytes(content.encode())
    path.chmod(0o640)
    inode = path.stat().st_ino
    assert run(monkeypatch, "encrypt", "--rotate", "config.yaml") == 0
    assert "1 of 2 encrypted secrets re-encrypted" in capsys.readouterr().err
    changed = path.read_bytes().decode()
    start, end = content.split(texts[0])
    assert changed.startswith(start) and changed.endswith(end)
    assert after.decrypt(changed.removeprefix(start).removesuffix(end)) == "one"
    assert (stat.S_IMODE(path.stat().st_mode), path.stat().st_ino != inode) == (0o640, True)
    Path("relay.key").write_text(Path("relay.key").read_text().split()[0])  # the old key goes
    upstreams = load(path, {}).upstreams
    assert [item.password.reveal() for item in upstreams.values() if item.password is not None] == ["one", "two"]
    assert run(monkeypatch, "encrypt", "--rotate", "config.yaml") == 0
    assert path.read_bytes().decode() == changed
    assert sorted(os.listdir()) == ["config.yaml", "relay.key"]


def test_rotation_through_a_pipe_leaves_everything_else_as_it_was(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    before, after = rotated_key()
    text = before.encrypt(VALUE)
    given = f"# a\r\nx: {{encrypted: {text}}}\n\n"
    assert run(monkeypatch, "encrypt", "--rotate", "--key-file", "relay.key", given=given.encode()) == 0
    printed = capsys.readouterr().out
    start, end = given.split(text)
    assert printed.startswith(start) and printed.endswith(end)
    found = printed.removeprefix(start).removesuffix(end)
    assert (after.decrypt(found), after.is_current(found)) == (VALUE, True)


def test_a_link_stays_a_link(monkeypatch: pytest.MonkeyPatch) -> None:
    before, after = rotated_key()
    Path("real.yaml").write_text(before.encrypt(VALUE))
    Path("link.yaml").symlink_to("real.yaml")
    assert run(monkeypatch, "encrypt", "--rotate", "--key-file", "relay.key", "link.yaml") == 0
    assert Path("link.yaml").is_symlink()
    assert after.is_current(Path("real.yaml").read_text())


@pytest.mark.parametrize("broken", ["foreign", "damaged", "folded"])
def test_a_file_with_one_that_does_not_open_is_not_touched(
    broken: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    before, _ = rotated_key()
    good = before.encrypt(VALUE)
    bad = (
        Keyring([new_key()]).encrypt(VALUE) if broken == "foreign" else good[:-9] if broken == "damaged" else f"{good[:40]}\n  {good[40:]}"
    )
    content = f"a: {good}\nb: {bad}\n"
    Path("config.yaml").write_text(content)
    assert run(monkeypatch, "encrypt", "--rotate", "--key-file", "relay.key", "config.yaml") == 1
    printed = capsys.readouterr()
    assert printed.err.startswith(f"relay secret: {Path('config.yaml').resolve()}, encrypted secret no. 2: ")
    assert VALUE not in printed.err
    assert Path("config.yaml").read_text() == content
    assert sorted(os.listdir()) == ["config.yaml", "relay.key"]


def test_a_file_that_cannot_be_read_or_written_is_said(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    rotated_key()
    for name, why in (("gone.yaml", "No such file or directory"), (".", "Is a directory")):
        assert run(monkeypatch, "encrypt", "--rotate", "--key-file", "relay.key", name) == 1
        assert why in capsys.readouterr().err
