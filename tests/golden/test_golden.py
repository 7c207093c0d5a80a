"""Bounces and rewritten headers against the files beside this one."""

from collections.abc import Callable
from pathlib import Path

import pytest

from relay.mail.bounce import About, Action, Notice, make_bounce
from relay.mail.envelope import Envelope, Recipient
from relay.mail.outcome import Failure, Phase, outcome_of_failure, outcome_of_reply
from relay.mail.reply import Reply
from relay.mail.rewrite import Rewrite, rewrite_header

HERE = Path(__file__).parent
HEADER = (HERE / "headers" / "original.txt").read_bytes()

RULES = {
    "unchanged": None,
    "from": Rewrite(from_name="Acme Billing", from_address="no-reply@acme.example"),
    "from-name": Rewrite(from_name="Büro, Acme"),
    "from-address": Rewrite(from_address="no-reply@acme.example"),
    "fallback": Rewrite(
        from_name="Acme via House",
        from_address="no-reply@house.example",
        reply_to="original",
        envelope_sender="bounces@house.example",
    ),
    "reply-to": Rewrite(reply_to="support@acme.example"),
    "headers": Rewrite(
        set_headers=(("X-Mailer", "relay"), ("X-Tenant", "Größe")),
        add_headers=(("X-Relay", "1"), ("Received", "by nowhere")),
        remove_headers=("X-Originating-IP", "dkim-signature"),
    ),
    "subject": Rewrite(subject_prefix="[acme] "),
    "long": Rewrite(set_headers=(("X-Words", "many words " * 120), ("X-Word", "x" * 1200)), subject_prefix="[Büro] "),
}

REFUSED = outcome_of_reply(Phase.RCPT, Reply(550, "5.1.1", "<bob@example.org>: Recipient address rejected: User unknown"))
REJECTED = outcome_of_reply(Phase.FINAL, Reply(554, "", "Spam " * 60))
EXPIRED = outcome_of_failure(Phase.CONNECT, Failure.UNREACHABLE, "mx.acme.example: connection refused")
BUSY = outcome_of_reply(Phase.RCPT, Reply(450, "4.2.1", "Mailbox busy"))
TAKEN = outcome_of_reply(Phase.FINAL, Reply(250, "2.0.0", "Ok: queued as 4711"))
IN_DOUBT = outcome_of_failure(Phase.FINAL, Failure.TIMEOUT, "no reply within 600 s")

BOUNCES = {
    "refused": [(Recipient("bob@example.org"), REFUSED)],
    "several": [
        (Recipient("bob@example.org", orcpt="rfc822;Bob+40work@example.org"), REFUSED),
        (Recipient("quiet@example.org", notify="NEVER"), REFUSED),
        (Recipient("carol@example.org"), REJECTED),
    ],
    "expired": [(Recipient("bob@example.org"), EXPIRED)],
    "in-doubt": [(Recipient("bob@example.org"), IN_DOUBT)],
    "international": [(Recipient("jürgen@bücher.example"), outcome_of_reply(Phase.RCPT, Reply(550, "5.1.1", "jürgen ist unbekannt")))],
    "full": [(Recipient("bob@example.org"), REFUSED)],
    "given-up": [(Recipient("bob@example.org", in_doubt=True), EXPIRED)],
    "delayed": [(Recipient("bob@example.org"), EXPIRED), (Recipient("carol@example.org"), BUSY)],
    "relayed": [(Recipient("bob@example.org", notify="SUCCESS,FAILURE"), TAKEN)],
    "mixed": [
        (Recipient("bob@example.org", notify="SUCCESS,FAILURE"), TAKEN),
        (Recipient("carol@example.org"), REJECTED),
        (Recipient("dora@example.org"), BUSY),
    ],
}
ACTIONS = {"delayed": [Action.DELAYED] * 2, "relayed": [Action.RELAYED], "mixed": [Action.RELAYED, Action.FAILED, Action.DELAYED]}


Golden = Callable[[str, str | bytes], None]


@pytest.mark.parametrize("name", RULES)
def test_a_rewritten_header_is_as_it_was(golden: Golden, name: str) -> None:
    golden(f"headers/{name}.txt", rewrite_header(HEADER, RULES[name]).decode())


@pytest.mark.parametrize("name", BOUNCES)
def test_a_bounce_is_as_it_was(golden: Golden, name: str) -> None:
    actions = ACTIONS.get(name, [Action.FAILED] * len(BOUNCES[name]))
    notices = [Notice(*fate, action) for fate, action in zip(BOUNCES[name], actions, strict=True)]
    envelope = Envelope(
        "app@acme.example", tuple(notice.recipient for notice in notices), ret="FULL" if name == "full" else "",
        envid="order+2B7" if name == "several" else "",
    )  # fmt: skip
    given_up = "it was held until its time was up; no route takes its sender any more" if name == "given-up" else ""
    about = About(
        "0123456789abc", envelope, notices, HEADER, 1_800_000_000.0, 1_800_345_600.0, "acme", "mx.acme.example", b"\r\nhello\r\n", given_up
    )  # fmt: skip
    now = 1_800_014_400.0 if name in ACTIONS else 1_800_345_600.0
    bounce = make_bounce(about, reporting_mta="relay.example.net", bounce_id="0123456789abd", now=now)
    assert bounce is not None
    golden(f"bounces/{name}.eml", bounce.content.decode())
