"""Drafts, outcomes and settlements for tests of the spool and of what stands on it."""

from collections.abc import Iterable
from pathlib import Path

from relay.mail.envelope import Envelope, Origin, Recipient, Summary
from relay.mail.outcome import Failure, Outcome, Phase, outcome_of_failure, outcome_of_reply
from relay.mail.reply import Reply
from relay.spool.base import Claim, Content, Draft, Lane, Next, Settlement, Spool

LANE = Lane("acme", "acme-mail")
OTHER_LANE = Lane("house", "acme-mail")

SENT = outcome_of_reply(Phase.FINAL, Reply(250, "2.0.0", "Ok"))
DEFERRED = outcome_of_reply(Phase.RCPT, Reply(450, "4.2.0", "later"))
FAILED = outcome_of_reply(Phase.RCPT, Reply(550, "5.1.1", "nobody"))
IN_DOUBT = outcome_of_failure(Phase.FINAL, Failure.CLOSED, "gone")


def octets_of(content: Content) -> bytes:
    """All of it, wherever it is."""
    if content.octets is not None:
        return content.octets
    assert content.path is not None
    return content.path.read_bytes()


def content_of(octets: bytes) -> Content:
    return Content(len(octets), octets, eight_bit=not octets.isascii(), dotted=False)


def draft(
    spool: Spool,
    *,
    lane: Lane = LANE,
    recipients: Iterable[str | Recipient] = ("you@example.org",),
    content: Content | bytes = b"Subject: hi\r\n\r\nhello\r\n",
    sender: str = "app@acme.example",
    created: float = 1_800_000_000.0,
    due: float = 0.0,
    prefix: bytes = b"",
    origin: Origin | None = None,
    summary: Summary | None = None,
    envelope: Envelope | None = None,
) -> Draft:
    """A draft with an id of its own, due at once."""
    named = tuple(Recipient(r) if isinstance(r, str) else r for r in recipients)
    return Draft(
        spool.new_id(),
        lane,
        envelope or Envelope(sender, named),
        content_of(content) if isinstance(content, bytes) else content,
        created,
        prefix,
        origin or Origin(),
        summary or Summary(),
        due,
    )


def settlement(
    claim: Claim,
    outcome: Outcome | dict[str, Outcome] = SENT,
    *,
    then: Next | None = None,
    bounce: Draft | None = None,
) -> Settlement:
    """The end of a claim, by default with every recipient sent."""
    outcomes = outcome if isinstance(outcome, dict) else {r.address: outcome for r in claim.envelope.recipients}
    return Settlement(claim, outcomes, then, bounce)


def stored_files(directory: Path) -> list[str]:
    """The names of the files that hold content in a spool's directory, arrived or arriving."""
    return sorted(f"{folder}/{path.name}" for folder in ("content", "incoming") for path in (directory / folder).iterdir())
