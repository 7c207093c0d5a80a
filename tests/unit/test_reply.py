"""Replies: parsed from anything, printed safely."""

import pytest

from relay.mail.reply import MalformedReply, Reply, parse_reply, printable


@pytest.mark.parametrize(
    ("lines", "expected"),
    [
        ([b"250 2.0.0 Ok: queued as 1"], Reply(250, "2.0.0", "Ok: queued as 1")),
        ([b"250 Ok"], Reply(250, "", "Ok")),
        ([b"250"], Reply(250, "", "")),
        ([b"250 "], Reply(250, "", "")),
        ([b"250 2.1.0"], Reply(250, "2.1.0", "")),
        ([b"250  2.1.0  Ok "], Reply(250, "2.1.0", "Ok")),
        ([b"550 5.1.1  No such user"], Reply(550, "5.1.1", "No such user")),
        ([b"354 go ahead"], Reply(354, "", "go ahead")),
        ([b"550-5.1.1 No such", b"550 5.1.1 user"], Reply(550, "5.1.1", "No such user")),
        ([b"550-No such", b"550 5.1.1 user"], Reply(550, "5.1.1", "No such user")),
        ([b"550-5.7.26 unsigned", b"550 5.7.1 see above"], Reply(550, "5.7.26", "unsigned 5.7.1 see above")),
        ([b"250-relay.example.net", b"250-PIPELINING", b"250 SIZE"], Reply(250, "", "relay.example.net PIPELINING SIZE")),
        ([b"250-", b"250 x"], Reply(250, "", "x")),
        ([b"550 2.0.0 odd"], Reply(550, "", "2.0.0 odd")),
        ([b"550 5.1 odd"], Reply(550, "", "5.1 odd")),
        ([b"550 5.1.1odd"], Reply(550, "", "5.1.1odd")),
        ([b"550 5.1.1234 odd"], Reply(550, "", "5.1.1234 odd")),
        (["550 5.\u0663.1 odd".encode()], Reply(550, "", "5.\u0663.1 odd")),
        ([b"421 4.7.0 slow\tdown"], Reply(421, "4.7.0", "slow down")),
        ([b"550 a\x1b[31m\x00b\x7f"], Reply(550, "", "a [31m b ")),
        ([b"550 \xff\xfe"], Reply(550, "", "\ufffd\ufffd")),
        (["550 Größe".encode()], Reply(550, "", "Größe")),
        ([b"250 a\rb\nc"], Reply(250, "", "a b c")),
    ],
)
def test_a_reply_is_read(lines: list[bytes], expected: Reply) -> None:
    assert parse_reply(lines) == expected


@pytest.mark.parametrize(
    "lines",
    [
        [],
        [b""],
        [b"25"],
        [b"2500 x"],
        [b"250x"],
        [b"250\tx"],
        [b"150 x"],
        [b"199 x"],
        [b"600 x"],
        [b"999"],
        [b"-50 x"],
        [b"+25 x"],
        [b" 250 x"],
        [b"2 0 x"],
        [b"HTTP/1.1 200 OK"],
        [b"\x16\x03\x01"],
        ["２５０ x".encode()],
        ["\u00b25\u00b9 x".encode()],
        [b"250-a", b"550 b"],
        [b"250-a", b"junk"],
    ],
)
def test_what_is_no_reply_is_refused_in_printable_words(lines: list[bytes]) -> None:
    with pytest.raises(MalformedReply) as caught:
        parse_reply(lines)
    assert str(caught.value).isprintable()


def test_a_reply_without_end_is_cut() -> None:
    assert len(parse_reply([b"550-" + b"x" * 500] * 100 + [b"550 end"]).text) == 2000


def test_a_reply_prints_on_one_line() -> None:
    assert str(Reply(550, "5.1.1", "No")) == "550 5.1.1 No"
    assert str(Reply(250, "", "")) == "250"
    assert str(Reply(0, "", "connection refused")) == "connection refused"
    assert Reply(550, "5.1.1", "Größe").line() == b"550 5.1.1 Gr??e"


def test_only_2xx_is_positive() -> None:
    assert [code for code in range(600) if Reply(code, "", "").positive] == list(range(200, 300))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("plain ü 漢 🙂", "plain ü 漢 🙂"),
        ("a\r\n\x00b", "a b"),
        (b"a\xff\r", "a\ufffd "),
        ("a\x85b\x9bc", "a b c"),
        ("a\u2028b\u2029c", "a b c"),
        ("a\u202eb\u2066c", "a b c"),
        ("a\udcffb", "a b"),
    ],
)
def test_a_strangers_text_is_made_printable(text: str | bytes, expected: str) -> None:
    assert printable(text) == expected
    printable(text).encode("utf-8")
    assert len(printable(text).splitlines()) == 1
