"""Addresses: the grammar, its errors, and how addresses compare."""

import time
import tracemalloc

import pytest

from relay.mail.address import (
    AddressError,
    ParameterError,
    domain_of,
    folded,
    is_mailbox,
    local_of,
    normalize_domain,
    parse_parameters,
    parse_path,
    patterns_for,
)


def escaped(text: str) -> str:
    """`text` as the listener reads it off the wire."""
    return text.encode().decode("ascii", "surrogateescape")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("<a@b.c>", ("a@b.c", "")),
        (" <a@b.c>", ("a@b.c", "")),
        ("\t <a@b.c>  ", ("a@b.c", "")),
        ("<>", ("", "")),
        (" <> SIZE=1", ("", "SIZE=1")),
        ("<A.b@C.d> SIZE=10 BODY=8BITMIME", ("A.b@C.d", "SIZE=10 BODY=8BITMIME")),
        ("a@b.c SIZE=10", ("a@b.c", "SIZE=10")),
        ("a@b.c", ("a@b.c", "")),
        ("root", ("root", "")),
        ("<root>", ("root", "")),
        ("<@a.b,@c.d:e@f.g> X", ("e@f.g", "X")),
        ("<user+tag@b.c>", ("user+tag@b.c", "")),
        ("<=?x?=@b.c>", ("=?x?=@b.c", "")),
        ('<"a b"@c.d>', ('"a b"@c.d', "")),
        ('<"a@b"@c.d>', ('"a@b"@c.d', "")),
        ('<"a\\"\\\\b"@c.d>', ('"a\\"\\\\b"@c.d', "")),
        ('<"<>"@c.d> SIZE=1', ('"<>"@c.d', "SIZE=1")),
        ('""@c.d', ('""@c.d', "")),
        ("<a@[127.0.0.1]>", ("a@[127.0.0.1]", "")),
        ("<a@[IPv6:2001:db8::1]>", ("a@[IPv6:2001:db8::1]", "")),
        ("<a@under_score.example>", ("a@under_score.example", "")),
        ("<a@localhost>", ("a@localhost", "")),
        ("<a..b@c.d>", ("a..b@c.d", "")),
        ("<a.@c.d>", ("a.@c.d", "")),
        ("<jürgen@bücher.example>", ("jürgen@bücher.example", "")),
        (escaped("<jürgen@bücher.example> SMTPUTF8"), ("jürgen@bücher.example", "SMTPUTF8")),
        (f"<{'l' * 128}@b.c>", ("l" * 128 + "@b.c", "")),
    ],
)
def test_a_path_gives_the_address_and_the_parameters(text: str, expected: tuple[str, str]) -> None:
    assert parse_path(text) == expected


def test_a_local_part_is_quoted_only_where_it_must_be() -> None:
    assert parse_path('<"joe.user"@c.d>')[0] == "joe.user@c.d"
    assert parse_path('<"j\\o\\e"@c.d>')[0] == "joe@c.d"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "no address"),
        ("   ", "no address"),
        ("<", "nothing where the local part"),
        ("<a@b.c", "no closing >"),
        ("<a", "no closing >"),
        ("<a,b@c.d>", "',' in the address"),
        ("<a b@c.d>", "a blank in the address"),
        ("<a@b@c>", "'@' in the address"),
        ("<a@b c>", "a blank in the address"),
        ("< a@b.c>", "a blank where the local part"),
        ("<<a@b.c>>", "'<' where the local part"),
        ("<a@b.c>X", "'X' behind the address"),
        ("<a@b.c><d@e.f>", "'<' behind the address"),
        ("a@b.c>", "'>' behind the address"),
        ("<@b.c>", "'@' where the local part"),
        ("<@a.b:>", "'>' where the local part"),
        ("<a@>", "'>' where the domain"),
        ("<a@b..c>", "domain is malformed"),
        ("<a@-b.c>", "domain is malformed"),
        ("<a@b-.c>", "domain is malformed"),
        ("<a@b.c.>", "domain is malformed"),
        (f"<a@{'l' * 64}.c>", "domain is malformed"),
        ("<a@[300.1.1.1]>", "literal is malformed"),
        ("<a@[IPv6:zz]>", "literal is malformed"),
        ("<a@[IPv6:fe80::1%eth0]>", "literal is malformed"),
        ("<a@[x]>", "literal is malformed"),
        ('<"a b>', "does not end"),
        ('<"a"b@c.d>', "no domain"),
        ('<"a b">', "no domain"),
        ("<@a.b:c>", "no domain"),
        ("<a\rb@c.d>", "an unexpected character"),
        ("<a\nb@c.d>", "an unexpected character"),
        ("<a@b.c>\n", "an unexpected character"),
        ("<a\x00@b.c>", "an unexpected character"),
        ("<a@b\x7f.c>", "an unexpected character"),
        ('<"a\rb"@c.d>', "does not end"),
        ("<\udcff@b.c>", "not valid UTF-8"),
        ("<a@\udcc3.c>", "not valid UTF-8"),
        ("<a\u0085@b.c>", "control characters"),
        ("<a\u2028@b.c>", "control characters"),
        ("<a\u202eb@b.c>", "control characters"),
        ("<a@b\u202e.c>", "domain is malformed"),
        (f"<{'l' * 129}@b.c>", "local part is too long"),
        (f"<{'ü' * 65}@b.c>", "local part is too long"),
        (f"<a@{'.'.join(['l' * 63] * 4)}>", "too long"),
    ],
)
def test_a_malformed_path_is_refused_in_plain_words(text: str, words: str) -> None:
    with pytest.raises(AddressError) as caught:
        parse_path(text)
    assert words in str(caught.value)
    assert str(caught.value).isascii() and str(caught.value).isprintable()


def test_parameters_keep_their_values_and_raise_their_keywords() -> None:
    assert parse_parameters("") == {}
    assert parse_parameters("size=10 Body=8BitMime SMTPUTF8") == {"SIZE": "10", "BODY": "8BitMime", "SMTPUTF8": ""}
    assert parse_parameters("ENVID=Abc+2B= NOTIFY=SUCCESS,FAILURE") == {"ENVID": "Abc+2B=", "NOTIFY": "SUCCESS,FAILURE"}
    assert parse_parameters("ORCPT=utf-8;ü@b.c") == {"ORCPT": "utf-8;ü@b.c"}


@pytest.mark.parametrize("text", ["SIZE=1 size=2", "SIZE=", "=1", "-X", "A_B=1", "X=\x01", "X=\udcff", "<a@b.c>", "X:1"])
def test_malformed_and_repeated_parameters_are_refused(text: str) -> None:
    with pytest.raises(ParameterError):
        parse_parameters(text)


@pytest.mark.parametrize(
    ("address", "local", "domain"),
    [
        ("User@Example.COM", "User", "example.com"),
        ("root", "root", ""),
        ("", "", ""),
        ('"a@b"@c.d', '"a@b"', "c.d"),
        ("a@[IPv6:::1]", "a", "[ipv6:::1]"),
        ("a@BÜCHER.example", "a", "xn--bcher-kva.example"),
    ],
)
def test_an_address_has_a_local_part_and_a_domain(address: str, local: str, domain: str) -> None:
    assert (local_of(address), domain_of(address)) == (local, domain)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Example.COM", "example.com"),
        ("bücher.example", "xn--bcher-kva.example"),
        ("BÜCHER。example", "xn--bcher-kva.example"),
        ("bu\u0308cher.example", "xn--bcher-kva.example"),
        ("XN--BCHER-KVA.example", "xn--bcher-kva.example"),
        ("straße.de", "xn--strae-oqa.de"),
        ("ｅxample.com", "example.com"),
        ("a_b.example", "a_b.example"),
        ("भारत.example", "xn--h2brj9c.example"),
    ],
)
def test_a_domain_is_lower_case_a_labels(text: str, expected: str) -> None:
    assert normalize_domain(text) == expected
    assert normalize_domain(expected) == expected


@pytest.mark.parametrize(
    "text", ["", ".", "a..b", ".a", "a.", "-a.b", "a b", "a@b", "[1.2.3.4]", "ü☃.de", "a/b", "a\u200e.b", "é" * 63 + ".x"]
)
def test_what_is_no_domain_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="not a"):
        normalize_domain(text)


@pytest.mark.parametrize("length", [64, 1_350])
def test_a_domain_that_is_too_long_costs_next_to_nothing(length: int) -> None:
    """A command has room for 1,350 such characters: to make an A-label of them would take a second, and everybody else waits."""
    started = time.process_time()
    for first in range(0x4E00, 0x4E00 + 20):
        with pytest.raises(ValueError, match="too long"):
            normalize_domain("".join(map(chr, range(first, first + length))))
    assert time.process_time() - started < 1  # it takes less than a millisecond


def test_addresses_compare_without_case_and_by_a_labels() -> None:
    assert folded("User@BÜCHER.example") == folded("user@xn--bcher-kva.EXAMPLE") == "user@xn--bcher-kva.example"
    assert folded("JU\u0308RGEN@b.c") == folded("jürgen@b.c")
    assert folded("Root") == "root"
    assert folded("") == ""
    assert folded("a@[IPv6:::A]") == "a@[ipv6:::a]"


def test_the_patterns_of_an_address_are_all_that_may_match_it() -> None:
    assert patterns_for("U+a+b@X.y.Z") == ("u+a+b@x.y.z", "u@x.y.z", "u+a@x.y.z", "x.y.z", "*.y.z", "*.z", "*")
    assert patterns_for("+x@y") == ("+x@y", "y", "*")
    assert patterns_for("a@[127.0.0.1]") == ("a@[127.0.0.1]", "[127.0.0.1]", "*")
    assert patterns_for("root") == patterns_for("") == ("*",)


@pytest.mark.parametrize(("plus", "labels"), [(100, 60), (60, 1), (1, 30)])
def test_no_flood_of_odd_addresses_is_remembered(plus: int, labels: int) -> None:
    tracemalloc.start()
    try:
        for number in range(500):
            assert f"a+{number}@*" not in patterns_for(f"a+{number}{'+' * plus}@{'x.' * labels}example")
        kept, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert kept < 500_000  # 2 MB and more, where each leaves its patterns behind


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a@b.c", True),
        ('"a b"@c.d', True),
        ("a@bücher.example", True),
        ("a", False),
        ("", False),
        ("<a@b.c>", False),
        ("A <a@b.c>", False),
        ("a@b.c d", False),
        ("a@b.c> <d@e.f", False),
        ("@x.y:a@b.c", False),
        (" a@b.c", False),
        ("a@b.c\n", False),
    ],
)
def test_a_mailbox_is_one_address_with_a_domain(text: str, expected: bool) -> None:
    assert is_mailbox(text) is expected
