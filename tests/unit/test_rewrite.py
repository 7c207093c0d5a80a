"""Rewriting: what a rule names changes, every other byte stays."""

import email
import email.policy

import pytest

from relay.mail.header import decode, fields, value_of
from relay.mail.rewrite import Rewrite, encoded_words, envelope_sender, field_of, phrase_of, rewrite_header

BLOCK = (
    b"Received: from app\r\n\tby relay.example.net\r\n"
    b"From: Acme App <app@acme.example>\r\n"
    b"odd Junk line\r\n"
    b"To:   bob@example.org \r\n"
    b"SUBJECT: hello\r\n world\r\n"
    b"User-Agent: old/1.0\r\n"
    b"DKIM-Signature: v=1; h=from:subject;\r\n b=abc\r\n"
)


def changed(block: bytes, rules: Rewrite) -> tuple[list[bytes], list[bytes]]:
    """The fields that are gone and those that are new."""
    before, after = ([part.raw for part in fields(text)] for text in (block, rewrite_header(block, rules)))
    return [raw for raw in before if raw not in after], [raw for raw in after if raw not in before]


def only_field(rules: Rewrite, block: bytes = BLOCK) -> bytes:
    """The one field that `rules` add or replace."""
    _, (new,) = changed(block, rules)
    return new


@pytest.mark.parametrize("rules", [None, Rewrite(), Rewrite(envelope_sender="a@b.c", bcc="d@e.f")])
def test_without_a_rule_for_it_the_same_header_comes_back(rules: Rewrite | None) -> None:
    assert rewrite_header(BLOCK, rules) is BLOCK
    assert rewrite_header(b"", rules) == b""


@pytest.mark.parametrize("rules", [None, Rewrite(set_headers=(("X-A", "1"),)), Rewrite(add_headers=(("Bcc", "x@y.z"),))])
def test_hidden_recipients_and_the_return_path_never_leave(rules: Rewrite | None) -> None:
    block = b"Return-Path: <a@b.c>\r\nbcc: x@y.z,\r\n z@y.x\r\nA: 1\r\nRESENT-BCC : q\r\nX-Bcc: stays\r\n"
    block += b"Bcc\r\n : x@y.z\r\nBcc\v: x@y.z\r\n"
    kept = b"".join(part.raw for part in fields(rewrite_header(block, rules)) if part.name != b"X-A")
    assert kept == b"A: 1\r\nX-Bcc: stays\r\n"


@pytest.mark.parametrize("rules", [None, Rewrite(set_headers=(("A", "1"),))])
@pytest.mark.parametrize("line", [b"From app Tue Nov 22 10:00:00 2026\r\n", b">From app Tue\r\n folded\r\n", b"From a\r\nFrom b: c\r\n"])
def test_the_line_of_a_mailbox_behind_our_trace_does_not_leave(rules: Rewrite | None, line: bytes) -> None:
    """Servers take it for the end of the header."""
    trace, header = b"Received: by relay\r\n", b"From : app@acme.example\r\nA: 1\r\nX: \r\n From here\r\n"
    assert rewrite_header(trace + line + header, rules) == trace + header
    assert rewrite_header(line + header, rules) == header


def test_a_word_like_bcc_elsewhere_changes_nothing() -> None:
    block = b"Subject: bcc: and return-path\r\n"
    assert rewrite_header(block, None) is block


def test_from_changes_in_its_place() -> None:
    rules = Rewrite(from_name="Acme Billing", from_address="no-reply@acme.example")
    assert changed(BLOCK, rules) == (
        [b"From: Acme App <app@acme.example>\r\n"],
        [b"From: Acme Billing <no-reply@acme.example>\r\n"],
    )
    assert fields(rewrite_header(BLOCK, rules))[1].name == b"From"


@pytest.mark.parametrize(
    ("value", "rules", "expected"),
    [
        (b"App <a@b.c>", Rewrite(from_name="New"), b"From: New <a@b.c>\r\n"),
        (b"a@b.c", Rewrite(from_name="New, Inc."), b'From: "New, Inc." <a@b.c>\r\n'),
        (b"root (Cron)", Rewrite(from_name="New"), b"From: New <root>\r\n"),
        (b"App <a@b.c>", Rewrite(from_address="x@y.z"), b"From: App <x@y.z>\r\n"),
        (b'"A, \\"B\\"" <a@b.c>', Rewrite(from_address="x@y.z"), b'From: "A, \\"B\\"" <x@y.z>\r\n'),
        (b"=?utf-8?q?=C3=BC?= <a@b.c>", Rewrite(from_address="x@y.z"), b"From: =?utf-8?q?=C3=BC?= <x@y.z>\r\n"),
        (b"a@b.c", Rewrite(from_address="x@y.z"), b"From: x@y.z\r\n"),
        (b"root (Cron, Daemon)", Rewrite(from_address="x@y.z"), b'From: "Cron, Daemon" <x@y.z>\r\n'),
        (b"a@b.c, d@e.f", Rewrite(from_address="x@y.z"), b"From: x@y.z\r\n"),
        (b"a@b.c, d@e.f", Rewrite(from_name="N", from_address="x@y.z"), b"From: N <x@y.z>\r\n"),
        (b"a@b.c", Rewrite(from_address="x@bücher.example"), b"From: x@xn--bcher-kva.example\r\n"),
        (b"a@b.c", Rewrite(from_name="Grüße"), b"From: =?utf-8?b?R3LDvMOfZQ==?= <a@b.c>\r\n"),
    ],
)
def test_the_half_of_from_that_no_rule_names_is_kept(value: bytes, rules: Rewrite, expected: bytes) -> None:
    assert rewrite_header(b"From: " + value + b"\r\n", rules) == expected


@pytest.mark.parametrize("block", [b"To: x\r\n", b"From: a@b.c, d@e.f\r\n", b"From: a@b.c\r\nFrom: d@e.f\r\n"])
def test_a_name_alone_is_not_put_before_an_address_that_cannot_be_read(block: bytes) -> None:
    assert rewrite_header(block, Rewrite(from_name="New")) == block


def test_several_from_fields_become_one() -> None:
    block = b"From: a@b.c\r\nTo: x\r\nFrom: d@e.f\r\n"
    assert rewrite_header(block, Rewrite(from_address="n@o.p")) == b"From: n@o.p\r\nTo: x\r\n"
    assert rewrite_header(b"To: x\r\n", Rewrite(from_address="n@o.p")) == b"To: x\r\nFrom: n@o.p\r\n"


def test_the_original_from_becomes_reply_to_where_there_is_none() -> None:
    rules = Rewrite(from_name="House", from_address="x@house.example", reply_to="original")
    assert rewrite_header(b"From: App <a@b.c>\r\n", rules) == b"From: House <x@house.example>\r\nReply-To: App <a@b.c>\r\n"
    assert rewrite_header(b"From: a@b.c\r\nReply-To: r@s.t\r\n", rules) == b"From: House <x@house.example>\r\nReply-To: r@s.t\r\n"
    assert rewrite_header(b"From: a@b.c, d@e.f\r\n", rules) == b"From: House <x@house.example>\r\n"
    assert rewrite_header(b"From: X@House.example\r\n", rules) == b"From: House <x@house.example>\r\n"
    assert rewrite_header(b"From: a@b.c\r\n", Rewrite(reply_to="original")) == b"From: a@b.c\r\n"


def test_a_reply_to_address_replaces_the_one_there_is() -> None:
    assert rewrite_header(b"reply-to: r@s.t\r\nA: 1\r\n", Rewrite(reply_to="n@o.p")) == b"Reply-To: n@o.p\r\nA: 1\r\n"
    assert rewrite_header(b"A: 1\r\n", Rewrite(reply_to="n@o.p")) == b"A: 1\r\nReply-To: n@o.p\r\n"


def test_set_replaces_the_first_in_place_and_drops_the_others() -> None:
    block = b"x-tag: 1\r\nA: 1\r\nX-Tag: 2\r\n 3\r\n"
    assert rewrite_header(block, Rewrite(set_headers=(("X-Tag", "new"),))) == b"X-Tag: new\r\nA: 1\r\n"
    assert rewrite_header(b"A: 1\r\n", Rewrite(set_headers=(("X-Tag", "new"),))) == b"A: 1\r\nX-Tag: new\r\n"


def test_add_keeps_what_is_there_and_remove_takes_every_one() -> None:
    block = b"X-Tag: 1\r\nuser-agent: a\r\nUser-Agent: b\r\n"
    rules = Rewrite(add_headers=(("X-Tag", "2"),), remove_headers=("USER-AGENT",))
    assert rewrite_header(block, rules) == b"X-Tag: 1\r\nX-Tag: 2\r\n"


def test_a_header_that_is_removed_and_set_is_set() -> None:
    assert rewrite_header(b"X: 1\r\n", Rewrite(remove_headers=("X",), set_headers=(("X", "2"),))) == b"X: 2\r\n"


def test_a_block_without_a_last_line_end_gets_one_before_more_is_added() -> None:
    assert rewrite_header(b"A: 1", Rewrite(add_headers=(("B", "2"),))) == b"A: 1\r\nB: 2\r\n"


@pytest.mark.parametrize(
    "rules",
    [
        Rewrite(from_address="x@y.z"),
        Rewrite(reply_to="x@y.z"),
        Rewrite(set_headers=(("X-Tenant", "acme"),)),
        Rewrite(add_headers=(("X-Tenant", "acme"),)),
        Rewrite(subject_prefix="[a] "),
    ],
)
def test_what_is_added_stands_before_a_line_that_servers_take_for_the_text(rules: Rewrite) -> None:
    before, text = b"Error: disk full\r\n", b"on host 7\r\nnote: x\r\n"
    block = rewrite_header(before + text, rules)
    assert block.startswith(before) and block.endswith(text)
    assert len(fields(block)) == 4


def test_what_is_set_replaces_a_field_in_the_text_by_one_before_it() -> None:
    block = b"A: 1\r\nwrapped\r\nFrom: a@b.c\r\nB: 2\r\n"
    assert rewrite_header(block, Rewrite(from_address="x@y.z")) == b"A: 1\r\nFrom: x@y.z\r\nwrapped\r\nB: 2\r\n"


@pytest.mark.parametrize(
    ("block", "prefix", "expected"),
    [
        (b"Subject: hi\r\n", "[a] ", b"Subject: [a] hi\r\n"),
        (b"subject:hi\r\n there\r\n", "[a] ", b"subject: [a] hi\r\n there\r\n"),
        (b"Subject: Re: hi\r\n", "[a] ", b"Subject: [a] Re: hi\r\n"),
        (b"Subject: [a] hi\r\n", "[a] ", b"Subject: [a] hi\r\n"),
        (b"Subject: [a]hi\r\n", "[a] ", b"Subject: [a]hi\r\n"),
        (b"Subject: =?utf-8?q?[a]_hi?=\r\n", "[a] ", b"Subject: =?utf-8?q?[a]_hi?=\r\n"),
        (b"Subject: =?utf-8?q?hi?=\r\n", "[a]", b"Subject: [a] =?utf-8?q?hi?=\r\n"),
        (b"Subject:\r\n =?utf-8?q?hi?=\r\n", "[a] ", b"Subject: [a] =?utf-8?q?hi?=\r\n"),
        (b"Subject: \r\n", "[a] ", b"Subject: [a]\r\n"),
        (b"To: x\r\n", "[a] ", b"To: x\r\nSubject: [a]\r\n"),
        (b"Subject: hi\r\nSubject: two\r\n", "[a] ", b"Subject: [a] hi\r\nSubject: two\r\n"),
    ],
)
def test_a_subject_prefix_stands_in_front_once(block: bytes, prefix: str, expected: bytes) -> None:
    once = rewrite_header(block, Rewrite(subject_prefix=prefix))
    assert once == expected
    assert rewrite_header(once, Rewrite(subject_prefix=prefix)) == expected


@pytest.mark.parametrize("value", [b"hi", b"=?utf-8?q?hi?=", b""])
def test_a_prefix_beyond_ascii_reads_as_it_was_meant(value: bytes) -> None:
    raw = rewrite_header(b"Subject: " + value + b"\r\n", Rewrite(subject_prefix="[Büro] "))
    assert raw.isascii()
    assert decode(value_of(raw)) == ("[Büro] hi" if value else "[Büro]")
    assert rewrite_header(raw, Rewrite(subject_prefix="[Büro] ")) == raw


def test_a_prefix_does_not_make_a_line_too_long() -> None:
    raw = rewrite_header(b"Subject: " + b"x" * 985 + b"\r\n", Rewrite(subject_prefix="[acme] "))
    assert max(map(len, raw.split(b"\r\n"))) <= 998
    assert value_of(raw) == b"[acme] " + b"x" * 985


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("Acme Billing", b"Acme Billing"),
        ("Acme, Inc.", b'"Acme, Inc."'),
        ('a "b" \\', b'"a \\"b\\" \\\\"'),
        ("a@b", b'"a@b"'),
        ("Grüße", b"=?utf-8?b?R3LDvMOfZQ==?="),
        ("Versicherungen AG Köln", b"=?utf-8?q?Versicherungen_AG_K=C3=B6ln?="),
        ("a\r\nBcc: x", b'"a Bcc: x"'),
        ("", b""),
    ],
)
def test_a_display_name_is_written_as_a_phrase(name: str, expected: bytes) -> None:
    assert phrase_of(name) == expected


def test_values_cannot_break_out_of_their_field() -> None:
    assert field_of("X-A", "1\r\nBcc: x\r\n\r\nbody") == b"X-A: 1 Bcc: x body\r\n"
    with pytest.raises(ValueError, match="not the name"):
        Rewrite(set_headers=(("X-A\r\nBcc", "x"),))
    with pytest.raises(ValueError, match="not the name"):
        Rewrite(remove_headers=("X A",))


@pytest.mark.parametrize("value", ["x" * 3000, "word " * 600, "ü" * 1000, "漢" * 1000, "a" * 980 + " b " + "c" * 900])
def test_long_values_are_folded_and_read_the_same(value: str) -> None:
    raw = field_of("X-Long-Header", value)
    assert raw.isascii() and raw.endswith(b"\r\n")
    assert max(map(len, raw.split(b"\r\n"))) <= 998
    assert decode(value_of(raw)) == value.strip()
    parsed = email.message_from_bytes(raw + b"\r\n", policy=email.policy.default)
    assert str(parsed["X-Long-Header"]) == value.strip()


def test_encoded_words_are_short_and_never_cut_a_character() -> None:
    for text in ("ü" * 200, "a" * 200, "漢字 " * 50, "🙂" * 60):
        words = encoded_words(text)
        assert all(len(word) <= 75 for word in words)
        assert "".join(decode(word.encode()) for word in words) == text


def test_a_long_name_beyond_ascii_stays_within_its_lines() -> None:
    raw = only_field(Rewrite(from_name="Größe " * 40, from_address="x@y.z"))
    assert max(map(len, raw.split(b"\r\n"))) <= 100
    assert email.message_from_bytes(raw + b"\r\n", policy=email.policy.default)["From"].addresses[0].addr_spec == "x@y.z"


def test_a_null_sender_is_never_rewritten() -> None:
    rules = Rewrite(envelope_sender="bounces@acme.example")
    assert envelope_sender("", rules) == ""
    assert envelope_sender("a@b.c", rules) == "bounces@acme.example"
    assert envelope_sender("a@b.c", None) == envelope_sender("a@b.c", Rewrite()) == "a@b.c"


def test_untouched_fields_leave_byte_for_byte() -> None:
    rules = Rewrite(
        from_name="N",
        from_address="n@o.p",
        reply_to="original",
        set_headers=(("X-A", "1"),),
        add_headers=(("X-B", "2"),),
        remove_headers=("User-Agent",),
        subject_prefix="[p] ",
    )
    gone, new = changed(BLOCK, rules)
    assert gone == [b"From: Acme App <app@acme.example>\r\n", b"SUBJECT: hello\r\n world\r\n", b"User-Agent: old/1.0\r\n"]
    assert new == [
        b"From: N <n@o.p>\r\n",
        b"Reply-To: Acme App <app@acme.example>\r\n",
        b"X-A: 1\r\n",
        b"X-B: 2\r\n",
        b"SUBJECT: [p] hello\r\n world\r\n",
    ]
