"""What every spool promises, held against each of them: custody, claims, settles, leases. Time stands still unless a test moves it."""

import asyncio
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

from relay.clock import ManualClock
from relay.mail.envelope import Envelope, Origin, Recipient, Summary
from relay.spool.base import (
    EVERYTHING,
    FILE_ABOVE_BYTES,
    Claim,
    Content,
    Draft,
    Lane,
    LeaseLost,
    Next,
    Selection,
    Spool,
    SpoolError,
    Used,
)
from relay.spool.memory import MemorySpool
from relay.spool.sqlite import SqliteSpool
from tests.contract.drafts import DEFERRED, FAILED, IN_DOUBT, LANE, OTHER_LANE, SENT, content_of, draft, octets_of, settlement, stored_files
from tests.support.eventually import eventually

BACKOFF_SECONDS = 60.0
LEASE_SECONDS = 15 * 60.0
MEBIBYTE = 1024 * 1024


class UnsteadyClock(ManualClock):
    """One whose wall time somebody sets, forward or back."""

    def set_forward(self, seconds: float) -> None:
        self._now += seconds


@dataclass
class House:
    """A spool, its clock and its directory, and the words that most tests use."""

    spool: Spool
    clock: UnsteadyClock
    directory: Path

    async def put(self, *drafts: Draft) -> None:
        await self.spool.put(drafts, [False] * len(drafts))

    async def put_claimed(self, message: Draft) -> Claim:
        (claim,) = await self.spool.put([message], [True])
        assert claim is not None
        return claim

    async def claim(self, limit: int = 100, *, lane: Lane = LANE) -> list[Claim]:
        return list(await self.spool.claim(lane, limit))

    async def claim_one(self, *, lane: Lane = LANE) -> Claim:
        (claim,) = await self.spool.claim(lane, 100)
        return claim

    async def arriving(self, *chunks: bytes) -> Content:
        writer = self.spool.writer()
        for chunk in chunks:
            await writer.write(chunk)
        return await writer.finish()

    def later(self, seconds: float, lane: Lane = LANE, *, counted: bool = True, held: str = "") -> Next:
        return Next(self.clock.now() + seconds, lane, counted, held)

    @property
    def files(self) -> list[str]:
        return stored_files(self.directory)

    async def no_file_stays(self) -> None:
        await eventually(lambda: self.files == [], "files that nobody needs to be gone")


@pytest.fixture(params=["memory", "sqlite"])
async def house(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[House]:
    clock = UnsteadyClock()
    spool: MemorySpool | SqliteSpool

    def backoff(attempts: int) -> float:
        return BACKOFF_SECONDS * attempts

    if request.param == "memory":
        spool = MemorySpool(tmp_path, clock, backoff=backoff)
    else:
        spool = SqliteSpool(tmp_path, clock, backoff=backoff, keep_log_seconds=86_400.0)
    yield House(spool, clock, tmp_path)
    await spool.close()


# -- custody --------------------------------------------------------------------------------------------------------------


async def test_what_was_put_comes_back_whole(house: House) -> None:
    recipients = (
        Recipient("you@example.org"),
        Recipient("grün@exämple.org", notify="SUCCESS,FAILURE", orcpt="utf-8;grün@exämple.org"),
        Recipient("[odd]@example.org", in_doubt=True),
        Recipient('"a b"@[IPv6:2001:db8::1]', notify="NEVER"),
    )
    envelope = Envelope("müller@acme.example", recipients, smtputf8=True, ret="HDRS", envid="x+2By")
    origin = Origin("local", "2001:db8::7", "erp", "S123", "billing@acme.example")
    summary = Summary("you, and others", "c@example.org", "Grüße \u2014 \U0001f4e7")
    content = Content(7, b"\xc3\xbc\r\n\x00\r\n", eight_bit=True, dotted=True)
    message = draft(
        house.spool, envelope=envelope, content=content, created=1_799_999_999.25, prefix=b"Received: from \xff\r\n", origin=origin,
        summary=summary,
    )  # fmt: skip
    await house.put(message)
    claim = await house.claim_one()
    assert claim.id == message.id
    assert (claim.lane, claim.envelope, claim.origin, claim.summary) == (LANE, envelope, origin, summary)
    assert (claim.created, claim.prefix, claim.attempt) == (message.created, message.prefix, 1)
    assert (claim.content.size, claim.content.eight_bit, claim.content.dotted) == (7, True, True)
    assert octets_of(claim.content) == content.octets
    assert claim.lease_until == house.clock.now() + LEASE_SECONDS


@pytest.mark.parametrize(("eight_bit", "dotted"), [(False, False), (True, False), (False, True)])
async def test_what_is_known_about_the_content_comes_back(house: House, eight_bit: bool, dotted: bool) -> None:
    await house.put(draft(house.spool, content=Content(2, b"\r\n", eight_bit=eight_bit, dotted=dotted)))
    content = (await house.claim_one()).content
    assert (content.eight_bit, content.dotted) == (eight_bit, dotted)


async def test_a_null_sender_stays_null(house: House) -> None:
    await house.put(draft(house.spool, sender=""))
    assert (await house.claim_one()).envelope.sender == ""


async def test_a_message_put_claimed_is_the_same_as_one_claimed_later(house: House) -> None:
    facts = {"origin": Origin("local", "127.0.0.1", "", "S1", "a@b.example"), "summary": Summary("t", "c", "s"), "prefix": b"P: 1\r\n"}
    first = await house.put_claimed(draft(house.spool, **facts))  # type: ignore[arg-type]
    await house.put(draft(house.spool, **facts))  # type: ignore[arg-type]
    second = await house.claim_one()
    assert first.token != second.token
    assert first._replace(id=second.id, token=second.token, content=second.content) == second
    assert octets_of(first.content) == octets_of(second.content)


async def test_a_message_put_claimed_is_nobody_elses(house: House) -> None:
    await house.put_claimed(draft(house.spool))
    assert await house.claim() == []
    assert await house.spool.next_due() == {}


async def test_of_drafts_put_together_each_is_claimed_or_not_as_was_said(house: House) -> None:
    drafts = [draft(house.spool), draft(house.spool, lane=OTHER_LANE), draft(house.spool)]
    claims = await house.spool.put(drafts, [True, False, False])
    assert [claim is not None for claim in claims] == [True, False, False]
    assert [claim.id for claim in await house.claim()] == [drafts[2].id]
    assert [claim.id for claim in await house.claim(lane=OTHER_LANE)] == [drafts[1].id]


@pytest.mark.parametrize("large", [False, True])
async def test_of_drafts_of_which_one_cannot_be_taken_none_is_taken(house: House, large: bool) -> None:
    known = draft(house.spool)
    await house.put(known)
    (first,) = await house.claim()
    content = await house.arriving(b"x" * 2 * MEBIBYTE) if large else b"x"
    with pytest.raises(SpoolError):
        await house.spool.put([draft(house.spool, content=content), draft(house.spool)._replace(id=known.id)], [True, False])
    assert await house.claim() == []
    assert await house.spool.next_due() == {}
    await house.spool.settle(settlement(first))  # and the first one is as it was
    await house.put(draft(house.spool))
    assert len(await house.claim()) == 1


async def test_ids_rise_and_are_never_the_same(house: House) -> None:
    ids = [house.spool.new_id() for _ in range(200)]
    house.clock.advance(5)
    ids += [house.spool.new_id() for _ in range(200)]
    house.clock.advance(-3600)  # somebody sets the clock back
    ids += [house.spool.new_id() for _ in range(200)]
    assert ids == sorted(set(ids))
    assert all(len(each) >= 13 and int(each, 16) for each in ids)


# -- content --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [0, 1, FILE_ABOVE_BYTES, FILE_ABOVE_BYTES + 1, MEBIBYTE])
async def test_content_of_any_size_comes_back(house: House, size: int) -> None:
    octets = bytes(range(256)) * (size // 256) + b"z" * (size % 256)
    for claimed in (True, False):
        (claim,) = await house.spool.put([draft(house.spool, content=octets)], [claimed])
        claim = claim or await house.claim_one()
        assert claim.content.size == size
        assert octets_of(claim.content) == octets
        await house.spool.settle(settlement(claim))
    await house.no_file_stays()


async def test_content_that_arrives_in_pieces_comes_back(house: House) -> None:
    pieces = [bytes([number]) * 300_000 for number in range(5)]
    content = await house.arriving(*pieces)
    assert (content.size, content.octets, content.eight_bit) == (1_500_000, None, False)
    await house.put(draft(house.spool, content=content))
    claim = await house.claim_one()
    assert octets_of(claim.content) == b"".join(pieces)
    await house.spool.settle(settlement(claim))
    await house.no_file_stays()


async def test_a_writer_says_whether_there_was_an_octet_above_127(house: House) -> None:
    content = await house.arriving(b"a" * 100, b"\x80", b"b")
    assert content.eight_bit
    assert octets_of(content) == b"a" * 100 + b"\x80b"


async def test_a_writer_of_nothing_gives_empty_content(house: House) -> None:
    await house.put(draft(house.spool, content=await house.arriving()))
    assert octets_of((await house.claim_one()).content) == b""


@pytest.mark.parametrize("finished", [False, True])
async def test_discarded_content_leaves_nothing(house: House, finished: bool) -> None:
    writer = house.spool.writer()
    await writer.write(b"x" * MEBIBYTE)
    assert len(house.files) == 1
    if finished:
        await writer.finish()
    writer.discard()
    await house.no_file_stays()


async def test_a_writer_that_is_discarded_while_it_writes_leaves_nothing_and_hurts_nobody(house: House) -> None:
    writer, other = house.spool.writer(), house.spool.writer()
    writing = asyncio.create_task(writer.write(b"x" * 32 * MEBIBYTE))
    await asyncio.sleep(0)
    writing.cancel()
    writer.discard()
    for _ in range(20):
        await other.write(b"y" * 1000)
    with pytest.raises(asyncio.CancelledError):
        await writing
    content = await other.finish()
    assert octets_of(content) == b"y" * 20_000
    await eventually(lambda: len(house.files) == 1, "the discarded file to be gone")


@pytest.mark.parametrize("large", [False, True])
async def test_a_split_messages_content_stays_until_its_last_part_is_settled(house: House, large: bool) -> None:
    content = await house.arriving(b"split" * 300_000) if large else content_of(b"split")
    octets = octets_of(content)
    parts = [draft(house.spool, content=content, lane=lane) for lane in (LANE, OTHER_LANE, LANE)]
    claims = await house.spool.put(parts, [True, False, False])
    assert claims[0] is not None
    assert octets_of(claims[0].content) == octets
    await house.spool.settle(settlement(claims[0]))
    (second,) = await house.claim(lane=OTHER_LANE)
    assert octets_of(second.content) == octets
    await house.spool.settle(settlement(second, DEFERRED, then=house.later(0, OTHER_LANE)))
    (second,) = await house.claim(lane=OTHER_LANE)
    await house.spool.settle(settlement(second, FAILED))
    assert len(house.files) == (1 if large else 0)
    (third,) = await house.claim()
    assert octets_of(third.content) == octets
    await house.spool.settle(settlement(third))
    await house.no_file_stays()


async def test_the_parts_of_a_split_message_settled_at_once_leave_no_content(house: House) -> None:
    content = await house.arriving(b"split" * 300_000)
    claims = await house.spool.put([draft(house.spool, content=content) for _ in range(3)], [True] * 3)
    await asyncio.gather(*(house.spool.settle(settlement(claim)) for claim in claims if claim))
    await house.no_file_stays()


async def test_content_stays_while_one_recipient_waits(house: House) -> None:
    content = await house.arriving(b"x" * MEBIBYTE)
    claim = await house.put_claimed(draft(house.spool, content=content, recipients=["a@x.example", "b@x.example"]))
    await house.spool.settle(settlement(claim, {"a@x.example": SENT, "b@x.example": DEFERRED}, then=house.later(0)))
    claim = await house.claim_one()
    assert len(octets_of(claim.content)) == MEBIBYTE
    await house.spool.settle(settlement(claim))
    await house.no_file_stays()


# -- claims ---------------------------------------------------------------------------------------------------------------


async def test_a_message_is_claimed_once(house: House) -> None:
    await house.put(draft(house.spool))
    assert len(await house.claim()) == 1
    assert await house.claim() == []


async def test_claims_made_at_the_same_time_never_share_a_message(house: House) -> None:
    await house.put(*(draft(house.spool) for _ in range(20)))
    found = await asyncio.gather(*(house.claim(7) for _ in range(4)))
    ids = [claim.id for claims in found for claim in claims]
    assert sorted(map(len, found)) == [0, 6, 7, 7]
    assert len(set(ids)) == 20
    assert len({claim.token for claims in found for claim in claims}) == 20


async def test_a_claim_takes_its_lane_alone(house: House) -> None:
    lanes = [LANE, OTHER_LANE, Lane("acme", "other-route"), Lane("", "")]
    drafts = [draft(house.spool, lane=lane) for lane in lanes]
    await house.put(*drafts)
    for lane, message in zip(lanes, drafts, strict=True):
        assert [claim.id for claim in await house.claim(lane=lane)] == [message.id]
        assert await house.claim(lane=lane) == []
    assert await house.claim(lane=Lane("nobody", "nowhere")) == []


async def test_what_is_not_due_yet_is_not_claimed(house: House) -> None:
    now = house.clock.now()
    await house.put(draft(house.spool, due=now + 10), draft(house.spool, due=now + 20))
    assert await house.claim() == []
    house.clock.advance(9.5)
    assert await house.claim() == []
    house.clock.advance(0.5)
    assert len(await house.claim()) == 1
    house.clock.advance(100)
    assert len(await house.claim()) == 1


async def test_the_longest_due_is_claimed_first_and_no_more_than_asked_for(house: House) -> None:
    now = house.clock.now()
    drafts = [draft(house.spool, due=now - age) for age in (5, 50, 1, 500, 10)]
    await house.put(*drafts)
    expected = [drafts[place].id for place in (3, 1, 4, 0, 2)]
    assert [claim.id for claim in await house.claim(2)] == expected[:2]
    assert [claim.id for claim in await house.claim(2)] == expected[2:4]
    assert [claim.id for claim in await house.claim(2)] == expected[4:]


async def put_fresh_and_retried(house: House, count: int) -> tuple[set[str], set[str]]:
    retried = [draft(house.spool) for _ in range(count)]
    await house.put(*retried)
    for claim in await house.claim():
        await house.spool.settle(settlement(claim, DEFERRED, then=house.later(-1000)))
    fresh = [draft(house.spool, due=house.clock.now()) for _ in range(count)]
    await house.put(*fresh)
    return {message.id for message in fresh}, {message.id for message in retried}


def kinds(claims: Sequence[Claim], retried: set[str]) -> str:
    return "".join("r" if claim.id in retried else "f" for claim in claims)


async def test_fresh_and_retried_mail_take_turns(house: House) -> None:
    _, retried = await put_fresh_and_retried(house, 4)
    assert kinds(await house.claim(6), retried) in ("frfrfr", "rfrfrf")


async def test_fresh_and_retried_mail_take_turns_one_at_a_time(house: House) -> None:
    _, retried = await put_fresh_and_retried(house, 4)
    seen = "".join([kinds(await house.claim(1), retried) for _ in range(6)])
    assert seen in ("frfrfr", "rfrfrf")


async def test_each_lane_has_turns_of_its_own(house: House) -> None:
    """Where two lanes are claimed from in turn, each would get but one kind if they shared them."""
    _, retried = await put_fresh_and_retried(house, 4)
    await house.put(*(draft(house.spool, lane=OTHER_LANE, due=house.clock.now()) for _ in range(4)))
    seen = ""
    for _ in range(4):
        seen += kinds(await house.claim(1), retried)
        assert len(await house.claim(1, lane=OTHER_LANE)) == 1
    assert seen in ("frfr", "rfrf")


async def test_where_one_kind_runs_out_the_other_has_the_rest(house: House) -> None:
    _, retried = await put_fresh_and_retried(house, 2)
    await house.put(*(draft(house.spool, due=house.clock.now()) for _ in range(4)))
    claims = kinds(await house.claim(100), retried)
    assert sorted(claims) == sorted("rrffffff")
    assert claims.endswith("ffff")


async def test_an_attempt_counts_from_one_and_is_written_with_its_next_time(house: House) -> None:
    await house.put(draft(house.spool))
    for attempt in (1, 2, 3):
        claim = await house.claim_one()
        assert claim.attempt == attempt
        house.clock.advance(LEASE_SECONDS)  # nobody settles it
        assert await house.spool.next_due() == {LANE: house.clock.now() - LEASE_SECONDS + BACKOFF_SECONDS * attempt}


# -- settles --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("outcome", [SENT, FAILED])
async def test_a_message_with_nobody_left_is_gone(house: House, outcome: object) -> None:
    await house.put(draft(house.spool, recipients=["a@x.example", "b@x.example"]))
    claim = await house.claim_one()
    await house.spool.settle(settlement(claim, outcome))  # type: ignore[arg-type]
    house.clock.advance(10 * LEASE_SECONDS)
    assert await house.spool.next_due() == {}
    assert await house.claim() == []


async def test_only_the_deferred_recipients_are_tried_again_with_what_is_known_of_them(house: House) -> None:
    recipients = [
        Recipient("sent@x.example"),
        Recipient("deferred@x.example", notify="FAILURE", orcpt="rfc822;d@x.example"),
        Recipient("failed@x.example"),
        Recipient("doubt@x.example"),
    ]
    await house.put(draft(house.spool, recipients=recipients))
    claim = await house.claim_one()
    outcomes = {"sent@x.example": SENT, "deferred@x.example": DEFERRED, "failed@x.example": FAILED, "doubt@x.example": IN_DOUBT}
    bounce = draft(house.spool, sender="", recipients=["app@acme.example"], content=b"report")
    await house.spool.settle(settlement(claim, outcomes, then=house.later(30), bounce=bounce))
    (only,) = await house.claim()
    assert (only.id, only.envelope.sender, octets_of(only.content)) == (bounce.id, "", b"report")
    house.clock.advance(30)
    (again,) = await house.claim()
    assert (again.id, again.attempt) == (claim.id, 2)
    assert again.envelope.recipients == (recipients[1], recipients[3]._replace(in_doubt=True))


async def test_a_doubt_once_raised_stays(house: House) -> None:
    await house.put(draft(house.spool))
    await house.spool.settle(settlement(await house.claim_one(), IN_DOUBT, then=house.later(0)))
    await house.spool.settle(settlement(await house.claim_one(), DEFERRED, then=house.later(0)))
    assert [r.in_doubt for r in (await house.claim_one()).envelope.recipients] == [True]


async def test_a_bounce_is_a_message_of_its_own_in_its_own_lane(house: House) -> None:
    claim = await house.put_claimed(draft(house.spool))
    bounce = draft(house.spool, sender="", lane=OTHER_LANE, recipients=["app@acme.example"], due=house.clock.now() + 5)
    await house.spool.settle(settlement(claim, FAILED, bounce=bounce))
    assert await house.spool.next_due() == {OTHER_LANE: bounce.due}
    house.clock.advance(5)
    assert (await house.claim_one(lane=OTHER_LANE)).id == bounce.id


async def test_a_settle_moves_a_message_to_another_lane(house: House) -> None:
    claim = await house.put_claimed(draft(house.spool))
    await house.spool.settle(settlement(claim, DEFERRED, then=house.later(0, OTHER_LANE, counted=False)))
    assert await house.claim() == []
    moved = await house.claim_one(lane=OTHER_LANE)
    assert (moved.id, moved.lane, moved.attempt) == (claim.id, OTHER_LANE, 1)


async def test_an_attempt_that_does_not_count_is_not_counted(house: House) -> None:
    await house.put(draft(house.spool))
    seen = []
    for counted in (False, True, False, True):
        claim = await house.claim_one()
        seen.append(claim.attempt)
        await house.spool.settle(settlement(claim, DEFERRED, then=house.later(0, counted=counted)))
    assert seen == [1, 1, 2, 2]
    assert (await house.claim_one()).attempt == 3


async def test_held_mail_is_neither_due_nor_claimed(house: House) -> None:
    claim = await house.put_claimed(draft(house.spool))
    await house.spool.settle(settlement(claim, DEFERRED, then=house.later(0, held="no route takes its sender any more")))
    house.clock.advance(10 * LEASE_SECONDS)
    assert await house.spool.next_due() == {}
    assert await house.claim() == []


async def test_a_claim_is_settled_once(house: House) -> None:
    claim = await house.put_claimed(draft(house.spool))
    await house.spool.settle(settlement(claim, DEFERRED, then=house.later(5)))
    with pytest.raises(LeaseLost):
        await house.spool.settle(settlement(claim))
    house.clock.advance(5)
    again = await house.claim_one()
    await house.spool.settle(settlement(again))
    for stale in (claim, again):
        with pytest.raises(LeaseLost):
            await house.spool.settle(settlement(stale))


async def test_of_two_settles_of_one_claim_at_once_one_wins(house: House) -> None:
    claim = await house.put_claimed(draft(house.spool))
    other = await house.put_claimed(draft(house.spool))
    results = await asyncio.gather(
        *(house.spool.settle(settlement(each)) for each in (claim, other, claim)), return_exceptions=True
    )  # fmt: skip
    assert [type(result) for result in results] == [type(None), type(None), LeaseLost]


@pytest.mark.parametrize("outcome", [SENT, FAILED, DEFERRED])
async def test_a_stale_settle_changes_nothing(house: House, outcome: object) -> None:
    stale = await house.put_claimed(draft(house.spool, recipients=["a@x.example", "b@x.example"], content=await house.arriving(b"whole")))
    house.clock.advance(LEASE_SECONDS)
    await house.spool.next_due()
    fresh = await house.claim_one()
    bounce = draft(house.spool, sender="", lane=OTHER_LANE)
    with pytest.raises(LeaseLost):
        await house.spool.settle(settlement(stale, outcome, then=house.later(0, OTHER_LANE), bounce=bounce))  # type: ignore[arg-type]
    assert await house.claim(lane=OTHER_LANE) == []
    assert await house.claim() == []
    assert octets_of(fresh.content) == b"whole"
    await house.spool.settle(settlement(fresh, DEFERRED, then=house.later(0)))
    assert [r.address for r in (await house.claim_one()).envelope.recipients] == ["a@x.example", "b@x.example"]


async def test_a_bounce_that_cannot_be_put_leaves_its_message_as_it_was(house: House) -> None:
    claim = await house.put_claimed(draft(house.spool))
    known = draft(house.spool, lane=OTHER_LANE)
    await house.put(known)
    with pytest.raises(SpoolError):
        await house.spool.settle(settlement(claim, FAILED, bounce=draft(house.spool, sender="")._replace(id=known.id)))
    await house.spool.settle(settlement(claim, FAILED, bounce=draft(house.spool, sender="")))
    assert (await house.claim_one()).envelope.sender == ""


async def test_a_settle_must_account_for_every_recipient(house: House) -> None:
    claim = await house.put_claimed(draft(house.spool, recipients=["a@x.example", "b@x.example"]))
    with pytest.raises(AssertionError, match="accounted for"):
        await house.spool.settle(settlement(claim, {"a@x.example": SENT}))
    await house.spool.settle(settlement(claim))


# -- leases ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("put_claimed", [False, True])
async def test_a_claim_that_expires_may_be_claimed_again_and_its_recipients_are_in_doubt(house: House, put_claimed: bool) -> None:
    recipients = [Recipient("a@x.example"), Recipient("b@x.example", notify="NEVER")]
    message = draft(house.spool, recipients=recipients)
    if put_claimed:
        await house.put_claimed(message)
    else:
        await house.put(message)
        await house.claim_one()
    house.clock.advance(LEASE_SECONDS - 1)
    assert await house.spool.next_due() == {}
    assert await house.claim() == []
    house.clock.advance(1)
    assert list(await house.spool.next_due()) == [LANE]
    again = await house.claim_one()
    assert (again.id, again.attempt) == (message.id, 2)
    assert again.envelope.recipients == tuple(r._replace(in_doubt=True) for r in recipients)


async def test_a_renewed_claim_lives_longer(house: House) -> None:
    claim = await house.put_claimed(draft(house.spool))
    other = await house.put_claimed(draft(house.spool, lane=OTHER_LANE))
    for _ in range(3):
        house.clock.advance(LEASE_SECONDS - 1)
        (claim,) = await house.spool.renew([claim])
        assert claim.lease_until == house.clock.now() + LEASE_SECONDS
        assert list(await house.spool.next_due()) in ([], [OTHER_LANE])
        assert await house.claim() == []
    assert (await house.claim_one(lane=OTHER_LANE)).id == other.id
    await house.spool.settle(settlement(claim))


async def test_what_was_lost_is_missing_from_the_renewed(house: House) -> None:
    kept = await house.put_claimed(draft(house.spool))
    settled = await house.put_claimed(draft(house.spool))
    await house.spool.settle(settlement(settled))
    deferred = await house.put_claimed(draft(house.spool, lane=OTHER_LANE))
    await house.spool.settle(settlement(deferred, DEFERRED, then=house.later(0, OTHER_LANE)))
    assert [claim.id for claim in await house.spool.renew([settled, kept, deferred])] == [kept.id]
    again = await house.claim_one(lane=OTHER_LANE)
    assert [claim.token for claim in await house.spool.renew([deferred, again])] == [again.token]
    house.clock.advance(LEASE_SECONDS)
    assert await house.spool.renew([kept, again]) == []
    assert await house.spool.renew([]) == []


@pytest.mark.parametrize("seconds", [30 * 86_400.0, -30 * 86_400.0])
async def test_a_clock_that_is_set_neither_ends_a_lease_nor_prolongs_it(house: House, seconds: float) -> None:
    put = await house.put_claimed(draft(house.spool))
    await house.put(draft(house.spool))
    claimed = await house.claim_one()
    house.clock.advance(LEASE_SECONDS - 1)
    house.clock.set_forward(seconds)
    assert await house.spool.next_due() == {}
    assert [claim.id for claim in await house.spool.renew([put])] == [put.id]
    house.clock.advance(1)
    assert list(await house.spool.next_due()) == [LANE]
    with pytest.raises(LeaseLost):
        await house.spool.settle(settlement(claimed))
    await house.spool.settle(settlement(put))


async def test_next_due_tells_each_lanes_earliest(house: House) -> None:
    now = house.clock.now()
    assert await house.spool.next_due() == {}
    await house.put(
        draft(house.spool, due=now + 9), draft(house.spool, due=now + 3), draft(house.spool, due=now - 5, lane=OTHER_LANE)
    )  # fmt: skip
    assert await house.spool.next_due() == {LANE: now + 3, OTHER_LANE: now - 5}
    claim = await house.claim_one(lane=OTHER_LANE)
    assert await house.spool.next_due() == {LANE: now + 3}
    await house.spool.settle(settlement(claim, DEFERRED, then=house.later(1)))
    assert await house.spool.next_due() == {LANE: now + 1}


async def test_a_healthy_spool_says_nothing(house: House) -> None:
    assert house.spool.obstacle() is None


# -- quotas, and mail that waits for them ---------------------------------------------------------------------------------


async def test_what_settles_use_of_quotas_adds_up_and_is_known_as_long_as_it_may_count(house: House) -> None:
    start = int(house.clock.now()) // 150 * 150 - 150
    await house.put(*(draft(house.spool) for _ in range(5)))
    first, second, third, *plain = await house.claim()
    hour, day = Used("acme", 3600, start, 1, 20), Used("acme", 86400, start - 300, 1, 20)
    await asyncio.gather(*(house.spool.settle(settlement(claim)._replace(used=(hour, day))) for claim in (first, second)))
    other = Used("house", 3600, start, 3, 0)
    await house.spool.settle(settlement(third, DEFERRED, then=house.later(60))._replace(used=(other, hour._replace(start=start + 150))))
    for claim in plain:
        await house.spool.settle(settlement(claim))
    known = [
        hour._replace(transactions=2, recipients=40), hour._replace(start=start + 150), day._replace(transactions=2, recipients=40), other,
    ]  # fmt: skip
    assert await house.spool.used() == known
    house.clock.advance(start + 2 * 3600 - house.clock.now() - 1)
    assert await house.spool.used() == known
    house.clock.advance(1)
    assert await house.spool.used() == known[1:3]
    house.clock.advance(3 * 86_400)
    assert await house.spool.used() == []


async def test_what_was_used_by_a_clock_that_was_ahead_counts_once_from_now_on(house: House) -> None:
    now = int(house.clock.now())
    await house.put(draft(house.spool), draft(house.spool))
    first, second = await house.claim()
    ahead, further = Used("acme", 3600, now, 1, 20), Used("acme", 3600, now + 150, 2, 30)
    await house.spool.settle(settlement(first)._replace(used=(ahead,)))
    await house.spool.settle(settlement(second)._replace(used=(further,)))
    house.clock.step(-1_000_000)
    moved = [Used("acme", 3600, now - 1_000_000, 3, 50)]
    assert await house.spool.used() == moved
    house.clock.advance(600)
    assert await house.spool.used() == moved, "and not again and again"


async def test_what_a_claim_that_was_lost_has_used_is_not_added(house: House) -> None:
    claim = await house.put_claimed(draft(house.spool))
    house.clock.advance(LEASE_SECONDS + 1)
    await house.spool.next_due()
    with pytest.raises(LeaseLost):
        await house.spool.settle(settlement(claim)._replace(used=(Used("acme", 3600, int(house.clock.now()), 1, 1),)))
    assert await house.spool.used() == []


async def test_what_waits_is_shown_oldest_first_and_page_by_page(house: House) -> None:
    now = house.clock.now()
    await house.put(held := draft(house.spool, created=now, due=now))
    await house.spool.hold(EVERYTHING, "why")
    old = [draft(house.spool, lane=lane, created=now, due=now) for lane in (LANE, OTHER_LANE) * 300]
    await house.put(*old)
    await house.put(later := draft(house.spool, created=now, due=now + 9000))
    under_way = await house.put_claimed(draft(house.spool, created=now, due=now))
    house.clock.advance(1000)
    await house.put(young := draft(house.spool, created=house.clock.now(), due=house.clock.now()))
    found, after, pages = [], "", 0
    while True:
        page, following = await house.spool.oldest(after, now + 500)
        found += page
        pages += 1
        if following is None:
            break
        assert following > after
        after = following
    assert [(each.id, each.lane, each.created) for each in found] == [(each.id, each.lane, now) for each in old]
    assert pages > 1
    (everything, _) = await house.spool.oldest(old[-1].id, house.clock.now())
    assert [each.id for each in everything] == [young.id]
    assert not {held.id, later.id, under_way.id} & {each.id for each in found}


@pytest.mark.parametrize(
    ("sender", "recipients", "unwarned"),
    [
        ("app@acme.example", [Recipient("a@x.example")], True),
        ("app@acme.example", [Recipient("a@x.example", warned=True)], False),
        ("app@acme.example", [Recipient("a@x.example", warned=True), Recipient("b@x.example")], True),
        ("app@acme.example", [Recipient("a@x.example", warned=True), Recipient("b@x.example", notify="NEVER")], False),
        ("app@acme.example", [Recipient("a@x.example", notify="FAILURE")], False),
        ("app@acme.example", [Recipient("a@x.example", notify="FAILURE,DELAY")], True),
        ("", [Recipient("a@x.example")], False),
    ],
)
async def test_what_waits_says_whether_its_sender_may_have_to_hear_of_that(
    house: House, sender: str, recipients: list[Recipient], unwarned: bool
) -> None:
    now = house.clock.now()
    await house.put(draft(house.spool, sender=sender, recipients=recipients, created=now, due=now))
    (waiting,), following = await house.spool.oldest("", now)
    assert waiting.unwarned is unwarned
    assert following is None


async def test_what_waits_is_claimed_by_its_id_for_something_else_than_an_attempt(house: House) -> None:
    now = house.clock.now()
    drafts = [draft(house.spool, created=now, due=now) for _ in range(5)]
    await house.put(*drafts)
    first, second, held, gone, beside = (each.id for each in drafts)
    await house.spool.hold(Selection(ids=frozenset({held})), "why")
    await house.spool.drop(Selection(ids=frozenset({gone})))
    claims = await house.spool.late([first, second, held, gone])
    assert [(claim.id, claim.attempt, claim.token < 0, claim.held) for claim in claims] == [(first, 0, True, ""), (second, 0, True, "")]
    assert await house.spool.late([first, second, held, gone]) == []
    await house.spool.settle(settlement(claims[0], FAILED))
    house.clock.advance(LEASE_SECONDS + 1)
    await house.spool.next_due()
    (again,) = await house.spool.late([first, second])
    assert (again.id, again.attempt) == (second, 0)
    assert not any(r.in_doubt for r in again.envelope.recipients)
    await house.spool.settle(settlement(again, DEFERRED, then=house.later(0, counted=False)))
    assert {(claim.id, claim.attempt) for claim in await house.claim()} == {(second, 1), (beside, 1)}


async def test_what_was_tried_and_put_off_since_it_was_looked_at_is_not_claimed_by_its_id(house: House) -> None:
    now = house.clock.now()
    await house.put(tried := draft(house.spool, created=now, due=now))
    (waiting,), _ = await house.spool.oldest("", now)
    (claim,) = await house.claim()
    await house.spool.settle(settlement(claim, DEFERRED, then=house.later(3600)))
    assert await house.spool.late([waiting.id]) == []
    house.clock.advance(3600)
    assert [claim.id for claim in await house.spool.late([waiting.id])] == [tried.id]


async def test_all_that_waits_in_a_lane_is_made_due_in_steps(house: House) -> None:
    now = house.clock.now()
    fresh = [draft(house.spool, due=now + 100 + number) for number in range(1100)]
    await house.put(*fresh, draft(house.spool, lane=OTHER_LANE, due=now + 100))
    await house.put(held := draft(house.spool, due=now))
    await house.put(retried := draft(house.spool, due=now))
    for claim in await house.claim():
        held_then = house.later(3600, held="why") if claim.id == held.id else house.later(3600)
        await house.spool.settle(settlement(claim, DEFERRED, then=held_then))
    steps = 0
    while await house.spool.hasten(LANE):
        steps += 1
        assert steps < 10
    assert steps >= 1
    assert {claim.id for claim in await house.claim(2000)} == {retried.id, *(each.id for each in fresh)}
    assert await house.claim(lane=OTHER_LANE) == []
