"""Secrets as encrypted text: the keys, a secret shut with the newest of them, opened with the one it was shut with.

A key file has one key a line, newest first, so that a new line on top begins a rotation and nothing that stands encrypted is lost. The
text is `KEY.TOKEN`: eight digits that say which key, and a Fernet token (authenticated, with a version of its own; whoever has the key
opens it with other programs, too). So a key that is missing is told from text that is damaged. Neither keys nor secrets are ever said.
"""

import hashlib
import os
import re
import stat
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Final, NoReturn

from relay.config.findings import KeyPath, Problem
from relay.config.secrets import SecretError, read_file

#: Where the key file is when the configuration does not say.
KEY_FILE: Final = "RELAY_SECRET_KEY_FILE"

_KEY: Final = re.compile(r"[A-Za-z0-9_-]{43}=")
_FORM: Final = re.compile(r"([0-9a-f]{8})\.([A-Za-z0-9_-]+={0,2})")


class Keyring:
    """Keys, newest first. Like a secret it is neither printed nor pickled."""

    __slots__ = ("_keys", "_where")

    def __init__(self, keys: Sequence[str], *, where: str = "the key file") -> None:
        self._keys = {_number(key): key for key in keys}  # a key that stands twice keeps its first place
        self._where = where

    @classmethod
    def from_file(cls, path: Path) -> "Keyring":
        """The keys in `path`. Raises SecretError."""
        return cls.from_text(read_file(path), path)

    @classmethod
    def from_text(cls, text: str, path: Path) -> "Keyring":
        """The keys in what was read from `path`. Empty lines and those that begin with # are left out. Raises SecretError."""
        keys = []
        for number, line in enumerate(text.splitlines(), 1):
            if (key := line.strip()) and not key.startswith("#"):
                if not _KEY.fullmatch(key):
                    raise SecretError(f"{path}, line {number}: is no key from `relay secret keygen`")
                keys.append(key)
        if not keys:
            raise SecretError(f"{path} holds no key: `relay secret keygen --out FILE` makes one")
        return cls(keys, where=str(path))

    def encrypt(self, text: str) -> str:
        """`text`, shut with the newest key."""
        from cryptography.fernet import Fernet  # 40 ms that most configurations need not spend

        number, key = next(iter(self._keys.items()))
        return f"{number}.{Fernet(key).encrypt(text.encode()).decode()}"

    def decrypt(self, text: str) -> str:
        """What was encrypted; line breaks and spaces in `text` do no harm. Raises SecretError, without any of it."""
        from cryptography.fernet import Fernet, InvalidToken

        match = _FORM.fullmatch("".join(text.split()))
        if match is None:
            raise SecretError("this is no encrypted secret, or not all of it: `relay secret encrypt` makes one")
        number, token = match.groups()
        if number not in self._keys:
            raise SecretError(f"was encrypted with the key {number}, which is not in {self._where}")
        try:
            return Fernet(self._keys[number]).decrypt(token).decode()
        except (InvalidToken, UnicodeDecodeError):
            raise SecretError("the encrypted secret is damaged or incomplete: encrypt it again") from None

    def is_current(self, text: str) -> bool:
        """Whether `text` is encrypted with the newest key."""
        return "".join(text.split()).startswith(f"{next(iter(self._keys))}.")

    def __repr__(self) -> str:
        return f"Keyring({len(self._keys)} from {self._where})"

    def __reduce__(self) -> NoReturn:
        raise TypeError("keys cannot be pickled")


class Keys:
    """Where the keys are, if anywhere: read at first use."""

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self._ring: Keyring | None = None

    def ring(self) -> Keyring:
        """The keys. Raises SecretError, also when nobody has said where they are."""
        if self.path is None:
            raise SecretError(f"there is no key: name its file with secrets.key_file or ${KEY_FILE}; `relay secret keygen` makes one")
        if self._ring is None:
            self._ring = Keyring.from_file(self.path)
        return self._ring

    def decrypt(self, text: str) -> str:
        """What was encrypted. Raises SecretError."""
        return self.ring().decrypt(text)


def keys_at(named: Path | None, environ: Mapping[str, str]) -> Keys:
    """The keys in the file that the configuration names, else the environment, else none."""
    if named is not None:
        return Keys(named)
    return Keys(Path(os.path.expanduser(environ[KEY_FILE])) if environ.get(KEY_FILE) else None)


def problems(keys: Keys, *, named: bool) -> Iterator[Problem]:
    """What is wrong with a key file. `named`: by the configuration, and not by the environment."""
    if keys.path is None:
        return
    place: KeyPath = ("secrets", "key_file") if named else ()
    try:
        keys.ring()
        mode = stat.S_IMODE(os.stat(keys.path).st_mode)
    except (SecretError, OSError) as error:
        yield Problem(place, str(error))
        return
    if mode & stat.S_IROTH:  # the group may be the service's own, as systemd and Kubernetes have it
        yield Problem(place, f"others can read {keys.path}, and with it every encrypted secret: chmod o-r", "warning")


def new_key() -> str:
    """A key, as it stands in the file."""
    from cryptography.fernet import Fernet

    return Fernet.generate_key().decode()


def _number(key: str) -> str:
    """What names a key without telling it: 32 of the 256 bits of its digest."""
    return hashlib.sha256(key.encode()).hexdigest()[:8]
