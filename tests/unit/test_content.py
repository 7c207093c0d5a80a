"""Line ends and dots, one case a line."""

import re
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from relay.mail.content import has_dot_line, normalize, stuff, unstuff


@pytest.mark.parametrize(
    ("octets", "expected"),
    [
        (b"", b""),
        (b"a", b"a"),
        (b"a\r\nb\r\n", b"a\r\nb\r\n"),
        (b"a\nb\n", b"a\r\nb\r\n"),
        (b"\n", b"\r\n"),
        (b"\n\n", b"\r\n\r\n"),
        (b"\r\n\n", b"\r\n\r\n"),
        (b"a\r\r\nb", b"a\r\nb"),
        (b"a\r\r\r\r\nb", b"a\r\nb"),
        (b"\r\r\n", b"\r\n"),
        (b"a\rb", b"a b"),
        (b"a\r\rb", b"a  b"),
        (b"\r", b" "),
        (b"\r\r", b"  "),
        (b"a\r", b"a "),
        (b"a\rb\r\nc\n", b"a b\r\nc\r\n"),
        (b"a\r \n", b"a  \r\n"),
        (b"\x85\x0b\x0c\x1c\xe2\x80\xa8", b"\x85\x0b\x0c\x1c\xe2\x80\xa8"),
        (b"\0\xff\n\0", b"\0\xff\r\n\0"),
        (b"a\n\r\n\rb", b"a\r\n\r\n b"),
    ],
)
def test_every_line_end_becomes_crlf(octets: bytes, expected: bytes) -> None:
    assert normalize(octets) == expected


def test_what_is_right_already_is_not_copied() -> None:
    octets = b"Subject: x\r\n\r\nbody\xff\r\n"
    assert normalize(octets) is octets


@pytest.mark.parametrize("unit", [b"\r", b"\n", b"\r\r\n", b"\rx", b"\n\r", b"\r" * 50_000 + b"x", b"\r" * 50_000 + b"\n"])
def test_bare_line_ends_cost_linear_time(unit: bytes) -> None:
    octets = (unit * 262_144)[:262_144] if len(unit) < 4 else unit * 5
    started = time.process_time()
    normalize(octets + b".")
    assert time.process_time() - started < 5  # it takes 50 ms; where each CR looks for the end of its run, minutes


@given(st.lists(st.sampled_from([b"\r", b"\n", b"\r\n", b".", b"a", b"\xff", b"\0"])).map(b"".join))
def test_normalized_content_has_nothing_but_crlf_and_stays_so(octets: bytes) -> None:
    done = normalize(octets)
    assert not re.search(rb"\r(?!\n)|(?<!\r)\n", done)
    assert normalize(done) == done
    assert done.replace(b"\r\n", b"").replace(b" ", b"") == re.sub(rb"[\r\n]", b"", octets)


@pytest.mark.parametrize(
    ("octets", "expected"),
    [
        (b"", b""),
        (b".", b"."),
        (b".\r\n", b".\r\n"),
        (b"..\r\n", b".\r\n"),
        (b"...\r\n", b"..\r\n"),
        (b".a\r\n", b"a\r\n"),
        (b"a.\r\n", b"a.\r\n"),
        (b"a\r\n..b\r\n", b"a\r\n.b\r\n"),
        (b"a\r\n.\r\nb\r\n", b"a\r\n.\r\nb\r\n"),
        (b".\r\n..\r\n.\r\n", b".\r\n.\r\n.\r\n"),
        (b"..\r\n..\r\n", b".\r\n.\r\n"),
        (b".\0\r\n", b"\0\r\n"),
        (b"a\x0b.b\r\n", b"a\x0b.b\r\n"),
        (b"a\x85.b\r\n", b"a\x85.b\r\n"),
    ],
)
def test_one_dot_is_taken_off_each_line_that_has_more(octets: bytes, expected: bytes) -> None:
    assert unstuff(octets) == expected


@pytest.mark.parametrize(
    ("octets", "expected"),
    [
        (b"", b""),
        (b".", b".."),
        (b".\r\n", b"..\r\n"),
        (b"a\r\n.\r\n.b\r\nc.\r\n", b"a\r\n..\r\n..b\r\nc.\r\n"),
        (b"..\r\n", b"...\r\n"),
        (b"\r\n.", b"\r\n.."),
    ],
)
def test_each_line_with_a_dot_gets_another(octets: bytes, expected: bytes) -> None:
    assert stuff(octets) == expected


LINES = st.lists(st.sampled_from([b"", b".", b"..", b".a", b"a", b"...."])).map(lambda lines: b"".join(line + b"\r\n" for line in lines))


@given(LINES)
def test_what_is_stuffed_never_holds_the_end_and_comes_back(content: bytes) -> None:
    wire = stuff(content)
    assert b"\r\n.\r\n" not in b"\r\n" + wire
    assert unstuff(wire) == content


@given(LINES)
def test_content_without_a_dot_line_needs_no_stuffing(content: bytes) -> None:
    assert has_dot_line(content) is (b"\r\n." in b"\r\n" + content)
    assert has_dot_line(content) or (stuff(content) == content and unstuff(content) == content)
