"""Every phase against everything that can happen in it, at a real upstream: what the table of fates says, and what nobody may break.

Whatever the upstream does: each recipient has one outcome; what is called sent was taken, once; what was taken and is not called sent
is in doubt; and the next message gets through unharmed. Expected fates come from the table; a second list is written by hand.
"""

import asyncio
from collections import Counter
from collections.abc import AsyncGenerator, Iterator
from contextlib import AsyncExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple, cast

import pytest

from relay.delivery import pace, scheduler
from relay.mail.outcome import TABLE, Failure, Outcome, Phase, Row, Status, row_for
from relay.mail.reply import Reply, parse_reply
from tests.support.certificates import Authority
from tests.support.upstream import Action, Close, Garbage, Half, Hang, Reset, Say, ScriptedUpstream, unused_port
from tests.support.upstream import Phase as ScriptPhase
from tests.system.relays import ROUTES, running, to
from tests.system.upstreams import CONTENT, PATIENT, all_sent, outgoing, pool_to, secured, settings, words

LOGIN = {"username": "acme", "password": "secret-of-acme"}
USERS = {"acme": "secret-of-acme"}
QUICK = {"connect": "600ms", "command": "600ms", "data": "600ms", "final": "600ms"}

Event = Reply | Failure
#: Where it happened and what: the key to a row of the table.
Cause = tuple[Phase, Event]

#: What upstreams say, and do.
REPLIES = (
    "252 2.1.5 Cannot verify, but go on",
    "354 Go ahead",
    "421 4.3.2 Shutting down",
    "421 4.7.28 Slow down",
    "432 4.3.2 Concurrent connections limit exceeded",
    "450 4.1.1 Not now",
    "451 4.3.0 Later",
    "452 4.3.1 Insufficient system storage",
    "454 4.7.0 Later",
    "454 Throttling failure: Maximum sending rate exceeded.",
    "501 5.5.4 Syntax",
    "530 5.7.0 Authentication required",
    "534 5.7.9 Too weak",
    "535 5.7.8 Wrong",
    "538 5.7.11 Encryption required",
    "550 5.1.1 Nobody",
    "550 5.7.1 Not permitted",
    "552 5.3.4 Too large",
    "553 5.1.7 Not that address",
    "554 5.6.0 No",
)
#: What some of them say in some phases, to meet the other rows.
SAID: tuple[tuple[ScriptPhase, str], ...] = (
    ("greeting", "421 Too many connections"),
    ("greeting", "554 Too many connections"),
    ("greeting", "421 Daily limit reached"),
    ("auth", "534 5.7.9 Application-specific password required"),
    ("auth", "535 5.7.139 Basic authentication is disabled"),
    ("auth", "454 later"),
    ("auth", "421 rate limit"),
    ("mail", "450 4.7.1 Too much mail"),
    ("mail", "421 4.3.2 Too many concurrent sessions"),
    ("mail", "421 too many messages in this connection"),
    ("mail", "421 4.7.0 Error: too many errors"),
    ("mail", "450 4.7.1 Hourly limit reached"),
    ("mail", "530 5.7.0 Must issue a STARTTLS command first"),
    ("mail", "550 Daily limit reached"),
    ("mail", "550 5.4.5 Come back tomorrow"),
    ("mail", "454 4.7.1 Relay access denied"),
    ("mail", "503 5.5.1 Nested MAIL command"),
    ("mail", "550 5.7.502 Access denied, banned sender"),
    ("rcpt", "452 4.2.2 Mailbox full, quota exceeded"),
    ("rcpt", "550 5.2.1 Mailbox disabled"),
    ("rcpt", "550 5.1.1 <throttle@example.org>: unknown"),
    ("rcpt", "450 4.1.1 Unverified: host mx said: too many connections"),
    ("rcpt", "454 4.7.1 Relay access denied"),
    ("rcpt", "550 Relay not permitted"),
    ("rcpt", "550 5.7.60 Not as this sender"),
    ("rcpt", "553 5.7.1 Sender address rejected: not owned by user acme"),
    ("data", "550 5.7.60 Not as this sender"),
    ("data", "550 5.4.5 Daily sending quota exceeded"),
    ("final", "550 5.4.5 Daily user sending limit exceeded"),
    ("final", "554 5.2.252 SendAsDenied"),
    ("final", "554 Message rejected: Email address is not verified."),
    ("final", "550 5.7.501 Access denied, spam abuse detected"),
    ("final", "552 5.3.4 Message too large"),
    ("final", "554 5.6.0 Content not taken"),
    ("final", "550 5.7.26 The sender must authenticate with SPF or DKIM"),
    ("final", "451 4.7.1 DMARC: authentication required"),
    ("final", "250-2.0.0 Ok\r\n250 2.0.0 in two lines"),
)
FAILURES: dict[str, tuple[Action, Failure]] = {
    "nonsense": (Garbage(), Failure.NONSENSE),
    "two codes": (Say(b"250-2.0.0 Ok\r\n550 5.0.0 or not"), Failure.NONSENSE),
    "silence": (Hang(), Failure.TIMEOUT),
    "close": (Close(), Failure.CLOSED),
    "RST": (Reset(), Failure.CLOSED),
    "half a reply": (Half(), Failure.CLOSED),
}


class Mode(NamedTuple):
    """How the transaction goes. `flight`: MAIL to the last octet without waiting for an answer."""

    pipelining: bool
    chunking: bool
    recipients: int

    @property
    def flight(self) -> bool:
        return self.pipelining and self.chunking and self.recipients == 1

    def server(self, **more: Any) -> ScriptedUpstream:
        without = () if self.pipelining else ("PIPELINING",)
        return ScriptedUpstream(offers=("CHUNKING",) if self.chunking else (), without=without, **more)

    def addresses(self) -> list[str]:
        return [f"{number}@example.org" for number in range(self.recipients)]


MODES = [Mode(pipelining, chunking, recipients) for pipelining in (True, False) for chunking in (True, False) for recipients in (1, 3)]
PLAIN = Mode(pipelining=True, chunking=False, recipients=1)
FLIGHT = Mode(pipelining=True, chunking=True, recipients=1)
TAKEN: Cause = (Phase.FINAL, Reply(250, "2.0.0", "Ok"))


def heard(said: str) -> Reply:
    return parse_reply([line.encode() for line in said.split("\r\n")])


# -- what must follow --------------------------------------------------------------------------------------------------------


def causes(phase: ScriptPhase, event: Event, mode: Mode, place: int = 0) -> list[list[Cause]]:
    """For each recipient what may decide about him, when `event` happens in `phase` (at RCPT: of the recipient at `place`)."""
    if isinstance(event, Failure):
        return [_broken(phase, event, mode)] * mode.recipients
    here = Phase(phase)
    if (event.positive and here in (Phase.MAIL, Phase.RCPT)) or (event.code == 354 and here is Phase.DATA):
        return [[TAKEN]] * mode.recipients
    if here is not Phase.RCPT or event.code == 421:  # it closes
        return [[(here, event)]] * mode.recipients
    return [[(here, event)] if number == place else [TAKEN] for number in range(mode.recipients)]


def _broken(phase: ScriptPhase, failure: Failure, mode: Mode) -> list[Cause]:
    if mode.flight:
        return [(Phase.FINAL, failure)]
    return [(Phase(phase), failure)]


def fate(cause: Cause) -> tuple[Any, ...]:
    row = row_for(*cause)
    return (cause[0], row.status, row.scope, row.in_doubt, row.throttled, row.fallback)


def check(outcomes: list[Outcome], expected: list[list[Cause]]) -> None:
    assert len(outcomes) == len(expected)
    for outcome, possible in zip(outcomes, expected, strict=True):
        got = (outcome.phase, outcome.status, outcome.scope, outcome.in_doubt, outcome.throttled, outcome.fallback)
        assert got in [fate(cause) for cause in possible], (words([outcome]), str(outcome.reply), possible)
        said = [str(event) for _, event in possible if isinstance(event, Reply) and event != TAKEN[1]]
        assert str(outcome.reply) in said if said else outcome.status is Status.SENT or outcome.reply.code == 0


def check_accounts(server: ScriptedUpstream, recipients: list[str], outcomes: list[Outcome]) -> None:
    """Independent of every table: what holds whatever an upstream does."""
    assert len(outcomes) == len(recipients)
    for recipient, outcome in zip(recipients, outcomes, strict=True):
        taken = sum(recipient in transaction.recipients for transaction in server.accepted)
        assert taken <= 1
        assert outcome.status is not Status.SENT or taken
        assert not taken or outcome.status is Status.SENT or outcome.in_doubt
        assert not (outcome.fallback and outcome.in_doubt)


# -- doing it ----------------------------------------------------------------------------------------------------------------


async def drive(
    phase: ScriptPhase, action: Action, mode: Mode, *, place: int = 0, warm: bool = False, **keys: Any
) -> list[Outcome]:  # fmt: skip
    """One message to an upstream that does `action` in `phase`, and another one to see that nothing is left of it.

    `warm`: over a session that has carried one before.
    """
    recipients = mode.addresses()
    async with AsyncExitStack() as stack:
        server = await stack.enter_async_context(mode.server(users=USERS))
        pool = await stack.enter_async_context(pool_to(acme=settings(server, **{**LOGIN, **keys})))
        if warm:
            assert all_sent(await pool.send("acme", outgoing("warm@example.org")))
        server.script(phase, action, recipient=recipients[place] if phase == "rcpt" else None, times=1)
        outcomes = await pool.send("acme", outgoing(*recipients))
        check_accounts(server, recipients, outcomes)
        server.heal()
        assert all_sent(await pool.send("acme", outgoing("next@example.org")))
        assert (server.accepted[-1].recipients, server.accepted[-1].content) == (["next@example.org"], CONTENT)
        assert len(server.logins) <= 2
    return outcomes


def timeouts_for(event: Event) -> dict[str, Any]:
    return {"timeouts": QUICK if event is Failure.TIMEOUT else PATIENT}


class Case(NamedTuple):
    phase: ScriptPhase
    name: str
    action: Action
    event: Event

    @classmethod
    def said(cls, phase: ScriptPhase, said: str) -> "Case":
        return cls(phase, said, Say(said.encode()), heard(said))

    def __str__(self) -> str:
        return f"{self.phase}: {self.name}".replace("\r\n", " ")


def cases(*phases: ScriptPhase) -> Iterator[Case]:
    for phase in phases:
        for said in REPLIES:
            yield Case.said(phase, said)
        for name, (action, failure) in FAILURES.items():
            yield Case(phase, name, action, failure)
        for where, said in SAID:
            if where == phase:
                yield Case.said(phase, said)


# Where aiosmtplib reads the reply, the last line of two that differ is what it says.
OPENING = [case for case in cases("greeting", "ehlo", "auth") if case.name != "two codes"]
SECURING = [case for case in cases("starttls") if case.name != "two codes"]
TRANSACTION = list(cases("mail", "rcpt", "data", "final"))
HANDSHAKE = [
    Case("tls", name, action, Failure.UNTRUSTED if event is Failure.NONSENSE else event) for name, (action, event) in FAILURES.items()
]
MIDDLE = list(cases("content"))


@pytest.mark.parametrize("case", OPENING, ids=str)
async def test_what_happens_before_the_transaction(case: Case) -> None:
    async def each(mode: Mode) -> None:
        outcomes = await drive(case.phase, case.action, mode, **timeouts_for(case.event))
        check(outcomes, [[(Phase(case.phase), case.event)]] * mode.recipients)

    await asyncio.gather(*map(each, (PLAIN, Mode(pipelining=False, chunking=False, recipients=3))))


@pytest.mark.parametrize("case", SECURING, ids=str)
async def test_what_happens_at_starttls(tls: Authority, case: Case) -> None:
    async with ScriptedUpstream(users=USERS, security="starttls", tls=tls.server) as server:
        server.script("starttls", case.action, times=1)
        async with pool_to(acme=secured(server, tls, **LOGIN, **timeouts_for(case.event))) as pool:
            outcomes = await pool.send("acme", outgoing())
            check(outcomes, [[(Phase.STARTTLS, case.event)]])
            assert (server.logins, server.transactions) == ([], [])
            assert all_sent(await pool.send("acme", outgoing()))


@pytest.mark.parametrize("security", ["starttls", "tls"])
@pytest.mark.parametrize("case", HANDSHAKE, ids=str)
async def test_what_happens_in_the_handshake(tls: Authority, case: Case, security: Any) -> None:
    async with ScriptedUpstream(users=USERS, security=security, tls=tls.server) as server:
        server.script("tls", case.action, times=1)
        async with pool_to(acme=secured(server, tls, security, **LOGIN, **timeouts_for(case.event))) as pool:
            (outcome,) = await pool.send("acme", outgoing())
            # An end that comes together with the reply to STARTTLS is met before the handshake begins.
            assert words([outcome])[0] in ("deferred upstream tls fallback", "deferred upstream starttls fallback")
            assert (server.logins, server.transactions) == ([], [])
            assert all_sent(await pool.send("acme", outgoing()))


@pytest.mark.parametrize("case", TRANSACTION, ids=str)
async def test_what_happens_in_the_transaction(case: Case) -> None:
    async def each(mode: Mode, place: int, warm: bool) -> None:
        outcomes = await drive(case.phase, case.action, mode, place=place, warm=warm, **timeouts_for(case.event))
        try:
            check(outcomes, on_the_wire(case, mode, place, warm=warm))
        except AssertionError as error:
            error.add_note(f"{mode}, recipient {place}, {'warm' if warm else 'new'}")
            raise

    every = [
        each(mode, place, warm)
        for mode in MODES
        if not (mode.flight and case.phase == "data")  # it is not said
        for place in (range(mode.recipients) if case.phase == "rcpt" else (0,))
        for warm in ((False, True) if mode.recipients == 1 else (False,))
    ]
    if case.event is Failure.TIMEOUT:
        await asyncio.gather(*every)
    else:
        for one in every:
            await one


def on_the_wire(case: Case, mode: Mode, place: int, *, warm: bool) -> list[list[Cause]]:
    """`causes`, and what a session that was idle and a connection that is torn down add to it."""
    expected = causes(case.phase, case.event, mode, place)
    closing = isinstance(case.event, Reply) and case.event.code == 421 and not row_for(Phase.MAIL, case.event).throttled
    ended = closing or case.event in (Failure.CLOSED, Failure.TIMEOUT)
    if warm and case.phase == "mail" and ended:
        return [[TAKEN]] * mode.recipients  # stale: it goes again on another one
    if case.name == "RST" and mode.pipelining:  # it may overtake replies that came before it
        before = [] if mode.flight or case.phase == "final" else [Phase.MAIL, Phase.RCPT, Phase.DATA]
        reached = [
            (phase, case.event) for phase in before[: 1 + [Phase.MAIL, Phase.RCPT, Phase.DATA, Phase.FINAL].index(Phase(case.phase))]
        ]
        unanswered = [TAKEN] if warm and (mode.flight or case.phase != "final") else []
        return [[*possible, *reached, *unanswered] for possible in expected]
    return expected


SLICE = b"x" * 262_142 + b"\r\n"
SLICES = 128  # more than the kernel keeps between two sockets


async def many_slices() -> AsyncGenerator[bytes, None]:
    for _ in range(SLICES):
        yield SLICE


@pytest.mark.both_loops
@pytest.mark.parametrize("case", MIDDLE, ids=str)
async def test_what_happens_in_the_middle_of_the_content(case: Case) -> None:
    async with ScriptedUpstream() as server, pool_to(acme=settings(server, **timeouts_for(case.event))) as pool:
        server.script("content", replace(case.action, after=1000), times=1)
        size = len(CONTENT) + SLICES * len(SLICE)
        outcomes = await pool.send("acme", outgoing(octets=CONTENT, rest=many_slices, size=size))
        check(outcomes, [[(Phase.CONTENT, case.event)]])
        check_accounts(server, ["you@example.org"], outcomes)
        assert all_sent(await pool.send("acme", outgoing()))
        assert server.accepted[-1].content == CONTENT


async def test_what_happens_before_the_connection() -> None:
    async with ScriptedUpstream() as server:
        for keys, phase in (({"host": "no-such-host.invalid"}, Phase.RESOLVE), ({"port": unused_port()}, Phase.CONNECT)):
            async with pool_to(acme=settings(server, **cast(dict[str, Any], keys))) as pool:
                check(await pool.send("acme", outgoing()), [[(phase, Failure.UNREACHABLE)]])
        assert server.connections == []


@pytest.mark.parametrize(
    ("without", "facts"),
    [
        (["8BITMIME"], {"eight_bit": True}),
        (["SMTPUTF8"], {"smtputf8": True, "sender": "jürgen@acme.example"}),
        ([], {"size": 200_000_000}),
    ],
)
async def test_what_the_upstream_lacks_is_asked_of_the_next_one(without: list[str], facts: dict[str, Any]) -> None:
    async with ScriptedUpstream(without=without) as server, pool_to(acme=settings(server)) as pool:
        check(await pool.send("acme", outgoing(**facts)), [[(Phase.MAIL, Failure.LACKING)]])
        assert all_sent(await pool.send("acme", outgoing()))
        assert len(server.connections) == 1
        assert server.connections[0].verbs == ["EHLO", "MAIL", "RCPT", "DATA"]


async def test_what_the_upstream_lacks_for_one_recipient_is_his_alone() -> None:
    async with ScriptedUpstream(without=["SMTPUTF8"]) as server, pool_to(acme=settings(server)) as pool:
        outcomes = await pool.send("acme", outgoing("jürgen@example.org", "you@example.org", smtputf8=True))
        check(outcomes[:1], [[(Phase.RCPT, Failure.LACKING)]])
        assert all_sent(outcomes[1:])


@pytest.mark.parametrize(("offered", "declared"), [(True, ("SMTPUTF8",)), (False, ())])
async def test_a_header_in_utf8_alone_asks_for_smtputf8_and_goes_without(offered: bool, declared: tuple[str, ...]) -> None:
    octets = "Subject: Grüße\r\n\r\nhello\r\n".encode()
    async with ScriptedUpstream(without=() if offered else ["SMTPUTF8"]) as server, pool_to(acme=settings(server)) as pool:
        assert all_sent(await pool.send("acme", outgoing(octets=octets, eight_bit=True, utf8_header=True)))
        assert server.accepted[0].parameters == (f"SIZE={len(octets)}", "BODY=8BITMIME", *declared)
        assert server.accepted[0].content == octets


async def test_a_login_that_no_mechanism_serves_is_the_credentials_fault() -> None:
    async with ScriptedUpstream(users=USERS, mechanisms=["GSSAPI"]) as server, pool_to(acme=settings(server, **LOGIN)) as pool:
        check(await pool.send("acme", outgoing()), [[(Phase.AUTH, Failure.LACKING)]])


async def test_a_starttls_that_is_not_offered_is_the_upstreams_fault(tls: Authority) -> None:
    async with ScriptedUpstream() as server, pool_to(acme=secured(server, tls)) as pool:
        check(await pool.send("acme", outgoing()), [[(Phase.STARTTLS, Failure.LACKING)]])


# -- a second opinion --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("phase", "what", "expected"),
    [
        ("greeting", "421 4.3.2 down", "deferred upstream greeting fallback"),
        ("greeting", "421 4.7.0 too many", "deferred upstream greeting throttled"),
        ("greeting", "554 5.7.1 go away", "deferred upstream greeting fallback"),
        ("greeting", "silence", "deferred upstream greeting fallback"),
        ("ehlo", "550 5.7.1 not with that name", "deferred upstream ehlo fallback"),
        ("ehlo", "close", "deferred upstream ehlo fallback"),
        ("auth", "535 5.7.8 wrong", "deferred credential auth fallback"),
        ("auth", "534 5.7.9 application password", "deferred credential auth fallback"),
        ("auth", "454 4.7.0 later", "deferred upstream auth throttled"),
        ("auth", "421 4.3.2 down", "deferred upstream auth fallback"),
        ("auth", "554 5.0.0 no", "deferred credential auth fallback"),
        ("auth", "close", "deferred upstream auth fallback"),
        ("mail", "421 4.3.2 down", "deferred upstream mail fallback"),
        ("mail", "421 4.7.0 slow", "deferred upstream mail throttled"),
        ("mail", "451 4.3.0 later", "deferred message mail"),
        ("mail", "452 4.3.1 disk", "deferred message mail"),
        ("mail", "530 5.7.0 login", "deferred credential mail fallback"),
        ("mail", "550 5.7.1 not you", "failed upstream mail fallback"),
        ("mail", "553 not you", "failed upstream mail fallback"),
        ("mail", "552 5.3.4 too large", "failed message mail"),
        ("mail", "554 5.0.0 no", "failed message mail"),
        ("mail", "silence", "deferred upstream mail fallback"),
        ("mail", "nonsense", "deferred upstream mail fallback"),
        ("rcpt", "450 4.2.0 greylisted", "deferred recipient rcpt"),
        ("rcpt", "452 4.5.3 too many", "deferred recipient rcpt"),
        ("rcpt", "550 5.1.1 nobody", "failed recipient rcpt"),
        ("rcpt", "550 5.7.1 no", "failed recipient rcpt"),
        ("rcpt", "553 5.1.3 no", "failed recipient rcpt"),
        ("rcpt", "554 5.7.1 Relay access denied", "deferred credential rcpt fallback"),
        ("rcpt", "421 4.3.2 down", "deferred upstream rcpt fallback"),
        ("rcpt", "454 4.7.0 slow", "deferred upstream rcpt throttled"),
        ("rcpt", "close", "deferred upstream rcpt fallback"),
        ("data", "451 4.3.0 later", "deferred message data"),
        ("data", "554 5.5.1 no", "failed message data"),
        ("data", "250 2.0.0 Ok?", "deferred upstream data fallback"),
        ("data", "close", "deferred upstream data fallback"),
        ("final", "250 2.0.0 Ok", "sent message final"),
        ("final", "451 4.3.0 later", "deferred message final"),
        ("final", "421 4.3.2 down", "deferred upstream final fallback"),
        ("final", "432 4.3.2 too many", "deferred upstream final throttled"),
        ("final", "550 5.7.1 spam", "failed message final"),
        ("final", "550 5.7.60 not as this sender", "failed upstream final fallback"),
        ("final", "552 5.2.2 full", "failed message final"),
        ("final", "354 go on", "deferred upstream final in_doubt"),
        ("final", "nonsense", "deferred upstream final in_doubt"),
        ("final", "silence", "deferred upstream final in_doubt"),
        ("final", "close", "deferred upstream final in_doubt"),
        ("final", "RST", "deferred upstream final in_doubt"),
    ],
)
async def test_the_cases_that_matter_most_by_hand(phase: ScriptPhase, what: str, expected: str) -> None:
    action, event = FAILURES[what] if what in FAILURES else (Say(what.encode()), heard(what))
    assert words(await drive(phase, action, PLAIN, **timeouts_for(event))) == [expected]


@pytest.mark.parametrize(
    ("phase", "what", "expected"),
    [
        ("mail", "451 4.3.0 later", "deferred message mail"),
        ("mail", "550 5.7.1 not you", "failed upstream mail fallback"),
        ("mail", "421 4.3.2 down", "deferred upstream mail fallback"),
        ("mail", "close", "deferred upstream final in_doubt"),
        ("mail", "silence", "deferred upstream final in_doubt"),
        ("rcpt", "550 5.1.1 nobody", "failed recipient rcpt"),
        ("rcpt", "421 4.3.2 down", "deferred upstream rcpt fallback"),
        ("rcpt", "close", "deferred upstream final in_doubt"),
        ("final", "552 5.3.4 too large", "failed message final"),
        ("final", "close", "deferred upstream final in_doubt"),
    ],
)
async def test_in_one_flight_doubt_begins_with_the_first_octet(phase: ScriptPhase, what: str, expected: str) -> None:
    action, event = FAILURES[what] if what in FAILURES else (Say(what.encode()), heard(what))
    assert words(await drive(phase, action, FLIGHT, **timeouts_for(event))) == [expected]


@pytest.mark.parametrize("mode", MODES, ids=str)
async def test_one_taken_one_refused_and_one_deferred(mode: Mode) -> None:
    async with mode.server() as server, pool_to(acme=settings(server)) as pool:
        server.script("rcpt", b"550 5.1.1 nobody", recipient="b@example.org")
        server.script("rcpt", b"450 4.2.0 later", recipient="c@example.org")
        outcomes = await pool.send("acme", outgoing("a@example.org", "b@example.org", "c@example.org"))
        assert words(outcomes) == ["sent message final", "failed recipient rcpt", "deferred recipient rcpt"]
        assert [transaction.recipients for transaction in server.accepted] == [["a@example.org"]]


@pytest.mark.parametrize("mode", MODES, ids=str)
@pytest.mark.parametrize(
    "name", ["421 4.3.2 Idle for too long", "421 too many messages in this connection", "421 4.7.0 Error: too many errors", "close", "RST"]
)
async def test_a_session_that_ended_before_mail_was_answered_is_replaced_once(mode: Mode, name: str) -> None:
    action = FAILURES[name][0] if name in FAILURES else Say(name.encode())
    async with mode.server(users=USERS) as server, pool_to(acme=settings(server, **LOGIN)) as pool:
        assert all_sent(await pool.send("acme", outgoing(*mode.addresses())))
        server.script("mail", action, times=1)
        assert all_sent(await pool.send("acme", outgoing(*mode.addresses())))
        assert (len(server.accepted), len(server.connections), len(server.logins)) == (2, 2, 2)
        server.script("mail", action)
        outcomes = await pool.send("acme", outgoing(*mode.addresses()))
        assert len(server.connections) == 3
        assert all(outcome.status is Status.DEFERRED for outcome in outcomes)
        assert all(outcome.in_doubt == (mode.flight and name not in REPLIES and name in FAILURES) for outcome in outcomes)


# -- no row goes untried -----------------------------------------------------------------------------------------------------

#: Rows for what cannot happen at an upstream's hands: totality asks for them.
UNHEARD_OF = {
    "connection lost after the last octet": Failure.UNREACHABLE,
    "TLS failed after the last octet": Failure.UNTRUSTED,
    "not offered by the upstream": Failure.LACKING,
    "no access token is given": Failure.REFUSED,
    "its token server is throttled": Failure.SLOWED,
    "taken, and the transaction went no further": ("2xx", "", ""),
}


def test_every_row_of_the_table_is_tried_above() -> None:
    tried: set[int] = set()
    for case in (*OPENING, *SECURING, *MIDDLE, *HANDSHAKE):
        tried.add(id(row_for(Phase(case.phase), case.event)))
    for case in TRANSACTION:
        for mode in MODES:
            if not (mode.flight and case.phase == "data"):
                tried |= {id(row_for(*cause)) for possible in causes(case.phase, case.event, mode) for cause in possible}
    named: list[Cause] = [(Phase.RESOLVE, Failure.UNREACHABLE), (Phase.MAIL, Failure.LACKING), (Phase.AUTH, Failure.LACKING)]
    named += [(Phase.STARTTLS, Failure.LACKING), (Phase.RCPT, Failure.LACKING)]
    named += [(Phase.AUTH, Failure.REFUSED), (Phase.AUTH, Failure.SLOWED)]  # of a token server, in the tests of OAuth 2.0
    tried |= {id(row_for(*cause)) for cause in named}
    assert [row for row in TABLE if id(row) not in tried and not _is_unheard_of(row)] == []


def _is_unheard_of(row: Row) -> bool:
    return UNHEARD_OF.get(row.why) == row.event and (row.phases == (Phase.FINAL,) or row.phases == (Phase.RCPT,))


# -- through the relay -------------------------------------------------------------------------------------------------------


async def test_each_recipient_of_one_message_is_settled_on_his_own(tmp_path: Path) -> None:
    async with ScriptedUpstream() as server:
        server.script("rcpt", b"550 5.1.1 nobody", recipient="gone@example.org")
        server.script("rcpt", b"450 4.2.0 later", recipient="busy@example.org", times=1)
        async with running(tmp_path, upstreams={"acme": to(server)}, routes=ROUTES[:1]) as relay:
            await relay.send("app@acme.example", ["here@example.org", "gone@example.org", "busy@example.org"])
            await server.received(3)
            await relay.empty()
            results = Counter((entry.recipient, entry.status) for entry in relay.results())
    assert results == {
        ("here@example.org", "sent"): 1,
        ("gone@example.org", "failed"): 1,
        ("busy@example.org", "deferred"): 1,
        ("busy@example.org", "sent"): 1,
        ("app@acme.example", "sent"): 1,
    }
    delivered = sorted((recipient, transaction.sender) for transaction in server.accepted for recipient in transaction.recipients)
    assert delivered == [("app@acme.example", ""), ("busy@example.org", "app@acme.example"), ("here@example.org", "app@acme.example")]


async def test_who_is_too_many_goes_at_once_and_the_number_is_remembered(tmp_path: Path) -> None:
    everybody = [f"{number}@example.org" for number in range(7)]
    async with ScriptedUpstream(recipients=3) as server, running(tmp_path, upstreams={"acme": to(server)}, routes=ROUTES[:1]) as relay:
        for _ in range(2):
            await relay.send("app@acme.example", everybody)
            await relay.empty()
        assert relay.events("deferred", "failed") == []
    assert [(len(t.recipients), len(t.refused)) for t in server.transactions] == [(3, 4), (3, 0), (1, 0), (3, 0), (3, 0), (1, 0)]
    assert Counter(recipient for t in server.accepted for recipient in t.recipients) == dict.fromkeys(everybody, 2)


@pytest.mark.parametrize("phase", ["greeting", "mail", "data", "final"])
async def test_what_is_temporary_at_any_moment_arrives_once_in_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, phase: ScriptPhase
) -> None:
    monkeypatch.setattr(scheduler, "_REFRESH_SOON_SECONDS", 0.2)
    monkeypatch.setattr(pace, "_MODEST", 100.0)  # so that half of it is no wait
    actions: list[Action | bytes] = [b"451 4.3.0 later", b"421 4.7.0 slow", b"421 4.3.2 down", b"\xff", Close(), Reset(), Half()]
    if phase == "final":
        actions = [action for action in actions if isinstance(action, bytes)]
    async with ScriptedUpstream() as server:
        for action in actions:
            server.script(phase, action, times=1)
        async with running(tmp_path, upstreams={"acme": to(server)}, routes=ROUTES[:1]) as relay:
            for number in range(3):
                await relay.send("app@acme.example", [f"{number}@example.org"])
            await server.received(3)
            await relay.empty()
    assert Counter(r for t in server.accepted for r in t.recipients) == {f"{number}@example.org": 1 for number in range(3)}
    assert {entry.status for entry in relay.results()} == {"deferred", "sent"}
