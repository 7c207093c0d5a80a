"""Logins at one listener: to whom AUTH is offered, of whom it is demanded, and what is said and noted when one fails.

State: none but what it was built with.
"""

from collections.abc import Callable

from relay.config.listeners import LOOPBACK, Listener
from relay.config.values import client_of, is_from
from relay.listener.access import Peer
from relay.listener.credentials import Credentials, LoginResult
from relay.listener.login import Given
from relay.listener.refusals import reason_of
from relay.mail.envelope import Origin
from relay.mail.reply import Reply, printable
from relay.observe.journal import Journal

#: In the reply to EHLO. The second line is for Outlook Express and others that knew a draft of RFC 2554.
EXTENSIONS = ("AUTH PLAIN LOGIN", "AUTH=PLAIN LOGIN")

LOGGED_IN = Reply(235, "2.7.0", "Authentication succeeded")
LOGIN_FIRST = Reply(530, "5.7.0", "Authentication required")
_ALREADY = Reply(503, "5.5.1", "Already authenticated")
_INSIDE = Reply(503, "5.5.1", "AUTH does not belong inside a transaction")
_IN_CLEAR = Reply(538, "5.7.11", "Authentication needs TLS")
_FAILED = Reply(535, "5.7.8", "Authentication failed")
_LATER = Reply(454, "4.7.0", "Too many logins, try again later")


class Logins:
    """What a listener asks of its clients, and who they are. Without `credentials` nobody is right."""

    def __init__(
        self, settings: Listener, credentials: Credentials | None, journal: Journal, *, count: Callable[[str], None]
    ) -> None:  # fmt: skip
        self.any = settings.auth != "none"
        self._required = settings.auth == "required"
        self._in_clear = settings.auth_without_tls and not settings.require_tls
        self._at_home = not settings.require_tls
        self._exempt = settings.auth_exempt
        self._credentials = credentials
        self._journal = journal
        self._count = count

    def offers(self, peer: Peer) -> bool:
        """Whether this client may log in as it is now: nobody on the way may read the password."""
        if not self.any:
            return False
        return peer.secure or self._in_clear or (self._at_home and (peer.uid is not None or is_from(client_of(peer.client), LOOPBACK)))

    def demands(self, peer: Peer) -> bool:
        """Whether this client must have logged in before MAIL."""
        return self._required and not is_from(client_of(peer.client), self._exempt)

    def refusal(self, peer: Peer, origin: Origin, *, inside: bool) -> Reply | None:
        """Why AUTH is not for now. `inside`: of a transaction."""
        if origin.user:
            return _ALREADY
        if inside:
            return _INSIDE
        return None if self.offers(peer) else self._refused(_IN_CLEAR, origin)

    async def verify(self, given: Given, origin: Origin) -> Reply:
        """The reply to a login, in its time."""
        result = LoginResult.WRONG
        if self._credentials is not None:
            result = await self._credentials.verify(given, origin.client)
        if result is LoginResult.RIGHT:
            return LOGGED_IN
        if result is LoginResult.BUSY:
            return self._refused(_LATER, origin)
        self._count(reason_of(_FAILED))
        self._journal.login_failed(
            session=origin.session, listener=origin.listener, client=origin.client, user=printable(given.user), reply=str(_FAILED)
        )
        return _FAILED

    def _refused(self, reply: Reply, origin: Origin) -> Reply:
        self._count(reason_of(reply))
        self._journal.refused(
            session=origin.session, listener=origin.listener, client=origin.client, sender="", recipients="", reply=str(reply)
        )
        return reply
