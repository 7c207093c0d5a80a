"""Intake without a listener: who may send, what is put before the content, what goes into custody, and what is said when it cannot."""

import asyncio
import re
from collections.abc import AsyncIterator, Callable
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Any

import pytest

from relay.intake import Transaction
from relay.mail.envelope import Origin, Recipient
from relay.mail.reply import Reply
from relay.spool.base import Content, Lane, SpoolError, SpoolFull
from tests.support.eventually import eventually
from tests.support.front import Front

MESSAGE = b"From: App <app@acme.example>\r\nSubject: hi\r\n\r\nhello\r\n"
ORIGIN = Origin("local", "192.0.2.1", "", "S7")

FrontOf = Callable[..., Front]


@pytest.fixture
async def front_of(tmp_path: Path) -> AsyncIterator[FrontOf]:
    fronts: list[Front] = []

    def make(**config: Any) -> Front:
        directory = tmp_path / str(len(fronts))
        directory.mkdir()
        fronts.append(Front(directory, config))
        return fronts[-1]

    yield make
    for front in fronts:
        await front.close()


def begin(front: Front, sender: str = "app@acme.example", *recipients: str, name: str = "app.example", **more: Any) -> Transaction:
    settings = {"protocol": "ESMTP", "smtputf8": False, "origin": ORIGIN, **more}
    opened = front.intake.begin(settings["origin"], name, settings["protocol"], sender, smtputf8=settings["smtputf8"])
    assert isinstance(opened, Transaction), opened
    for recipient in recipients:
        assert front.intake.add(opened, Recipient(recipient), limit=1000) is None
    return opened


async def accept(front: Front, transaction: Transaction, octets: bytes = MESSAGE) -> Reply:
    reply = await front.intake.accept(transaction, Content(len(octets), octets), octets)
    return await front.intake.verdict(transaction.wait) if transaction.wait is not None else reply


async def prefix(front: Front, octets: bytes = MESSAGE, *recipients: str, **more: Any) -> bytes:
    """What is put before these octets, with the id as ID."""
    reply = await accept(front, begin(front, "app@acme.example", *(recipients or ("you@example.org",)), **more), octets)
    assert reply.code == 250, reply
    message = front.taken[-1]
    assert reply.text == f"Ok: queued as {message.id}"
    return message.prefix.replace(message.id.encode(), b"ID")


def names_in(fields: bytes) -> list[bytes]:
    return [line.split(b":")[0] for line in fields.split(b"\r\n") if line and not line.startswith(b"\t")]


# -- the envelope -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("domain", "given", "completed"),
    [
        ("acme.example", "root", "root@acme.example"),
        ("acme.example", "Root", "Root@acme.example"),
        ("acme.example", "root@globex.example", "root@globex.example"),
        (None, "root@acme.example", "root@acme.example"),
    ],
)
async def test_a_bare_address_gets_our_domain(front_of: FrontOf, domain: str | None, given: str, completed: str) -> None:
    front = front_of(domain=domain)
    transaction = begin(front, given, given)
    assert transaction.sender == completed
    assert list(transaction.recipients) == [completed]


async def test_the_domain_is_the_host_name_unless_it_is_given(front_of: FrontOf) -> None:
    front = front_of()
    assert list(begin(front, "app@acme.example", "root").recipients) == ["root@relay.example"]


async def test_without_a_domain_a_bare_address_is_refused(front_of: FrontOf) -> None:
    front = front_of(domain=None)
    assert str(front.intake.begin(ORIGIN, "app", "SMTP", "root", smtputf8=False)).startswith("501 5.1.7 ")
    assert str(front.intake.add(begin(front), Recipient("root"), limit=10)).startswith("501 5.1.3 ")


@pytest.mark.parametrize(
    ("aliases", "recipients", "expected"),
    [
        ({"root": "ops@acme.example"}, ["root"], ["ops@acme.example"]),
        ({"root": "ops@acme.example"}, ["ROOT@Relay.Example"], ["ops@acme.example"]),
        ({"root": "ops@acme.example"}, ["root@other.example"], ["root@other.example"]),
        ({"ops@acme.example": "a@x.example"}, ["OPS@acme.example"], ["a@x.example"]),
        ({"root": ["a@x.example", "b@x.example"]}, ["root", "b@x.example", "c@x.example"], ["a@x.example", "b@x.example", "c@x.example"]),
        ({"root": "adm@relay.example", "adm": "a@x.example"}, ["root"], ["a@x.example"]),
        ({"a": "b@relay.example", "b": "a@relay.example"}, ["a"], ["a@relay.example"]),
        ({"a": "a@relay.example"}, ["a"], ["a@relay.example"]),
        ({"a": ["a@relay.example", "b@x.example"]}, ["a"], ["a@relay.example", "b@x.example"]),
        ({"a": ["b@relay.example", "c@relay.example"], "b": "d@x.example", "c": "d@x.example"}, ["a"], ["d@x.example"]),
    ],
)
async def test_an_alias_stands_for_its_targets(front_of: FrontOf, aliases: Any, recipients: list[str], expected: list[str]) -> None:
    front = front_of(aliases=aliases)
    assert list(begin(front, "app@acme.example", *recipients).recipients) == expected


async def test_senders_have_no_aliases(front_of: FrontOf) -> None:
    assert begin(front_of(aliases={"root": "ops@globex.example"}, domain="acme.example"), "root").sender == "root@acme.example"


async def test_a_recipient_given_twice_gets_one_copy(front_of: FrontOf) -> None:
    front = front_of()
    await accept(front, begin(front, "app@acme.example", "a@x.example", "b@x.example", "a@x.example"))
    assert [message.recipients for message in front.taken] == [("a@x.example", "b@x.example")]


async def test_an_alias_with_one_refused_target_is_refused_whole(front_of: FrontOf) -> None:
    routes = [
        {"name": "no", "sender": "*", "recipient": "rival.example", "reject": "not to rivals"},
        {"name": "yes", "sender": "*", "upstream": "house"},
    ]
    front = front_of(routes=routes, aliases={"both": ["a@x.example", "b@rival.example"]})
    transaction = begin(front)
    assert str(front.intake.add(transaction, Recipient("both"), limit=10)) == "550 5.7.1 not to rivals"
    assert not transaction.recipients


@pytest.mark.parametrize(
    ("taken", "more", "fits"), [(1, "new", True), (2, "new", False), (2, "old", True), (1, "two", False), (0, "two", True)]
)
async def test_the_limit_counts_recipients_after_aliases(front_of: FrontOf, taken: int, more: str, fits: bool) -> None:
    front = front_of(aliases={"two": ["p@x.example", "q@x.example"]})
    transaction = begin(front, "app@acme.example", *[f"r{number}@x.example" for number in range(taken)])
    name = {"new": "s@x.example", "old": "r0@x.example", "two": "two"}[more]
    reply = front.intake.add(transaction, Recipient(name), limit=2)
    assert (reply is None) is fits
    assert reply is None or str(reply) == "452 4.5.3 Too many recipients"
    assert len(transaction.recipients) == (taken if not fits or more == "old" else taken + (2 if more == "two" else 1))


# -- the fields that we make --------------------------------------------------------------------------------------------------


async def test_received_says_from_whom_to_whom_and_when(front_of: FrontOf) -> None:
    front = front_of()
    complete = b"Message-ID: <1@app>\r\nDate: Fri, 15 Jan 2027 08:00:00 +0000\r\n" + MESSAGE
    assert await prefix(front, complete) == (
        b"Received: from app.example ([192.0.2.1])\r\n\tby relay.example with ESMTP id ID\r\n\tfor <you@example.org>;\r\n"
        b"\tFri, 15 Jan 2027 08:00:00 -0000\r\n"
    )


async def test_received_does_not_tell_recipients_of_each_other(front_of: FrontOf) -> None:
    assert b"for <" not in await prefix(front_of(), MESSAGE, "a@x.example", "b@x.example")


@pytest.mark.parametrize(
    ("client", "literal"),
    [("192.0.2.1", b"([192.0.2.1])"), ("2001:db8::1", b"([IPv6:2001:db8::1])"), ("::ffff:10.0.0.1", b"([IPv6:::ffff:10.0.0.1])")],
)
async def test_the_client_is_an_address_literal(front_of: FrontOf, client: str, literal: bytes) -> None:
    assert literal in await prefix(front_of(), origin=Origin("local", client, "", "S1"))


@pytest.mark.parametrize("protocol", ["SMTP", "ESMTP", "UTF8SMTP"])
async def test_received_names_the_protocol(front_of: FrontOf, protocol: str) -> None:
    assert f" with {protocol} id ID".encode() in await prefix(front_of(), protocol=protocol)


@pytest.mark.parametrize(
    "name",
    [
        "x\r\nBcc: evil@x.example", "x\nBcc: evil@x.example", "x\rBcc: evil", "a\0b", "x) by evil (y", "x\u2028y", "bücher.example",
        "\udcff\udcfe", "; Fri, 1 Jan 1999", "x\ty", "x\x85y", '"quoted"', "<x@y>", "x" * 255,
    ],
)  # fmt: skip
async def test_what_a_client_calls_itself_stays_one_harmless_word(front_of: FrontOf, name: str) -> None:
    made = await prefix(front_of(), name=name)
    word = re.match(rb"Received: from (\S+) \(\[192\.0\.2\.1\]\)\r\n\tby ", made)
    assert word and re.fullmatch(rb"[A-Za-z0-9.:\[\]_?-]+", word[1])
    assert names_in(made) == [b"Received", b"Message-ID", b"Date"]
    assert len(made.split(b"\r\n")[0]) < 998


@pytest.mark.parametrize(
    ("head", "added"),
    [
        (b"Subject: x\r\n\r\n", [b"Message-ID", b"Date"]),
        (b"message-id: <1@x>\r\n\r\n", [b"Date"]),
        (b"DATE: today\r\n\r\n", [b"Message-ID"]),
        (b"Date : today\r\nMessage-ID\t: <1@x>\r\n\r\n", []),
        (b"Message-ID:\r\n <1@x>\r\nDate:\r\n today\r\n\r\n", []),
        (b"Subject: x\r\n Date: folded\r\n\tMessage-ID: <1@x>\r\n\r\n", [b"Message-ID", b"Date"]),
        (b"X-Date: x\r\nResent-Message-ID: <1@x>\r\n\r\nDate: body\r\n", [b"Message-ID", b"Date"]),
        (b"", [b"Message-ID", b"Date"]),
        (b"\r\nDate: body\r\nMessage-ID: <body@x>\r\n", [b"Message-ID", b"Date"]),
        (b"no header\r\nDate: body\r\n", [b"Message-ID", b"Date"]),
        (b"Date: x", [b"Message-ID"]),
    ],
)
async def test_message_id_and_date_are_added_where_they_are_missing(front_of: FrontOf, head: bytes, added: list[bytes]) -> None:
    made = await prefix(front_of(), head)
    assert names_in(made) == [b"Received", *added]


async def test_what_is_added_is_well_formed(front_of: FrontOf) -> None:
    front = front_of()
    made = (await prefix(front)).decode()
    date = re.search(r"^Date: (.*)\r$", made, re.MULTILINE)
    assert date and parsedate_to_datetime(date[1]).timestamp() == front.clock.now()
    assert re.search(r"Message-ID: <ID\.[0-9a-f]{8}@relay\.example>\r\n", made)
    assert made.isascii() and made.endswith("\r\n") and "\r\n\r\n" not in made


async def test_two_messages_of_one_second_differ_in_their_message_id(front_of: FrontOf) -> None:
    front = front_of()
    for _ in range(2):
        await accept(front, begin(front, "app@acme.example", "you@x.example"))
    ids = [re.findall(rb"Message-ID: (<.*>)", message.prefix) for message in front.taken]
    assert [len(found) for found in ids] == [1, 1] and ids[0] != ids[1]


async def test_the_content_itself_is_not_touched(front_of: FrontOf) -> None:
    front = front_of(
        routes=[{"sender": "*", "upstream": "acme", "rewrite": {"from": "Other <other@acme.example>", "subject_prefix": "[x] "}}]
    )
    octets = b"From app@acme.example Fri\r\n" + MESSAGE + b"\xff\0\r\n.\r\n"
    await accept(front, begin(front, "app@acme.example", "you@x.example"), octets)
    assert front.taken[0].content == octets


@pytest.mark.parametrize(
    "octets", [b"\r\nSubject: body\r\n", b"text\r\nSubject: body\r\n", b" folded\r\nSubject: body\r\n", b": x\r\nSubject: body\r\n"]
)
async def test_content_without_a_header_cannot_add_to_ours(front_of: FrontOf, octets: bytes) -> None:
    front = front_of()
    await accept(front, begin(front, "app@acme.example", "you@x.example"), octets)
    header, _, body = front.taken[0].sent.partition(b"\r\n\r\n")
    assert header + b"\r\n" == front.taken[0].prefix
    assert body == octets.removeprefix(b"\r\n")


# -- routes -------------------------------------------------------------------------------------------------------------------

SPLIT = [
    {"name": "inside", "sender": "acme.example", "recipient": "acme.example", "upstream": "acme"},
    {"name": "outside", "sender": "acme.example", "upstream": "house"},
]


async def test_recipients_of_several_routes_become_several_messages_in_one_put(front_of: FrontOf) -> None:
    front = front_of(routes=SPLIT)
    reply = await accept(front, begin(front, "app@acme.example", "a@x.example", "b@acme.example", "c@x.example"))
    outside, inside = front.taken
    assert front.spool.puts == 1
    assert (outside.lane, outside.recipients) == (Lane("house", "outside"), ("a@x.example", "c@x.example"))
    assert (inside.lane, inside.recipients) == (Lane("acme", "inside"), ("b@acme.example",))
    assert outside.prefix == inside.prefix and outside.draft.content is inside.draft.content and outside.id != inside.id
    assert str(reply) == f"250 2.0.0 Ok: queued as {outside.id}"
    assert sorted(claim.id for claim in front.dispatch.started) == sorted([outside.id, inside.id])
    assert [event["route"] for event in front.events("accepted")] == ["outside", "inside"]


async def test_the_facts_that_conditions_need_are_stored(front_of: FrontOf) -> None:
    front = front_of()
    await accept(front, begin(front, "app@acme.example", "you@x.example"))
    assert front.taken[0].draft.origin == Origin("local", "192.0.2.1", "", "S7", "app@acme.example")


@pytest.mark.parametrize(
    ("author", "route"),
    [
        (b"From: app@acme.example\r\n", "acme"),
        (b"From: App <APP@Globex.example>\r\n", "globex"),
        (b"From: a@acme.example, b@globex.example\r\n", None),
        (b"From: a@acme.example\r\nFrom: b@globex.example\r\n", None),
        (b"Sender: app@acme.example\r\n", None),
        (b"From: who@unknown.example\r\n", None),
        (b"", None),
    ],
)
async def test_a_null_sender_is_routed_by_its_header_from(front_of: FrontOf, author: bytes, route: str | None) -> None:
    front = front_of()
    reply = await accept(front, begin(front, "", "you@x.example"), author + b"Subject: away\r\n\r\n")
    if route is None:
        assert str(reply) == "550 5.7.1 No route for this sender"
        assert front.spool.puts == 0
    else:
        assert [(message.lane.route, message.sender) for message in front.taken] == [(route, "")]


async def test_a_null_sender_that_a_route_rejects_hears_its_text(front_of: FrontOf) -> None:
    front = front_of(routes=[{"sender": "acme.example", "reject": "not ours"}, {"sender": "globex.example", "upstream": "house"}])
    assert str(await accept(front, begin(front, "", "you@x.example"))) == "550 5.7.1 not ours"


async def test_of_a_null_senders_recipients_those_without_a_route_are_lost_with_a_line_in_the_log(front_of: FrontOf) -> None:
    front = front_of(routes=SPLIT[:1])
    reply = await accept(front, begin(front, "", "a@x.example", "b@acme.example"))
    assert reply.code == 250
    assert [message.recipients for message in front.taken] == [("b@acme.example",)]
    (lost,) = front.events("failed")
    assert (lost["recipients"], lost["id"]) == ("a@x.example", front.taken[0].id)


async def test_nobody_is_called_lost_when_nothing_was_taken(front_of: FrontOf) -> None:
    front = front_of(routes=SPLIT[:1])
    front.spool.put_error = SpoolFull("full")
    assert (await accept(front, begin(front, "", "a@x.example", "b@acme.example"))).code == 452
    assert front.events("failed") == []


# -- bcc ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("recipients", "expected"),
    [
        (["a@x.example"], [("a@x.example", "archive@acme.example")]),
        (["a@x.example", "archive@acme.example"], [("a@x.example",), ("archive@acme.example",)]),
        (["a@x.example", "b@acme.example"], [("a@x.example", "archive@acme.example"), ("b@acme.example",)]),
        (["archive@acme.example"], [("archive@acme.example",)]),
    ],
)
async def test_bcc_is_one_more_recipient_once_a_message(front_of: FrontOf, recipients: list[str], expected: list[tuple[str, ...]]) -> None:
    bcc = {"rewrite": {"bcc": "archive@acme.example"}}
    front = front_of(routes=[{**route, **bcc} for route in SPLIT])
    await accept(front, begin(front, "app@acme.example", *recipients))
    assert [message.recipients for message in front.taken] == expected
    added = [r for m in front.taken for r in m.draft.envelope.recipients if r.address == "archive@acme.example"]
    assert [r.notify for r in added] == ([""] if "archive@acme.example" in recipients else ["NEVER"])


async def test_bcc_is_not_added_for_whom_the_client_writes_otherwise(front_of: FrontOf) -> None:
    front = front_of(routes=[{"sender": "*", "upstream": "acme", "rewrite": {"bcc": "archive@acme.example"}}])
    await accept(front, begin(front, "app@acme.example", "Archive@ACME.example"))
    assert [message.recipients for message in front.taken] == [("Archive@ACME.example",)]


async def test_bcc_is_not_in_the_trace_field(front_of: FrontOf) -> None:
    front = front_of(routes=[{"sender": "*", "upstream": "acme", "rewrite": {"bcc": "archive@acme.example"}}])
    made = await prefix(front)
    assert b"for <you@example.org>;" in made and b"archive" not in made


# -- whose upstream it is -----------------------------------------------------------------------------------------------------


def bound(**rewrite: Any) -> dict[str, Any]:
    route: dict[str, Any] = {"sender": "*", "upstream": "acme", **({"rewrite": rewrite} if rewrite else {})}
    return {"upstreams": {"acme": {"host": "smtp.acme.example", "senders": ["acme.example"]}}, "routes": [route]}


@pytest.mark.parametrize(
    ("sender", "head", "rewrite", "allowed"),
    [
        ("app@acme.example", b"From: a@acme.example\r\n", {}, True),
        ("app@acme.example", b"From: A <A@ACME.example>\r\nSender: b@acme.example\r\n", {}, True),
        ("", b"From: a@acme.example\r\n", {}, True),
        ("app@globex.example", b"From: a@acme.example\r\n", {}, False),
        ("app@acme.example", b"From: a@globex.example\r\n", {}, False),
        ("app@acme.example", b"From: a@acme.example\r\nSender: b@globex.example\r\n", {}, False),
        ("app@acme.example", b"From: a@acme.example, b@acme.example\r\n", {}, False),
        ("app@acme.example", b"From: a@acme.example\r\nFrom: a@acme.example\r\n", {}, False),
        ("app@acme.example", b"From: a@sub.acme.example\r\n", {}, False),
        ("app@acme.example", b"Subject: no From\r\n", {}, False),
        ("app@acme.example", b"", {}, False),
        ("app@acme.example", b" From: a@acme.example\r\n", {}, False),
        ("app@acme.example", b"junk\r\nFrom: a@acme.example\r\n", {}, False),
        ("app@acme.example", b"From: a@globex.example\r\n", {"from": "X <x@acme.example>"}, True),
        ("app@acme.example", b"", {"from": "X <x@acme.example>"}, True),
        ("app@acme.example", b"From: a@acme.example\r\n", {"from": "X <x@globex.example>"}, False),
        ("app@globex.example", b"From: a@acme.example\r\n", {"envelope_sender": "b@acme.example"}, True),
        ("app@acme.example", b"From: a@acme.example\r\n", {"envelope_sender": "b@globex.example"}, False),
        ("", b"From: a@acme.example\r\n", {"envelope_sender": "b@globex.example"}, True),
        ("app@acme.example", b"From: a@acme.example\r\nSender: x@globex.example\r\n", {"remove_headers": ["Sender"]}, True),
    ],
)
async def test_a_credential_only_takes_its_own_senders_judged_by_what_would_go_out(
    front_of: FrontOf, sender: str, head: bytes, rewrite: dict[str, Any], allowed: bool
) -> None:
    front = front_of(**bound(**rewrite))
    reply = await accept(front, begin(front, sender, "you@x.example"), head + b"\r\nFrom: body@globex.example\r\n")
    assert reply.code == (250 if allowed else 550), reply
    assert allowed or (reply.enhanced == "5.7.1" and front.spool.puts == 0 and front.dispatch.outstanding == 0)
    assert len(reply.line()) + 2 <= 512


async def test_one_forbidden_part_of_a_split_message_refuses_all_of_it(front_of: FrontOf) -> None:
    upstreams = {"acme": {"host": "smtp.acme.example", "senders": ["other.example"]}, "house": {"host": "smtp.house.example"}}
    front = front_of(routes=SPLIT, upstreams=upstreams)
    assert (await accept(front, begin(front, "app@acme.example", "a@x.example", "b@acme.example"))).code == 550
    assert (front.spool.puts, front.dispatch.outstanding) == (0, 0)


# -- loops --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("others", "ours", "code"),
    [(49, 0, 250), (50, 0, 554), (0, 4, 250), (0, 5, 554), (45, 4, 250), (46, 4, 554), (5, 5, 554), (200, 0, 554)],
)
async def test_a_loop_is_cut(front_of: FrontOf, others: int, ours: int, code: int) -> None:
    front = front_of()
    head = b"Received: from a by mx.example; x\r\n" * others + b"Received: from b\r\n\tby relay.example with SMTP; x\r\n" * ours
    reply = await accept(front, begin(front, "app@acme.example", "you@x.example"), head + MESSAGE)
    assert reply.code == code
    assert code == 250 or str(reply) == "554 5.4.6 Mail loop: too many Received header fields"


# -- custody ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "reply"),
    [
        (SpoolFull("disk full"), "452 4.3.1 Insufficient storage, try again later"),
        (SpoolError("I/O error"), "451 4.3.0 Local error, try again later"),
    ],
)
async def test_a_spool_that_cannot_take_it_is_our_fault_and_temporary(front_of: FrontOf, error: Exception, reply: str) -> None:
    front = front_of()
    front.spool.put_error = error
    assert str(await accept(front, begin(front, "app@acme.example", "you@x.example"))) == reply
    assert front.dispatch.outstanding == 0
    assert (front.dispatch.started, front.dispatch.woken) == ([], [])
    assert front.events("accepted") == []


@pytest.mark.parametrize("error", [ValueError("a bug"), asyncio.CancelledError()])
async def test_what_was_reserved_is_given_back_whatever_happens(front_of: FrontOf, error: BaseException) -> None:
    front = front_of(routes=SPLIT)
    front.spool.put_error = error  # type: ignore[assignment]
    with pytest.raises(type(error)):
        await accept(front, begin(front, "app@acme.example", "a@x.example", "b@acme.example"))
    assert front.dispatch.outstanding == 0


async def test_a_message_that_finds_no_slot_waits_in_its_lane(front_of: FrontOf) -> None:
    front = front_of(routes=SPLIT)
    front.dispatch.reserved[Lane("house", "outside")] = front.dispatch.slots = 1
    await accept(front, begin(front, "app@acme.example", "a@x.example", "b@acme.example"))
    assert [claim.lane.route for claim in front.dispatch.started] == ["inside"]
    assert front.dispatch.woken == [(Lane("house", "outside"), front.clock.now())]


async def test_after_the_commit_nothing_takes_250_back(front_of: FrontOf) -> None:
    front = front_of()
    front.dispatch.start_error = RuntimeError("a bug in delivery")
    assert (await accept(front, begin(front, "app@acme.example", "you@x.example"))).code == 250
    assert len(front.taken) == 1
    (fault,) = front.events("fault")
    assert fault["id"] == front.taken[0].id and "a bug in delivery" in fault["traceback"]


async def test_a_part_that_cannot_be_handed_over_keeps_no_other_back(front_of: FrontOf) -> None:
    front = front_of(routes=SPLIT)
    front.dispatch.start_error = RuntimeError("a bug in delivery")
    front.dispatch.reserved[Lane("house", "outside")] = front.dispatch.slots = 1
    assert (await accept(front, begin(front, "app@acme.example", "b@acme.example", "a@x.example"))).code == 250
    assert front.dispatch.woken == [(Lane("house", "outside"), front.clock.now())]


@pytest.mark.parametrize(
    ("author", "spoil", "code"),
    [
        (b"a@acme.example", None, 250),
        (b"a@globex.example", None, 550),
        (b"a@acme.example", SpoolFull("full"), 452),
        (b"a@acme.example", SpoolError("broken"), 451),
    ],
)
async def test_content_in_a_file_is_gone_unless_it_was_taken(front_of: FrontOf, author: bytes, spoil: SpoolError | None, code: int) -> None:
    front = front_of(**bound())
    front.spool.put_error = spoil
    writer = front.intake.spill()
    head = b"From: " + author + b"\r\n\r\n" + b"x" * 1000 + b"\r\n"
    await writer.write(head)
    reply = await front.intake.accept(begin(front, "app@acme.example", "you@x.example"), await writer.finish(), head)
    assert reply.code == code
    await eventually(lambda: not front.arriving, "files of what was not taken to go")
    assert [message.content for message in front.taken] == ([head] if code == 250 else [])


async def test_content_in_a_file_is_gone_after_a_bug_too(front_of: FrontOf) -> None:
    front = front_of()
    front.spool.put_error = ZeroDivisionError()
    writer = front.intake.spill()
    await writer.write(MESSAGE)
    with pytest.raises(ZeroDivisionError):
        await front.intake.accept(begin(front, "app@acme.example", "you@x.example"), await writer.finish(), MESSAGE)
    await eventually(lambda: not front.arriving, "files of what was not taken to go")


async def test_an_ill_spool_is_an_obstacle_before_the_content(front_of: FrontOf) -> None:
    front = front_of()
    assert front.intake.obstacle() is None
    front.spool.ill = "the disk is full"
    assert str(front.intake.obstacle()) == "452 4.3.1 Insufficient storage, try again later"


async def test_a_message_too_large_for_the_room_that_is_left_is_told_alone(front_of: FrontOf, monkeypatch: pytest.MonkeyPatch) -> None:
    front = front_of()
    monkeypatch.setattr(front.spool, "obstacle", lambda size=0: SpoolFull("140 MB free") if size > 1000 else None)
    assert str(front.intake.obstacle(2000)) == "452 4.3.1 Insufficient storage, try again later"
    assert front.intake.obstacle(500) is None
    assert [event["what"] for event in front.events("note")] == ["a message of 2000 octets is not taken: 140 MB free"]


async def test_the_log_has_one_line_for_what_was_taken(front_of: FrontOf) -> None:
    front = front_of()
    await accept(front, begin(front, "app@acme.example", "a@x.example", "b@x.example"))
    (event,) = front.events()
    del event["time"], event["level"]
    assert event == {
        "event": "accepted", "id": front.taken[0].id, "session": "S7", "listener": "local", "client": "192.0.2.1", "route": "acme",
        "upstream": "acme", "sender": "app@acme.example", "recipients": "a@x.example,b@x.example", "size": len(MESSAGE),
    }  # fmt: skip


ODD = [
    '"a b"@acme.example', '"a\\"b"@acme.example', '"a>b"@acme.example', '"a\\\\"@acme.example', "a+b=c@acme.example", "ü@acme.example",
    "a@[127.0.0.1]", "a@[IPv6:::1]", "a..b@acme.example", "post@bücher.example", "a@" + "x" * 63 + ".example", "%s%n{}@acme.example",
]  # fmt: skip


@pytest.mark.parametrize("address", ODD)
async def test_odd_addresses_pass_unharmed(front_of: FrontOf, address: str) -> None:
    front = front_of(routes=[{"sender": "*", "upstream": "acme"}], aliases={"x": "y@z.example"})
    reply = await accept(front, begin(front, address, address, smtputf8=True))
    assert reply.code == 250
    (message,) = front.taken
    assert (message.sender, message.recipients) == (address, (address,))
    assert f"for <{address}>;\r\n".encode() in message.prefix
    assert front.events("accepted")[0]["sender"] == address


# -- the upstream's own verdict ---------------------------------------------------------------------------------------------------

HELD = [{"name": "acme", "sender": "acme.example", "upstream": "acme", "wait": "60s"}]


async def verdict(front: Front, said: Reply, *recipients: str) -> Reply:
    """The reply to a client that waits, when the upstream has said this to the whole message."""
    accepting = asyncio.ensure_future(accept(front, begin(front, "app@acme.example", *(recipients or ("you@x.example",)))))
    await eventually(lambda: front.dispatch.started, "the message to go on")
    claims = front.dispatch.started
    wait = front.waits.of(claims[0].id)
    assert wait is not None
    async with asyncio.timeout(20):
        if said.positive:
            for claim in claims:
                wait.sent(claim.id, said)
        else:
            assert all(await asyncio.gather(*(wait.refused(claim.id, said) for claim in claims)))
            for claim in claims:
                assert not accepting.done(), "5xx only after all of it is stored"
                wait.stored(claim.id)
        return await accepting


@pytest.mark.parametrize(
    ("said", "heard"),
    [
        (Reply(250, "2.0.0", "Ok: queued as 4711"), "250 2.0.0 Ok: sent as ID (upstream: 250 2.0.0 Ok: queued as 4711)"),
        (Reply(250, "", ""), "250 2.0.0 Ok: sent as ID (upstream: 250)"),
        (Reply(252, "2.5.0", "maybe"), "250 2.0.0 Ok: sent as ID (upstream: 252 2.5.0 maybe)"),
        (Reply(550, "5.1.1", "nobody here"), "550 5.1.1 nobody here (refused as ID)"),
        (Reply(551, "5.1.6", "moved"), "551 5.1.6 moved (refused as ID)"),
        (Reply(552, "5.2.2", "full"), "552 5.2.2 full (refused as ID)"),
        (Reply(553, "5.1.3", "bad"), "553 5.1.3 bad (refused as ID)"),
        (Reply(554, "5.7.1", "spam"), "554 5.7.1 spam (refused as ID)"),
        (Reply(521, "5.3.2", "no mail here"), "554 5.3.2 no mail here (refused as ID)"),
        (Reply(555, "5.5.4", "what"), "554 5.5.4 what (refused as ID)"),
        (Reply(556, "", ""), "554 5.0.0 Refused by the upstream (refused as ID)"),
        (Reply(549, "4.9.9", "odd"), "554 5.0.0 odd (refused as ID)"),
        (Reply(0, "", "the upstream does not offer SMTPUTF8"), "554 5.0.0 the upstream does not offer SMTPUTF8 (refused as ID)"),
        (Reply(550, "5.1.1", "größer Gruß"), "550 5.1.1 gr??er Gru? (refused as ID)"),
    ],
)
async def test_a_client_that_waits_hears_the_upstreams_own_words(front_of: FrontOf, said: Reply, heard: str) -> None:
    front = front_of(routes=HELD)
    reply = await verdict(front, said)
    assert str(reply).replace(front.taken[0].id, "ID") == heard
    assert front.dispatch.outstanding == 0


@pytest.mark.parametrize("code", [250, 550])
async def test_the_upstreams_words_fit_one_line_and_keep_our_id(front_of: FrontOf, code: int) -> None:
    front = front_of(routes=HELD)
    reply = await verdict(front, Reply(code, f"{code // 100}.123.123", "x" * 2000))
    assert len(reply.line()) + 2 <= 512
    assert front.taken[0].id in reply.text


async def test_a_route_without_a_wait_is_answered_at_once(front_of: FrontOf) -> None:
    front = front_of(routes=[*HELD, {"sender": "globex.example", "upstream": "house"}])
    reply = await accept(front, begin(front, "app@globex.example", "you@x.example"))
    assert reply.text.startswith("Ok: queued as ")
    assert front.waits.of(front.taken[0].draft.id) is None


@pytest.mark.parametrize(("inside", "outside"), [("60s", "0s"), ("0s", "60s"), ("60s", "1ms"), ("1ms", "60s"), ("60s", "60s")])
async def test_a_split_message_waits_for_all_parts_that_ask_for_it_up_to_the_longest(front_of: FrontOf, inside: str, outside: str) -> None:
    front = front_of(routes=[{**SPLIT[0], "wait": inside}, {**SPLIT[1], "wait": outside}])
    reply = await verdict(front, Reply(550, "5.1.1", "nobody"), "a@x.example", "b@acme.example")
    assert str(reply) == f"550 5.1.1 nobody (refused as {front.taken[0].id})"
    assert [front.waits.of(message.draft.id) for message in front.taken] == [None, None]


@pytest.mark.parametrize("error", [SpoolFull("full"), SpoolError("broken"), ZeroDivisionError(), asyncio.CancelledError()])
async def test_what_was_not_taken_is_not_waited_for(front_of: FrontOf, error: BaseException) -> None:
    front = front_of(routes=HELD)
    front.spool.put_error = error  # type: ignore[assignment]
    accepting = asyncio.ensure_future(accept(front, begin(front, "app@acme.example", "you@x.example")))
    await asyncio.wait([accepting], timeout=20)
    assert accepting.done() and (accepting.cancelled() or accepting.exception() or accepting.result().code in (451, 452))
    assert front.waits._waits == {}


async def test_who_is_cut_off_while_waiting_is_forgotten_and_the_message_stays(front_of: FrontOf) -> None:
    front = front_of(routes=HELD)
    accepting = asyncio.ensure_future(accept(front, begin(front, "app@acme.example", "you@x.example")))
    await eventually(lambda: front.taken, "the message to be in custody")
    accepting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await accepting
    assert front.waits.of(front.taken[0].draft.id) is None
    assert await front.spool.next_due() == {} and [claim.id for claim in front.dispatch.started] == [front.taken[0].id]


@pytest.mark.parametrize("when", ["before", "during"])
async def test_who_has_left_is_not_waited_for(front_of: FrontOf, when: str) -> None:
    front = front_of(routes=HELD)
    transaction = begin(front, "app@acme.example", "you@x.example")
    if when == "before":
        transaction.leave()
    accepting = asyncio.ensure_future(accept(front, transaction))
    if when == "during":
        await eventually(lambda: front.taken, "the message to be in custody")
        transaction.leave()
    async with asyncio.timeout(20):
        assert str(await accepting) == f"250 2.0.0 Ok: queued as {front.taken[0].id}"


async def test_a_null_sender_with_a_recipient_that_is_lost_is_not_told_that_all_was_sent(front_of: FrontOf) -> None:
    front = front_of(routes=[{**SPLIT[0], "wait": "60s"}])
    async with asyncio.timeout(20):
        assert (await accept(front, begin(front, "", "a@x.example", "b@acme.example"))).text.startswith("Ok: queued as ")


async def test_a_bug_in_delivery_holds_nobody(front_of: FrontOf) -> None:
    front = front_of(routes=HELD)
    front.dispatch.start_error = RuntimeError("a bug in delivery")
    async with asyncio.timeout(20):
        assert (await accept(front, begin(front, "app@acme.example", "you@x.example"))).text.startswith("Ok: queued as ")


async def test_an_upstream_that_asks_for_patience_holds_nobody(front_of: FrontOf) -> None:
    front = front_of(routes=HELD)
    front.dispatch.pausing, front.dispatch.slots = {"acme"}, 0
    async with asyncio.timeout(20):
        assert (await accept(front, begin(front, "app@acme.example", "you@x.example"))).text.startswith("Ok: queued as ")


# -- what the client asks to be told, and loops ------------------------------------------------------------------------------


async def test_what_the_client_asks_to_be_told_is_kept(front_of: FrontOf) -> None:
    front = front_of()
    opened = front.intake.begin(ORIGIN, "app", "ESMTP", "app@acme.example", smtputf8=False, ret="FULL", envid="order+2B7")
    assert isinstance(opened, Transaction)
    asked = Recipient("you@example.org", "SUCCESS", "rfc822;You@example.org")
    assert front.intake.add(opened, asked, limit=10) is None
    assert (await accept(front, opened)).code == 250
    envelope = front.taken[0].draft.envelope
    assert (envelope.ret, envelope.envid, envelope.recipients) == ("FULL", "order+2B7", (asked,))


async def test_an_alias_keeps_the_wishes_and_the_name_it_had(front_of: FrontOf) -> None:
    front = front_of(domain="example.net", aliases={"root": ["ops@acme.example", "you@example.org"]})
    transaction = begin(front)
    for recipient in (Recipient("root", "SUCCESS"), Recipient("Root@example.net", "", "rfc822;boss@example.net"), Recipient("bare")):
        assert front.intake.add(transaction, recipient, limit=10) is None
    assert [recipient for recipient, _ in transaction.recipients.values()] == [
        Recipient("ops@acme.example", "SUCCESS,FAILURE,DELAY", "rfc822;root@example.net"),
        Recipient("you@example.org", "SUCCESS,FAILURE,DELAY", "rfc822;root@example.net"),
        Recipient("bare@example.net"),
    ]


@pytest.mark.parametrize(
    ("first", "second", "both"),
    [
        (Recipient("a@b.c", "NEVER"), Recipient("a@b.c"), Recipient("a@b.c", "FAILURE,DELAY")),
        (Recipient("a@b.c"), Recipient("a@b.c"), Recipient("a@b.c")),
        (
            Recipient("a@b.c", "SUCCESS", "rfc822;x"),
            Recipient("a@b.c", "DELAY", "rfc822;y"),
            Recipient("a@b.c", "SUCCESS,DELAY", "rfc822;x"),
        ),
    ],
)
async def test_a_recipient_given_twice_misses_no_report(front_of: FrontOf, first: Recipient, second: Recipient, both: Recipient) -> None:
    front = front_of()
    transaction = begin(front)
    for recipient in (first, second):
        assert front.intake.add(transaction, recipient, limit=1) is None
    assert [recipient for recipient, _ in transaction.recipients.values()] == [both]


OURS = b"Received: from app ([127.0.0.1])\r\n\tby relay.example with ESMTP id 0123456789ABC;\r\n\tnow\r\n"
LOOP = Reply(554, "5.4.6", "Mail loop: this message is being sent from here")


@pytest.mark.parametrize("sender", ["app@acme.example", ""])
async def test_a_message_that_comes_back_while_it_is_sent_is_refused_at_once(front_of: FrontOf, sender: str) -> None:
    front = front_of()
    front.dispatch.sending.add(("0123456789ABC", "acme"))
    assert await accept(front, begin(front, sender, "you@example.org"), OURS + MESSAGE) == LOOP
    assert front.taken == []
    (note,) = front.events("note")
    assert note["level"] == "error"
    assert note["what"] == "a loop: 0123456789ABC, which route acme is sending to acme, has come back"


async def test_a_message_that_comes_back_from_a_fallback_is_refused_too(front_of: FrontOf) -> None:
    front = front_of(routes=[{"name": "acme", "upstream": "acme", "fallback": "house"}])
    front.dispatch.sending.add(("0123456789ABC", "house"))
    assert await accept(front, begin(front, "app@acme.example", "you@example.org"), OURS + MESSAGE) == LOOP


@pytest.mark.parametrize(
    ("header", "sending"),
    [
        (OURS, []),
        (OURS, [("0123456789ABD", "acme")]),
        (OURS, [("0123456789ABC", "house")]),  # from a filter, by which another route led
        (OURS.replace(b"by relay.example ", b"by other.example "), [("0123456789ABC", "acme")]),
        (b"X-" + OURS, [("0123456789ABC", "acme")]),
    ],
)
async def test_a_message_that_only_resembles_one_is_taken(front_of: FrontOf, header: bytes, sending: list[tuple[str, str]]) -> None:
    front = front_of()
    front.dispatch.sending.update(sending)
    assert (await accept(front, begin(front, "app@acme.example", "you@example.org"), header + MESSAGE)).code == 250
