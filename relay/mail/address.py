"""Addresses as SMTP and configuration write them: `local@domain`, `local` alone, or nothing at all (RFC 5321 section 4.1.2).

What `parse_path` returns is safe inside `MAIL FROM:<…>`: no control characters, no blanks and no angle brackets outside a quoted
local part. A local part is only quoted where it must be, so that one mailbox has one spelling. Domains compare as lower-case
A-labels (RFC 5890); the spelling of the sender is what travels on. Pure; small caches keep the common names ready.
"""

import re
import unicodedata
from functools import lru_cache
from ipaddress import AddressValueError, IPv4Address, IPv6Address

# RFC 5321 section 4.5.3.1: 64, 255 and 256 octets. Senders with a signature or a coded recipient exceed the first in practice.
_LOCAL_LIMIT_OCTETS = 128
_DOMAIN_LIMIT_OCTETS = 255
_ADDRESS_LIMIT_OCTETS = 254  # a path of 256 without its brackets
_LABEL_LIMIT_OCTETS = 63

# Patterns of longer addresses, and of those with more dots and plus signs, are not kept: 254 octets may have 35 KB of them.
_REMEMBERED_LENGTH = 80
_REMEMBERED_PARTS = 8

_ATEXT = r"A-Za-z0-9!#$%&'*+/=?^_`{|}~\-"
_LABEL = r"(?!-)[A-Za-z0-9_-]{1,63}(?<!-)"
_match_common = re.compile(rf" ?<([{_ATEXT}.]{{1,64}}@{_LABEL}(?:\.{_LABEL})*)>(?: ([!-~][ -~]*))?").fullmatch
_match_folded_alike = re.compile(r"[!-~]+@[A-Za-z0-9._-]+").fullmatch
# Dots are taken wherever they stand: mailboxes such as `a..b@` and `a.@` exist, and the upstream knows best.
_ATOM = re.compile(rf"[{_ATEXT}.\u0080-\U0010ffff]+")
_QUOTED = re.compile(r'"((?:[ !#-\[\]-~\u0080-\U0010ffff]|\\[ -~])*)"')
_QUOTED_PAIR = re.compile(r"\\(.)")
_ROUTE = re.compile(r"@[^\s<>@,:\"]+(?:,@[^\s<>@,:\"]+)*:")
_DOMAIN = re.compile(r"\[[^\[\]\s<>]*\]|[A-Za-z0-9._\u0080-\U0010ffff-]+")
_ASCII_DOMAIN = re.compile(rf"{_LABEL}(?:\.{_LABEL})*")
_FULL_STOPS = re.compile("[\u3002\uff0e\uff61]")  # UTS 46 maps them to "."
_PARAMETER = re.compile(r"([A-Za-z0-9][A-Za-z0-9-]*)(?:=([!-~\u00a0-\ud7ff\ue000-\U0010ffff]+))?")
_JOINERS = "\u200c\u200d"  # the only format characters that words need


class AddressError(ValueError):
    """The text is no address; the message says why, in words for the client."""


class ParameterError(ValueError):
    """The text behind the address is no list of ESMTP parameters."""


def parse_path(text: str) -> tuple[str, str]:
    """Read what follows `MAIL FROM:` or `RCPT TO:`: the address (`""` for `<>`) and the text of the parameters.

    `text` may carry octets above 127 as UTF-8 or as surrogate escapes. Angle brackets may be missing, and a source route is
    dropped (RFC 5321 appendix C). Raises AddressError.
    """
    if len(text) < _ADDRESS_LIMIT_OCTETS and (match := _match_common(text)):
        address, rest = match.groups("")
        return address, rest
    text = _from_octets(text).strip(" \t")
    if not text:
        raise AddressError("no address given")
    if not text.startswith("<"):
        address, end = _read_address(text, 0)
    elif text.startswith("<>"):
        address, end = "", 2
    else:
        address, end = _read_address(text, 1)
        if text[end : end + 1] != ">":
            raise AddressError(f"{_naming(text, end)} in the address" if end < len(text) else "no closing >")
        end += 1
    if end < len(text) and text[end] not in " \t":
        raise AddressError(f"{_naming(text, end)} behind the address")
    return address, text[end:].strip(" \t")


def parse_parameters(text: str) -> dict[str, str]:
    """Read ESMTP parameters, `KEY=value KEY2`: keywords in upper case, values as they are, `""` where there is none.

    Raises ParameterError for a malformed or repeated parameter.
    """
    if not text:
        return {}
    parameters: dict[str, str] = {}
    for word in text.split():
        match = _PARAMETER.fullmatch(word)
        if not match:
            raise ParameterError("malformed parameter")
        keyword = match[1].upper()
        if keyword in parameters:
            raise ParameterError(f"parameter {keyword} given twice")
        parameters[keyword] = match[2] or ""
    return parameters


def local_of(address: str) -> str:
    """The local part as it is written; all of a bare address."""
    local, at, domain = address.rpartition("@")
    return local if at else domain


@lru_cache(maxsize=16384)
def domain_of(address: str) -> str:
    """The domain as lower-case A-labels, or an address literal; `""` for a bare or null address."""
    domain = address.rpartition("@")[2] if "@" in address else ""
    if not domain or domain.startswith("["):
        return domain.lower()
    return normalize_domain(domain)


def folded(address: str) -> str:
    """The spelling under which two addresses are the same mailbox to us: lower case, the domain as A-labels."""
    if _match_folded_alike(address):
        return address.lower()
    domain = domain_of(address)
    local = unicodedata.normalize("NFC", local_of(address)).lower()
    return f"{local}@{domain}" if domain else local


def patterns_for(address: str) -> tuple[str, ...]:
    """Every condition that this address meets: itself without its tag and with it, its domain, those above as `*.`, and `*`."""
    ordinary = len(address) <= _REMEMBERED_LENGTH and address.count(".") + address.count("+") <= _REMEMBERED_PARTS
    return _patterns(address) if ordinary else _patterns.__wrapped__(address)


@lru_cache(maxsize=8192)
def _patterns(address: str) -> tuple[str, ...]:
    address = folded(address)
    local, at, domain = address.rpartition("@")
    if not at:
        return ("*",)
    patterns = [address]
    plus = local.find("+")
    while plus > 0:
        patterns.append(f"{local[:plus]}@{domain}")
        plus = local.find("+", plus + 1)
    patterns.append(domain)
    dot = -1 if domain.startswith("[") else domain.find(".")
    while dot >= 0:
        patterns.append(f"*{domain[dot:]}")
        dot = domain.find(".", dot + 1)
    return (*patterns, "*")


@lru_cache(maxsize=16384)
def normalize_domain(text: str) -> str:
    """`text` as lower-case A-labels. Underscores are allowed: they are not host names, but people do send from them.

    Raises ValueError when it is no domain. IDNA 2008 in spirit: compatibility forms and case are mapped, `ß` stays itself.
    """
    if text.isascii():
        name = text.lower()
    elif len(text) > _DOMAIN_LIMIT_OCTETS:  # before any of it is mapped: a stranger's 4 KB would take a second
        raise ValueError("not a domain: it is too long")
    else:
        mapped = unicodedata.normalize("NFC", unicodedata.normalize("NFKC", _FULL_STOPS.sub(".", text)).lower())
        name = ".".join(_a_label(label) for label in mapped.split("."))
    if not _ASCII_DOMAIN.fullmatch(name) or len(name) > _DOMAIN_LIMIT_OCTETS:
        raise ValueError(f"not a domain: {text!r}")
    return name


def is_mailbox(text: str) -> bool:
    """Whether `text` is exactly one address with a domain."""
    if text.startswith("@"):
        return False
    try:
        address, rest = parse_path(f"<{text}>")
    except AddressError:
        return False
    return "@" in address and not rest


def _from_octets(text: str) -> str:
    """`text` as characters, whether its octets above 127 came decoded or as surrogate escapes."""
    if text.isascii():
        return text
    try:
        return text.encode("utf-8", "surrogateescape").decode("utf-8")
    except UnicodeError as error:
        raise AddressError("the address is not valid UTF-8") from error


def _read_address(text: str, start: int) -> tuple[str, int]:
    """The address at `start` and the place behind it."""
    if route := _ROUTE.match(text, start):
        start = route.end()
    if quoted := _QUOTED.match(text, start):
        local, end = _QUOTED_PAIR.sub(r"\1", quoted[1]), quoted.end()
    elif atom := _ATOM.match(text, start):
        local, end = atom[0], atom.end()
    elif text[start : start + 1] == '"':
        raise AddressError("the quoted local part does not end")
    else:
        raise AddressError(f"{_naming(text, start)} where the local part should be")
    if any(_is_unfit(character) for character in local):
        raise AddressError("control characters in the address")
    local = _quote(local)
    if len(local.encode()) > _LOCAL_LIMIT_OCTETS:
        raise AddressError("the local part is too long")
    if text[end : end + 1] != "@":
        if quoted or route:
            raise AddressError("the address has no domain")
        return local, end
    match = _DOMAIN.match(text, end + 1)
    if not match:
        raise AddressError(f"{_naming(text, end + 1)} where the domain should be")
    _check_domain(match[0])
    address = f"{local}@{match[0]}"
    if len(address.encode()) > _ADDRESS_LIMIT_OCTETS:
        raise AddressError("the address is too long")
    return address, match.end()


def _check_domain(domain: str) -> None:
    if not domain.startswith("["):
        try:
            normalize_domain(domain)
        except ValueError as error:
            raise AddressError("the domain is malformed") from error
        return
    literal = domain[1:-1]
    try:
        if literal[:5].upper() == "IPV6:" and "%" not in literal:
            IPv6Address(literal[5:])
        else:
            IPv4Address(literal)
    except AddressValueError as error:
        raise AddressError("the address literal is malformed") from error


def _quote(local: str) -> str:
    if _ATOM.fullmatch(local):
        return local
    return '"' + local.replace("\\", "\\\\").replace('"', '\\"') + '"'


def _is_unfit(character: str) -> bool:
    """Whether a character may stand in no local part: controls, separators, and what makes text read other than it is."""
    return not (character.isprintable() or character in _JOINERS)


def _naming(text: str, place: int) -> str:
    """The character at `place`, in words."""
    character = text[place : place + 1]
    if not character:
        return "nothing"
    if character in " \t":
        return "a blank"
    return repr(character) if " " < character <= "~" else "an unexpected character"


def _a_label(label: str) -> str:
    if label.isascii():
        return label
    if len(label) > _LABEL_LIMIT_OCTETS:  # an A-label has at least as many octets; to make it takes Python quadratic time
        raise ValueError("not a label: it is too long")
    if not all(unicodedata.category(character)[0] in "LMN" or character in f"-{_JOINERS}\u00b7" for character in label):
        raise ValueError(f"not a label: {label!r}")
    return "xn--" + label.encode("punycode").decode("ascii")
