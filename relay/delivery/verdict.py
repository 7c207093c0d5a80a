"""What an attempt says to the client that still waits for its verdict (`spool.wait`): everybody sent to, everybody refused, or neither.

A refusal that the client hears takes the place of the bounce, so the message is stored as ended before the client is told.

State: none but what it was built with.
"""

import asyncio

from relay.clock import Clock
from relay.delivery.retry import Plan
from relay.mail.outcome import Outcome, Phase, Status
from relay.mail.reply import Reply
from relay.observe.journal import Journal
from relay.spool.base import Claim, LeaseLost, Next, Settlement, Spool, SpoolError, Used
from relay.spool.wait import Wait, Waits

_AGAIN_SECONDS = 1.0

# Where a failure without a reply is that the upstream lacks what the message or the recipient's address needs.
_BEGUN = (Phase.MAIL, Phase.RCPT)


class Verdicts:
    """Answers waits."""

    def __init__(self, waits: Waits, spool: Spool, journal: Journal, clock: Clock) -> None:
        self._waits = waits
        self._spool = spool
        self._journal = journal
        self._clock = clock

    def sent(self, claim: Claim, reply: Reply) -> None:
        """Everybody has been sent to."""
        if (wait := self._waits.of(claim.id)) is not None:
            wait.sent(claim.id, reply)

    def moved(self, claim: Claim, then: Next) -> None:
        """It goes elsewhere untried: only where it is tried at once does the client wait on."""
        if (then.held or then.when > self._clock.now()) and (wait := self._waits.of(claim.id)) is not None:
            wait.end()

    async def refused(self, claim: Claim, decided: Plan, used: tuple[Used, ...]) -> bool:
        """Whether it was stored as ended, without a bounce, for the client to hear that everybody is refused. `used`: of quotas.

        Anything else ends the wait, apart from a fallback that tries everybody now.
        """
        wait = self._waits.of(claim.id)
        if wait is None or _all(decided, Status.SENT):
            return False
        reply = _refusal(claim, decided)
        if reply is None:
            if not (decided.fallback and _all(decided, Status.DEFERRED)):
                wait.end()
            return False
        if not await wait.refused(claim.id, reply):
            return False
        async with wait.turn:
            return wait.refusing and await self._end(wait, Settlement(claim, decided.outcomes, used=used))

    async def _end(self, wait: Wait, settlement: Settlement) -> bool:
        """Store the end of one part. Where none of the parts is stored yet, its failure turns the refusal into a bounce again."""
        claim = settlement.claim
        while True:
            try:
                await self._spool.settle(settlement)
            except LeaseLost:
                if wait.binding:
                    wait.stored(claim.id)  # whoever has it now will hear the same from the upstream, and report it
                wait.give_up()
                return False
            except SpoolError as error:
                self._journal.fault("storing a refusal that a client waits for", error, id=claim.id)
                wait.give_up()
                if not wait.binding:
                    return False
                await asyncio.sleep(_AGAIN_SECONDS)
            else:
                wait.stored(claim.id)
                return True


def _refusal(claim: Claim, decided: Plan) -> Reply | None:
    """What the upstream said to the first recipient when it has refused them all for good; also that it lacks what all of them need."""
    if len(decided.failed) < len(claim.envelope.recipients) or not all(_by_upstream(outcome) for _, outcome in decided.failed):
        return None
    return decided.failed[0][1].reply


def _by_upstream(outcome: Outcome) -> bool:
    """Whether it was the upstream that refused, and not time or an operator. Where it may have the message all the same, only a bounce
    can say so."""
    return outcome.status is Status.FAILED and not outcome.in_doubt and (outcome.reply.code >= 500 or outcome.phase in _BEGUN)


def _all(decided: Plan, status: Status) -> bool:
    return all(outcome.status is status for outcome in decided.outcomes.values())
