"""The header block as bytes: where it ends, its fields, what a few of them say (RFC 5322 section 2.2).

Nothing here is ever serialised again: cutting and joining gives back the same bytes, junk lines included. Reading is strict where
tenancy depends on it (`from_address` fails closed) and forgiving where only a person looks (`unfold`). Content is expected with
CRLF line ends, as it is stored; a bare LF counts as a line end too, because some receivers see it so.
"""

import re
from binascii import Error as Base64Error
from binascii import a2b_base64, a2b_qp
from collections.abc import Iterable, Mapping, Sequence
from encodings import aliases, normalize_encoding
from functools import lru_cache
from typing import NamedTuple

from relay.mail.address import AddressError, domain_of, local_of, parse_path
from relay.mail.envelope import NO_SUMMARY, Summary
from relay.mail.reply import printable

_SUMMARY_LIMIT = 200  # characters
_SHOWN_LIMIT_OCTETS = 4096  # of a field, when it is decoded for a person
_MAILBOX_LIMIT_OCTETS = 4096  # a From longer than this is not read
_REMEMBERED_OCTETS = 500  # a From may have a megabyte, and thousands are remembered
_RUN_LIMIT = 16384  # characters of neighbouring encoded words: a few of Python's codecs take quadratic time

# The mbox line `From app Tue Nov…` before the header is junk that old programs write; before anything else it is the text of a mail.
_FIRST_LINE = re.compile(rb"(?:>?From [^\n]*+\n)*[!-9;-~]++[ \t]*+:")
_FIELD = re.compile(rb"[^\n]*\n(?:[ \t][^\n]*\n?)*|[^\n]+")
# Before the colon RFC 5322 has blanks. Exim takes any white space there, folds too, for a field of that name.
_NAME = re.compile(rb"([!-9;-~]++)\s*+:")
_FIELD_NAME = re.compile(r"[!-9;-~]{1,76}")
# Begins with a literal, which `re` finds much faster than `^`.
_SCANNED = re.compile(
    rb"\n(received|message-id|date|from|sender|to|cc|subject)[^\S\n]*+(?:\n[ \t][^\S\n]*+)*:([^\n]*+(?:\n[ \t][^\n]*+)*+)", re.IGNORECASE
)
_FOLD = re.compile(rb"\r?\n(?=[ \t])")
_WORD = r"=\?([!-)+-<>@-Z^-~]{1,40})(?:\*[A-Za-z0-9-]*)?\?([bBqQ])\?([^?\s]*)\?="
_ENCODED_WORD = re.compile(_WORD)
# Those that Python knows; the ones written out have no second name. No other is looked up: Python remembers each name that it looked for in
# vain, and messages may make up names by the thousand.
_CHARSETS = frozenset((
    *aliases.aliases, *aliases.aliases.values(), "cp1006", "cp720", "cp737", "cp856", "cp874", "cp875", "koi8_t", "koi8_u", "mac_arabic",
    "mac_croatian", "mac_farsi", "mac_romanian", "utf_8_sig",
))  # fmt: skip
_ENCODED_RUN = re.compile(rf"{_WORD}(?:\s+{_WORD})*")

# `=?` in an address is kept for the slow way. Possessive throughout: a stranger's field costs linear time.
_PLAIN_FROM = re.compile(
    rb"(?:([A-Za-z0-9!#$%&'*+/=?^_`{|}~. \t\x80-\xff-]*+|[ \t]*+\"[^\"\\\r\n\x00]*+\"[ \t]*+)"
    rb"<([A-Za-z0-9!#$%&'*+/^_`{|}~.-]++@[A-Za-z0-9.-]++)>|[ \t]*+([A-Za-z0-9!#$%&'*+/^_`{|}~.-]++@[A-Za-z0-9.-]++))[ \t]*+"
)
_TOKEN = re.compile(
    rb"(?P<blank>[ \t]+)|(?P<quoted>\"(?:[^\"\\\r\n\x00]|\\[^\r\n\x00])*\")|(?P<word>[A-Za-z0-9!#$%&'*+/=?^_`{|}~.\x80-\xff-]+)"
    rb"|(?P<special>[<>@\[\]:])"
)


class Field(NamedTuple):
    """One header field: its name as written (`b""` for a junk line) and all its bytes, folds and line ends included."""

    name: bytes
    raw: bytes


class Mailbox(NamedTuple):
    """One mailbox as a field has it: the display name's raw bytes (without a comment's brackets), and the address."""

    name: bytes
    address: str


#: What one look at a header block tells: of the fields that intake has to know, by their names in lower case, the raw values, which are
#: the bytes behind the colon, folds and the last CR included.
Scan = Mapping[bytes, Sequence[bytes]]


def block_of(content: bytes) -> bytes:
    """The header block of content, with its last line end.

    Content whose first line is no field has none: `separator` tells what to put between. Content without an empty line is all header
    block.
    """
    if not _FIRST_LINE.match(content):
        return b""
    end = content.find(b"\r\n\r\n")
    return content if end < 0 else content[: end + 2]


def split(content: bytes) -> tuple[bytes, bytes]:
    """Cut content into its header block and the rest, which begins with the empty line, if there is one: `block + rest == content`."""
    block = block_of(content)
    return block, content[len(block) :]


def separator(rest: bytes) -> bytes:
    """What must stand between a header block and a `rest` that `split` gave: nothing, or the missing empty line."""
    return b"" if not rest or rest.startswith(b"\r\n") else b"\r\n"


def fields(block: bytes) -> list[Field]:
    """The fields of a header block in their order. Joined, their `raw` is the block."""
    found = []
    for raw in _FIELD.findall(block):
        match = _NAME.match(raw)
        found.append(Field(match[1] if match else b"", raw))
    return found


def join(parts: Iterable[Field]) -> bytes:
    """The header block of these fields."""
    return b"".join([part.raw for part in parts])


def is_field_name(text: str) -> bool:
    """Whether `text` may name a header field: printable ASCII without the colon (RFC 5322 section 2.2)."""
    return _FIELD_NAME.fullmatch(text) is not None


def value_of(raw: bytes) -> bytes:
    """A field's value on one line, nothing decoded."""
    return _FOLD.sub(b"", raw.partition(b":")[2]).strip(b" \t\r\n")


def unfold(raw: bytes) -> str:
    """A field's value on one line, decoded for display (RFC 2047). What cannot be decoded stays as it is."""
    return decode(value_of(raw))


def decode(value: bytes) -> str:
    """Raw bytes of a value as text: UTF-8, or Latin-1 where they are not, with encoded words read."""
    try:
        text = value.decode("utf-8")
    except UnicodeDecodeError:
        text = value.decode("latin-1")
    return _ENCODED_RUN.sub(_decode_run, text) if "=?" in text else text


def scan(block: bytes) -> Scan:
    """One look over the header block for what intake has to know."""
    found: dict[bytes, list[bytes]] = {}
    for name, value in _SCANNED.findall(b"\n" + block):
        found.setdefault(name.lower(), []).append(value)
    return found


def traces_of(found: Scan, hostname: str) -> int:
    """How many of the Received fields were made by `hostname`: its name follows the word `by`."""
    made_by = _made_by(hostname)
    return sum(1 for trace in found.get(b"received", ()) if made_by.search(trace))


def ids_by(found: Scan, hostname: str) -> list[str]:
    """The queue ids in the Received fields that were made by `hostname`."""
    made_by = _made_by(hostname)
    return [match[1].decode("ascii").upper() for trace in found.get(b"received", ()) if (match := made_by.search(trace)) and match[1]]


@lru_cache(maxsize=16)
def _made_by(hostname: str) -> re.Pattern[bytes]:
    name = re.escape(hostname.encode())
    return re.compile(rb"\bby[ \t\r\n]+" + name + rb"(?![\w.-])(?:[^;]*?[ \t\n]id[ \t\r\n]+([0-9A-F]{13,16})\b)?", re.IGNORECASE)


def summary_of(found: Scan) -> Summary:
    """To, Cc and Subject for the operator's eye."""
    to, cc, subject = found.get(b"to"), found.get(b"cc"), found.get(b"subject")
    return Summary(_shown(to), _shown(cc), _shown(subject)) if to or cc or subject else NO_SUMMARY


def from_address(values: Sequence[bytes]) -> str:
    """The address in the header From, in lower case, if there is exactly one field with exactly one mailbox; else `""`.

    `values` are the raw values of all From fields. Also used for Sender.
    """
    if len(values) != 1:
        return ""
    value = values[0].rstrip(b"\r")
    return _address_of(value) if len(value) <= _REMEMBERED_OCTETS else _address_of.__wrapped__(value)


@lru_cache(maxsize=4096)  # an app writes the same From again and again
def _address_of(value: bytes) -> str:
    found = mailbox(value)
    if found is None or "@" not in found.address:
        return ""
    return f"{local_of(found.address).lower()}@{domain_of(found.address)}"


def mailbox(value: bytes) -> Mailbox | None:
    """The one mailbox that `value` holds, or None when it is a list, a group, obsolete syntax or anything doubtful.

    The address may be bare: old programs write `From: root (Cron Daemon)`.
    """
    if match := _PLAIN_FROM.fullmatch(value):
        name, angled, alone = match.groups(b"")
        return _mailbox(name.strip(), angled or alone)
    if len(value) > _MAILBOX_LIMIT_OCTETS:
        return None
    return _read_mailbox(_FOLD.sub(b"", value).strip(b" \t\r\n"))


def _read_mailbox(value: bytes) -> Mailbox | None:
    """The full grammar: comments, quoted local parts, address literals. None as soon as anything has two readings."""
    comments: list[bytes] = []
    phrase = b""
    address = b""
    angled = closed = False
    place = 0
    while place < len(value):
        if value[place : place + 1] == b"(":
            end = _comment_end(value, place)
            if end < 0:
                return None
            comments.append(value[place + 1 : end - 1])
            phrase, place = phrase + (b"" if angled else b" "), end
            continue
        token = _TOKEN.match(value, place)
        if token is None:
            return None
        text, kind, place = token[0], token.lastgroup, token.end()
        if kind == "blank":
            phrase += b"" if angled else b" "
        elif closed:
            return None
        elif text == b"<":
            if angled:
                return None
            angled = True
        elif text == b">":
            closed = True
            if not angled:
                return None
        elif angled:
            if value[place - len(text) - 1 : place - len(text)] in (b" ", b"\t", b")"):
                return None
            address += text
        else:
            phrase += text
    phrase = phrase.strip()
    if not angled:
        if re.search(rb"[ \t]", _without_quotes(phrase)):
            return None
        return _mailbox(comments[0].strip() if comments else b"", phrase)
    if not closed or re.search(rb"[@\[\]:]", _without_quotes(phrase)):
        return None
    return _mailbox(phrase or (comments[0].strip() if comments else b""), address)


def _mailbox(name: bytes, address: bytes) -> Mailbox | None:
    try:
        text = address.decode("utf-8")
        parsed, rest = parse_path(f"<{text}>")
    except (UnicodeDecodeError, AddressError):
        return None
    # An encoded word is no address, but there are receivers that decode first and look for the address afterwards.
    if not parsed or rest or text.startswith("@") or "=?" in parsed:
        return None
    return Mailbox(name, parsed)


def _comment_end(value: bytes, place: int) -> int:
    """The place behind the comment that opens at `place`, or -1."""
    depth = 0
    while place < len(value):
        octet = value[place : place + 1]
        if octet == b"\\":
            place += 1
        elif octet == b"(":
            depth += 1
        elif octet == b")":
            depth -= 1
            if depth == 0:
                return place + 1
        elif octet in b"\r\n\x00":
            return -1
        place += 1
    return -1


def _without_quotes(phrase: bytes) -> bytes:
    return re.sub(rb'"(?:[^"\\]|\\.)*"', b"", phrase)


def _shown(values: Sequence[bytes] | None) -> str:
    """The first of a field's values."""
    if not values:
        return ""
    value = values[0]
    if value.isascii() and "=?" not in (text := value.strip().decode()) and text.isprintable():
        return text[:_SUMMARY_LIMIT]
    return printable(unfold(b":" + value[:_SHOWN_LIMIT_OCTETS])).strip()[:_SUMMARY_LIMIT]


def _decode_run(run: re.Match[str]) -> str:
    """Neighbouring encoded words as text. Octets of one charset are joined first: some programs cut inside a character."""
    if len(run[0]) > _RUN_LIMIT:
        return run[0]
    pieces: list[tuple[str, bytes]] = []
    for charset, encoding, text in _ENCODED_WORD.findall(run[0]):
        if normalize_encoding(charset.lower()) not in _CHARSETS:
            return run[0]
        try:
            octets = a2b_base64(text + "==") if encoding in "bB" else a2b_qp(text.encode(), header=True)
        except (Base64Error, UnicodeEncodeError):
            return run[0]
        if pieces and pieces[-1][0] == charset.lower():
            pieces[-1] = (charset.lower(), pieces[-1][1] + octets)
        else:
            pieces.append((charset.lower(), octets))
    try:
        return "".join(octets.decode(charset, "replace") for charset, octets in pieces)
    except (LookupError, ValueError):
        return run[0]
