"""How the relay keeps the passwords of its own users: as scrypt hashes (RFC 7914), and how user names and passwords compare (RFC 4013).

A hash reads `scrypt$N$r$p$salt$hash`, the last two in base64. What a hash may cost is bounded: a file must not stall the relay at the
first login. Pure, but for the salt; hashing takes a tenth of a second and 32 MiB, and lets other threads run meanwhile.
"""

import hashlib
import hmac
import re
import secrets
import unicodedata
from binascii import Error as Base64Error
from binascii import a2b_base64, b2a_base64
from typing import Final, NamedTuple

#: RFC 4616 section 2 sets this bound for names and passwords.
CREDENTIAL_LIMIT_BYTES: Final = 255

# What hash-password uses: 32 MiB for each guess. More memory than this times the threads that verify would show in a small container.
_COST, _BLOCK, _LANES = 2**15, 8, 1
_SALT_BYTES, _HASH_BYTES = 16, 32
_MEMORY_LIMIT_BYTES: Final = 256 * 2**20
_WORK_LIMIT: Final = 2**24  # N times r times p: about eight seconds on a slow machine
_FORM = re.compile(r"scrypt\$(\d{1,8})\$(\d{1,4})\$(\d{1,4})\$([A-Za-z0-9+/]{2,172}={0,2})\$([A-Za-z0-9+/]{2,172}={0,2})")


class ScryptHash(NamedTuple):
    """One stored password. `cost`, `block` and `lanes` are the N, r and p of RFC 7914."""

    cost: int
    block: int
    lanes: int
    salt: bytes
    digest: bytes

    def __repr__(self) -> str:
        return f"ScryptHash(cost={self.cost}, block={self.block}, lanes={self.lanes})"

    @property
    def work(self) -> int:
        """How long it takes, compared with others."""
        return self.cost * self.block * self.lanes

    def matches(self, password: str) -> bool:
        """Whether `password`, as `prepared` gives it, is the one. Slow."""
        return hmac.compare_digest(_derive(password, self), self.digest)


def parse_hash(text: str) -> ScryptHash:
    """A hash out of the file. Raises ValueError, which does not repeat it."""
    match = _FORM.fullmatch(text)
    if not match:
        raise ValueError("must be a hash from `relay hash-password`, scrypt$N$r$p$salt$hash")
    cost, block, lanes = (int(match[group]) for group in (1, 2, 3))
    try:
        salt, digest = (a2b_base64(match[group].rstrip("=") + "===") for group in (4, 5))
    except Base64Error:
        raise ValueError("the salt or the hash is not base64") from None
    if len(salt) < 8 or not 16 <= len(digest) <= 64:
        raise ValueError("the salt must have at least 8 bytes, and the hash 16 to 64")
    if cost < 2 or cost & (cost - 1) or not block or not lanes:
        raise ValueError("N must be a power of two, r and p at least 1")
    found = ScryptHash(cost, block, lanes, salt, digest)
    if 128 * cost * block > _MEMORY_LIMIT_BYTES or found.work > _WORK_LIMIT:
        raise ValueError("this hash would take too much time or memory for each login")
    return found


def hash_password(password: str) -> str:
    """The hash of a password, with a salt of its own. Raises ValueError for a password that no client could send."""
    password = checked(password)
    made = ScryptHash(_COST, _BLOCK, _LANES, secrets.token_bytes(_SALT_BYTES), b"\0" * _HASH_BYTES)
    salt, digest = (b2a_base64(octets, newline=False).decode().rstrip("=") for octets in (made.salt, _derive(password, made)))
    return f"scrypt${made.cost}${made.block}${made.lanes}${salt}${digest}"


def checked(text: str) -> str:
    """A name or password to be stored, prepared. Raises ValueError for one that could never be used."""
    text = prepared(text)
    if not text:
        raise ValueError("must not be empty")
    if len(text.encode()) > CREDENTIAL_LIMIT_BYTES:
        raise ValueError(f"must have at most {CREDENTIAL_LIMIT_BYTES} bytes")
    return text


def prepared(text: str) -> str:
    """The form in which names and passwords compare: SASLprep (RFC 4013). Raises ValueError for characters that it forbids."""
    if text.isascii():
        if not text.isprintable():
            raise ValueError("must not contain control characters")
        return text
    import stringprep  # its tables take memory that most relays never need

    mapped = "".join(" " if stringprep.in_table_c12(c) else "" if stringprep.in_table_b1(c) else c for c in text)
    text = unicodedata.normalize("NFKC", mapped)
    forbidden = (
        stringprep.in_table_c12, stringprep.in_table_c21_c22, stringprep.in_table_c3, stringprep.in_table_c4, stringprep.in_table_c5,
        stringprep.in_table_c6, stringprep.in_table_c7, stringprep.in_table_c8, stringprep.in_table_c9,
    )  # fmt: skip
    if any(table(character) for character in text for table in forbidden):
        raise ValueError("must not contain control characters, or others that SASLprep (RFC 4013) forbids")
    if any(map(stringprep.in_table_d1, text)):  # RFC 3454 section 6: from right to left throughout, or not at all
        ends = stringprep.in_table_d1(text[0]) and stringprep.in_table_d1(text[-1])
        if not ends or any(map(stringprep.in_table_d2, text)):
            raise ValueError("must not mix directions of writing (RFC 3454 section 6)")
    return text


def _derive(password: str, like: ScryptHash) -> bytes:
    cost, block, lanes, salt, digest = like
    memory = 128 * block * (cost + lanes + 2)  # as OpenSSL counts it
    return hashlib.scrypt(password.encode(), salt=salt, n=cost, r=block, p=lanes, maxmem=memory, dklen=len(digest))
