"""What is wrong with a file, and where: the words of `relay check`.

A `Problem` names a place by the path of keys that leads there; a `Finding` names it by line and column, ready to print. Below a
key that holds a secret no path goes on: what stands there may be the secret itself.
"""

import difflib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Final, Literal

KeyPath = tuple[str | int, ...]
Severity = Literal["error", "warning"]

#: Stands where a value was that nobody could read: it is there, and nothing more can be said about it.
BROKEN: Final = object()
_SECRET_KEYS: Final = {"password", "password_hash", "client_secret", "refresh_token", "service_account", "token"}
_SUGGESTIONS: Final = 20  # comparing a name with thousands of others is slow; after so many the cause is one and the same

#: Words of other programs and providers for what is called otherwise here; the first that is known is meant.
_CALLED: Final = {
    "gmail": ("google",), "googlemail": ("google",), "workspace": ("google",), "gsuite": ("google",),
    "office365": ("microsoft365",), "o365": ("microsoft365",), "outlook": ("microsoft365",), "exchange": ("microsoft365",),
    "aws": ("ses",), "amazon": ("ses",),
    "ssl": ("tls", "security"), "smtps": ("tls",), "implicit": ("tls",), "tls": ("security",), "starttls": ("security",),
    "encryption": ("security",), "clear": ("none",), "plaintext": ("none",), "warn": ("warning",),
    "from": ("sender",), "mail_from": ("sender",), "to": ("recipient",), "rcpt_to": ("recipient",), "domain": ("sender",),
    "network": ("client", "networks"), "networks": ("client",), "mynetworks": ("networks",), "allow": ("networks",),
    "server": ("host",), "smarthost": ("host",), "relayhost": ("host",), "address": ("host", "bind"), "hostname": ("host",),
    "listen": ("bind", "listeners"), "port": ("bind",), "login": ("username",), "user": ("username",), "pass": ("password",),
    "secret": ("password",), "cert": ("certificate",), "path": ("directory",), "dir": ("directory",), "action": ("upstream",),
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Finding:
    """One line of `relay check`. `line` and `column` count from 1; 0: the file as a whole. `where` is dotted, or `""`."""

    file: str
    line: int
    column: int
    where: str
    message: str
    severity: Severity = "error"

    def __str__(self) -> str:
        place = f"{self.file}:{self.line}:{self.column}" if self.line else self.file
        warning = "warning: " if self.severity == "warning" else ""
        return ": ".join(part for part in (place, self.where, warning + self.message) if part)


@dataclass(frozen=True, slots=True)
class Problem:
    """Something wrong at a path. `at`: the value, its key, or the section where a key is missing."""

    path: KeyPath
    message: str
    severity: Severity = "error"
    at: Literal["value", "key", "missing"] = "value"


class ConfigError(Exception):
    """The configuration cannot be used. `findings` holds everything that was found, warnings too, in the order of the file."""

    def __init__(self, findings: Iterable[Finding]) -> None:
        self.findings = tuple(findings)
        super().__init__("\n".join(str(finding) for finding in self.findings))


class Suggestions:
    """Names that a mistyped one may have meant, for a bounded number of questions."""

    def __init__(self) -> None:
        self._left = _SUGGESTIONS

    def meant(self, name: str, known: Iterable[str]) -> str:
        """`, did you mean 'acme'?`, or `""`."""
        if not self._left:
            return ""
        self._left -= 1
        by_folded = {word.lower(): word for word in known}
        close = [word for word in _CALLED.get(name.lower(), ()) if word in by_folded]
        close = close or difflib.get_close_matches(name.lower(), by_folded, n=1, cutoff=0.6)
        return f", did you mean {by_folded[close[0]]!r}?" if close else ""


def holds_secret(path: KeyPath) -> bool:
    """Whether a secret stands at this path or around it."""
    return any(part in _SECRET_KEYS for part in path)


def dotted(path: KeyPath) -> str:
    """`routes[2].upstream`; nothing of what stands below a secret's key."""
    text = ""
    for part in path:
        if isinstance(part, int):
            text += f"[{part}]"
        else:
            name = part if part.isprintable() and part and not set(part) & set(".[]: ") else repr(part)
            text += f".{name}" if text else name
        if part in _SECRET_KEYS:
            break
    return text


def kind_of(value: Any) -> str:
    """What a value of the file is, in words."""
    if value is None:
        return "nothing"
    if isinstance(value, bool):
        return "true or false"
    if isinstance(value, dict):
        return "a mapping"
    if isinstance(value, list):
        return "a list"
    return "a number" if isinstance(value, int | float) else "text"
