"""The header block: cut without loss, read strictly where it matters."""

import codecs
import time
import tracemalloc

import pytest

from relay.mail.envelope import NO_SUMMARY, Summary
from relay.mail.header import (
    Field,
    decode,
    fields,
    from_address,
    ids_by,
    is_field_name,
    join,
    mailbox,
    scan,
    separator,
    split,
    summary_of,
    traces_of,
    unfold,
    value_of,
)

HEADER = (
    b"Received: from app by other.example.net\r\n"
    b"received : from app\r\n\tby RELAY.example.net (relay) with ESMTP id 1\r\n"
    b"FROM: Acme App <app@acme.example>\r\n"
    b"To: bob@example.org,\r\n carol@example.org\r\n"
    b"Subject: =?utf-8?q?Gr=C3=BC=C3=9Fe?=\r\n"
    b"X-From: nobody@example.com\r\n"
    b"Date: today\r\n"
)


@pytest.mark.parametrize(
    ("content", "block", "rest", "between"),
    [
        (b"A: 1\r\n\r\nbody\r\n", b"A: 1\r\n", b"\r\nbody\r\n", b""),
        (b"A: 1\r\n\r\n", b"A: 1\r\n", b"\r\n", b""),
        (b"A: 1\r\nB: 2\r\n", b"A: 1\r\nB: 2\r\n", b"", b""),
        (b"A: 1", b"A: 1", b"", b""),
        (b"", b"", b"", b""),
        (b"\r\nbody\r\n", b"", b"\r\nbody\r\n", b""),
        (b"hello world\r\n\r\nmore\r\n", b"", b"hello world\r\n\r\nmore\r\n", b"\r\n"),
        (b" folded: start\r\n\r\n", b"", b" folded: start\r\n\r\n", b"\r\n"),
        (b"From app Tue Nov 22\r\nA: 1\r\n\r\nx", b"From app Tue Nov 22\r\nA: 1\r\n", b"\r\nx", b""),
        (b"From app Tue Nov 22\r\n>From app\r\nA: 1\r\n\r\nx", b"From app Tue Nov 22\r\n>From app\r\nA: 1\r\n", b"\r\nx", b""),
        (b"From now on, see below\r\nfor it\r\n\r\nx", b"", b"From now on, see below\r\nfor it\r\n\r\nx", b"\r\n"),
        (b"From now on\r\n\r\nx: y", b"", b"From now on\r\n\r\nx: y", b"\r\n"),
        (b"From now on", b"", b"From now on", b"\r\n"),
        (b"A: 1\r\njunk\r\nB: 2\r\n\r\nx\r\n\r\ny", b"A: 1\r\njunk\r\nB: 2\r\n", b"\r\nx\r\n\r\ny", b""),
    ],
)
def test_content_is_cut_at_the_empty_line(content: bytes, block: bytes, rest: bytes, between: bytes) -> None:
    assert split(content) == (block, rest)
    assert separator(rest) == between


def test_fields_keep_their_folds_and_junk_keeps_its_place() -> None:
    block = b" lost\r\nA: 1\r\n\t2\r\njunk line\r\nb :3\r\nC:"
    assert fields(block) == [
        Field(b"", b" lost\r\n"),
        Field(b"A", b"A: 1\r\n\t2\r\n"),
        Field(b"", b"junk line\r\n"),
        Field(b"b", b"b :3\r\n"),
        Field(b"C", b"C:"),
    ]
    assert join(fields(block)) == block


def test_a_scan_tells_what_intake_has_to_know() -> None:
    found = scan(HEADER)
    assert found.keys() == {b"received", b"date", b"from", b"to", b"subject"}
    assert len(found[b"received"]) == 2
    assert found[b"from"] == [b" Acme App <app@acme.example>\r"]
    assert [value_of(b"To:" + value) for value in found[b"to"]] == [b"bob@example.org, carol@example.org"]


def test_a_scan_finds_every_from_and_sender() -> None:
    found = scan(b"From: a@b.c\r\nfrom:d@e.f\r\nSender: g@h.i\r\nMessage-Id: <1>\r\nCC: x@y.z\r\n")
    assert found[b"from"] == [b" a@b.c\r", b"d@e.f\r"]
    assert found[b"sender"] == [b" g@h.i\r"]
    assert found[b"cc"] == [b" x@y.z\r"]
    assert b"message-id" in found


def test_our_own_received_fields_are_counted_by_whole_names() -> None:
    found = scan(HEADER)
    assert traces_of(found, "relay.example.net") == 1
    assert traces_of(found, "example.net") == 0
    assert traces_of(found, "relay.example") == 0


def test_the_ids_in_our_own_received_fields_are_found() -> None:
    fields = [
        b"from app by relay.example.net with ESMTP id 0123456789ABC; now",
        b"from app ([127.0.0.1])\r\n\tby relay.example.net with ESMTP id 0123456789abd\r\n\tfor <a@b.c>;\r\n\tnow",
        b"by RELAY.example.net id 0123456789ABE; now",
        b"by relay.example.net (a comment) with X id 0123456789ABF for x; now",
        b"from x by other.example.net id 1123456789ABC; now",
        b"from relay.example.net by other.example.net id 2123456789ABC; now",
        b"by relay.example.net; id 3123456789ABC",
        b"by relay.example.net with ESMTP id 4; now",
        b"by relay.example.net with ESMTP id 512345678901234567; now",
        b"by relay.example.net",
    ]
    found = scan(b"".join(b"Received: " + field + b"\r\n" for field in fields))
    assert ids_by(found, "relay.example.net") == ["0123456789ABC", "0123456789ABD", "0123456789ABE", "0123456789ABF"]
    assert traces_of(found, "relay.example.net") == 8


def test_a_summary_is_decoded_short_and_printable() -> None:
    found = scan(HEADER + b"Cc: " + b"x" * 500 + b"\r\n")
    assert summary_of(found) == Summary("bob@example.org, carol@example.org", "x" * 200, "Grüße")
    assert summary_of(scan(b"X: y\r\n")) is NO_SUMMARY
    assert summary_of(scan(b"Subject: a\x1b[31mb\x00\r\n")).subject == "a [31mb"
    assert summary_of(scan(b"Subject: \xff\xfe\r\n")).subject == "ÿþ"


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (b"a@b.c", "a@b.c"),
        (b" Acme App <App@ACME.Example> ", "app@acme.example"),
        (b'"Acme, Inc. <x@y.z>" <a@b.c>', "a@b.c"),
        (b'"A \\" B" <a@b.c>', "a@b.c"),
        (b"Dr. Who <a@b.c>", "a@b.c"),
        (b"<a@b.c>", "a@b.c"),
        (b"=?utf-8?q?J=C3=BC?= <a@b.c>", "a@b.c"),
        (b"J\xfcrgen <a@b.c>", "a@b.c"),
        (b"a@b.c (Acme (the App))", "a@b.c"),
        (b"(App) Acme <a@b.c> (x)", "a@b.c"),
        (b"Acme\r\n App\r\n <a@b.c>", "a@b.c"),
        (b'"a b"@c.d', '"a b"@c.d'),
        (b"X <a@[127.0.0.1]>", "a@[127.0.0.1]"),
        ("Ü <Ü@bücher.example>".encode(), "ü@xn--bcher-kva.example"),
    ],
)
def test_one_from_with_one_mailbox_gives_its_address(value: bytes, expected: str) -> None:
    assert from_address([value]) == expected


@pytest.mark.parametrize(
    "values",
    [
        [],
        [b"a@b.c", b"a@b.c"],
        *(
            [value]
            for value in (
                b"",
                b"<>",
                b"a@b.c, d@e.f",
                b"a@b.c,",
                b"Group: a@b.c;",
                b"<@x.y:a@b.c>",
                b"a @ b.c",
                b"<a @b.c>",
                b"<a@ b.c>",
                b"a(x)@b.c",
                b"evil@x.y <a@b.c>",
                b"<a@b.c> <d@e.f>",
                b"<a@b.c> d@e.f",
                b"<a@b.c",
                b"a@b.c>",
                b'"x" a@b.c',
                b'"x <a@b.c>',
                b"(x a@b.c",
                b"(x\\) a@b.c",
                b"X: <a@b.c>",
                b"A\r<d@e.f> <a@b.c>",
                b'"A\rB" <a@b.c>',
                b"A\x00 <a@b.c>",
                b"<=?utf-8?q?d=40e=2Ef?=@b.c>",
                b"=?utf-8?q?a?=@b.c",
                b"<a@b..c>",
                b"<\xfc@b.c>",
                b"root (Cron Daemon)",
                b"<root>",
                b" " * 5000 + b"a@b.c (x)",
                b"a@b.c\n\nd@e.f",
            )
        ),
    ],
)
def test_a_from_with_two_readings_gives_nobody(values: list[bytes]) -> None:
    assert from_address(values) == ""


def test_a_mailbox_keeps_the_name_as_it_is_written() -> None:
    assert mailbox(b' "A, B"  <a@B.c>') == (b'"A, B"', "a@B.c")
    assert mailbox(b"root (Cron Daemon)") == (b"Cron Daemon", "root")
    assert mailbox(b"a@b.c") == (b"", "a@b.c")


@pytest.mark.parametrize(
    ("raw", "expected"),
    [
        (b"Subject: plain\r\n", "plain"),
        (b"Subject:\r\n a\r\n\tb\r\n", "a\tb"),
        (b"Subject: =?UTF-8?B?R3LDvMOfZQ==?= x", "Grüße x"),
        (b"Subject: a =?iso-8859-1?q?=FC?= =?iso-8859-1?Q?_=FC?= b", "a ü ü b"),
        (b"Subject: =?utf-8?b?w7w=?=\r\n =?utf-8?b?w7w=?=", "üü"),
        (b"Subject: =?utf-8?q?=C3?= =?utf-8?q?=BC?=", "ü"),
        (b"Subject: =?iso-8859-1*de?q?=FC?=", "ü"),
        (b"Subject: =?nonsense?q?a?=", "=?nonsense?q?a?="),
        (b"Subject: =?zlib?b?eJw=?=", "=?zlib?b?eJw=?="),
        (b"Subject: =?utf-8?x?a?=", "=?utf-8?x?a?="),
        ("Subject: Grüße".encode(), "Grüße"),
        (b"Subject: \xfc", "ü"),
        (b"Subject:", ""),
        (b"junk", ""),
    ],
)
def test_a_value_is_decoded_for_display(raw: bytes, expected: str) -> None:
    assert unfold(raw) == expected


def test_a_long_from_is_read_as_a_short_one_is() -> None:
    for name in (b"App", b"x" * 100_000):
        found = scan(b"Subject: hello\r\nFrom: %b <app@acme.example>\r\nTo: you@example.org\r\n" % name)
        assert from_address(found[b"from"]) == "app@acme.example"


def test_no_flood_of_long_from_fields_is_remembered() -> None:
    tracemalloc.start()
    try:
        for number in range(50):
            assert from_address([b" %d %b <app@acme.example>" % (number, b"x" * 100_000)]) == "app@acme.example"
        kept, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert kept < 1_000_000  # 5 MB, where each is kept


def test_hostile_headers_cost_linear_time() -> None:
    size = 1_000_000
    blank, word = b" " * size, b"a" * size
    start = time.process_time()
    for block in (
        blank,
        word,
        b"From:" + blank,
        b"From: " + b"\t \n" * size,
        b"\r" * size,
        b"A:\r\n" + b" \r\n" * 100_000,
        b"=?" * size,
    ):
        split(block)
        found = scan(block)
        summary_of(found)
        from_address(found.get(b"from", ()))
        assert join(fields(block)) == block
    for value in (
        blank + b"<",
        b"a " * size,
        b'"' * size,
        b"(" * size,
        b"<" * size,
        b"=?utf-8?q?a?= " * 50_000,
        b"=?a?q?" * 100_000,
    ):
        from_address([value])
        decode(value)
    assert time.process_time() - start < 20


@pytest.mark.parametrize("between", [b"", b" \t", b"\x0b", b"\r\n ", b"\n\t \r\n ", b"\r\n", b"\n", b" \r\n \r\n"])
def test_intake_sees_the_fields_that_there_are(between: bytes) -> None:
    """A From that only the check sees would let a message without one through."""
    block = b"Subject: x\r\nFrom" + between + b":a@acme.example\r\nTo: b@example.org\r\n"
    assert sorted(scan(block)) == sorted(part.name.lower() for part in fields(block) if part.name)


def test_a_field_name_is_printable_ascii_without_a_colon() -> None:
    assert is_field_name("X-Tenant")
    assert not any(is_field_name(name) for name in ("", "X Y", "X:", "Ü", "X\r\n", "x" * 77))


def test_a_charset_that_nobody_knows_is_not_even_looked_for() -> None:
    """Python keeps every name that it has looked for in vain: each would cost memory for as long as the process lives."""
    asked: list[str] = []

    def search(name: str) -> None:
        asked.append(name)

    codecs.register(search)
    try:
        assert decode(b"=?x-of-my-own?q?a?= and =?KOI8-U?q?=C1?= and =?cp874?q?=A1?=") == "=?x-of-my-own?q?a?= and \u0430 and \u0e01"
    finally:
        codecs.unregister(search)
    assert asked == []
