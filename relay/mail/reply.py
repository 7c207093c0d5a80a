"""An SMTP reply: code, enhanced status code, text (RFC 5321 section 4.2, RFC 3463).

Both directions use it: what we say to clients and what upstreams say to us. What a reply *means* is decided in `mail.outcome`.
"""

import re
from functools import lru_cache
from typing import NamedTuple

# RFC 3463 section 2; the subject and detail have at most three digits.
_ENHANCED = re.compile(r"([245])\.([0-9]{1,3})\.([0-9]{1,3})(?:[ \t]+|$)")
# How the only line of a reply begins; "250" alone and "250-" go the long way.
_CODES = {b"%d " % code: code for code in range(200, 600)}
# Controls, line and paragraph separators, what reverses the direction of text, lone surrogates, which no file takes.
_UNSAFE = re.compile(r"[^\x20-\x7e\xa0-\u2027\u202f-\u2065\u206a-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]+")
_TEXT_LIMIT = 2000  # characters of one reply that are kept; aiosmtplib and Postfix keep less


class Reply(NamedTuple):
    """One complete reply. `enhanced` is `""` where there was none; `text` is one line, safe to print.

    Code 0 stands for no reply at all: the text then says what happened on the network.
    """

    code: int
    enhanced: str
    text: str

    def __str__(self) -> str:
        if self.code and self.enhanced and self.text:  # nearly all
            return f"{self.code} {self.enhanced} {self.text}"
        return " ".join(part for part in (str(self.code) if self.code else "", self.enhanced, self.text) if part)

    @property
    def positive(self) -> bool:
        return 200 <= self.code < 300

    def line(self) -> bytes:
        """The reply as one line for the wire, without CRLF."""
        return str(self).encode("ascii", "replace")


class MalformedReply(ValueError):
    """The other side sent something that is not an SMTP reply; the text says what."""


def parse_reply(lines: list[bytes]) -> Reply:
    """Read the lines of one reply, without line ends.

    An enhanced code is taken from the first line that has one and removed from every line that repeats it; another one stays
    in the text. Raises MalformedReply when there is no line, a line has no three-digit code, or the codes differ.
    """
    if len(lines) == 1 and len(line := lines[0]) < _TEXT_LIMIT and line.isascii() and (number := _CODES.get(line[:4])):
        text = line[4:].decode().strip()
        if text.isprintable():  # nearly all
            first, _, others = text.partition(" ")
            return Reply(number, first, others.lstrip()) if _is_enhanced(first, number) else Reply(number, "", text)
    code = 0
    enhanced = ""
    texts = []
    for line in lines:
        digits = line[:3]
        if not (len(digits) == 3 and digits.isdigit() and line[3:4] in (b"", b" ", b"-") and 200 <= int(digits) < 600):
            raise MalformedReply(f"not an SMTP reply: {printable(line[:80])!r}")
        if code and int(digits) != code:
            raise MalformedReply(f"one reply with two codes: {code} and {int(digits)}")
        code = int(digits)
        text = line[4:].decode("utf-8", "replace").strip()
        match = _ENHANCED.match(text)
        if match and match[1] == str(code)[0]:
            enhanced = enhanced or match[0].strip()
            if match[0].strip() == enhanced:
                text = text[match.end() :]
        texts.append(text)
    if not code:
        raise MalformedReply("no reply")
    return Reply(code, enhanced, told(" ".join(text for text in texts if text)))


@lru_cache(maxsize=256)
def _is_enhanced(word: str, code: int) -> bool:
    """Whether the word is an enhanced code that goes with `code`: it begins with the same digit."""
    match = _ENHANCED.fullmatch(word)
    return match is not None and match[1] == str(code)[0]


def told(text: str) -> str:
    """What a stranger has told us, made safe to repeat: printable, and no more of it than anybody reads."""
    return printable(text)[:_TEXT_LIMIT]


def printable(text: str | bytes) -> str:
    """Text of a stranger made safe for one line of a log, a reply or a report: control characters become a space."""
    if isinstance(text, bytes):
        text = text.decode("utf-8", "replace")
    return _UNSAFE.sub(" ", text)
