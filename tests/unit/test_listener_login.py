"""One AUTH command without a connection: what each step answers, and what comes out."""

from base64 import b64encode

import pytest
from hypothesis import given
from hypothesis import strategies as st

from relay.listener.login import Exchange, Given
from relay.mail.reply import Reply

USER, PASSWORD = "VXNlcm5hbWU6", "UGFzc3dvcmQ6"


def encoded(octets: bytes | str) -> str:
    return b64encode(octets if isinstance(octets, bytes) else octets.encode()).decode()


def outcome(argument: str, *lines: str) -> Reply | Given:
    """What the last step gives; every one before it must ask for more."""
    exchange = Exchange()
    step = exchange.begin(argument)
    for line in lines:
        assert isinstance(step, Reply), step
        assert step.code == 334, step
        step = exchange.go_on(line.encode("latin-1"))
    return step


@pytest.mark.parametrize(
    ("argument", "lines", "user", "password"),
    [
        ("PLAIN " + encoded("\0erp\0s3cret"), (), "erp", "s3cret"),
        ("plain " + encoded("erp\0erp\0s3cret"), (), "erp", "s3cret"),
        ("Plain", (encoded("\0erp\0s3cret"),), "erp", "s3cret"),
        ("PLAIN  " + encoded("\0erp\0s3cret") + " ", (), "erp", "s3cret"),
        ("PLAIN " + encoded("\0erp\0s3cret").rstrip("="), (), "erp", "s3cret"),
        ("PLAIN", (encoded("\0erp\0s3cret") + "\r",), "erp", "s3cret"),
        ("LOGIN", (encoded("erp"), encoded("s3cret")), "erp", "s3cret"),
        ("login " + encoded("erp"), (encoded("s3cret"),), "erp", "s3cret"),
        ("LOGIN =", (encoded("erp"), encoded("s3cret")), "erp", "s3cret"),
        ("PLAIN " + encoded("\0jürgen\0pässwort"), (), "jürgen", "pässwort"),
        ("PLAIN " + encoded("\0ju\u0308rgen\0\u2168"), (), "jürgen", "IX"),
        ("PLAIN " + encoded("\0jürgen\0pässwort".encode("latin-1")), (), "jürgen", "pässwort"),
        ("PLAIN " + encoded("\0" + "u" * 255 + "\0" + "p" * 255), (), "u" * 255, "p" * 255),
    ],
)
def test_a_login_gives_a_name_and_a_password(argument: str, lines: tuple[str, ...], user: str, password: str) -> None:
    assert outcome(argument, *lines) == Given(user, password)


@pytest.mark.parametrize(
    ("argument", "lines", "user"),
    [
        ("PLAIN " + encoded("boss\0erp\0s3cret"), (), "erp"),
        ("PLAIN " + encoded("\0erp\0"), (), "erp"),
        ("PLAIN " + encoded("\0erp\0" + "p" * 256), (), "erp"),
        ("PLAIN " + encoded("\0" + "u" * 300 + "\0p"), (), "u" * 255),
        ("PLAIN " + encoded("\0erp\0tab\tin it"), (), "erp"),
        ("LOGIN", (encoded("erp"), ""), "erp"),
        ("LOGIN", ("", ""), ""),
    ],
)
def test_what_can_be_nobodys_credentials_has_no_password(argument: str, lines: tuple[str, ...], user: str) -> None:
    assert outcome(argument, *lines) == Given(user, "")


@pytest.mark.parametrize(
    ("argument", "lines", "reply"),
    [
        ("", (), "501 5.5.4"),
        ("PLAIN a b", (), "501 5.5.4"),
        ("CRAM-MD5", (), "504 5.5.4"),
        ("XOAUTH2 " + encoded("user=x"), (), "504 5.5.4"),
        ("PLAIN", ("*",), "501 5.7.0"),
        ("PLAIN *", (), "501 5.7.0"),
        ("LOGIN", (encoded("erp"), " * \r"), "501 5.7.0"),
        ("PLAIN =", (), "501 5.5.2"),
        ("PLAIN", ("",), "501 5.5.2"),
        ("PLAIN AB!D", (), "501 5.5.2"),
        ("PLAIN \udcff", (), "501 5.5.2"),
        ("PLAIN A", (), "501 5.5.2"),
        ("PLAIN " + encoded("erp"), (), "501 5.5.2"),
        ("PLAIN " + encoded("\0erp"), (), "501 5.5.2"),
        ("PLAIN " + encoded("\0erp\0a\0b"), (), "501 5.5.2"),
        ("LOGIN", ("QUIT!",), "501 5.5.2"),
    ],
)
def test_what_is_no_login_is_refused_without_being_looked_up(argument: str, lines: tuple[str, ...], reply: str) -> None:
    assert str(outcome(argument, *lines)).startswith(reply)


def test_prompts_are_the_words_that_picky_clients_look_for() -> None:
    assert outcome("LOGIN") == Reply(334, "", USER)
    assert outcome("LOGIN", encoded("erp")) == Reply(334, "", PASSWORD)
    assert outcome("PLAIN") == Reply(334, "", "")


def test_a_password_is_not_shown() -> None:
    assert repr(Given("erp", "hunter2")) == "Given(user='erp')"


@given(st.text(), st.lists(st.binary(), max_size=4))
def test_no_octets_make_it_fail_otherwise(argument: str, lines: list[bytes]) -> None:
    exchange = Exchange()
    step = exchange.begin(argument)
    for line in lines:
        if isinstance(step, Given) or step.code != 334:
            break
        step = exchange.go_on(line)
    assert isinstance(step, Given) or step.code in (334, 501, 504)
