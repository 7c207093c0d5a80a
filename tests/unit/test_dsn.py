"""What a client asks to be told: read into one spelling, refused when it is nonsense, and never forgotten."""

from itertools import product

import pytest

from relay.mail.address import ParameterError
from relay.mail.dsn import both, decode_xtext, message_wishes, original_recipient, recipient_wishes, wants


@pytest.mark.parametrize(
    ("parameters", "wishes"),
    [
        ({}, ("", "")),
        ({"SIZE": "1"}, ("", "")),
        ({"RET": "full"}, ("FULL", "")),
        ({"RET": "HDRS", "ENVID": "order-7"}, ("HDRS", "order-7")),
        ({"ENVID": "a+2Bb+3dc"}, ("", "a+2Bb+3Dc")),
        ({"ENVID": "a=b"}, ("", "a+3Db")),
        ({"ENVID": "a+41+20b"}, ("", "aA+20b")),
        ({"ENVID": "x" * 100}, ("", "x" * 100)),
    ],
)
def test_the_wishes_of_a_message_have_one_spelling(parameters: dict[str, str], wishes: tuple[str, str]) -> None:
    assert message_wishes(parameters) == wishes


@pytest.mark.parametrize(
    "parameters",
    [
        {"RET": ""},
        {"RET": "BODY"},
        {"RET": "FULL,HDRS"},
        {"ENVID": ""},
        {"ENVID": "x" * 101},
        {"ENVID": "=" * 34},
        {"ENVID": "a+"},
        {"ENVID": "a+4"},
        {"ENVID": "a+4G"},
        {"ENVID": "a+0D+0AX"},
        {"ENVID": "a+00"},
        {"ENVID": "a+FF"},
        {"ENVID": "größe"},
    ],
)
def test_nonsense_about_a_message_is_refused(parameters: dict[str, str]) -> None:
    with pytest.raises(ParameterError):
        message_wishes(parameters)


@pytest.mark.parametrize(
    ("notify", "spelling"),
    [
        ("never", "NEVER"),
        ("SUCCESS", "SUCCESS"),
        ("delay,Failure", "FAILURE,DELAY"),
        ("DELAY,SUCCESS,FAILURE", "SUCCESS,FAILURE,DELAY"),
        ("FAILURE,FAILURE", "FAILURE"),
    ],
)
def test_notify_has_one_spelling(notify: str, spelling: str) -> None:
    assert recipient_wishes({"NOTIFY": notify}, smtputf8=False) == (spelling, "")


@pytest.mark.parametrize("notify", ["", "ALWAYS", "NEVER,FAILURE", "FAILURE,NEVER", "SUCCESS,", ",", "SUCCESS;DELAY", "NEVER,NEVER"])
def test_a_notify_that_is_none_is_refused(notify: str) -> None:
    with pytest.raises(ParameterError):
        recipient_wishes({"NOTIFY": notify}, smtputf8=True)


@pytest.mark.parametrize(
    ("orcpt", "smtputf8", "spelling"),
    [
        ("rfc822;Bob@example.org", False, "rfc822;Bob@example.org"),
        ("RFC822;a+2bb@example.org", False, "RFC822;a+2Bb@example.org"),
        ("rfc822;prvs=1=a@example.org", False, "rfc822;prvs+3D1+3Da@example.org"),
        ("x400;/C=de/+20", False, "x400;/C+3Dde/+20"),
        ("rfc822;a;b", False, "rfc822;a;b"),
        ("utf-8;jürgen@bücher.example", True, r"utf-8;j\x{FC}rgen@b\x{FC}cher.example"),
        (r"utf-8;j\x{fc}rgen\x{2B}41@example.org", False, r"utf-8;j\x{FC}rgen\x{2B}41@example.org"),
        ("UTF-8;a+2Bb@example.org", False, r"UTF-8;a\x{2B}b@example.org"),
        ("utf-8;a\u200db@example.org", True, r"utf-8;a\x{200D}b@example.org"),
        ("rfc822;" + "x" * 493, False, "rfc822;" + "x" * 493),
    ],
)
def test_an_original_recipient_is_kept_in_ascii(orcpt: str, smtputf8: bool, spelling: str) -> None:
    assert recipient_wishes({"ORCPT": orcpt}, smtputf8=smtputf8) == ("", spelling)
    assert recipient_wishes({"ORCPT": spelling}, smtputf8=False) == ("", spelling)


@pytest.mark.parametrize(
    "orcpt",
    [
        "",
        ";",
        "rfc822",
        "rfc822;",
        ";bob@example.org",
        "rfc 822;x",
        "rfc822;a+b@example.org",
        "rfc822;a+0Ab@example.org",
        "rfc822;jürgen@example.org",
        "rfc822;" + "x" * 494,
        "rfc822;" + "=" * 200,
        r"utf-8;a\x{0A}b",
        r"utf-8;a\x{D800}b",
        r"utf-8;a\x{110000}b",
        "utf-8;a\u202eb",
    ],
)
def test_an_original_recipient_that_is_none_is_refused(orcpt: str) -> None:
    with pytest.raises(ParameterError):
        recipient_wishes({"ORCPT": orcpt}, smtputf8=True)


def test_utf8_needs_smtputf8() -> None:
    with pytest.raises(ParameterError):
        recipient_wishes({"ORCPT": "utf-8;jürgen@example.org"}, smtputf8=False)


@pytest.mark.parametrize(
    ("address", "orcpt"),
    [
        ("root@example.net", "rfc822;root@example.net"),
        ("a+b=c@example.net", "rfc822;a+2Bb+3Dc@example.net"),
        ('"a b"@example.net', 'rfc822;"a+20b"@example.net'),
        ("jürgen+x@example.net", r"utf-8;j\x{FC}rgen\x{2B}x@example.net"),
        ("ü" * 64 + "@example.net", ("utf-8;" + r"\x{FC}" * 64 + "@example.net")),
        ("\U0001f600" * 32 + "@" + "ü.de." * 30 + "de", ""),
    ],
)
def test_the_name_that_an_alias_had_is_kept(address: str, orcpt: str) -> None:
    assert original_recipient(address) == orcpt
    assert not orcpt or recipient_wishes({"ORCPT": orcpt}, smtputf8=False) == ("", orcpt)


@pytest.mark.parametrize(
    ("notify", "wanted"),
    [
        ("", {"FAILURE", "DELAY"}),
        ("NEVER", set()),
        ("SUCCESS", {"SUCCESS"}),
        ("failure", {"FAILURE"}),
        ("SUCCESS,DELAY", {"SUCCESS", "DELAY"}),
    ],
)
def test_failures_and_delays_are_told_unless_something_else_is_asked(notify: str, wanted: set[str]) -> None:
    assert {event for event in ("SUCCESS", "FAILURE", "DELAY") if wants(notify, event)} == wanted


@pytest.mark.parametrize(("first", "second"), list(product(["", "NEVER", "SUCCESS", "FAILURE", "DELAY", "FAILURE,DELAY"], repeat=2)))
def test_two_wishes_for_one_recipient_miss_nothing(first: str, second: str) -> None:
    for event in ("SUCCESS", "FAILURE", "DELAY"):
        assert wants(both(first, second), event) == (wants(first, event) or wants(second, event))


def test_xtext_is_decoded() -> None:
    assert decode_xtext("a+2Bb+20c") == "a+b c"
