"""What refusals are counted as: few words, whatever the reply says."""

import pytest

from relay.listener.refusals import reason_of
from relay.mail.reply import Reply


@pytest.mark.parametrize(
    ("reply", "reason"),
    [
        (Reply(554, "5.7.1", "Access denied"), "network"),
        (Reply(421, "4.7.0", "Too many connections"), "connections"),
        (Reply(421, "4.7.0", "Too many connections from one client"), "connections_per_client"),
        (Reply(452, "4.3.1", "Too much mail at once, try again later"), "memory"),
        (Reply(452, "4.3.1", "Insufficient storage, try again later"), "storage"),
        (Reply(550, "5.7.1", "No route for this sender"), "route"),
        (Reply(550, "5.7.1", "not ours to send, app@acme.example"), "route"),
        (Reply(550, "5.6.7", "A non-ASCII address needs SMTPUTF8"), "address"),
        (Reply(553, "5.7.1", "You may not send as app@acme.example"), "sender"),
        (Reply(451, "4.1.8", "whatever an upstream says"), "other"),
        (Reply(550, "5.1.1", "whatever an upstream says"), "other"),
        (Reply(550, "5.7.1", "Too many connections"), "route"),
        (Reply(530, "5.7.0", "STARTTLS first"), "tls"),
        (Reply(530, "5.7.0", "Authentication required"), "auth"),
    ],
)
def test_each_has_one(reply: Reply, reason: str) -> None:
    assert reason_of(reply) == reason
