"""Secrets as encrypted text: what was shut opens with the right key alone, keys can be changed, and every error says which and not what."""

import logging
import pickle
import traceback
from pathlib import Path

import pytest

from relay.config.encryption import Keyring, Keys, keys_at, new_key
from relay.config.load import examine, load
from relay.config.secrets import SecretError

VALUE = "hunter2-ünseen"
OLD, NEW = new_key(), new_key()


def ring(*keys: str) -> Keyring:
    return Keyring(keys, where="relay.key")


@pytest.mark.parametrize("value", [VALUE, "x", "a\nb\n", "{}" * 4000, "=.'\"#: "])
def test_what_was_encrypted_comes_back(value: str) -> None:
    text = ring(NEW).encrypt(value)
    assert ring(NEW).decrypt(text) == value
    assert value not in text or value == "x"
    assert text.isascii()
    assert not set(text) & set(" \n'\"#:{}\\")


def test_the_same_secret_is_never_the_same_text() -> None:
    assert ring(NEW).encrypt(VALUE) != ring(NEW).encrypt(VALUE)


def test_line_breaks_of_a_folded_text_do_no_harm() -> None:
    text = ring(NEW).encrypt(VALUE)
    assert ring(NEW).decrypt(f" {text[:30]}\n    {text[30:]}\n") == VALUE


def test_a_new_key_on_top_encrypts_and_the_old_one_still_opens() -> None:
    before = ring(OLD).encrypt(VALUE)
    both = ring(NEW, OLD)
    assert both.decrypt(before) == VALUE
    assert (both.is_current(before), both.is_current(both.encrypt(VALUE))) == (False, True)
    assert ring(NEW).decrypt(both.encrypt(VALUE)) == VALUE
    with pytest.raises(SecretError, match=r"encrypted with the key [0-9a-f]{8}, which is not in relay\.key"):
        ring(NEW).decrypt(before)


def test_a_key_that_stands_twice_is_as_new_as_its_first_line() -> None:
    assert ring(NEW, OLD, NEW).is_current(ring(NEW).encrypt(VALUE))


def damaged() -> dict[str, str]:
    text = ring(NEW).encrypt(VALUE)
    key, token = text.split(".")
    middle = len(token) // 2
    other = "A" if token[middle] != "A" else "B"
    return {
        "a letter is wrong": f"{key}.{token[:middle]}{other}{token[middle + 1 :]}",
        "the end is missing": text[:-10],
        "the end is missing, but its padding": text[:-14] + "==",
        "almost all is missing": f"{key}.g",
        "something stands behind it": text + "AAAA",
        "the key's number is another's": f"{ring(OLD).encrypt(VALUE).split('.')[0]}.{token}",
        "the token stands alone": token,
        "there is nothing but the key": f"{key}.",
        "it is the secret itself": VALUE,
        "it is empty": "",
    }


@pytest.mark.parametrize("how", damaged())
def test_what_is_damaged_is_refused_without_any_of_it(how: str) -> None:
    text = damaged()[how]
    with pytest.raises(SecretError) as caught:
        ring(NEW, OLD).decrypt(text)
    shown = "".join(traceback.format_exception(caught.value))
    assert VALUE not in shown
    assert len(text) < 12 or text[9:] not in shown
    assert any(words in str(caught.value) for words in ("damaged or incomplete", "no encrypted secret, or not all of it"))


def test_keys_show_themselves_to_nobody(caplog: pytest.LogCaptureFixture) -> None:
    keys = ring(NEW, OLD)
    logging.getLogger().error("%s %r", keys, {"keys": keys})
    shown = f"{keys!r}{keys}{caplog.text}"
    assert NEW not in shown and OLD not in shown
    assert repr(keys) == "Keyring(2 from relay.key)"
    with pytest.raises(TypeError):
        pickle.dumps(keys)


# -- the file of the keys ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("content", ["{new}\n{old}\n", "# since May\r\n{new}\r\n\r\n  {old}", "\n{new}\n# before\n{old}\n"])
def test_a_key_file_has_a_key_a_line_newest_first(content: str, tmp_path: Path) -> None:
    path = tmp_path / "keys"
    path.write_bytes(content.format(new=NEW, old=OLD).encode())
    keys = Keyring.from_file(path)
    assert keys.is_current(ring(NEW).encrypt(VALUE))
    assert keys.decrypt(ring(OLD).encrypt(VALUE)) == VALUE


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (None, "No such file or directory"),
        (b"", "holds no key: `relay secret keygen --out FILE` makes one"),
        (b"# nothing yet\n", "holds no key"),
        (b"hunter2\n", "line 1: is no key from `relay secret keygen`"),
        (NEW.encode() + b"\n\n" + OLD[:-1].encode(), "line 3: is no key"),
        (NEW.encode() + OLD.encode(), "line 1: is no key"),
        (b"\xff\xfe", "is not UTF-8 text"),
    ],
    ids=["absent", "empty", "only a comment", "no key", "the second is cut", "two on a line", "no text"],
)
def test_a_key_file_that_cannot_be_used_says_why(content: bytes | None, reason: str, tmp_path: Path) -> None:
    path = tmp_path / "keys"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(SecretError) as caught:
        Keyring.from_file(path)
    shown = "".join(traceback.format_exception(caught.value))
    assert reason in str(caught.value)
    assert str(path) in str(caught.value)
    assert all(secret not in shown for secret in ("hunter2", NEW, OLD[:-1]))


def test_the_configuration_names_the_key_file_else_the_environment_does(tmp_path: Path) -> None:
    environ = {"RELAY_SECRET_KEY_FILE": "/run/key"}
    assert keys_at(tmp_path, environ).path == tmp_path
    assert keys_at(None, environ).path == Path("/run/key")
    assert keys_at(None, {"RELAY_SECRET_KEY_FILE": ""}).path is None
    with pytest.raises(SecretError, match=r"there is no key: name its file with secrets\.key_file or \$RELAY_SECRET_KEY_FILE"):
        Keys(None).decrypt("x")


# -- in the configuration ----------------------------------------------------------------------------------------------------

ACME = """\
upstreams:
  acme: {{host: smtp.acme.example, username: acme, password: {{encrypted: "{text}"}}}}
routes: [{{upstream: acme}}]
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    (tmp_path / "relay.key").touch(mode=0o600)
    (tmp_path / "relay.key").write_text(NEW)
    return tmp_path / "config.yaml"


def said(file: Path, content: str, **environ: str) -> list[str]:
    file.write_text(content)
    return [str(finding).removeprefix(f"{file}:").replace(f"{file.parent}/", "") for finding in examine(file, environ)[1]]


def test_an_encrypted_secret_opens_wherever_the_key_is_named(file: Path) -> None:
    text = ring(NEW).encrypt(VALUE)
    acme = ACME.format(text=text)
    key_file = "secrets: {key_file: relay.key}\n"
    for content, environ in (
        (acme + key_file, {}),
        (key_file + acme, {"RELAY_SECRET_KEY_FILE": "/nonexistent"}),
        (acme, {"RELAY_SECRET_KEY_FILE": str(file.parent / "relay.key")}),
    ):
        file.write_text(content)
        password = load(file, environ).upstreams["acme"].password
        assert password is not None
        assert (password.reveal(), repr(password), password.is_plain) == (VALUE, "Secret(from encrypted text)", False)


def test_every_secret_of_the_file_may_be_encrypted(file: Path) -> None:
    text, hashed = ring(NEW).encrypt(VALUE), ring(NEW).encrypt("scrypt$16$8$1$AAAAAAAAAAAAAAAA$AAAAAAAAAAAAAAAAAAAAAAAAAAAA")
    file.write_text(
        ACME.format(text=text) + "listeners: [{auth: optional}]\nsecrets: {key_file: relay.key}\nusers:\n"
        f"  erp: {{password: {{encrypted: {text}}}, senders: acme.example}}\n"
        f"  crm: {{password_hash: {{encrypted: {hashed}}}, senders: acme.example}}\n"
    )
    users = load(file, {}).users
    assert users["erp"].password is not None and users["crm"].password_hash is not None
    assert users["erp"].password.reveal() == VALUE


def test_what_opens_to_no_password_is_refused_like_any_other(file: Path) -> None:
    content = ACME.format(text=ring(NEW).encrypt("two\nlines")) + "secrets: {key_file: relay.key}\n"
    assert said(file, content) == ["2:61: upstreams.acme.password: must not contain control characters or line breaks"]


def test_errors_say_where_and_why(file: Path) -> None:
    acme, key = ACME.format(text=ring(NEW).encrypt(VALUE)), "secrets: {key_file: relay.key}\n"
    nowhere = "there is no key: name its file with secrets.key_file or $RELAY_SECRET_KEY_FILE; `relay secret keygen` makes one"
    assert said(file, acme) == [f"2:61: upstreams.acme.password: {nowhere}"]
    missing = "cannot read gone.key: No such file or directory"
    assert said(file, acme + "secrets: {key_file: gone.key}\n") == [f"2:61: upstreams.acme.password: {missing}"]
    (finding,) = said(file, ACME.format(text=ring(OLD).encrypt(VALUE)) + key)
    assert finding.startswith("2:61: upstreams.acme.password: was encrypted with the key ")
    (finding,) = said(file, acme.replace("gAAAA", "gAAAB") + key)
    assert finding == "2:61: upstreams.acme.password: the encrypted secret is damaged or incomplete: encrypt it again"
    (finding,) = said(file, ACME.format(text="hunter2") + key)
    assert "hunter2" not in finding


def test_a_key_file_is_looked_at_even_while_nothing_is_encrypted(file: Path) -> None:
    plain = ACME.replace('{{encrypted: "{text}"}}', "{{env: ACME}}").format()
    assert said(file, plain + "secrets: {key_file: gone.key}\n", ACME="x") == [
        "4:21: secrets.key_file: cannot read gone.key: No such file or directory"
    ]
    assert said(file, plain, ACME="x", RELAY_SECRET_KEY_FILE="/gone.key") == ["1:1: cannot read /gone.key: No such file or directory"]
    (file.parent / "relay.key").write_text("hunter2")
    assert said(file, plain + "secrets: {key_file: relay.key}\n", ACME="x") == [
        "4:21: secrets.key_file: relay.key, line 1: is no key from `relay secret keygen`"
    ]


@pytest.mark.parametrize(("mode", "warned"), [(0o600, False), (0o400, False), (0o640, False), (0o644, True), (0o604, True)])
def test_a_key_file_that_others_can_read_is_a_warning(mode: int, warned: bool, file: Path) -> None:
    (file.parent / "relay.key").chmod(mode)
    content = ACME.format(text=ring(NEW).encrypt(VALUE)) + "secrets: {key_file: relay.key}\n"
    found = said(file, content)
    assert found == ["4:21: secrets.key_file: warning: others can read relay.key, and with it every encrypted secret: chmod o-r"] * warned


@pytest.mark.parametrize("section", ["secrets: {key_file: [relay.key]}", "secrets: relay.key", "secrets: {keyfile: relay.key}", "secrets:"])
def test_a_section_that_cannot_be_understood_is_said_beside_what_needs_it(section: str, file: Path) -> None:
    found = said(file, ACME.format(text=ring(NEW).encrypt(VALUE)) + section + "\n")
    assert any("there is no key" in finding for finding in found)
    assert any(": secrets" in finding for finding in found)
