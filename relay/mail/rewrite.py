"""Change the header block and the sender on the way out, as a route's `rewrite` says.

Every field that no rule touches leaves byte for byte as it came. Bcc, Resent-Bcc, Return-Path and the `From …` line of a mailbox never
leave, whatever the rules say. The order is fixed: remove, From, Reply-To, set, add, subject prefix. A DKIM-Signature that came with
the message is left alone, even where a rule breaks it. What the rules write is pure ASCII (RFC 2047), but for addresses that need SMTPUTF8.
Rules are values: what they render to is worked out once and kept. Where no rule applies, the same object comes back.
"""

import re
from base64 import b64encode
from dataclasses import dataclass
from functools import lru_cache

from relay.mail.address import domain_of, folded, local_of
from relay.mail.header import Field, Mailbox, fields, is_field_name, join, mailbox, unfold, value_of
from relay.mail.reply import printable

_LINE_LIMIT_OCTETS = 998  # RFC 5322 section 2.1.1, without CRLF
_FOLD_AT = 900  # leaves room for the name and a few words of grace
_WORD_LIMIT = 75  # RFC 2047 section 2
_PRIVATE = re.compile(rb"^(?:(?:(?:resent-)?bcc|return-path)\s*+:|>?From )", re.IGNORECASE | re.MULTILINE)
_PRIVATE_NAMES = frozenset({b"bcc", b"resent-bcc", b"return-path"})
_MAILBOX_LINES = (b"From ", b">From ")
_PHRASE = re.compile(r"[A-Za-z0-9!#$%&'*+/=?^_`{|}~-]+(?: [A-Za-z0-9!#$%&'*+/=?^_`{|}~-]+)*")
_PHRASE_BYTES = re.compile(rb"[A-Za-z0-9!#$%&'*+/=?^_`{|}~. \t\x80-\xff-]+|\"(?:[^\"\\]|\\.)*\"")
_Q_PLAIN = frozenset(b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789!*+-/")  # RFC 2047 section 5 (3)


@dataclass(frozen=True, slots=True)
class Rewrite:
    """The rules of one route at one upstream. None or empty: leave it.

    `reply_to` is an address, or `original`: the mailbox of the From whose address was replaced, where no Reply-To exists. `bcc`
    is one more recipient, which is the caller's to add. Raises ValueError for a header name that is none.
    """

    from_name: str | None = None
    from_address: str | None = None
    reply_to: str | None = None
    envelope_sender: str | None = None
    set_headers: tuple[tuple[str, str], ...] = ()
    add_headers: tuple[tuple[str, str], ...] = ()
    remove_headers: tuple[str, ...] = ()
    subject_prefix: str | None = None
    bcc: str | None = None

    def __post_init__(self) -> None:
        for name in (*(name for name, _ in (*self.set_headers, *self.add_headers)), *self.remove_headers):
            if not is_field_name(name):
                raise ValueError(f"not the name of a header field: {name!r}")

    @property
    def touches_header(self) -> bool:
        """Whether any rule changes the header block."""
        return bool(
            self.from_name
            or self.from_address
            or self.reply_to
            or self.set_headers
            or self.add_headers
            or self.remove_headers
            or self.subject_prefix
        )


def rewrite_header(block: bytes, rules: Rewrite | None) -> bytes:
    """The header block as it shall leave: `block` with `rules` applied and without the fields that nobody else may see."""
    if rules is None or not rules.touches_header:
        return _without_private(block)
    parts = fields(_without_private(block))
    if parts and not parts[-1].raw.endswith(b"\n"):
        parts[-1] = Field(parts[-1].name, parts[-1].raw + b"\r\n")
    if rules.remove_headers:
        unwanted = _lower_names(rules.remove_headers)
        parts = [part for part in parts if part.name.lower() not in unwanted]
    if rules.from_name or rules.from_address:
        _replace_from(parts, rules)
    if rules.reply_to and rules.reply_to != "original":
        _set(parts, b"Reply-To", _address_field("Reply-To", rules.reply_to))
    for name, value in rules.set_headers:
        _set(parts, name.encode(), field_of(name, value))
    for name, value in rules.add_headers:
        _add(parts, Field(name.encode(), field_of(name, value)))
    if rules.subject_prefix:
        _prefix_subject(parts, rules.subject_prefix)
    return _without_private(join(parts))


def _without_private(block: bytes) -> bytes:
    lowered = block.lower()
    if b"bcc" not in lowered and b"return-path" not in lowered and b"From " not in block:
        return block
    if not _PRIVATE.search(block):
        return block
    return join(part for part in fields(block) if not _is_private(part))


def _is_private(part: Field) -> bool:
    """Whether a field is nobody else's business. Servers take the line of a mailbox behind our trace for the end of the header."""
    return part.name.lower() in _PRIVATE_NAMES if part.name else part.raw.startswith(_MAILBOX_LINES)


def envelope_sender(sender: str, rules: Rewrite | None) -> str:
    """The sender at the upstream. A null sender stays null: its message must never be answered."""
    if sender and rules is not None and rules.envelope_sender:
        return rules.envelope_sender
    return sender


@lru_cache(maxsize=4096)
def field_of(name: str, value: str) -> bytes:
    """One unstructured field: encoded where it is not ASCII, folded where it would be too long, with CRLF."""
    value = printable(value).strip()
    start = f"{name}: "
    if value.isascii():
        lines = _fold(start, value)
        if all(len(line) <= _LINE_LIMIT_OCTETS for line in lines):
            return "\r\n".join(lines).encode() + b"\r\n"
    return (start + "\r\n ".join(encoded_words(value, first_limit=_WORD_LIMIT - len(start)))).encode() + b"\r\n"


@lru_cache(maxsize=4096)
def phrase_of(name: str) -> bytes:
    """A display name as RFC 5322 wants it: bare words, a quoted string, or encoded words."""
    name = printable(name).strip()
    if not name.isascii() or "=?" in name or len(name) > _FOLD_AT:
        return "\r\n ".join(encoded_words(name, first_limit=_WORD_LIMIT - 10)).encode()
    if not name or _PHRASE.fullmatch(name):
        return name.encode()
    return b'"' + name.replace("\\", "\\\\").replace('"', '\\"').encode() + b'"'


def encoded_words(text: str, *, first_limit: int = _WORD_LIMIT) -> list[str]:
    """`text` as encoded words of UTF-8, at most 75 characters each and `first_limit` the first; no character is cut in two."""
    octets = text.encode("utf-8", "replace")
    plain = sum(octet in _Q_PLAIN or octet == 0x20 for octet in octets)
    quoted = len(octets) + 2 * (len(octets) - plain) <= len(octets) * 4 / 3
    overhead = len("=?utf-8?q??=")
    words: list[str] = []
    current = b""
    for character in text:
        piece = character.encode("utf-8", "replace")
        limit = (_WORD_LIMIT if words else max(first_limit, 40)) - overhead
        length = len(_q(current + piece)) if quoted else (len(current) + len(piece) + 2) // 3 * 4
        if current and length > limit:
            words.append(_word(current, "q" if quoted else "b"))
            current = b""
        current += piece
    words.append(_word(current, "q" if quoted else "b"))
    return words


def _word(octets: bytes, encoding: str) -> str:
    return f"=?utf-8?{encoding}?{_q(octets) if encoding == 'q' else b64encode(octets).decode('ascii')}?="


def _q(octets: bytes) -> str:
    return "".join(chr(octet) if octet in _Q_PLAIN else "_" if octet == 0x20 else f"={octet:02X}" for octet in octets)


def _fold(start: str, value: str) -> list[str]:
    """`start` and `value` on lines cut at blanks so that each is short enough, where blanks allow it."""
    lines: list[str] = []
    line = start + value
    least = len(start)  # never fold right behind the colon: a line of the name alone confuses old parsers
    while len(line) > _LINE_LIMIT_OCTETS:
        cut = line.rfind(" ", least, _FOLD_AT)
        if cut < 0:
            cut = line.find(" ", max(least, _FOLD_AT))
        if cut < 0:
            break
        lines.append(line[:cut])
        line, least = line[cut:], 1
    return [*lines, line]


@lru_cache(maxsize=4096)
def _lower_names(names: tuple[str, ...]) -> frozenset[bytes]:
    return frozenset(name.lower().encode() for name in names)


@lru_cache(maxsize=4096)
def _address_field(name: str, address: str) -> bytes:
    return f"{name}: ".encode() + _wire_address(address) + b"\r\n"


def _wire_address(address: str) -> bytes:
    """The address as it may stand in a field: an international domain as A-labels, so that the rest of us can read it too."""
    if address.isascii():
        return address.encode()
    return f"{local_of(address)}@{domain_of(address)}".encode()


def _set(parts: list[Field], name: bytes, raw: bytes) -> None:
    """Put `raw` in the place of the first field called `name` that everybody sees, or add it; drop all others."""
    wanted = name.lower()
    place = next((place for place, part in enumerate(parts) if part.name.lower() == wanted or _is_text(part)), len(parts))
    parts[place:] = [Field(name, raw), *(part for part in parts[place:] if part.name.lower() != wanted)]


def _add(parts: list[Field], added: Field) -> None:
    """Put it behind the last field that everybody sees."""
    parts.insert(next((place for place, part in enumerate(parts) if _is_text(part)), len(parts)), added)


def _is_text(part: Field) -> bool:
    """Whether it is a line that most servers take for the beginning of the text, as it is no field and belongs to none."""
    return not part.name and part.raw[:1] not in (b" ", b"\t")


def _replace_from(parts: list[Field], rules: Rewrite) -> None:
    """Apply the From rules. A name alone changes nothing where the address cannot be read for sure."""
    present = [part for part in parts if part.name.lower() == b"from"]
    before = mailbox(value_of(present[0].raw)) if len(present) == 1 else None
    if rules.from_address:
        address = _wire_address(rules.from_address)
    elif before:
        address = before.address.encode()
    else:
        return
    name = phrase_of(rules.from_name) if rules.from_name else _name_of(before)
    _set(parts, b"From", _from_field(name, address))
    if rules.reply_to != "original" or before is None or folded(before.address) == folded(address.decode()):
        return
    if not any(part.name.lower() == b"reply-to" for part in parts):
        raw = _from_field(_name_of(before), before.address.encode())
        _add(parts, Field(b"Reply-To", b"Reply-To" + raw[len(b"From") :]))


@lru_cache(maxsize=4096)
def _from_field(name: bytes, address: bytes) -> bytes:
    if not name:
        return b"From: " + address + b"\r\n"
    last_line = len(name) - name.rfind(b"\n")
    fold = b"\r\n <" if last_line + len(address) > _FOLD_AT else b" <"
    return b"From: " + name + fold + address + b">\r\n"


def _name_of(before: Mailbox | None) -> bytes:
    """The display name as it came; what came in a comment, or as anything that is no phrase, in quotes."""
    if before is None or len(before.name) > _FOLD_AT:
        return b""
    if not before.name or _PHRASE_BYTES.fullmatch(before.name):
        return before.name
    return b'"' + re.sub(rb'[\\"]', b"", before.name) + b'"'


def _prefix_subject(parts: list[Field], prefix: str) -> None:
    prefix = printable(prefix)
    for place, part in enumerate(parts):
        if part.name.lower() != b"subject":
            continue
        if not unfold(part.raw).startswith(prefix.strip()):
            parts[place] = Field(part.name, _prefixed(part.raw, prefix))
        return
    _add(parts, Field(b"Subject", field_of("Subject", prefix)))


def _prefixed(raw: bytes, prefix: str) -> bytes:
    """The Subject field with `prefix` in front of its value, whose bytes stay as they are.

    Between two encoded words a blank is not shown (RFC 2047 section 6.2), and next to plain text it is.
    """
    name, _, value = raw.partition(b":")
    value = value.lstrip(b" \t\r\n")
    encoded = value.startswith(b"=?")
    if prefix.isascii():
        front = prefix.encode().lstrip() + (b" " if encoded and not prefix.endswith(" ") else b"")
    else:
        words = encoded_words(prefix.lstrip() if encoded else prefix.strip(), first_limit=_WORD_LIMIT - len(name) - 2)
        front = "\r\n ".join(words).encode() + b" "
    if not value:
        return name + b": " + front.rstrip() + b"\r\n"
    first_line = value.partition(b"\r\n")[0]
    fold = b"\r\n " if len(name) + len(front) + len(first_line) + 2 > _LINE_LIMIT_OCTETS >= len(first_line) + 1 else b""
    return name + b": " + (front.rstrip(b" ") + fold if fold else front) + value
