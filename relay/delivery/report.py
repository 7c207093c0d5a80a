"""The report that an attempt owes to a sender, as a draft for the spool: what it says is `mail.bounce`, where it goes is decided here.

State: none but what it was built with. Laws: a report is routed as the sender's own mail is; nobody is told about a report.
"""

from collections.abc import Sequence
from typing import Final, NamedTuple

from relay.clock import Clock
from relay.config.model import Config
from relay.delivery.retry import Plan
from relay.mail.bounce import Undelivered, make_bounce
from relay.mail.envelope import Envelope, Facts, Origin, Recipient
from relay.routing import Router
from relay.spool.base import Claim, Content, Draft, Lane, Spool


class Report(NamedTuple):
    """A report to be queued, or None where nobody may be told; and the recipients it speaks of."""

    draft: Draft | None
    told: Sequence[str]


NO_REPORT: Final = Report(None, ())


class Reporter:
    """Makes reports."""

    def __init__(self, config: Config, router: Router, spool: Spool, clock: Clock) -> None:
        self._config = config
        self._router = router
        self._spool = spool
        self._clock = clock

    def report(self, claim: Claim, decided: Plan, *, header_block: bytes) -> Report:
        """The report about those whom `decided` gives up. `header_block` is the message's own, without our prefix."""
        now, envelope, new_id = self._clock.now(), claim.envelope, self._spool.new_id()
        message = Undelivered(claim.id, envelope, decided.failed, claim.prefix + header_block, claim.created, claim.lane.upstream)
        bounce = make_bounce(message, reporting_mta=self._config.hostname, bounce_id=new_id, now=now)
        if bounce is None:
            return NO_REPORT
        origin = Origin(claim.origin.listener, claim.origin.client, claim.origin.user, claim.origin.session, envelope.sender)
        route = self._router.match(Facts("", bounce.recipient, origin)).route
        lane = Lane(route.upstream, route.name) if route is not None and route.upstream is not None else claim.lane
        content = Content(len(bounce.content), bounce.content, eight_bit=not bounce.content.isascii())
        reported = Envelope("", (Recipient(bounce.recipient),), smtputf8=not bounce.recipient.isascii())
        return Report(Draft(new_id, lane, reported, content, now, origin=origin, due=now), bounce.recipients)
