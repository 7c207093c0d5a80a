"""What XOAUTH2 says to a server, and what the server's answer means (developers.google.com/gmail/imap/xoauth2-protocol). Pure."""

import binascii
import json
from base64 import b64decode, b64encode

_MEANINGS = {
    "400": "it cannot use the token",
    "401": "the token has expired, was revoked, or is for something else",
    "403": "the token does not allow to send mail as this user",
}


def initial_response(user: str, token: str) -> bytes:
    return b64encode(f"user={user}\1auth=Bearer {token}\1\1".encode())


def meaning_of(challenge: str) -> str:
    """What the JSON of a refusal says, in words of ours: some servers put what they were shown into theirs."""
    try:
        answer = json.loads(b64decode(challenge, validate=True))
    except (binascii.Error, ValueError, RecursionError):
        return ""
    status = str(answer.get("status", "")) if isinstance(answer, dict) else ""
    if not (status.isascii() and status.isdigit() and len(status) == 3):
        return ""
    return f"status {status}: {_MEANINGS.get(status, 'it refuses the token')}"
