"""Why there is no access token: what the token server says, or what keeps us from asking it."""

from relay.mail.outcome import Failure


class TokenError(Exception):
    """No token. `failure` is what that means for mail, `error` the server's own code, `sign_in` whether signing in again helps.

    `wait_seconds`: how long it wants to be left alone.
    """

    def __init__(self, failure: Failure, text: str, *, error: str = "", sign_in: bool = False, wait_seconds: float = 0.0) -> None:
        super().__init__(text)
        self.failure = failure
        self.error = error
        self.sign_in = sign_in
        self.wait_seconds = wait_seconds
