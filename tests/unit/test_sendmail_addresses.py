"""The addresses of a recipient field."""

import email.utils
import pwd

import pytest
from hypothesis import given
from hypothesis import strategies as st

from relay.sendmail import EX_DATAERR, main
from relay.sendmail.addresses import AddressError, parse_list, parse_one


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", []),
        (" , ,", []),
        ("root", ["root"]),
        ("you@example.org, her@example.org", ["you@example.org", "her@example.org"]),
        ("you@example.org;her@example.org", ["you@example.org", "her@example.org"]),
        ("You <you@example.org>", ["you@example.org"]),
        ('"Last, First" <you@example.org>, root', ["you@example.org", "root"]),
        ('"a \\" <b@c>" <you@example.org>', ["you@example.org"]),
        ("=?utf-8?q?J=C3=B6rg?= <you@example.org>", ["you@example.org"]),
        ("Jörg <jörg@example.org>", ["jörg@example.org"]),
        ("you@example.org (the, one <and> only)", ["you@example.org"]),
        ("(a (nested) comment) you@example.org", ["you@example.org"]),
        ("friends: you@example.org, Her <her@example.org>;, last@example.org", ["you@example.org", "her@example.org", "last@example.org"]),
        ("undisclosed-recipients:;", []),
        ("you @ example . org", ["you@example.org"]),
        ("you@[IPv6:::1], other@[127.0.0.1]", ["you@[IPv6:::1]", "other@[127.0.0.1]"]),
        ('"a b,c>"@example.org', ['"a b,c>"@example.org']),
        ('"a\\"b"@example.org', ['"a\\"b"@example.org']),
        ("<@hop.example:you@example.org>", ["@hop.example:you@example.org"]),
        ("you@example.org,\r\n\tHer <her@example.org>\n", ["you@example.org", "her@example.org"]),
        ("<>", []),
    ],
)
def test_a_list_is_cut_into_its_addresses(text: str, expected: list[str]) -> None:
    assert parse_list(text) == expected


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("you her", "not an address"),
        ("you@example.org her@example.org", "not an address"),
        ("<you@example.org> <her@example.org>", "a comma is missing"),
        ("You <you@example.org", "no closing >"),
        ("<a <b@c>", "no closing >"),
        ('"open <a@b>', "does not end"),
        ("(open a@b", "does not end"),
        ("<you@example.org\r\nRCPT TO:<her@example.org>", "no closing >"),
        ("<you@example.org\r\nRSET>", "control character"),
        ("a\x00b", "control character"),
        ("<a b@c>", "not an address"),
        ("a>b", "not an address"),
    ],
)
def test_what_has_two_readings_or_none_is_refused(text: str, reason: str) -> None:
    with pytest.raises(AddressError, match=reason):
        parse_list(text)


@pytest.mark.parametrize(("text", "expected"), [("", ""), ("<>", ""), ("me", "me"), ("Me <me@acme.example>", "me@acme.example")])
def test_a_sender_is_one_address_or_none(text: str, expected: str) -> None:
    assert parse_one(text) == expected


def test_two_senders_are_refused() -> None:
    with pytest.raises(AddressError, match="more than one"):
        parse_one("me@acme.example, you@example.org")


@given(st.text(st.sampled_from('ab@.,;:<>()[]" \\\t\r\n\x00é'), max_size=30))
def test_nothing_that_is_read_can_leave_its_place_in_a_command(text: str) -> None:
    try:
        found = parse_list(text)
    except AddressError:
        return
    for address in found:
        assert address and address.strip() == address
        assert not any(character < " " or character == "\x7f" for character in address)
        if '"' not in address:
            assert not set("<> ") & set(address)


def test_the_name_of_a_user_whom_only_the_environment_knows_cannot_either(monkeypatch: pytest.MonkeyPatch) -> None:
    def nobody(uid: int) -> None:
        raise KeyError(uid)

    monkeypatch.setattr(pwd, "getpwuid", nobody)
    monkeypatch.setenv("LOGNAME", "app>\r\nRCPT TO:<victim@example.org")
    monkeypatch.setenv("RELAY_DROP", "/nonexistent")
    assert main(["you@example.org"], name="sendmail") == EX_DATAERR


_ATOM = st.text(st.sampled_from("abcXYZ019!#$%&'*+-/=?^_`{|}~"), min_size=1, max_size=8)
_ADDRESS = st.builds("{}@{}.example".format, _ATOM, st.text("abcz09", min_size=1, max_size=8))


@given(st.lists(st.tuples(st.text(st.sampled_from('ab ,;:<>()"\\é@.'), max_size=10), _ADDRESS), max_size=5))
def test_what_the_standard_library_writes_is_read(mailboxes: list[tuple[str, str]]) -> None:
    text = ", ".join(email.utils.formataddr(mailbox) for mailbox in mailboxes)
    assert parse_list(text) == [address for _, address in mailboxes]
