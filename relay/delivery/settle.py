"""End an attempt: decide what follows, store it with its bounce in one step, and tell the journal.

State: which routes use a fallback at the moment, which have just ceased to, and which did for single messages. Laws: every recipient is
accounted for (law 2); a bounce is durable in the same step that ends its message; an outcome that cannot be stored is stored later, never
forgotten.
"""

import asyncio
import math
import random
from collections.abc import Collection, Sequence

from relay.clock import Clock
from relay.config.model import Config, Retry
from relay.delivery.attempt import Result, for_everybody
from relay.delivery.breaker import Breakers
from relay.delivery.report import Report, Reporter
from relay.delivery.retry import Plan, give_up, plan, unreported
from relay.delivery.verdict import Verdicts
from relay.delivery.verified import Verified
from relay.mail.bounce import Action
from relay.mail.envelope import Recipient
from relay.mail.outcome import Outcome, Phase, Scope, Status
from relay.mail.reply import Reply, told
from relay.observe.journal import Journal
from relay.observe.metrics import Metrics
from relay.routing import Router, upstreams_of
from relay.spool.base import Claim, Lane, LeaseLost, Next, Settlement, Spool, SpoolError
from relay.spool.wait import Waits

_AGAIN_SECONDS = 1.0

#: What makes a report fail may pass, such as a lack of memory. Longer than this, it would keep a relay that stops from its end.
_REPORT_TRIES = 10

#: Until it is so old, a message that waits for an open breaker has not been told of: the shortest time that one is open.
_NEW_SECONDS = 30.0

#: How often it is told of a route that its upstream does not take some of the mail.
_DIVERTING_SECONDS = 3600.0


class Settler:
    """Settles attempts."""

    def __init__(
        self, config: Config, router: Router, spool: Spool, journal: Journal, clock: Clock, *, rng: random.Random,
        breakers: Breakers, metrics: Metrics, waits: Waits | None = None, verified: Verified | None = None,
    ) -> None:  # fmt: skip
        """`waits`: the clients that intake holds for a verdict. `verified`: asked for routes with `verified_only`."""
        self._verified = verified
        self._config = config
        self._router = router
        self._reporter = Reporter(config, router, spool, clock)
        self._spool = spool
        self._journal = journal
        self._clock = clock
        self._rng = rng
        self._breakers = breakers
        self._metrics = metrics
        self._degraded: set[str] = set()
        self._diverting: dict[str, float] = {}  # routes that were degraded by single messages, and until when that is known
        self._recovered: set[str] = set()  # routes whose mail may still wait for a fallback, though their own upstream takes it again
        self._verdicts = Verdicts(waits or Waits(), spool, journal, clock)

    async def settle(self, claim: Claim, result: Result) -> list[Next]:
        """Store what the attempt came to. Answers what is due next, and where. Raises nothing but cancellation."""
        if result.moved is not None:
            return await self._move(claim, result)
        outcomes, recipients = result.outcomes, claim.envelope.recipients
        for outcome in outcomes.values():
            if outcome.status is not Status.SENT:
                claim = await self._dated(claim)
                return await self._conclude(claim, result, self._plan(claim, result))
        # The common end: everybody has been sent to, and nothing is left to decide.
        first = next(iter(outcomes.values()))
        self._verdicts.sent(claim, first.reply)
        report = None
        if any(recipient.notify for recipient in recipients):  # some may have asked to hear of success
            report = await self._report(claim, Plan(outcomes, None, ()), header_block=result.header_block)
        draft = report.draft if report is not None else None
        if not await self._store(Settlement(claim, outcomes, None, draft, used=result.used)):
            return []
        if len(recipients) > 1:
            self._tell(claim, Plan(outcomes, None, ()))
        else:  # without the detour over those who fared alike
            self._tell_sent(claim, recipients, first)
        return self._tell_report(report) if report is not None else []

    def retry_of(self, lane: Lane) -> Retry:
        """How old mail of this lane may become, and when its sender is to hear that it waits."""
        return self._router.retry_of(lane.route)

    @property
    def recovered(self) -> Collection[str]:
        """The routes whose mail may have a home to go to."""
        return self._recovered

    def home_of(self, lane: Lane) -> Lane | None:
        """Where mail that waits for this fallback could go instead: to its route's own upstream, which has just come back."""
        route = self._router.route(lane.route) if lane.route in self._recovered else None
        return Lane(route.upstream, route.name) if route is not None and route.upstream not in (None, lane.upstream) else None

    def returned(self, routes: Collection[str]) -> None:
        """What had a home is on its way there, of these routes."""
        self._recovered.difference_update(routes)

    async def give_up(self, claim: Claim, reason: str, *, waited_for: str = "") -> list[Next]:
        """End a message that nobody tries any more, as failed for `reason`; `""`: its time was up while it was held, or `waited_for`
        something. As `settle`."""
        status, text = (Status.FAILED, reason) if reason else (Status.DEFERRED, waited_for or f"held: {claim.held}")
        decided = give_up(claim, Outcome(status, Scope.MESSAGE, Phase.RESOLVE, Reply(0, "", text)))
        return await self._conclude(claim, Result(decided.outcomes), decided, given_up=reason)

    async def keep(self, claim: Claim, waited_for: str) -> list[Next]:
        """Leave a message that was not tried where it waits, and tell its sender of the delay, once that is due. As `settle`."""
        outcome = Outcome(Status.DEFERRED, Scope.MESSAGE, Phase.RESOLVE, Reply(0, "", waited_for))
        then = Next(claim.created, claim.lane, counted=False)  # nothing that came later is tried before it
        kept = Plan(for_everybody(claim, outcome), then, ())
        report = await self._report(claim, kept)
        if not await self._store(Settlement(report.claim, kept.outcomes, then, report.draft, tried=False)):
            return []
        return [then, *self._tell_report(report)]

    async def _dated(self, claim: Claim) -> Claim:
        """Before a message is found to be old: it may only look like it, as wall time was set while it was tried."""
        retry = self._router.retry_of(claim.lane.route)
        if self._clock.now() - claim.created < min(retry.expire, retry.warn_after or math.inf):
            return claim
        try:
            return await self._spool.dated(claim)
        except SpoolError:  # its record cannot be read: what is known of it must do
            return claim

    def _plan(self, claim: Claim, result: Result) -> Plan:
        route, now, lane = self._router.route(claim.lane.route), self._clock.now(), claim.lane
        upstreams = (upstreams_of(route) if route is not None else ()) or (lane.upstream,)
        closed = {name: when for name in upstreams if (when := self._breakers.due_at(name))}
        unverified = route is not None and route.verified_only and self._verified is not None and self._verified.ready_at(upstreams[0])
        if unverified:
            closed[upstreams[0]] = max(closed.get(upstreams[0], 0.0), unverified)
        elif route is not None and any(outcome.status is Status.DEFERRED for outcome in result.outcomes.values()):
            for item in route.fallback:  # to wait would not change a refusal for good
                if item.after and item.upstream != lane.upstream:
                    since = self._breakers.failing_since(upstreams[0])
                    closed[item.upstream] = max(closed.get(item.upstream, 0.0), (now if since is None else since) + item.after)
        return plan(
            claim, result.outcomes, upstreams=upstreams, retry=self._router.retry_of(lane.route), now=now,
            jitter=self._rng.uniform(0.9, 1.1), closed=closed, tried=result.tried, resumes=result.resumes,
        )  # fmt: skip

    async def _conclude(self, claim: Claim, result: Result, decided: Plan, *, given_up: str = "") -> list[Next]:
        if await self._verdicts.refused(claim, decided, result.used):
            self._tell(claim, decided)
            self._tell_upstream(claim, result)
            return []
        report = await self._report(claim, decided, header_block=result.header_block, given_up=given_up)
        if report.fault:
            decided = unreported(decided, claim.lane, f"the report to its sender cannot be made, see the log: {report.fault}")
        # Mail that waits for an open breaker is put off again and again: that is told once, not every time.
        news = result.tried or decided.fallback != "" or decided.next is None or self._clock.now() < claim.created + _NEW_SECONDS
        settlement = Settlement(report.claim, decided.outcomes, decided.next, report.draft, tried=news, used=result.used)
        if not await self._store(settlement):
            return []
        if news:
            if decided.fallback:
                self._tell_degraded(claim, decided, fails=any(o.status is Status.DEFERRED for o in result.outcomes.values()))
            self._tell(claim, decided)
        self._tell_upstream(claim, result)
        reported = report.addresses(Action.FAILED)
        self._tell_untold(claim, [r for r, _ in decided.failed if r.address not in reported])
        due = [decided.next] if decided.next is not None and not decided.next.held else []
        return [*due, *self._tell_report(report)]

    async def _move(self, claim: Claim, result: Result) -> list[Next]:
        assert result.moved is not None
        self._verdicts.moved(claim, result.moved)
        if not await self._store(Settlement(claim, result.outcomes, result.moved, tried=False)):
            return []
        if not result.moved.held:
            return [result.moved]
        self._tell_held(claim, claim.envelope.recipients, result.moved.held)
        return []

    async def _report(self, claim: Claim, decided: Plan, *, header_block: bytes = b"", given_up: str = "") -> Report:
        """What the sender is told of it; where that fails, made some times again. Has a `fault` where it cannot be made."""
        fault = ""
        for left in reversed(range(_REPORT_TRIES)):
            try:
                return await self._reporter.report(claim, decided, header_block=header_block, given_up=given_up)
            except Exception as error:  # law 9
                if left in (0, _REPORT_TRIES - 1):
                    self._journal.fault(f"a report to a sender, {'trying again' if left else 'given up'}", error, id=claim.id)
                fault = told(str(error)) or type(error).__name__
            await asyncio.sleep(_AGAIN_SECONDS if left else 0)
        return Report(claim, fault=fault)

    async def _store(self, settlement: Settlement) -> bool:
        """Settle, again and again while the spool cannot write: forgetting the outcome would send the message twice. Told each time half
        as often, for all that is under way fails at once, and the log may be on the same disk."""
        failures = 0
        while True:
            try:
                await self._spool.settle(settlement)
                return True
            except LeaseLost:
                self._journal.note("warning", f"{settlement.claim.id}: the claim was taken over; its outcome is not ours to store")
                return False
            except SpoolError as error:
                failures += 1
                if failures.bit_count() == 1:
                    self._journal.fault("storing an outcome, trying again", error, id=settlement.claim.id)
                await asyncio.sleep(_AGAIN_SECONDS)

    def _tell(self, claim: Claim, decided: Plan) -> None:
        """One event for all recipients who fared alike."""
        for outcome, recipients in _by_outcome(claim, decided).items():
            if outcome.status is Status.SENT:
                self._tell_sent(claim, recipients, outcome)
            else:
                self._tell_unsent(claim, recipients, outcome, decided)

    def _tell_sent(self, claim: Claim, recipients: Sequence[Recipient], outcome: Outcome) -> None:
        lane = claim.lane
        self._journal.sent(
            id=claim.id, session=claim.origin.session, route=lane.route, upstream=lane.upstream, sender=claim.envelope.sender or "<>",
            recipients=_names(recipients), size=claim.content.size, reply=str(outcome.reply), attempt=claim.attempt,
            delay=self._clock.now() - claim.created,
        )  # fmt: skip
        if self._degraded:
            self._tell_recovered(lane)

    def _tell_unsent(self, claim: Claim, recipients: Sequence[Recipient], outcome: Outcome, decided: Plan) -> None:
        lane, reply, delay = claim.lane, str(outcome.reply), self._clock.now() - claim.created
        id, session, sender, size = claim.id, claim.origin.session, claim.envelope.sender or "<>", claim.content.size
        names = _names(recipients)
        if outcome.status is Status.FAILED:
            self._journal.failed(
                id=id, session=session, route=lane.route, upstream=lane.upstream, sender=sender, recipients=names, size=size, reply=reply,
                attempt=claim.attempt, delay=delay,
            )  # fmt: skip
            return
        then = decided.next
        assert then is not None, "a deferred recipient has a next time"
        if then.held:
            self._tell_held(claim, recipients, then.held)
            return
        seconds = max(0.0, then.when - self._clock.now())
        self._journal.deferred(
            id=id, session=session, route=lane.route, upstream=lane.upstream, sender=sender, recipients=names, size=size, reply=reply,
            attempt=claim.attempt, delay=delay, in_doubt=outcome.in_doubt or any(r.in_doubt for r in recipients),
            next_try=f"fallback {then.lane.upstream}, now" if decided.fallback else f"in {seconds:.0f} s at {then.lane.upstream}",
        )  # fmt: skip

    def _tell_held(self, claim: Claim, recipients: Sequence[Recipient], reason: str) -> None:
        self._journal.held(
            id=claim.id, route=claim.lane.route, upstream=claim.lane.upstream, sender=claim.envelope.sender or "<>",
            recipients=_names(recipients), reason=reason,
        )  # fmt: skip

    def _tell_report(self, report: Report) -> list[Next]:
        """The report that is queued now, if there is one, and when and where it is due."""
        draft, claim = report.draft, report.claim
        if draft is None:
            return []
        failed, delayed, relayed = (",".join(report.addresses(action)) for action in Action)
        self._journal.bounced(
            id=claim.id, bounce=draft.id, recipients=claim.envelope.sender, failed=failed, delayed=delayed, relayed=relayed
        )  # fmt: skip
        return [Next(draft.due, draft.lane)]

    def _tell_upstream(self, claim: Claim, result: Result) -> None:
        """What the attempt says about everybody who uses this credential or upstream."""
        upstream, outcomes = claim.lane.upstream, result.outcomes.values()
        if refused := next((outcome for outcome in outcomes if outcome.scope is Scope.CREDENTIAL), None):
            settings = self._config.upstreams.get(upstream)
            user = settings.username if settings is not None and settings.username is not None else ""
            self._journal.auth_failed(upstream=upstream, user=user, reply=str(refused.reply))

    def _tell_untold(self, claim: Claim, failed: Sequence[Recipient]) -> None:
        """The log's last word on those whom no report speaks of."""
        if failed:
            sender = claim.envelope.sender
            reason = "the sender asked for no notice" if sender else "a bounce is never bounced"
            self._journal.unbounced(id=claim.id, sender=sender or "<>", recipients=_names(failed), reason=reason)

    def _tell_degraded(self, claim: Claim, decided: Plan, *, fails: bool) -> None:
        """One event when a route begins to use its fallback. `fails`: its upstream does, and not only for this message.

        One that takes other mail, and not what is too large or from a certain sender, would begin and recover with every message.
        """
        now = self._clock.monotonic()
        if claim.lane.route not in self._degraded and (fails or self._diverting.get(claim.lane.route, now) <= now):
            if not fails:
                self._diverting[claim.lane.route] = now + _DIVERTING_SECONDS
            self._degraded.add(claim.lane.route)
            self._recovered.discard(claim.lane.route)
            self._metrics.degraded(route=claim.lane.route, upstream=decided.fallback)
            reply = next(str(o.reply) for o in decided.outcomes.values() if o.status is Status.DEFERRED)
            self._journal.degraded(route=claim.lane.route, upstream=claim.lane.upstream, fallback=decided.fallback, reply=reply)

    @property
    def degraded(self) -> Collection[str]:
        """The routes that use a fallback at the moment."""
        return self._degraded

    def _tell_recovered(self, lane: Lane) -> None:
        """One event when a degraded route's own upstream takes mail again."""
        route = self._router.route(lane.route)
        if lane.route in self._degraded and route is not None and route.upstream == lane.upstream:
            self._degraded.discard(lane.route)
            self._recovered.add(lane.route)
            self._metrics.recovered(route=lane.route, upstream=lane.upstream)
            self._journal.recovered(route=lane.route, upstream=lane.upstream)


def _by_outcome(claim: Claim, decided: Plan) -> dict[Outcome, list[Recipient]]:
    found: dict[Outcome, list[Recipient]] = {}
    for recipient in claim.envelope.recipients:
        found.setdefault(decided.outcomes[recipient.address], []).append(recipient)
    return found


def _names(recipients: Sequence[Recipient]) -> str:
    return ",".join([r.address for r in recipients])
