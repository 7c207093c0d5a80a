"""What the way to one upstream promises, whatever it offers: one outcome for each recipient, in their order, and octets as they are.

Held against every kind of session: in clear, STARTTLS and TLS, pipelined and in lock-step.
"""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import pytest

from relay.mail.outcome import Outcome, Status
from relay.upstream.pool import Pool
from relay.upstream.transaction import Outgoing
from tests.support.certificates import Authority
from tests.support.upstream import Close, Drip, Garbage, Half, Hang, Hold, Phase, Reset, ScriptedUpstream, Security
from tests.system.upstreams import all_sent, outgoing, pool_to, raw_server, secured, settings, sliced, words

pytestmark = pytest.mark.both_loops

A, B, C = "a@example.org", "b@example.org", "c@example.org"
QUICK = {"connect": "30s", "command": "500ms", "data": "500ms", "final": "500ms"}
USERS = {"acme": "secret"}


@dataclass
class Way:
    """A scripted upstream and the pool that leads to it."""

    server: ScriptedUpstream
    pool: Pool

    async def send(self, message: Outgoing) -> list[Outcome]:
        return await self.pool.send("acme", message)


@asynccontextmanager
async def way_to(
    tls: Authority, *, security: Security = "none", pipelining: bool = True, quick: bool = False, **offer: Any
) -> AsyncIterator[Way]:
    without = {*offer.pop("without", ()), *(() if pipelining else ("PIPELINING",))}
    server = ScriptedUpstream(users=USERS, security=security, tls=tls.server if security != "none" else None, without=without, **offer)
    async with server:
        keys: dict[str, Any] = {"username": "acme", "password": "secret", **({"timeouts": QUICK} if quick else {})}
        async with pool_to(acme=settings(server, **keys) if security == "none" else secured(server, tls, security, **keys)) as pool:
            yield Way(server, pool)


@pytest.fixture(params=["none", "starttls", "tls"])
def security(request: pytest.FixtureRequest) -> Any:
    return request.param


@pytest.fixture(params=[True, False], ids=["pipelined", "lock-step"])
def pipelining(request: pytest.FixtureRequest) -> Any:
    return request.param


# -- behaving --------------------------------------------------------------------------------------------------------------


CONTENTS = {
    "plain": b"Subject: hi\r\n\r\nhello\r\n",
    "empty": b"",
    "dots": b".\r\n..\r\n.x\r\n\r\n.\r\na.\r\n",
    "only-dots": b"." * 1000 + b"\r\n",
    "long-line": b"x" * 100_000 + b"\r\n",
    "many-lines": b".y\r\n" * 20_000,
}


@pytest.mark.parametrize("content", CONTENTS.values(), ids=CONTENTS)
async def test_what_is_sent_is_what_arrives(tls: Authority, security: Security, pipelining: bool, content: bytes) -> None:
    async with way_to(tls, security=security, pipelining=pipelining) as way:
        assert words(await way.send(outgoing(A, B, octets=content))) == ["sent message final"] * 2
        (transaction,) = way.server.accepted
        assert transaction.content == content
        assert (transaction.sender, transaction.recipients) == ("app@acme.example", [A, B])
        assert transaction.pipelined == pipelining


SLICED = {
    "cut-in-crlf": (b"Subject: x\r\n\r\nab\r", b"\n.c\r\n"),
    "cut-before-dot": (b"Subject: x\r\n\r\nab\r\n", b".c\r\n"),
    "cut-behind-dot": (b"Subject: x\r\n\r\nab\r\n.", b"c\r\n"),
    "dot-alone": (b"Subject: x\r\n\r\nab\r\n", b".", b"\r\n"),
    "octet-by-octet": tuple(bytes([octet]) for octet in b"S: x\r\n\r\n.\r\n..\r\n.a\r\nb.\r\n"),
    "empty-slices": (b"S: x\r\n", b"", b"\r\n", b"", b".a\r\n", b""),
    "starts-with-dot": (b".a\r\n", b".b\r\n"),
    "no-line-ends": (b"a" * 70_000, b"." * 70_000, b"\r\n"),
    "many": (b"Subject: x\r\n\r\n", *[(b".line %d\r\n" % n) * 1000 for n in range(50)]),
    "nothing": (b"", b"\r\n"),
}


@pytest.mark.parametrize("slices", SLICED.values(), ids=SLICED)
async def test_content_in_slices_arrives_as_one(tls: Authority, security: Security, slices: tuple[bytes, ...]) -> None:
    content = b"".join(slices)
    async with way_to(tls, security=security) as way:
        message = outgoing(A, octets=slices[0], rest=sliced(*slices[1:]), size=len(content))
        assert all_sent(await way.send(message))
        assert way.server.accepted[0].content == content


async def test_a_session_is_kept_and_used_again(tls: Authority, security: Security, pipelining: bool) -> None:
    async with way_to(tls, security=security, pipelining=pipelining) as way:
        for number in range(3):
            assert all_sent(await way.send(outgoing(A, octets=b"%d\r\n" % number)))
        assert [transaction.content for transaction in way.server.accepted] == [b"0\r\n", b"1\r\n", b"2\r\n"]
        assert len(way.server.connections) == len(way.server.logins) == 1
        await way.pool.close()
        assert way.server.connections[0].verbs[-1] == "QUIT"
        assert way.server.open_connections == 0


async def test_each_recipient_has_the_outcome_of_its_own_reply(tls: Authority, security: Security, pipelining: bool) -> None:
    async with way_to(tls, security=security, pipelining=pipelining) as way:
        way.server.script("rcpt", b"550 5.1.1 nobody", recipient=A)
        way.server.script("rcpt", b"450 4.2.0 later", recipient=C)
        outcomes = await way.send(outgoing(A, B, C))
        assert words(outcomes) == ["failed recipient rcpt", "sent message final", "deferred recipient rcpt"]
        assert [str(outcome.reply) for outcome in outcomes[::2]] == ["550 5.1.1 nobody", "450 4.2.0 later"]
        assert way.server.accepted[0].recipients == [B]


@pytest.mark.parametrize(
    ("script_phase", "reply", "expected"),
    [
        ("mail", b"451 4.3.0 later", "deferred message mail"),
        ("mail", b"550 5.1.8 bad sender", "failed message mail"),
        ("mail", b"550 5.7.1 not you", "failed upstream mail fallback"),
        ("mail", b"530 5.7.0 Authentication required", "deferred credential mail fallback"),
        ("mail", b"454 4.7.0 slow down", "deferred upstream mail throttled"),
        ("rcpt", b"550 5.1.1 nobody", "failed recipient rcpt"),
        ("rcpt", b"450 4.2.0 later", "deferred recipient rcpt"),
        ("rcpt", b"554 5.7.1 Relay access denied", "deferred credential rcpt fallback"),
        ("data", b"451 4.3.0 later", "deferred message data"),
        ("data", b"554 5.5.1 no", "failed message data"),
        ("data", b"250 2.0.0 Ok", "deferred upstream data fallback"),
        ("final", b"451 4.3.0 later", "deferred message final"),
        ("final", b"554 5.6.0 no", "failed message final"),
        ("final", b"554 5.7.60 not this From", "failed upstream final fallback"),
        ("final", b"421 4.3.2 closing", "deferred upstream final fallback"),
        ("final", b"452 4.3.1 disk full", "deferred message final"),
    ],
)
async def test_a_refusal_is_the_fate_of_all_and_the_next_message_goes_on(
    tls: Authority, pipelining: bool, script_phase: Phase, reply: bytes, expected: str
) -> None:
    async with way_to(tls, pipelining=pipelining) as way:
        way.server.script(script_phase, reply, transaction=1)
        outcomes = await way.send(outgoing(A, B))
        assert words(outcomes) == [expected] * 2
        assert str(outcomes[0].reply) == reply.decode()
        assert all_sent(await way.send(outgoing(A, B, octets=b"second\r\n")))
        assert [t.content for t in way.server.accepted] == [b"second\r\n"]
        # After 530 what the login is worth is asked anew; after 250 it may wait for content.
        assert len(way.server.connections) == (2 if reply.startswith((b"421", b"530", b"250")) else 1)


# -- misbehaving -----------------------------------------------------------------------------------------------------------

#: Everything that ends a connection or makes it useless, by the phase in which it happens and the phase it is told in.
BREAKS = [Close(), Reset(), Hang(), Garbage(), Half(b"250 2.0.0 Ok")]
PLACES: list[tuple[Phase, str]] = [
    ("mail", "deferred upstream mail fallback"),
    ("rcpt", "deferred upstream rcpt fallback"),
    ("data", "deferred upstream data fallback"),
    ("content", "deferred upstream final in_doubt"),
    ("final", "deferred upstream final in_doubt"),
]


@pytest.mark.parametrize(("script_phase", "expected"), PLACES, ids=[place[0] for place in PLACES])
@pytest.mark.parametrize("action", BREAKS, ids=lambda action: type(action).__name__)
async def test_a_break_in_any_phase_gives_everybody_one_outcome_and_spoils_nothing_else(
    tls: Authority, pipelining: bool, script_phase: Phase, expected: str, action: Any
) -> None:
    if script_phase == "content" and isinstance(action, Garbage | Half):
        action = Close()
    async with way_to(tls, pipelining=pipelining, quick=True) as way:
        way.server.script(script_phase, action, transaction=1)
        outcomes = await way.send(outgoing(A, B))
        assert words(outcomes) == [expected] * 2
        assert all(outcome.reply.code == 0 and outcome.reply.text for outcome in outcomes)
        assert way.server.accepted == []
        assert all_sent(await way.send(outgoing(A, B)))
        assert len(way.server.connections) == 2


@pytest.mark.parametrize("action", [Close(), Reset(), Hang(), Garbage()], ids=lambda action: type(action).__name__)
async def test_a_break_under_tls_is_met_in_the_same_phase(tls: Authority, security: Security, action: Any) -> None:
    async with way_to(tls, security=security, quick=True) as way:
        way.server.script("final", action)
        assert words(await way.send(outgoing(A))) == ["deferred upstream final in_doubt"]
        way.server.heal()
        way.server.script("data", action)
        assert words(await way.send(outgoing(A))) == ["deferred upstream data fallback"]


async def test_a_break_between_two_replies_keeps_the_outcomes_that_were_told(tls: Authority, pipelining: bool) -> None:
    async with way_to(tls, pipelining=pipelining) as way:
        way.server.script("rcpt", b"550 5.1.1 nobody", recipient=A)
        way.server.script("rcpt", Close(), recipient=C)
        outcomes = await way.send(outgoing(A, B, C))
        assert words(outcomes) == ["failed recipient rcpt", "deferred upstream rcpt fallback", "deferred upstream rcpt fallback"]


async def test_a_421_in_the_middle_is_told_to_those_who_had_no_reply(tls: Authority, pipelining: bool) -> None:
    async with way_to(tls, pipelining=pipelining) as way:
        way.server.script("rcpt", b"450 4.2.0 later", recipient=A)
        way.server.script("rcpt", b"421 4.3.2 closing", recipient=B)
        outcomes = await way.send(outgoing(A, B, C))
        assert words(outcomes) == ["deferred recipient rcpt", "deferred upstream rcpt fallback", "deferred upstream rcpt fallback"]
        way.server.heal()
        assert all_sent(await way.send(outgoing(A)))


@pytest.mark.parametrize("script_phase", ["mail", "rcpt", "data", "final"])
async def test_replies_may_drip_and_have_many_lines(tls: Authority, security: Security, script_phase: Phase) -> None:
    code = b"354" if script_phase == "data" else b"250"
    async with way_to(tls, security=security) as way:
        way.server.script(script_phase, Drip(b"%b-first line\r\n%b-\r\n%b last line\r\n" % (code, code, code)))
        assert all_sent(await way.send(outgoing(A, B)))


@pytest.mark.parametrize("script_phase", ["mail", "rcpt", "data", "final"])
@pytest.mark.parametrize("reply", [b"250-one\r\n550 two", b"25 too short", b"hello", b"999 what", b"250x", b"250" + b"x" * 70_000])
async def test_what_is_no_reply_is_never_a_success(tls: Authority, script_phase: Phase, reply: bytes) -> None:
    async with way_to(tls) as way:
        way.server.script(script_phase, reply, transaction=1)
        (outcome,) = await way.send(outgoing(A))
        assert outcome.status is Status.DEFERRED
        assert (outcome.phase.value, outcome.in_doubt) == (script_phase, script_phase == "final")
        assert len(outcome.reply.text) < 300
        assert all_sent(await way.send(outgoing(A)))


async def test_go_ahead_after_all_were_refused_sends_no_content(tls: Authority) -> None:
    async with way_to(tls) as way:
        way.server.script("rcpt", b"550 5.1.1 nobody")
        way.server.script("data", b"354 go ahead all the same")
        assert words(await way.send(outgoing(A, B))) == ["failed recipient rcpt"] * 2
        way.server.heal()
        assert all_sent(await way.send(outgoing(C)))
        first = way.server.transactions[0]
        assert (first.content, first.complete) == (b"", False)
        assert len(way.server.connections) == 2


@pytest.mark.parametrize("refused", [False, True])
@pytest.mark.parametrize("pipelining", [True, False])
async def test_an_upstream_that_says_yes_in_the_place_of_go_ahead_may_wait_for_content_and_gets_no_more_commands(
    tls: Authority, pipelining: bool, refused: bool
) -> None:  # fmt: skip
    async with way_to(tls, pipelining=pipelining) as way:
        if refused:
            way.server.script("rcpt", b"550 5.1.1 nobody")
        way.server.script("data", b"250 2.0.0 Ok")
        await way.send(outgoing(A))
        way.server.heal()
        assert all_sent(await way.send(outgoing(B)))
        assert len(way.server.connections) == (1 if refused and not pipelining else 2)


async def test_lock_step_asks_for_no_content_when_nobody_was_taken(tls: Authority) -> None:
    async with way_to(tls, pipelining=False) as way:
        way.server.script("rcpt", b"550 5.1.1 nobody", transaction=1)
        assert words(await way.send(outgoing(A, B))) == ["failed recipient rcpt"] * 2
        assert way.server.connections[0].verbs[-3:] == ["MAIL", "RCPT", "RCPT"]
        way.server.script("mail", b"451 4.3.0 later", transaction=2)
        assert words(await way.send(outgoing(A, B))) == ["deferred message mail"] * 2
        assert way.server.connections[0].verbs[-2:] == ["RSET", "MAIL"]
        assert all_sent(await way.send(outgoing(A, B)))
        assert way.server.connections[0].verbs[-5:] == ["RSET", "MAIL", "RCPT", "RCPT", "DATA"]


@pytest.mark.parametrize("reply", [b"354 go on\r\n250 2.0.0 Ok", b"354 go on\r\n554 5.7.1 no", b"354 go on\r\n25"])
async def test_a_reply_before_the_content_is_never_taken_for_the_reply_to_it(tls: Authority, pipelining: bool, reply: bytes) -> None:
    async with way_to(tls, pipelining=pipelining) as way:
        way.server.script("data", reply, times=1)
        way.server.script("final", b"554 5.6.0 no")
        for message in (outgoing(A), outgoing(A, octets=b"x\r\n", rest=sliced(b"y\r\n"), size=6)):
            (outcome,) = await way.send(message)
            assert outcome.status is not Status.SENT
            assert not outcome.in_doubt


async def test_one_reply_too_many_behind_the_last_one_ends_the_session_and_changes_nothing(tls: Authority) -> None:
    async with way_to(tls) as way:
        way.server.script("final", b"250 2.0.0 Ok\r\n250 2.0.0 Ok again", times=1)
        assert all_sent(await way.send(outgoing(A)))
        way.server.script("mail", b"550 5.1.8 bad sender", times=1)
        assert words(await way.send(outgoing(A))) == ["failed message mail"]
        assert len(way.server.connections) == 2


@pytest.mark.parametrize(
    ("reply", "expected"),
    [
        (b"452 4.3.1 disk full", "deferred message content"),
        (b"554 5.3.4 too large", "failed message content"),
        (b"421 4.3.2 closing", "deferred upstream content fallback"),
        (b"250 2.0.0 Ok already", "deferred upstream content fallback"),
        (b"nonsense", "deferred upstream content fallback"),
    ],
)
async def test_a_reply_in_the_middle_of_the_content_ends_it(reply: bytes, expected: str) -> None:
    received: list[int] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"220 hasty.test\r\n")
        for answer in (b"250-hasty.test\r\n250 PIPELINING\r\n", b"250 Ok\r\n", b"250 Ok\r\n", b"250 Ok\r\n", b"354 Go ahead\r\n"):
            await reader.readline()
            writer.write(answer)
        await reader.readexactly(300_000)
        writer.write(reply + b"\r\n")
        received.append(len(await reader.read()))

    async with raw_server(serve) as upstream, pool_to(acme=upstream) as pool:
        slices = [b"x" * 200_000 + b"\r\n"] * 200
        outcomes = await pool.send("acme", outgoing(A, B, octets=b"S: x\r\n\r\n", rest=sliced(*slices), size=40_000_000))
        assert words(outcomes) == [expected] * 2
    assert len(received) <= 1


@pytest.mark.parametrize("size", [b"SIZE", b"SIZE 0", b"SIZE many", "SIZE ²".encode(), b"size 1000000"])
async def test_an_odd_size_is_no_limit(size: bytes) -> None:
    mails: list[bytes] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"220 odd.test\r\n")
        await reader.readline()
        writer.write(b"250-odd.test\r\n250 " + size + b"\r\n")
        mails.append(await reader.readline())
        writer.write(b"550 5.1.8 enough\r\n")
        await reader.read()

    async with raw_server(serve) as upstream, pool_to(acme=upstream) as pool:
        assert words(await pool.send("acme", outgoing(A, size=1000))) == ["failed message mail"]
    assert mails == [b"MAIL FROM:<app@acme.example> SIZE=1000\r\n"]


@pytest.mark.parametrize(
    ("security", "action"),
    [  # not Close under TLS: asyncio of Python 3.11 trips over an end that it meets while it flushes
        ("none", Close(after=100_000)),
        ("none", Reset(after=100_000)),
        ("tls", Reset(after=100_000)),
    ],
    ids=str,
)
async def test_a_break_before_the_last_octet_is_not_in_doubt(tls: Authority, security: Security, action: Any) -> None:
    async with way_to(tls, security=security) as way:
        way.server.script("content", action, times=1)
        slices = [b"x" * 200_000 + b"\r\n"] * 100
        outcomes = await way.send(outgoing(A, B, octets=b"S: x\r\n\r\n", rest=sliced(*slices), size=20_000_000))
        assert words(outcomes) == ["deferred upstream content fallback"] * 2
        assert all_sent(await way.send(outgoing(A)))


async def test_an_upstream_that_stops_reading_is_given_up_in_time(tls: Authority, security: Security) -> None:
    async with way_to(tls, security=security, quick=True) as way:
        way.server.script("content", Hang(after=1000))
        slices = [b"x" * 200_000 + b"\r\n"] * 100
        outcomes = await way.send(outgoing(A, octets=b"S: x\r\n\r\n", rest=sliced(*slices), size=20_000_000))
        assert words(outcomes) == ["deferred upstream content fallback"]


async def test_what_the_message_needs_is_declared(tls: Authority, pipelining: bool) -> None:
    async with way_to(tls, pipelining=pipelining) as way:
        await way.send(outgoing(A, octets=b"x\r\n"))
        await way.send(outgoing("bücher@example.org", octets="ü\r\n".encode(), sender="jürgen@acme.example", eight_bit=True, smtputf8=True))
        await way.send(outgoing(A, sender=""))
        first, second, third = way.server.accepted
        assert first.parameters == ("SIZE=3",)
        assert second.parameters == ("SIZE=4", "BODY=8BITMIME", "SMTPUTF8")
        assert (second.sender, second.recipients) == ("jürgen@acme.example", ["bücher@example.org"])
        assert third.sender == ""


@pytest.mark.parametrize(
    ("without", "facts", "lacks"),
    [
        ("8BITMIME", {"eight_bit": True}, "8BITMIME"),
        ("SMTPUTF8", {"smtputf8": True, "sender": "jürgen@acme.example"}, "SMTPUTF8"),
        ("ENHANCEDSTATUSCODES", {"size": 104857601}, "SIZE 104857601"),
    ],
)
async def test_what_the_upstream_lacks_is_found_before_anything_is_sent(
    tls: Authority, without: str, facts: dict[str, Any], lacks: str
) -> None:
    async with way_to(tls, without=[without]) as way:
        outcomes = await way.send(outgoing(A, B, **facts))
        assert words(outcomes) == ["failed upstream mail fallback"] * 2
        assert lacks in outcomes[0].reply.text
        assert way.server.transactions == []
        assert all_sent(await way.send(outgoing(A)))
        assert len(way.server.connections) == 1


@pytest.mark.parametrize(
    ("recipients", "sent"),
    [
        ("A u B v", "A B"),
        ("u A", "A"),
        ("A B", "A B"),
        ("u v", ""),
        ("u", ""),
    ],
)
async def test_without_smtputf8_those_go_out_who_do_not_need_it(tls: Authority, pipelining: bool, recipients: str, sent: str) -> None:
    who = {"A": A, "B": B, "u": "ü@example.org", "v": "v@bücher.example"}
    async with way_to(tls, without=["SMTPUTF8"], pipelining=pipelining) as way:
        for _ in range(2):
            outcomes = await way.send(outgoing(*(who[each] for each in recipients.split()), smtputf8=True, utf8_header=True))
            assert words(outcomes) == [
                "sent message final" if each in sent else "failed recipient rcpt fallback" for each in recipients.split()
            ]
            for outcome in outcomes:
                assert outcome.status is Status.SENT or str(outcome.reply).startswith("5.6.7 the upstream does not offer SMTPUTF8")
        assert [t.recipients for t in way.server.accepted] == ([[who[each] for each in sent.split()]] * 2 if sent else [])
        assert all("SMTPUTF8" not in t.parameters for t in way.server.accepted)
        assert len(way.server.connections) == 1


async def test_an_upstream_without_extensions_takes_plain_mail(tls: Authority) -> None:
    async with way_to(tls, without=["PIPELINING", "SIZE", "8BITMIME", "SMTPUTF8", "ENHANCEDSTATUSCODES"]) as way:
        assert all_sent(await way.send(outgoing(A, size=10**9)))
        assert way.server.accepted[0].parameters == ()


# -- time ------------------------------------------------------------------------------------------------------------------


async def test_the_time_for_a_reply_counts_from_the_reply_before(tls: Authority, pipelining: bool) -> None:
    """Twenty recipients whose replies take half the time each: no one is late, whether or not they were asked in one flight."""
    async with way_to(tls, pipelining=pipelining, quick=True) as way:
        recipients = [f"r{number}@example.org" for number in range(6)]
        holds = [asyncio.Event() for _ in recipients]
        for recipient, hold in zip(recipients, holds, strict=True):
            way.server.script("rcpt", Hold(hold), recipient=recipient)
        loop = asyncio.get_running_loop()
        for number, hold in enumerate(holds):
            loop.call_later(0.075 * (number + 1), hold.set)
        assert all_sent(await way.send(outgoing(*recipients)))


async def test_a_cancelled_message_leaves_no_session_that_is_out_of_step(tls: Authority) -> None:
    async with way_to(tls) as way:
        assert all_sent(await way.send(outgoing(A)))
        hold = asyncio.Event()
        way.server.script("final", Hold(hold), times=1)
        sending = asyncio.ensure_future(way.send(outgoing(A, octets=b"cut off\r\n")))
        while not any(transaction.complete for transaction in way.server.transactions[1:]):
            await asyncio.sleep(0)
        sending.cancel()
        with pytest.raises(asyncio.CancelledError):
            await sending
        hold.set()
        way.server.script("final", b"554 5.6.0 no", times=1)
        assert words(await way.send(outgoing(B))) == ["failed message final"]
        assert len(way.server.connections) == 2
