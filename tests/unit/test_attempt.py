"""One attempt: matched again, rewritten, asked for permission, sent in as many transactions as it takes, one outcome for each recipient."""

import asyncio
import errno
import math
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from relay.clock import ManualClock
from relay.config.model import Config, Retry
from relay.delivery import attempt as module
from relay.delivery.attempt import Attempts, Result
from relay.delivery.breaker import Breakers
from relay.mail.envelope import Origin
from relay.mail.outcome import Failure, Outcome, Phase, Scope, Status, outcome_of_failure, outcome_of_reply
from relay.mail.reply import Reply
from relay.observe.metrics import Metrics
from relay.routing import Router
from relay.spool.base import Claim, Content, Lane, Next
from relay.upstream.transaction import Outgoing
from tests.unit.delivery import CONTENT, PREFIX, SENT, FakePool, Log, claim_of, config_of

REFUSED = outcome_of_reply(Phase.RCPT, Reply(550, "5.1.1", "nobody here"))
GREYLISTED = outcome_of_reply(Phase.RCPT, Reply(450, "4.2.0", "later"))
TOO_MANY = outcome_of_reply(Phase.RCPT, Reply(452, "4.5.3", "too many"))
DOWN = outcome_of_failure(Phase.CONNECT, Failure.UNREACHABLE, "refused")
CLOSED = outcome_of_failure(Phase.DATA, Failure.CLOSED, "gone")
LOST = outcome_of_failure(Phase.FINAL, Failure.TIMEOUT, "no reply")
LOGIN_REFUSED = outcome_of_reply(Phase.AUTH, Reply(535, "5.7.8", "wrong"))
FORBIDDEN = outcome_of_reply(Phase.MAIL, Reply(550, "5.7.1", "not you"))
MEBIBYTE = 1024 * 1024


class Bench:
    """Attempts over a fake pool, with the journal to read."""

    def __init__(self, log: Log) -> None:
        self.log = log
        self.clock = ManualClock()
        self.pool = FakePool()
        self.breakers = Breakers(Retry(), log.journal, Metrics(), self.clock)

    async def send(
        self,
        claim: Claim,
        config: Config | None = None,
        *,
        fresh: bool = False,
        answer: Callable[[str, list[str]], Sequence[Outcome]] | None = None,
        pool: FakePool | None = None,
    ) -> Result:
        setup = config or config_of()
        self.pool = pool or FakePool(answer)
        attempts = Attempts(setup, Router(setup), self.pool, self.log.journal, self.clock, breakers=self.breakers)  # type: ignore[arg-type]
        return await attempts.send(claim, fresh=fresh)

    async def wire(self, claim: Claim, config: Config | None = None) -> bytes:
        """The octets of the one transaction that the claim makes."""
        result = await self.send(claim, config)
        assert result.moved is None, result.moved
        (handed,) = self.pool.handed
        assert handed.message.size == len(handed.octets)
        return handed.octets


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    log = Log(tmp_path, ManualClock())
    yield Bench(log)
    log.text()


def held(result: Result) -> str:
    assert result.moved is not None
    assert not result.moved.counted
    assert all(o.status is Status.DEFERRED and not o.in_doubt for o in result.outcomes.values())
    return result.moved.held


# -- what goes out ---------------------------------------------------------------------------------------------------------


async def test_the_upstream_gets_our_fields_then_the_content_without_its_hidden_ones(bench: Bench) -> None:
    claim = claim_of(content=b"Return-Path: <x@y.example>\r\n" + CONTENT)
    assert await bench.wire(claim) == PREFIX + b"From: App <app@acme.example>\r\nSubject: hi\r\n\r\nhello\r\n"
    message = bench.pool.handed[0].message
    assert (message.sender, bench.pool.handed[0].recipients, message.eight_bit, message.smtputf8) == (
        "app@acme.example",
        ["you@example.org"],
        False,
        False,
    )


async def test_content_without_a_header_gets_one(bench: Bench) -> None:
    assert await bench.wire(claim_of(content=b"just text\r\n")) == PREFIX + b"\r\njust text\r\n"
    assert await bench.wire(claim_of(content=b"")) == PREFIX


@pytest.mark.parametrize("size", [0, 1, 1024 * 1024 + 64 * 1024, 1024 * 1024 + 64 * 1024 + 1, 3 * MEBIBYTE])
async def test_content_in_a_file_goes_out_like_content_in_memory(bench: Bench, tmp_path: Path, size: int) -> None:
    octets = CONTENT + b"x" * size
    path = tmp_path / "content"
    path.write_bytes(octets)
    claim = claim_of(content=Content(len(octets), None, path))
    wire = await bench.wire(claim)
    assert wire == PREFIX + octets.replace(b"Bcc: secret@example.org\r\n", b"")
    assert (bench.pool.handed[0].message.rest is not None) == (len(octets) > MEBIBYTE + 64 * 1024)


REWRITE: dict[str, Any] = {
    "from": "Acme <no-reply@acme.example>",
    "reply_to": "original",
    "envelope_sender": "bounces@acme.example",
    "subject_prefix": "[acme] ",
}


def rewriting(rewrite: dict[str, Any] = REWRITE, *, fallback: list[Any] | None = None, **more: Any) -> Config:
    return config_of(
        [{"name": "acme", "sender": "acme.example", "upstream": "acme", "rewrite": rewrite, "fallback": fallback or ["house"]}], **more
    )


async def test_the_route_rewrites_header_and_envelope_sender(bench: Bench) -> None:
    assert await bench.wire(claim_of(), rewriting()) == (
        PREFIX + b"From: Acme <no-reply@acme.example>\r\nSubject: [acme] hi\r\nReply-To: App <app@acme.example>\r\n\r\nhello\r\n"
    )
    assert bench.pool.handed[0].message.sender == "bounces@acme.example"


async def test_a_fallback_lays_its_own_rules_over_those_of_the_route(bench: Bench) -> None:
    setup = rewriting(fallback=[{"upstream": "house", "rewrite": {"from": "via@house.example", "envelope_sender": "b@house.example"}}])
    octets = await bench.wire(claim_of(lane=Lane("house", "acme")), setup)
    assert b"From: App <via@house.example>\r\n" in octets or b"From: via@house.example\r\n" in octets
    assert b"Subject: [acme] hi\r\n" in octets
    assert bench.pool.handed[0].message.sender == "b@house.example"


async def test_a_null_sender_stays_null_unless_the_upstream_wants_an_address_instead(bench: Bench) -> None:
    claim = claim_of(sender="", origin=Origin(header_from="app@acme.example"))
    await bench.send(claim, rewriting())
    assert bench.pool.handed[0].message.sender == ""
    await bench.send(claim, rewriting(upstreams={"acme": {"null_sender": "null@acme.example"}}))
    assert bench.pool.handed[0].message.sender == "null@acme.example"
    await bench.send(claim_of(), config_of(upstreams={"acme": {"null_sender": "null@acme.example"}}))
    assert bench.pool.handed[0].message.sender == "app@acme.example"


REPORT = b"From: Mail Delivery System <MAILER-DAEMON@acme.example>\r\nSubject: Undelivered\r\n\r\nsorry\r\n"
REPORTED = {"sender": "", "prefix": b"", "content": REPORT, "origin": Origin(header_from="app@acme.example")}


async def test_a_bounce_of_ours_is_not_rewritten(bench: Bench) -> None:
    assert await bench.wire(claim_of("app@acme.example", **REPORTED), rewriting()) == REPORT
    assert bench.pool.handed[0].message.sender == ""


async def test_a_bounce_of_ours_gets_a_fallbacks_from_and_nothing_else(bench: Bench) -> None:
    over = {"from": "Acme via House <no-reply@house.example>", "subject_prefix": "[house] ", "reply_to": "original"}
    setup = rewriting(fallback=[{"upstream": "house", "rewrite": over}, "spare"])
    expected = REPORT.replace(b"Mail Delivery System <MAILER-DAEMON@acme.example>", b"Acme via House <no-reply@house.example>")
    assert await bench.wire(claim_of("app@acme.example", lane=Lane("house", "acme"), **REPORTED), setup) == expected
    assert await bench.wire(claim_of("app@acme.example", lane=Lane("spare", "acme"), **REPORTED), setup) == REPORT


@pytest.mark.parametrize(
    ("senders", "rewrite", "author"),
    [
        (["acme.example"], None, "Mail Delivery System <MAILER-DAEMON@acme.example>"),
        (["app@acme.example"], None, "Mail Delivery System <app@acme.example>"),
        (["billing@acme.example", "other.example"], None, "Mail Delivery System <billing@acme.example>"),
        (["other.example"], None, "Mail Delivery System <MAILER-DAEMON@other.example>"),
        (["billing@acme.example"], {"from": {"name": "Acme"}}, "Acme <billing@acme.example>"),
        (["billing@acme.example"], {"from": "Acme <billing@acme.example>"}, "Acme <billing@acme.example>"),
    ],
)
async def test_a_bounce_of_ours_leaves_by_a_credential_that_may_not_send_as_mailer_daemon(
    bench: Bench, senders: list[str], rewrite: dict[str, Any] | None, author: str
) -> None:  # fmt: skip
    route = {"name": "acme", "sender": "acme.example", "upstream": "acme", "fallback": {"upstream": "spare", "rewrite": rewrite}}
    setup = config_of([route], upstreams={"spare": {"senders": senders}})
    octets = await bench.wire(claim_of("app@acme.example", lane=Lane("spare", "acme"), **REPORTED), setup)
    assert octets == REPORT.replace(b"Mail Delivery System <MAILER-DAEMON@acme.example>", author.encode())


async def test_a_bounce_of_ours_with_a_from_that_the_credential_may_not_use_is_held(bench: Bench) -> None:
    over = {"upstream": "spare", "rewrite": {"from": "who@ever.example"}}
    setup = config_of([{"name": "acme", "upstream": "acme", "fallback": over}], upstreams={"spare": {"senders": ["acme.example"]}})
    result = await bench.send(claim_of("app@acme.example", lane=Lane("spare", "acme"), **REPORTED), setup)
    assert "upstream spare may not send it: the From address who@ever.example" in held(result)


@pytest.mark.parametrize(
    ("routes", "sent"),
    [
        ([{"name": "acme", "sender": "acme.example", "recipient": "example.org", "upstream": "acme"}], True),
        ([{"name": "null", "sender": "<>", "reject": "no"}, {"name": "acme", "sender": "acme.example", "upstream": "acme"}], True),
        ([{"name": "acme", "sender": "globex.example", "recipient": "example.org", "upstream": "acme"}], False),
        ([{"name": "acme", "sender": "acme.example", "reject": "no"}], False),
    ],
)
async def test_a_bounce_of_ours_is_held_only_where_its_sender_is_served_no_more(
    bench: Bench, routes: list[dict[str, Any]], sent: bool
) -> None:  # fmt: skip
    result = await bench.send(claim_of("app@acme.example", **REPORTED), config_of(routes))
    assert (result.moved is None) == sent
    assert sent or "no route takes its sender" in held(result) or "now rejects it: no" in held(result)


async def test_a_bounce_of_ours_reaches_a_sender_who_also_gets_the_hidden_copies(bench: Bench) -> None:
    result = await bench.send(claim_of("app@acme.example", **REPORTED), rewriting({"bcc": "app@acme.example"}))
    assert dict(result.outcomes) == {"app@acme.example": SENT}


async def test_an_apps_own_null_sender_has_no_such_ways_around_a_route(bench: Bench) -> None:
    route = {"name": "acme", "sender": "acme.example", "recipient": "example.org", "upstream": "acme"}
    result = await bench.send(claim_of("app@acme.example", **{**REPORTED, "prefix": PREFIX}), config_of([route]))
    assert "no route takes its sender any more" in held(result)


@pytest.mark.parametrize(
    ("claim", "eight_bit", "smtputf8"),
    [
        (claim_of(content=CONTENT + "ü\r\n".encode()), True, False),
        (claim_of("bücher@example.org"), False, True),
        (claim_of(sender="jürgen@acme.example"), False, True),
    ],
)
async def test_the_message_says_what_it_needs(bench: Bench, claim: Claim, eight_bit: bool, smtputf8: bool) -> None:
    await bench.send(claim)
    message = bench.pool.handed[0].message
    assert (message.eight_bit, message.smtputf8) == (eight_bit, smtputf8)


@pytest.mark.parametrize(("declared", "subject", "expected"), [(True, "ü", True), (True, "u", False), (False, "ü", False)])
async def test_smtputf8_is_wished_for_a_header_whose_client_declared_it(bench: Bench, declared: bool, subject: str, expected: bool) -> None:
    claim = claim_of(content=f"Subject: {subject}\r\n\r\n".encode())
    await bench.send(claim._replace(envelope=claim.envelope._replace(smtputf8=declared)))
    message = bench.pool.handed[0].message
    assert (message.utf8_header, message.smtputf8) == (expected, False)


async def test_a_rewrite_with_a_dot_line_is_seen(bench: Bench) -> None:
    plain = Content(len(CONTENT), CONTENT, dotted=False)
    await bench.send(claim_of(content=plain))
    assert not bench.pool.handed[0].message.dotted
    await bench.send(claim_of(content=plain._replace(dotted=True)))
    assert bench.pool.handed[0].message.dotted


# -- where it goes ---------------------------------------------------------------------------------------------------------


async def test_fresh_mail_goes_where_it_was_just_routed(bench: Bench) -> None:
    result = await bench.send(claim_of(lane=Lane("globex", "globex")), fresh=True)
    assert result == Result({"you@example.org": SENT}, None, CONTENT[: CONTENT.index(b"\r\n\r\n") + 2])


@pytest.mark.parametrize("upstream", ["acme", "spare", "house"])
async def test_queued_mail_stays_at_any_upstream_of_its_route(bench: Bench, upstream: str) -> None:
    await bench.send(claim_of(lane=Lane(upstream, "acme")))
    assert [handed.upstream for handed in bench.pool.handed] == [upstream]


@pytest.mark.parametrize(
    ("lane", "goes_to"),
    [
        (Lane("globex", "globex"), Lane("acme", "acme")),
        (Lane("acme", "an-older-name"), Lane("acme", "acme")),
        (Lane("house", "an-older-name"), Lane("house", "acme")),
        (Lane("globex", "acme"), Lane("acme", "acme")),
        (Lane("no-such-upstream", "acme"), Lane("acme", "acme")),
        (Lane("no-such-upstream", "no-such-route"), Lane("acme", "acme")),
    ],
)
async def test_queued_mail_of_another_route_moves_there_uncounted_and_untried(bench: Bench, lane: Lane, goes_to: Lane) -> None:
    result = await bench.send(claim_of(lane=lane))
    assert result.moved == Next(bench.clock.now(), goes_to, counted=False)
    assert not bench.pool.handed
    assert all(o.status is Status.DEFERRED and not o.in_doubt for o in result.outcomes.values())


@pytest.mark.parametrize(
    ("claim", "routes", "reason"),
    [
        (claim_of(sender="who@unknown.example"), None, "no route takes its sender any more"),
        (claim_of(), [{"name": "acme", "sender": "acme.example", "reject": "not ours"}], "route acme now rejects it: not ours"),
        (
            claim_of("a@partner.example", "b@example.org"),
            [{"name": "partner", "recipient": "partner.example", "upstream": "house"}, {"name": "acme", "upstream": "acme"}],
            "its recipients now take different routes",
        ),
    ],
)
async def test_queued_mail_that_has_no_route_of_its_own_any_more_is_held(
    bench: Bench, claim: Claim, routes: list[dict[str, Any]] | None, reason: str
) -> None:
    result = await bench.send(claim, config_of(routes))
    assert held(result) == reason
    assert result.moved is not None
    assert (result.moved.lane, result.moved.when) == (claim.lane, claim.created + 4 * 86_400)
    assert not bench.pool.handed


WITH_ARCHIVE: list[dict[str, Any]] = [
    {
        "name": "partner",
        "sender": "acme.example",
        "recipient": "partner.example",
        "upstream": "acme",
        "rewrite": {"bcc": "archive@acme.example"},
        "fallback": [{"upstream": "house", "rewrite": {"bcc": None}}],
    },
    {"name": "rest", "sender": "acme.example", "upstream": "globex"},
]


@pytest.mark.parametrize("upstream", ["acme", "house"])
@pytest.mark.parametrize("recipients", [["a@partner.example", "archive@acme.example"], ["archive@acme.example"]])
async def test_a_hidden_copy_stays_with_the_route_that_made_it(bench: Bench, upstream: str, recipients: list[str]) -> None:
    result = await bench.send(claim_of(*recipients, lane=Lane(upstream, "partner")), config_of(WITH_ARCHIVE))
    assert result.moved is None, result.moved
    assert [(handed.upstream, handed.recipients) for handed in bench.pool.handed] == [(upstream, recipients)]


# -- permission ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rewrite", "reason"),
    [
        ({"from": "boss@globex.example"}, "the From address boss@globex.example is not one of its senders"),
        ({"envelope_sender": "b@globex.example"}, "the envelope sender b@globex.example is not one of its senders"),
        ({"set_headers": {"Sender": "x@globex.example"}}, "the Sender address x@globex.example is not one of its senders"),
    ],
)
async def test_what_the_credential_may_not_send_is_held_however_it_came_about(bench: Bench, rewrite: dict[str, Any], reason: str) -> None:
    setup = rewriting(rewrite, upstreams={"acme": {"senders": ["acme.example"]}})
    assert held(await bench.send(claim_of(), setup)) == f"upstream acme may not send it: {reason}"
    assert held(await bench.send(claim_of(), setup, fresh=True)) == f"upstream acme may not send it: {reason}"
    assert not bench.pool.handed


async def test_a_fallback_is_asked_for_its_own_senders(bench: Bench) -> None:
    senders = {"house": {"senders": ["house.example"]}}
    over = {"from": "no-reply@house.example", "envelope_sender": "bounces@house.example"}
    claim = claim_of(lane=Lane("house", "acme"))
    assert "may not send it" in held(await bench.send(claim, config_of(upstreams=senders)))
    await bench.wire(claim, rewriting(fallback=[{"upstream": "house", "rewrite": over}], upstreams=senders))


# -- transactions ----------------------------------------------------------------------------------------------------------


def names(count: int) -> list[str]:
    return [f"r{number}@example.org" for number in range(count)]


async def test_recipients_beyond_the_limit_go_in_further_transactions(bench: Bench) -> None:
    setup = config_of(upstreams={"acme": {"limits": {"recipients": 3}}})
    result = await bench.send(claim_of(*names(8)), setup)
    assert [handed.recipients for handed in bench.pool.handed] == [names(8)[:3], names(8)[3:6], names(8)[6:]]
    assert dict(result.outcomes) == dict.fromkeys(names(8), SENT)


@pytest.mark.parametrize(("limit", "said", "sizes"), [(3, 2, [2, 2, 2, 1]), (3, 5, [3, 3, 1]), (100, 4, [4, 3])])
async def test_an_upstream_that_tells_its_limit_is_given_no_more(bench: Bench, limit: int, said: int, sizes: list[int]) -> None:
    """RFC 9422."""
    pool = FakePool()
    pool.limits["acme"] = said
    setup = config_of(upstreams={"acme": {"limits": {"recipients": limit}}})
    await bench.send(claim_of(*names(7)), setup, pool=pool)
    assert [len(handed.recipients) for handed in pool.handed] == sizes


@pytest.mark.parametrize("code", [452, 552])
async def test_those_whom_the_upstream_finds_too_many_go_at_once_in_the_next_transaction(bench: Bench, code: int) -> None:
    too_many = outcome_of_reply(Phase.RCPT, Reply(code, "", "too many recipients"))
    result = await bench.send(
        claim_of(*names(7)), answer=lambda _, recipients: [SENT if place < 3 else too_many for place in range(len(recipients))]
    )
    assert [handed.recipients for handed in bench.pool.handed] == [names(7), names(7)[3:6], names(7)[6:]]
    assert dict(result.outcomes) == dict.fromkeys(names(7), SENT)


async def test_a_452_for_everybody_is_what_it_says(bench: Bench) -> None:
    result = await bench.send(claim_of(*names(3)), answer=lambda _, recipients: [TOO_MANY] * len(recipients))
    assert len(bench.pool.handed) == 1
    assert dict(result.outcomes) == dict.fromkeys(names(3), TOO_MANY)


async def test_a_452_that_stays_ends_with_one_transaction_for_each_recipient(bench: Bench) -> None:
    def answer(_: str, recipients: list[str]) -> list[Outcome]:
        return [SENT if address == "r0@example.org" else TOO_MANY for address in recipients]

    result = await bench.send(claim_of(*names(4)), answer=answer)
    assert [handed.recipients for handed in bench.pool.handed] == [names(4), ["r1@example.org"], ["r2@example.org"], ["r3@example.org"]]
    assert dict(result.outcomes) == {"r0@example.org": SENT, **dict.fromkeys(names(4)[1:], TOO_MANY)}


def at_most(count: int) -> Callable[[str, list[str]], Sequence[Outcome]]:
    return lambda _, recipients: [SENT if place < count else TOO_MANY for place in range(len(recipients))]


async def test_how_many_an_upstream_takes_at_once_is_remembered_for_an_hour(bench: Bench) -> None:
    setup = config_of(upstreams={"acme": {"limits": {"recipients": 4}}})
    pool = FakePool(at_most(3))
    attempts = Attempts(setup, Router(setup), pool, bench.log.journal, bench.clock, breakers=bench.breakers)

    async def sizes(seconds: float = 0.0, upstream: str = "acme") -> list[int]:
        bench.clock.advance(seconds)
        pool.handed.clear()
        result = await attempts.send(claim_of(*names(6), lane=Lane(upstream, upstream)), fresh=True)
        assert dict(result.outcomes) == dict.fromkeys(names(6), SENT)
        return [len(handed.recipients) for handed in pool.handed]

    assert await sizes() == [4, 3]
    assert await sizes() == [3, 3]
    assert await sizes(3599) == [3, 3]
    assert await sizes(1) == [4, 3]
    assert await sizes() == [3, 3]


async def test_a_recipient_who_is_deferred_alone_as_well_says_nothing_about_numbers(bench: Bench) -> None:
    setup = config_of()
    pool = FakePool(lambda _, recipients: [TOO_MANY if address == "r2@example.org" else SENT for address in recipients])
    attempts = Attempts(setup, Router(setup), pool, bench.log.journal, bench.clock, breakers=bench.breakers)
    for _ in range(2):
        pool.handed.clear()
        await attempts.send(claim_of(*names(3)), fresh=True)
        assert [handed.recipients for handed in pool.handed] == [names(3), ["r2@example.org"]]


@pytest.mark.parametrize(("code", "enhanced"), [(452, "4.2.2"), (552, "5.2.2")])
async def test_a_full_mailbox_is_not_one_recipient_too_many(bench: Bench, code: int, enhanced: str) -> None:
    full = outcome_of_reply(Phase.RCPT, Reply(code, enhanced, "mailbox full"))
    result = await bench.send(claim_of(*names(2)), answer=lambda _, recipients: [SENT, full])
    assert len(bench.pool.handed) == 1
    assert [result.outcomes[name] for name in names(2)] == [SENT, full]


@pytest.mark.parametrize("fault", [DOWN, CLOSED, LOGIN_REFUSED, FORBIDDEN])
async def test_a_fault_of_the_upstream_ends_the_attempt_for_those_not_yet_tried(bench: Bench, fault: Outcome) -> None:
    setup = config_of(upstreams={"acme": {"limits": {"recipients": 2}}})
    result = await bench.send(claim_of(*names(6)), setup, answer=lambda _, now: [SENT if "r0@" in now[0] else fault] * len(now))
    assert [handed.recipients for handed in bench.pool.handed] == [names(6)[:2], names(6)[2:4]]
    assert dict(result.outcomes) == dict.fromkeys(names(6)[:2], SENT) | dict.fromkeys(names(6)[2:], fault)


async def test_those_not_yet_tried_get_the_fault_of_the_upstream_and_not_a_neighbours_fate(bench: Bench) -> None:
    setup = config_of(upstreams={"acme": {"limits": {"recipients": 3}}})
    result = await bench.send(claim_of(*names(6)), setup, answer=lambda *_: [GREYLISTED, CLOSED, REFUSED])
    assert len(bench.pool.handed) == 1
    assert [result.outcomes[name] for name in names(6)] == [GREYLISTED, CLOSED, REFUSED, CLOSED, CLOSED, CLOSED]


async def test_those_not_yet_tried_are_not_in_doubt(bench: Bench) -> None:
    setup = config_of(upstreams={"acme": {"limits": {"recipients": 2}}})
    result = await bench.send(claim_of(*names(4)), setup, answer=lambda *_: [LOST, LOST])
    assert [result.outcomes[name].in_doubt for name in names(4)] == [True, True, False, False]
    assert all(outcome.status is Status.DEFERRED for outcome in result.outcomes.values())


@pytest.mark.parametrize(
    ("code", "enhanced", "text", "speaks_for_all"),
    [
        (554, "5.7.1", "Relay access denied", False),
        (450, "4.7.1", "Relaying denied", False),
        (550, "5.7.1", "Sender address rejected: not by this recipient", False),
        (530, "5.7.0", "Authentication required", True),
        (421, "4.3.2", "closing", True),
        (450, "4.7.0", "Rate limit exceeded", True),
    ],
)
async def test_what_is_said_to_one_recipient_speaks_for_the_others_only_where_it_is_about_the_session(
    bench: Bench, code: int, enhanced: str, text: str, speaks_for_all: bool
) -> None:  # fmt: skip
    odd = outcome_of_reply(Phase.RCPT, Reply(code, enhanced, text))
    assert odd.scope in (Scope.UPSTREAM, Scope.CREDENTIAL)
    setup = config_of(upstreams={"acme": {"limits": {"recipients": 1}}})
    result = await bench.send(claim_of(*names(3)), setup, answer=lambda _, now: [odd if "r0@" in now[0] else SENT])
    assert [result.outcomes[name] for name in names(3)] == ([odd] * 3 if speaks_for_all else [odd, SENT, SENT])


@pytest.mark.parametrize("outcome", [REFUSED, GREYLISTED, outcome_of_reply(Phase.FINAL, Reply(554, "5.6.0", "no"))])
async def test_a_fate_of_recipient_or_message_says_nothing_about_those_not_yet_tried(bench: Bench, outcome: Outcome) -> None:
    assert outcome.scope in (Scope.RECIPIENT, Scope.MESSAGE)
    setup = config_of(upstreams={"acme": {"limits": {"recipients": 1}}})
    result = await bench.send(claim_of(*names(3)), setup, answer=lambda _, now: [SENT if "r2@" in now[0] else outcome])
    assert [result.outcomes[name] for name in names(3)] == [outcome, outcome, SENT]


# -- what goes wrong here --------------------------------------------------------------------------------------------------


async def test_content_that_cannot_be_read_is_held(bench: Bench, tmp_path: Path) -> None:
    gone = Content(10, None, tmp_path / "gone")
    result = await bench.send(claim_of(content=gone))
    assert held(result) == "its content cannot be read: No such file or directory"
    assert result.moved is not None
    assert result.moved.when == math.inf, "it does not bounce by itself: a person may find the file again"


@pytest.mark.parametrize("number", [errno.EMFILE, errno.ENFILE, errno.ENOMEM])
async def test_content_that_cannot_be_read_for_lack_of_something_else_is_tried_again(
    bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:  # fmt: skip
    def lacking(*_: object) -> bytes:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(module, "_read_head", lacking)
    result = await bench.send(claim_of(content=Content(10, None, tmp_path / "there")))
    assert result.moved is None
    (outcome,) = result.outcomes.values()
    assert (outcome.status, outcome.in_doubt, outcome.fallback) == (Status.DEFERRED, False, False)
    assert str(outcome.reply) == f"its content cannot be read now: {os.strerror(number)}"
    assert [event["id"] for event in bench.log.events("fault")] == ["00000000000A1"]


async def test_content_that_cannot_be_read_to_its_end_is_not_in_doubt_as_its_final_dot_was_not_sent(
    bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    path, octets = tmp_path / "content", CONTENT + b"x" * 1_500_000
    path.write_bytes(octets)
    real = module._read_slice

    def fails(path: Any, place: int, length: int) -> bytes:
        if place:
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
        return real(path, place, length)

    monkeypatch.setattr(module, "_read_slice", fails)
    result = await bench.send(claim_of(content=Content(len(octets), None, path)))
    (outcome,) = result.outcomes.values()
    assert (outcome.status, outcome.scope, outcome.in_doubt) == (Status.DEFERRED, Scope.MESSAGE, False)
    assert "cannot be read now" in str(outcome.reply)


async def test_without_a_thread_to_read_with_nothing_was_sent_and_nothing_is_in_doubt(bench: Bench, tmp_path: Path) -> None:
    class Starved(ThreadPoolExecutor):
        def submit(self, *arguments: Any, **options: Any) -> Any:
            raise RuntimeError("can't start new thread")

    asyncio.get_running_loop().set_default_executor(Starved(1))
    result = await bench.send(claim_of(content=Content(10, None, tmp_path / "there")))
    (outcome,) = result.outcomes.values()
    assert (outcome.status, outcome.in_doubt, outcome.fallback) == (Status.DEFERRED, False, False)
    assert str(outcome.reply) == f"its content cannot be read now: {os.strerror(errno.EAGAIN)}"
    assert [event["id"] for event in bench.log.events("fault")] == ["00000000000A1"]


async def test_held_mail_expires_when_its_route_says_so(bench: Bench) -> None:
    routes = [{"name": "acme", "sender": "acme.example", "reject": "no"}]
    patient = [{"name": "acme", "sender": "acme.example", "upstream": "acme", "retry": {"expire": "9d"}}]
    result = await bench.send(claim_of(), config_of(routes, retry={"expire": "2d"}))
    assert result.moved is not None
    assert result.moved.when == claim_of().created + 2 * 86_400
    setup = config_of(patient, upstreams={"acme": {"senders": ["globex.example"]}})
    result = await bench.send(claim_of(), setup)
    assert result.moved is not None
    assert result.moved.when == claim_of().created + 9 * 86_400
    assert not bench.pool.handed


async def test_an_unexpected_error_is_told_and_leaves_everybody_in_doubt(bench: Bench) -> None:
    def explode(*_: object) -> list[Outcome]:
        raise RuntimeError("a fault of ours")

    result = await bench.send(claim_of(*names(2)), answer=explode)
    assert [(o.status, o.phase, o.in_doubt) for o in result.outcomes.values()] == [(Status.DEFERRED, Phase.FINAL, True)] * 2
    assert list(result.outcomes) == names(2)
    (event,) = bench.log.events("fault")
    assert (event["level"], event["id"]) == ("error", "00000000000A1")
    assert "RuntimeError: a fault of ours" in event["traceback"]


async def test_who_was_served_before_an_unexpected_error_stays_served(bench: Bench) -> None:
    def answer(_: str, recipients: list[str]) -> list[Outcome]:
        if recipients[0] == "r4@example.org":
            raise RuntimeError("a fault of ours")
        return [SENT, REFUSED]

    setup = config_of(upstreams={"acme": {"limits": {"recipients": 2}}})
    result = await bench.send(claim_of(*names(6)), setup, answer=answer)
    assert [result.outcomes[name] for name in names(4)] == [SENT, REFUSED, SENT, REFUSED]
    assert [(o.status, o.in_doubt) for o in list(result.outcomes.values())[4:]] == [(Status.DEFERRED, True)] * 2


async def test_who_was_to_be_tried_again_when_the_error_came_is_in_doubt(bench: Bench) -> None:
    def answer(_: str, recipients: list[str]) -> list[Outcome]:
        if len(recipients) < 3:
            raise RuntimeError("a fault of ours")
        return [SENT, SENT, TOO_MANY]

    result = await bench.send(claim_of(*names(3)), answer=answer)
    assert [(o.status, o.in_doubt) for o in result.outcomes.values()] == [(Status.SENT, False)] * 2 + [(Status.DEFERRED, True)]


@pytest.mark.parametrize("lost", [1, 100, 2 * MEBIBYTE, 3 * MEBIBYTE])
async def test_a_file_that_has_lost_its_end_is_held_and_never_sent_short(bench: Bench, tmp_path: Path, lost: int) -> None:
    path, size = tmp_path / "content", len(CONTENT) + 3 * MEBIBYTE
    path.write_bytes((CONTENT + b"x" * 3 * MEBIBYTE)[: size - lost])
    result = await bench.send(claim_of(content=Content(size, None, path)))
    assert held(result) == f"its content cannot be read: the file has {size - lost} octets instead of {size}"
    assert not bench.pool.handed


async def test_a_file_that_loses_its_end_while_it_is_sent_is_an_error_and_never_a_short_message(bench: Bench, tmp_path: Path) -> None:
    class Thief(FakePool):
        async def send(self, name: str, message: Outgoing) -> list[Outcome]:
            os.truncate(path, 2 * MEBIBYTE)
            return await super().send(name, message)

    path = tmp_path / "content"
    path.write_bytes(CONTENT + b"x" * 3 * MEBIBYTE)
    result = await bench.send(claim_of(content=Content(len(CONTENT) + 3 * MEBIBYTE, None, path)), pool=Thief())
    assert result.outcomes["you@example.org"].status is Status.DEFERRED
    assert not bench.pool.handed
    assert "shorter than it was" in bench.log.text()


# -- breakers --------------------------------------------------------------------------------------------------------------


async def test_an_upstream_whose_breaker_is_open_is_not_touched_and_says_why(bench: Bench) -> None:
    for number in range(3):
        await bench.send(claim_of(id=f"0{number}"), answer=lambda *_: [DOWN])
    result = await bench.send(claim_of(*names(2)))
    assert not bench.pool.handed
    assert not result.tried
    assert result.moved is None
    assert list(result.outcomes) == names(2)
    assert {str(outcome.reply).partition(" since")[0] for outcome in result.outcomes.values()} == {"not tried: acme has failed"}
    assert all(o.status is Status.DEFERRED and o.fallback and not o.in_doubt for o in result.outcomes.values())


async def test_what_an_attempt_comes_to_opens_and_closes_the_breaker(bench: Bench) -> None:
    for number in range(3):
        assert (await bench.send(claim_of(id=f"0{number}"), answer=lambda *_: [DOWN])).tried
    bench.clock.advance(30)
    result = await bench.send(claim_of())
    assert (result.tried, result.revived) == (True, False)
    assert len(bench.pool.handed) == 1
    assert bench.breakers.troubles() == []


async def test_an_upstream_that_comes_back_after_long_is_said_to_be_revived(bench: Bench) -> None:
    await bench.send(claim_of(), answer=lambda *_: [LOGIN_REFUSED])
    bench.clock.advance(15 * 60)
    assert (await bench.send(claim_of())).revived


@pytest.mark.parametrize("trouble", ["error", "gone"])
async def test_an_attempt_that_found_out_nothing_lets_another_message_try(bench: Bench, tmp_path: Path, trouble: str) -> None:
    def explode(*_: object) -> list[Outcome]:
        raise RuntimeError("a fault of ours")

    for number in range(3):
        await bench.send(claim_of(id=f"0{number}"), answer=lambda *_: [DOWN])
    bench.clock.advance(30)
    if trouble == "error":
        await bench.send(claim_of(id="0A"), answer=explode)
    else:
        await bench.send(claim_of(id="0A", content=Content(1, None, tmp_path / "gone")))
    assert (await bench.send(claim_of(id="0B"))).tried


async def test_queued_mail_of_another_route_moves_though_its_upstream_is_closed(bench: Bench) -> None:
    await bench.send(claim_of(lane=Lane("globex", "globex"), sender="x@globex.example"), answer=lambda *_: [LOGIN_REFUSED])
    result = await bench.send(claim_of(lane=Lane("globex", "globex")))
    assert result.moved == Next(bench.clock.now(), Lane("acme", "acme"), counted=False)
