"""What programs write to sendmail's standard input, and what becomes of it."""

import os
import threading
import time
from email import message_from_bytes
from email.header import decode_header, make_header

import pytest
from hypothesis import given
from hypothesis import strategies as st

from relay.sendmail import message
from relay.sendmail.addresses import AddressError
from relay.sendmail.message import Header, Letter, TooLarge, author_field, lines_of, read


def through_a_pipe(*pieces: bytes, dot_ends: bool, closed: bool = True) -> bytes:
    """Read what a program writes in pieces; with `closed` it then ends."""
    end, start = os.pipe()
    try:
        writer = threading.Thread(target=lambda: [os.write(start, piece) for piece in pieces])
        writer.start()
        if closed:
            writer.join()
            os.close(start)
        return read(end, dot_ends=dot_ends)
    finally:
        writer.join()
        os.close(end)
        if not closed:
            os.close(start)


def content(octets: bytes, *, dot_ends: bool = True) -> bytes:
    return Header(lines_of(octets, dot_ends=dot_ends)).content()


@pytest.mark.parametrize(
    "pieces", [(b"a\n.\nb\n",), (b"a\n", b".\n", b"b\n"), (b"a\n.", b"\nb"), (b"a", b"\n", b".", b"\n"), (b"a\r\n.\r\n",)]
)
def test_a_line_of_a_single_dot_ends_the_message_though_the_writer_goes_on(pieces: tuple[bytes, ...]) -> None:
    octets = through_a_pipe(*pieces, dot_ends=True, closed=False)
    assert lines_of(octets, dot_ends=True) == b"a\n"


def test_a_progress_bar_of_carriage_returns_is_read_in_linear_time() -> None:
    octets = b"\r" * 200_000 + b"done\r\r\n"
    started = time.process_time()
    assert lines_of(octets, dot_ends=False) == b"\r" * 200_000 + b"done\n"
    assert time.process_time() - started < 5


def test_without_it_the_message_goes_on_to_the_end_of_the_input() -> None:
    octets = through_a_pipe(b"a\n.\nb\n.\n", dot_ends=False)
    assert content(octets, dot_ends=False) == b"\r\na\r\n.\r\nb\r\n.\r\n"


def test_a_message_without_an_end_is_not_read_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(message, "_LIMIT_BYTES", 100_000)
    with open("/dev/zero", "rb") as endless, pytest.raises(TooLarge):
        read(endless.fileno(), dot_ends=False)


@pytest.mark.parametrize(
    ("octets", "expected"),
    [
        (b"", b"\r\n"),
        (b".", b"\r\n"),
        (b"Subject: x\n\nbody\n", b"Subject: x\r\n\r\nbody\r\n"),
        (b"Subject: x\r\n\r\nbody\r\n", b"Subject: x\r\n\r\nbody\r\n"),
        (b"Subject: x\r\r\n\r\r\nbody\r\r\n", b"Subject: x\r\n\r\nbody\r\n"),
        (b"Subject: x\n\nbody", b"Subject: x\r\n\r\nbody\r\n"),
        (b"Subject: x\n\nbody\n.", b"Subject: x\r\n\r\nbody\r\n"),
        (b"Subject: x\n\nbody.\n", b"Subject: x\r\n\r\nbody.\r\n"),
        (b"Subject: x\n", b"Subject: x\r\n\r\n"),
        (b"From me Mon Jan  1\nSubject: x\n\nb\n", b"Subject: x\r\n\r\nb\r\n"),
        (b">From me\nFrom you\nSubject: x\n\nFrom b\n", b"Subject: x\r\n\r\nFrom b\r\n"),
        (b"just a line\n", b"\r\njust a line\r\n"),
        (b"Subject: x\nno field\nTo: you\n", b"Subject: x\r\n\r\nno field\r\nTo: you\r\n"),
        (b" blank first\n", b"\r\n blank first\r\n"),
        (b"X-Fold: a\n b\n\tc\nSubject : x\n\n\nb\n", b"X-Fold: a\r\n b\r\n\tc\r\nSubject : x\r\n\r\n\r\nb\r\n"),
        (b"Subject: \xff\n\n\x00\xfe\n", b"Subject: \xff\r\n\r\n\x00\xfe\r\n"),
        (b"To: you\nBcc: her,\n him\nbcc: it\nResent-Bcc: x\nBccx: y\n\nBcc: b\n", b"To: you\r\nBccx: y\r\n\r\nBcc: b\r\n"),
    ],
)
def test_a_message_is_made_ready(octets: bytes, expected: bytes) -> None:
    assert content(octets) == expected


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        (b"Subject: x\n", []),
        (b"To: you@example.org, Her <her@example.org>\nCc: him\nBCC: it\n", ["you@example.org", "her@example.org", "him", "it"]),
        (b"To: you@example.org,\n\tHer\n <her@example.org>\n", ["you@example.org", "her@example.org"]),
        (b"to:you\nTO : her\n", ["you", "her"]),
        (b"To: you\nResent-To: her\nCc: him\nResent-Bcc: it\n", ["her", "it"]),
        (b"Reply-To: a\nX-To: b\nApparently-To: c\nTo: you\n\nTo: d\n", ["you"]),
        (b"To: undisclosed-recipients:;\nBcc: you\n", ["you"]),
        ("To: Jörg <jörg@example.org>\n".encode(), ["jörg@example.org"]),
    ],
)
def test_recipients_are_read_from_the_header(fields: bytes, expected: list[str]) -> None:
    assert list(Header(fields + b"\nTo: nobody\n").recipients()) == expected


def test_a_recipient_field_that_cannot_be_read_is_an_error() -> None:
    with pytest.raises(AddressError):
        list(Header(b"To: you her\n\n").recipients())


@pytest.mark.parametrize(
    ("sender", "name", "expected"),
    [
        ("www-data", "", b"From: www-data\n"),
        ("root", "Cron Daemon", b"From: Cron Daemon <root>\n"),
        ("a@b.example", 'O"Brien, T. \\', b'From: "O\\"Brien, T. \\\\" <a@b.example>\n'),
        ("root", "one\nBcc: two\r\n", b'From: "one Bcc: two" <root>\n'),
    ],
)
def test_a_missing_from_is_written(sender: str, name: str, expected: bytes) -> None:
    assert author_field(sender, name) == expected


@pytest.mark.parametrize(
    ("field", "expected"),
    [
        (b"From: root (Cron Daemon)\n", b"From: root@acme.example (Cron Daemon)\n"),
        (b"from:root\n", b"from:root@acme.example\n"),
        (b'From: "root" <root>\n', b'From: "root" <root@acme.example>\n'),
        (b"From: Root\n <root>\n", b"From: Root\n <root@acme.example>\n"),
        ("From: Jörg <jörg>\n".encode(), "From: Jörg <jörg@acme.example>\n".encode()),
        (b"From: \xff <root>\n", b"From: \xff <root@acme.example>\n"),
        (b"From: a@b.example\n", b"From: a@b.example\n"),
        (b"From: a, b\n", b"From: a, b\n"),
        (b"From: two words\n", b"From: two words\n"),
        (b"From: (root) root\n", b"From: (root) root\n"),
        (b"From:\n", b"From:\n"),
    ],
)
def test_a_from_without_a_domain_gets_one_where_that_is_simple(field: bytes, expected: bytes) -> None:
    message = b"To: you\n" + field + b"\nFrom: root\n"
    assert Header(message).content(domain="acme.example") == (b"To: you\n" + expected + b"\nFrom: root\n").replace(b"\n", b"\r\n")
    assert Header(message).content() == message.replace(b"\n", b"\r\n")


def test_the_from_that_is_written_goes_first_and_gets_the_domain_too() -> None:
    author = author_field("root", "Cron")
    assert Header(b"To: you\n\n").content(author=author, domain="acme.example") == b"From: Cron <root@acme.example>\r\nTo: you\r\n\r\n"


@given(st.text(st.characters(exclude_categories=["Cs", "Cc"]), max_size=80))
def test_any_name_survives_and_adds_no_line(name: str) -> None:
    field = author_field("a@b.example", name)
    lines = field.decode().removesuffix("\n").split("\n")
    assert all(len(line) < 998 for line in lines) and all(line.startswith(" ") for line in lines[1:])
    wanted = " ".join(name.split())
    if not wanted.isascii():
        value = message_from_bytes(field + b"\n")["From"]
        assert str(make_header(decode_header(value))).removesuffix(" <a@b.example>") == wanted


@pytest.mark.parametrize(
    ("octets", "expected"),
    [(b"a\r\n", b"a\r\n.\r\n"), (b".\r\n.a\r\n..\r\n", b"..\r\n..a\r\n...\r\n.\r\n"), (b"\r\n", b"\r\n.\r\n")],
)
def test_dots_are_stuffed(octets: bytes, expected: bytes) -> None:
    assert Letter("", [], octets).stuffed() == expected


def test_an_address_with_other_than_ascii_needs_smtputf8() -> None:
    assert [Letter(sender, [recipient], b"").smtputf8 for sender, recipient in (("a", "b"), ("ä", "b"), ("a", "b@ö"))] == [
        False,
        True,
        True,
    ]
