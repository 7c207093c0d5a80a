"""What becomes of a message after an attempt: done, tried again, moved to a fallback, or given up. Pure.

Laws: a recipient in doubt never leaves its upstream; a fallback is tried only where every recipient that still waits may use it; what
has expired fails with the last reply it got.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from relay.config.model import Retry
from relay.mail.envelope import Recipient
from relay.mail.outcome import Outcome, Status
from relay.mail.reply import Reply
from relay.spool.base import Claim, Lane, Next

# RFC 3463 section 3.5: delivery time expired.
_EXPIRED = "4.4.7"


class Plan(NamedTuple):
    """The end of one attempt. `fallback`: the upstream the message moves to, or `""`.

    `failed`: who shall be told of in a bounce, each with the outcome of the attempt itself; deferred means that time is up.
    """

    outcomes: Mapping[str, Outcome]
    next: Next | None
    failed: Sequence[tuple[Recipient, Outcome]]
    fallback: str = ""
    throttled: bool = False


def delay_seconds(retry: Retry, attempts: int) -> float:
    """Seconds until the next try after `attempts` of them, without jitter: doubling from `first` up to `max`."""
    return min(retry.max, retry.first * 2.0 ** min(attempts - 1, 30))


def plan(
    claim: Claim, outcomes: Mapping[str, Outcome], *, upstreams: Sequence[str], retry: Retry, now: float, jitter: float
) -> Plan:  # fmt: skip
    """Decide. `upstreams` are the route's, in the order they are tried; `jitter` multiplies the delay, about 0.9 to 1.1."""
    recipients = claim.envelope.recipients
    left = _after(claim.lane.upstream, upstreams)
    waiting = [r for r in recipients if _waits(r, outcomes[r.address], left)]
    doubt = any(r.in_doubt or outcomes[r.address].in_doubt for r in waiting)
    fallback = left if waiting and not doubt and all(outcomes[r.address].fallback for r in waiting) else ""
    decided = {**outcomes, **{r.address: outcomes[r.address]._replace(status=Status.DEFERRED) for r in waiting}}
    if not fallback and now >= claim.created + retry.expire:
        decided = {address: _expired(outcome) for address, outcome in decided.items()}
    deferred = [decided[r.address] for r in recipients if decided[r.address].status is Status.DEFERRED]
    failed = [(r, outcomes[r.address]) for r in recipients if decided[r.address].status is Status.FAILED]
    if not deferred:
        return Plan(decided, None, failed)
    if fallback:
        return Plan(decided, Next(now, Lane(fallback, claim.lane.route), counted=False), failed, fallback)
    throttled = any(outcome.throttled for outcome in deferred)
    stays = doubt or throttled or not all(outcome.fallback for outcome in deferred)
    upstream = claim.lane.upstream if stays else upstreams[0]
    seconds = jitter * delay_seconds(retry, 1 if throttled else claim.attempt)
    when = max(now, min(now + seconds, claim.created + retry.expire))
    return Plan(decided, Next(when, Lane(upstream, claim.lane.route), counted=not throttled), failed, throttled=throttled)


def _waits(recipient: Recipient, outcome: Outcome, left: str) -> bool:
    """Whether the recipient is still to be served, here or by the fallback that is `left`."""
    return outcome.status is Status.DEFERRED or (
        outcome.status is Status.FAILED and outcome.fallback and left != "" and not recipient.in_doubt
    )


def _after(upstream: str, upstreams: Sequence[str]) -> str:
    """The upstream behind this one, or `""`."""
    place = upstreams.index(upstream) + 1 if upstream in upstreams else len(upstreams)
    return upstreams[place] if place < len(upstreams) else ""


def _expired(outcome: Outcome) -> Outcome:
    if outcome.status is not Status.DEFERRED:
        return outcome
    return outcome._replace(status=Status.FAILED, reply=Reply(0, _EXPIRED, f"delivery time expired; last reply: {outcome.reply}"))
