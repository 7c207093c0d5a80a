"""What a refusal is counted as. Pure.

A table from replies to few words: metrics have a listener and a reason, and a reply's text may be an upstream's or have an address in it.

Law: there are as many reasons as stand here; a reply that does not is one of the rest.
"""

from typing import Final

from relay.mail.reply import Reply

# Replies of ours with the same codes.
_REASONS: Final = {
    Reply(421, "4.7.0", "Too many connections"): "connections",
    Reply(421, "4.7.0", "Too many connections from one client"): "connections_per_client",
    Reply(452, "4.3.1", "Too much mail at once, try again later"): "memory",
    Reply(530, "5.7.0", "STARTTLS first"): "tls",
}

_BY_CODES: Final = {
    (421, "4.3.2"): "stopping",
    (451, "4.3.0"): "fault",
    (452, "4.3.1"): "storage",
    (452, "4.5.3"): "recipients",
    (454, "4.7.0"): "auth",
    (501, "5.1.3"): "address",
    (501, "5.1.7"): "address",
    (530, "5.7.0"): "auth",
    (535, "5.7.8"): "auth",
    (538, "5.7.11"): "auth",
    (550, "5.6.0"): "line_ends",
    (550, "5.6.7"): "address",
    (550, "5.7.1"): "route",
    (552, "5.3.4"): "size",
    (553, "5.7.1"): "sender",
    (554, "5.4.6"): "loop",
    (554, "5.5.1"): "no_smtp",
    (554, "5.6.0"): "long_line",
    (554, "5.7.1"): "network",
}


def reason_of(reply: Reply) -> str:
    """The word for `reply` in the metrics."""
    return _REASONS.get(reply) or _BY_CODES.get((reply.code, reply.enhanced)) or "other"
