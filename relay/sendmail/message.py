"""A message as a program wrote it to standard input, made into one that can be submitted.

LF becomes CRLF, a missing line end is added, a mailbox's `From …` line goes, Bcc goes, a missing From is written, and one without a
domain gets it: cron writes `From: root (Cron Daemon)`. All else stays octet by octet; Date, Message-ID and the completion of the envelope
are the relay's. Pure, but for reading.
"""

import os
from collections.abc import Iterator

from relay.sendmail.addresses import AddressError, parse_list

_READ_BYTES = 1024 * 1024
_LIMIT_BYTES = 256 * 1024 * 1024  # of any message: all of it is in memory, a few times. A relay takes 50 MB unless it is told otherwise
_NAME_OCTETS = bytes(octet for octet in range(33, 127) if octet != ord(":"))  # RFC 5322 section 3.6.8
_RECIPIENTS = (b"to", b"cc", b"bcc")
_RESENT_RECIPIENTS = (b"resent-to", b"resent-cc", b"resent-bcc")
_HIDDEN = (b"bcc", b"resent-bcc")
_SPECIALS = '()<>[]:;@\\,."'
_ENCODED_OCTETS = 45  # 60 characters of base64, in a word of at most 75


class TooLarge(Exception):
    """Nobody takes a message of this size."""


class Letter:
    """One message to be submitted: `content` has CRLF line ends and no transparency dots. `recipients` shrink as they are served."""

    def __init__(self, sender: str, recipients: list[str], content: bytes, *, notify: str = "", ret: str = "", envid: str = "") -> None:
        self.sender = sender
        self.recipients = recipients
        self.content = content
        self.notify = notify
        self.ret = ret
        self.envid = envid

    @property
    def smtputf8(self) -> bool:
        """Whether its envelope needs RFC 6531."""
        return not (self.sender.isascii() and all(recipient.isascii() for recipient in self.recipients))

    def stuffed(self) -> bytes:
        """The content as it follows 354: transparency dots, and the final one (RFC 5321 section 4.5.2)."""
        content = self.content.replace(b"\r\n.", b"\r\n..") if b"\r\n." in self.content else self.content
        return b"".join((b"." if content.startswith(b".") else b"", content, b".\r\n"))


def read(descriptor: int, *, dot_ends: bool) -> bytes:
    """Read to the end, which may be a line of a single dot: a person at a terminal then need not close it. Raises OSError or TooLarge."""
    octets = bytearray()
    while chunk := os.read(descriptor, _READ_BYTES):
        searched = max(0, len(octets) - 4)
        octets += chunk
        if len(octets) > _LIMIT_BYTES:
            raise TooLarge(f"the message has more than {_LIMIT_BYTES >> 20} MiB")
        if dot_ends and (end := _dot_line(octets, searched)) >= 0:
            del octets[end:]
            break
    return bytes(octets)


def _dot_line(octets: bytearray, searched: int) -> int:
    """Where the line of a single dot begins, or -1. It may be the last one, still without its end: then more must come."""
    if octets.startswith((b".\n", b".\r\n")):
        return 0
    found = [place for ending in (b"\n.\n", b"\n.\r\n") if (place := octets.find(ending, searched)) >= 0]
    return min(found) + 1 if found else -1


def lines_of(octets: bytes, *, dot_ends: bool) -> bytes:
    """The message with LF line ends, the last one included, and without a mailbox's first line."""
    if b"\r" in octets:
        octets = octets.replace(b"\r\n", b"\n")
        if b"\r\n" in octets:  # CR CR LF and the like
            import re  # not for the ordinary message: it would double what there is to load

            octets = re.sub(rb"(?<!\r)\r+\n", b"\n", octets)  # from each CR of a run on, it would be quadratic
    while octets.startswith((b"From ", b">From ", b">>From ")):
        octets = octets.partition(b"\n")[2]
    if dot_ends and (octets == b"." or octets.endswith(b"\n.")):
        octets = octets[:-1]
    return octets if octets.endswith(b"\n") or not octets else octets + b"\n"


class Header:
    """The fields of a message in LF form, each with all its lines, and the rest, which begins with the empty line if there is one."""

    def __init__(self, octets: bytes) -> None:
        self.fields: list[tuple[bytes, bytes]] = []
        place = 0
        while place < len(octets):
            end = octets.index(b"\n", place) + 1
            line = octets[place:end]
            if line[:1] in (b" ", b"\t") and self.fields:
                name, raw = self.fields.pop()
                self.fields.append((name, raw + line))
            elif name := _name_of(line):
                self.fields.append((name, line))
            else:
                break
            place = end
        self.rest = octets[place:]

    def has(self, name: bytes) -> bool:
        return any(each == name for each, _ in self.fields)

    def recipients(self) -> Iterator[str]:
        """The addresses in To, Cc and Bcc, or in their Resent- forms where there is one. Raises AddressError."""
        names = _RESENT_RECIPIENTS if any(name in _RESENT_RECIPIENTS for name, _ in self.fields) else _RECIPIENTS
        for name, raw in self.fields:
            if name in names:
                yield from parse_list(raw.partition(b":")[2].decode("utf-8", "surrogateescape"))

    def content(self, *, author: bytes = b"", domain: str = "") -> bytes:
        """The message for the relay: CRLF, without Bcc, `author` as its From where it has none, and that with a domain if there is one."""
        parts = [raw if name != b"from" else with_domain(raw, domain) for name, raw in self.fields if name not in _HIDDEN]
        if not self.has(b"from"):
            parts.insert(0, with_domain(author, domain))
        fields = b"".join(parts)
        missing = b"" if self.rest.startswith(b"\n") else b"\n"
        return b"".join((fields, missing, self.rest)).replace(b"\n", b"\r\n")


def author_field(sender: str, full_name: str) -> bytes:
    """The From of a message that has none, with its LF."""
    name = _phrase(" ".join(full_name.split()))
    mailbox = f"{name} <{sender}>" if name else sender
    return f"From: {mailbox}\n".encode("utf-8", "surrogateescape")


def with_domain(raw: bytes, domain: str) -> bytes:
    """A From field whose one address has a domain: `domain`, where it had none. What is not as simple stays as it is."""
    name, _, value = raw.decode("utf-8", "surrogateescape").partition(":")
    try:
        found = parse_list(value)
    except AddressError:
        return raw
    if not domain or len(found) != 1 or "@" in (bare := found[0]):
        return raw
    full = f"{bare}@{domain}"
    if value.count(f"<{bare}>") == 1:
        value = value.replace(f"<{bare}>", f"<{full}>")
    elif value.lstrip().startswith(bare):
        value = value.replace(bare, full, 1)
    return f"{name}:{value}".encode("utf-8", "surrogateescape")


def _name_of(line: bytes) -> bytes:
    """The field's name in lower case, or nothing where the line is no field."""
    name, colon, _ = line.partition(b":")
    name = name.rstrip(b" \t")
    return name.lower() if colon and name and not name.translate(None, _NAME_OCTETS) else b""


def _phrase(name: str) -> str:
    if name.isascii() and name.isprintable():
        if not any(character in _SPECIALS for character in name):
            return name
        return '"' + name.replace("\\", "\\\\").replace('"', '\\"') + '"'
    from binascii import b2a_base64  # only for a name with other than ASCII characters

    words, word = [], ""
    for character in name.encode("utf-8", "replace").decode("utf-8"):
        if len((word + character).encode()) > _ENCODED_OCTETS:
            words.append(word)
            word = ""
        word += character
    return "\n ".join(f"=?utf-8?b?{b2a_base64(each.encode(), newline=False).decode()}?=" for each in [*words, word])
