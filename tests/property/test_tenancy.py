"""No message leaves with a credential that does not own its domain: whatever the routes, rewrites, fallbacks, answers and changes.

The real intake, attempts and settles, between a spool in memory and upstreams that look at every octet they are given. What an upstream
may be given is decided here anew, without the code that is being tested: by the library's parser and by comparing text.
"""

import asyncio
import random
import re
from collections.abc import Collection, Iterator
from email.parser import BytesHeaderParser
from email.policy import compat32
from email.utils import getaddresses
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from relay.clock import ManualClock
from relay.config.model import Config
from relay.delivery.attempt import Attempts
from relay.delivery.breaker import Breakers
from relay.delivery.settle import Settler
from relay.intake import Intake, Transaction
from relay.mail.envelope import Origin, Recipient
from relay.mail.outcome import Failure, Outcome, Phase, outcome_of_failure, outcome_of_reply
from relay.mail.reply import Reply
from relay.observe.metrics import Metrics
from relay.routing import Router
from relay.spool.base import Claim, Content, Lane
from relay.spool.memory import MemorySpool
from relay.upstream.transaction import Outgoing
from tests.unit.delivery import SENT, Log

DOMAINS = ("a.example", "b.example", "c.example")
ADDRESSES = tuple(f"{local}@{domain}" for domain in DOMAINS for local in ("app", "boss", "app+tag"))
UPSTREAMS = ("one", "two", "three")
ANSWERS = (
    SENT,
    outcome_of_reply(Phase.RCPT, Reply(550, "5.1.1", "nobody")),
    outcome_of_reply(Phase.MAIL, Reply(553, "5.7.1", "not you")),
    outcome_of_reply(Phase.MAIL, Reply(454, "4.7.0", "slow down")),
    outcome_of_reply(Phase.AUTH, Reply(535, "5.7.8", "no")),
    outcome_of_failure(Phase.CONNECT, Failure.TIMEOUT, "no answer"),
    outcome_of_failure(Phase.FINAL, Failure.CLOSED, "gone"),
)
ROUNDS = 12
_BLANK_BEFORE_COLON = re.compile(rb"^([!-9;-~]+)[ \t]+:", re.MULTILINE)

address = st.sampled_from(ADDRESSES)
upstream_name = st.sampled_from(UPSTREAMS)


def optional(strategy: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    return st.one_of(st.none(), strategy)


def sparse(**keys: st.SearchStrategy[Any]) -> st.SearchStrategy[dict[str, Any]]:
    """A mapping with some of these keys."""
    return st.fixed_dictionaries({}, optional=keys)


REWRITES = sparse(
    **{
        "from": st.one_of(address, address.map(lambda each: f"Somebody <{each}>"), st.just({"name": "Else"})),
        "reply_to": st.one_of(address, st.just("original")),
        "envelope_sender": address,
        "set_headers": st.dictionaries(st.sampled_from(["Sender", "From", "X-Tenant"]), address, max_size=2),
        "add_headers": st.dictionaries(st.sampled_from(["Sender", "From", "X-Relay"]), address, max_size=2),
        "remove_headers": st.lists(st.sampled_from(["Sender", "From", "X-Mailer"]), unique=True, max_size=2),
        "bcc": address,
    }
)
CONDITIONS = st.sampled_from([*DOMAINS, *DOMAINS, *ADDRESSES, "*.example", "<>", "*", "*"])
SENDERS = st.lists(st.sampled_from([*DOMAINS, *DOMAINS, *ADDRESSES[:-1]]), min_size=1, max_size=2, unique=True)
OTHER_KEYS: dict[str, Any] = {"null_sender": st.one_of(st.just("keep"), address), "limits": st.just({"recipients": 1})}
BOUND = st.fixed_dictionaries({"senders": SENDERS}, optional=OTHER_KEYS)
ANY = st.fixed_dictionaries({}, optional={"senders": SENDERS, **OTHER_KEYS})
ROUTES = st.fixed_dictionaries(
    {"sender": st.lists(CONDITIONS, min_size=1, max_size=2, unique=True), "upstream": upstream_name},
    optional={
        "recipient": st.sampled_from(["x.example", "y.example"]),
        "rewrite": REWRITES,
        "fallback": st.lists(st.fixed_dictionaries({"upstream": upstream_name}, optional={"rewrite": REWRITES}), max_size=2),
    },
)
CONFIGS = st.fixed_dictionaries(
    {
        "upstreams": st.fixed_dictionaries({"one": BOUND, "two": BOUND, "three": ANY}),
        "routes": st.lists(ROUTES, min_size=1, max_size=4),
    }
)
FIELDS = st.lists(
    st.one_of(
        address.map(lambda each: f"From: {each}\r\n"),
        address.map(lambda each: f"From: Somebody <{each}>\r\n"),
        st.tuples(address, address).map(lambda two: f'From: "{two[0]}" <{two[1]}>\r\n'),
        st.tuples(address, address).map(lambda two: f"From: {two[0]}, {two[1]}\r\n"),
        st.tuples(address, address).map(lambda two: f"From: {two[0]}\r\n <{two[1]}>\r\n"),
        st.tuples(address, address).map(lambda two: f"From: ({two[0]}) {two[1]}\r\n"),
        address.map(lambda each: f"fRoM : {each.upper()}\r\n"),
        address.map(lambda each: f"From: group: {each};\r\n"),
        address.map(lambda each: f"Sender: {each}\r\n"),
        address.map(lambda each: f"Reply-To: {each}\r\n"),
        st.just("X-Mailer: x\r\n"),
    ),
    max_size=3,
)
RECIPIENTS = st.lists(st.sampled_from(["u@x.example", "v@y.example", "w@z.example"]), min_size=1, max_size=3, unique=True)


@st.composite
def mails(draw: st.DrawFn) -> tuple[str, list[str], list[str]]:
    """Sender, header fields and recipients: more often than not honest ones, for what is refused at once shows nothing."""
    sender = draw(address)
    honest = [f"From: {sender}\r\n"]
    fields = honest if draw(st.booleans()) else draw(FIELDS)
    return draw(st.sampled_from([sender, sender, ""])), fields, draw(RECIPIENTS)


def config_of(drawn: dict[str, Any]) -> Config | None:
    """The configuration, or None where it is none."""
    upstreams = {name: {"host": "same.example", "security": "none", **keys} for name, keys in drawn["upstreams"].items()}
    retry = {"first": "1m", "max": "10m", "expire": "1h", "warn_after": "10m"}
    try:
        return Config.model_validate({"hostname": "relay.test", "upstreams": upstreams, "routes": drawn["routes"], "retry": retry})
    except ValidationError:
        return None


def owned(senders: Collection[str], who: str) -> bool:
    who = who.lower()
    local, _, domain = who.rpartition("@")
    return any(each in (domain, who, f"{local.partition('+')[0]}@{domain}") for each in senders)


class Guard:
    """Upstreams that answer at random, and note what no credential of theirs may send."""

    def __init__(self, config: Config, answers: Iterator[Outcome]) -> None:
        self.config = config
        self.given = 0
        self.leaks: list[str] = []
        self._answers = answers

    def recipients_limit(self, name: str) -> int | None:
        return None

    riding = frozenset[str]()

    async def send(self, name: str, message: Outgoing) -> list[Outcome]:
        self.given += 1
        senders = self.config.upstreams[name].senders
        if senders:
            self.leaks += [f"{name}, bound to {', '.join(senders)}, was given {what}" for what in self._strangers(senders, message)]
        return [next(self._answers) for _ in message.recipients]

    def _strangers(self, senders: Collection[str], message: Outgoing) -> Iterator[str]:
        if message.sender and not owned(senders, message.sender):
            yield f"MAIL FROM:<{message.sender}>"
        block = message.octets.partition(b"\r\n\r\n")[0]
        block = _BLANK_BEFORE_COLON.sub(rb"\1:", block)  # RFC 5322 section 4.5.8; the parser ends there
        fields = BytesHeaderParser(policy=compat32).parsebytes(block + b"\r\n\r\n")
        authors = fields.get_all("From", [])
        if len(authors) != 1:
            yield f"{len(authors)} fields From"
        for field, values in (("From", authors), ("Sender", fields.get_all("Sender", []))):
            for _, found in getaddresses([str(value) for value in values]):
                if not owned(senders, found):
                    yield f"{field}: {found}"


class Nowhere:
    """A way to delivery that takes nothing at once: everything waits in the spool."""

    def reserve(self, lane: Lane) -> bool:
        return False

    def release(self, lane: Lane) -> None:
        raise AssertionError("nothing was reserved")

    def start(self, claim: Claim) -> None:
        raise AssertionError("nothing was reserved")

    def wake(self, lane: Lane, when: float) -> None:
        pass

    def paused(self, lane: Lane) -> bool:
        return False

    def attempting(self, message_id: str, upstreams: Collection[str]) -> bool:
        return False


async def carry(directory: Path, configs: list[Config], mail: list[tuple[str, list[str], list[str]]], seed: int) -> Guard:
    """Take all mail in under the first configuration, and let it go its way, from the middle of it on under the last one."""
    clock, rng = ManualClock(), random.Random(seed)
    log = Log(directory, clock)
    spool = MemorySpool(directory / "spool", clock, backoff=lambda attempts: 60.0)
    guard = Guard(configs[0], iter(lambda: rng.choice(ANSWERS), None))
    intake = Intake(configs[0], Router(configs[0]), spool, Nowhere(), log.journal, clock)
    accepted = 0
    for sender, fields, recipients in mail:
        transaction = intake.begin(Origin("local", "127.0.0.1", "", "S1"), "app", "ESMTP", sender, smtputf8=False)
        if isinstance(transaction, Transaction):
            taken = [intake.add(transaction, Recipient(each, "SUCCESS,FAILURE"), limit=10) for each in recipients]
            if None in taken:
                octets = "".join(fields).encode() + b"Subject: hi\r\n\r\nhello\r\n"
                accepted += (await intake.accept(transaction, Content(len(octets), octets), octets)).positive
    for number in range(ROUNDS):
        config = guard.config = configs[0] if number < ROUNDS // 2 else configs[-1]
        metrics, router = Metrics(), Router(config)
        breakers = Breakers(config.retry, log.journal, metrics, clock)
        attempts = Attempts(config, router, guard, log.journal, clock, breakers=breakers)  # type: ignore[arg-type]
        settler = Settler(config, router, spool, log.journal, clock, rng=rng, breakers=breakers, metrics=metrics)
        for lane in await spool.next_due():
            for claim in await spool.claim(lane, 100):
                await settler.settle(claim, await attempts.send(claim, fresh=False))
        for claim in await spool.overdue(100) if number == ROUNDS - 2 else ():
            await settler.give_up(claim, "")
        clock.advance(601 if number < ROUNDS - 3 else 4000)
    await spool.close()
    assert not log.events("fault"), log.text()
    guard.leaks += [] if accepted or not guard.given else ["something that nobody sent"]
    return guard


@settings(max_examples=150, suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much])
@given(drawn=st.lists(CONFIGS, min_size=1, max_size=2), mail=st.lists(mails(), min_size=1, max_size=4), seed=st.integers(0, 2**16))
def test_no_credential_sends_for_a_stranger(
    tmp_path_factory: pytest.TempPathFactory, drawn: list[dict[str, Any]], mail: list[tuple[str, list[str], list[str]]], seed: int
) -> None:
    configs = [config for config in map(config_of, drawn) if config is not None]
    if configs:
        guard = asyncio.run(carry(tmp_path_factory.mktemp("relay"), configs, mail, seed))
        assert guard.leaks == []
