"""What a service account shows a token server instead of a refresh token: who it is and for whom it speaks, signed (RFC 7523, RFC 7515)."""

import json
from base64 import urlsafe_b64encode

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.padding import PKCS1v15
from cryptography.hazmat.primitives.asymmetric.rsa import RSAPrivateKey
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import load_pem_private_key

from relay.config.secrets import Secret

_LIFETIME_SECONDS = 3600  # the most that Google takes


def assertion(key: Secret, *, audience: str, scope: str, subject: str, now: float) -> str:
    """A signed JSON web token. `now`: epoch. Raises ValueError where the key cannot be used."""
    account = json.loads(key.reveal())
    issued = int(now) - 10  # a clock that is ahead by less costs nothing
    claims = {"iss": account["client_email"], "sub": subject, "aud": audience, "scope": scope, "iat": issued}
    header = {"alg": "RS256", "typ": "JWT"} | ({"kid": account["private_key_id"]} if account.get("private_key_id") else {})
    signed = b".".join(_encoded(json.dumps(part).encode()) for part in (header, claims | {"exp": issued + _LIFETIME_SECONDS}))
    return b".".join((signed, _encoded(_private_key(account["private_key"]).sign(signed, PKCS1v15(), SHA256())))).decode()


def _private_key(pem: str) -> RSAPrivateKey:
    try:
        private = load_pem_private_key(pem.encode(), password=None)
    except (ValueError, TypeError, UnsupportedAlgorithm):
        raise ValueError("the private_key of the service account cannot be read") from None
    if not isinstance(private, RSAPrivateKey):
        raise ValueError("the private_key of the service account is no RSA key")
    return private


def _encoded(octets: bytes) -> bytes:
    return urlsafe_b64encode(octets).rstrip(b"=")
