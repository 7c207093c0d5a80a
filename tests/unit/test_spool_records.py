"""How drafts and log lines become rows and come back."""

import pytest

from relay.mail.envelope import NO_SUMMARY, Envelope, Origin, Recipient, Summary
from relay.spool.base import Content
from relay.spool.records import (
    addresses_of,
    id_of,
    number_of,
    pack_facts,
    pack_recipients,
    summary_of,
    unpack_envelope,
    unpack_facts,
    unpack_recipients,
    unpack_summary,
)


@pytest.mark.parametrize(
    ("recipients", "text"),
    [
        ((Recipient("you@example.org"),), "you@example.org"),
        ((Recipient("grün@exämple.org"),), "grün@exämple.org"),
        ((Recipient("[a@example.org"),), '[["[a@example.org","","",0,0]]'),
        ((Recipient("a@x.example", notify="NEVER"),), '[["a@x.example","NEVER","",0,0]]'),
        ((Recipient("a@x.example", orcpt="rfc822;b@y.example"),), '[["a@x.example","","rfc822;b@y.example",0,0]]'),
        ((Recipient("a@x.example", in_doubt=True),), '[["a@x.example","","",1,0]]'),
        (
            (Recipient('"a,\\"b"@x.example'), Recipient("c@x.example")),
            '[["\\"a,\\\\\\"b\\"@x.example","","",0,0],["c@x.example","","",0,0]]',
        ),
    ],
)
def test_recipients_become_text_and_come_back(recipients: tuple[Recipient, ...], text: str) -> None:
    assert pack_recipients(recipients) == text
    assert unpack_recipients(text) == recipients


def test_after_a_claim_that_ended_without_a_word_all_recipients_are_in_doubt() -> None:
    for recipients in ((Recipient("a@x.example"),), (Recipient("a@x.example", "NEVER"), Recipient("b@x.example", in_doubt=True))):
        back = unpack_recipients(pack_recipients(recipients), in_doubt=True)
        assert back == tuple(r._replace(in_doubt=True) for r in recipients)


@pytest.mark.parametrize("text", ["[[1", "[1]", '[["a@x.example","",""]]', '[["a@x.example",1,"",0,0]]', "[[1,2,3,4,5]]", "[null]"])
def test_recipients_that_damage_has_made_something_else_are_an_error_and_nobody_for_the_eye(text: str) -> None:
    with pytest.raises(ValueError):
        unpack_recipients(text)
    assert addresses_of(text) == ()


@pytest.mark.parametrize("text", ["", "{", "[]", "1", '"x"'])
def test_facts_that_damage_has_made_something_else_are_an_error_and_no_summary(text: str) -> None:
    with pytest.raises(ValueError):
        unpack_facts(text)
    assert summary_of(text) == ""


def test_recipients_without_a_mark_of_a_warning_were_not_warned() -> None:
    assert unpack_recipients('[["a@x.example","","",1]]') == (Recipient("a@x.example", in_doubt=True),)


def test_facts_that_are_as_usual_take_no_room() -> None:
    plain = pack_facts(Envelope("a@x.example", ()), Origin(), NO_SUMMARY, Content(1, b"x", dotted=False))
    assert plain == "{}"
    assert unpack_facts(plain)[:2] == (Origin(), NO_SUMMARY)


def test_facts_of_a_later_relay_are_passed_over() -> None:
    origin, summary, facts = unpack_facts('{"client":"::1","shade":"blue","utf8":true}')
    assert (origin, summary) == (Origin(client="::1"), NO_SUMMARY)
    assert unpack_envelope("", (), facts) == Envelope("", (), smtputf8=True)


def test_ids_are_numbers_in_hexadecimal_that_sort_as_text() -> None:
    numbers = [1, 255, 1_800_000_000_000_000, 2**52 - 1]
    ids = [id_of(number) for number in numbers]
    assert ids == sorted(ids)
    assert all(len(each) == 13 for each in ids)
    assert [number_of(each) for each in ids] == numbers
    with pytest.raises(ValueError, match="not-an-id"):
        number_of("not-an-id")


def test_no_summary_is_no_text() -> None:
    assert unpack_summary("") == NO_SUMMARY
    assert unpack_summary('["a","","ü"]') == Summary("a", "", "ü")
