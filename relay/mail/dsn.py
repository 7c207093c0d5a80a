"""What a client asks to be told about its mail: RET, ENVID, NOTIFY and ORCPT (RFC 3461 section 4, RFC 6533 section 3).

Values are read into the one spelling that is stored, passed on to upstreams and shown in reports: keywords in upper case and in one
order, texts as ASCII with nothing encoded that need not be. Reading is a little wider than the grammar, where the meaning is
clear: lower-case hexadecimal, an `=` that was not encoded. Pure.

Law: two wishes for one recipient become one that misses nothing either of them asked for.
"""

import re
from collections.abc import Mapping

from relay.mail.address import ParameterError

_ENVID_LIMIT = 100  # RFC 3461 section 4.4
_ORCPT_LIMIT = 500  # RFC 3461 section 4.2: what ORCPT adds to the longest RCPT command
_EVENTS = ("SUCCESS", "FAILURE", "DELAY")
_UNASKED = "FAILURE,DELAY"  # RFC 3461 section 4.1: what is reported where nothing was asked for

_XTEXT = re.compile(r"(?:[!-*,-~]|\+[0-9A-Fa-f]{2})+")
_ENCODED = re.compile(r"\+([0-9A-Fa-f]{2})")
_NEEDS_XTEXT = re.compile(r"[^!-*,-<>-~]")
_PRINTABLE = re.compile(r"[ -~]+")
_TYPE = re.compile(r"[A-Za-z0-9-]{1,40}")
_EMBEDDED = re.compile(r"\\x\{([0-9A-Fa-f]{2,6})\}|\+([0-9A-Fa-f]{2})")
_JOINERS = {0x200C: None, 0x200D: None}  # no letters, but words need them
_NEEDS_EMBEDDING = re.compile(r"[^!-*,-<>-\[\]-~]")  # RFC 6533 section 3: all but QCHAR


def message_wishes(parameters: Mapping[str, str]) -> tuple[str, str]:
    """RET and ENVID out of MAIL's parameters, `""` for what was not given. Raises ParameterError."""
    ret = envid = ""
    if "RET" in parameters and (ret := parameters["RET"].upper()) not in ("FULL", "HDRS"):
        raise ParameterError("RET is FULL or HDRS")
    if "ENVID" in parameters:
        envid = _xtext(parameters["ENVID"])
        if len(envid) > _ENVID_LIMIT:
            raise ParameterError("ENVID is too long")
    return ret, envid


def recipient_wishes(parameters: Mapping[str, str], *, smtputf8: bool) -> tuple[str, str]:
    """NOTIFY and ORCPT out of RCPT's parameters, `""` for what was not given. Raises ParameterError."""
    notify = _notify(parameters["NOTIFY"]) if "NOTIFY" in parameters else ""
    orcpt = _orcpt(parameters["ORCPT"], smtputf8=smtputf8) if "ORCPT" in parameters else ""
    return notify, orcpt


def original_recipient(address: str) -> str:
    """ORCPT for a recipient that leaves under another address; `""` where it would be longer than a command may be."""
    text = f"rfc822;{_NEEDS_XTEXT.sub(_hexadecimal, address)}" if address.isascii() else f"utf-8;{_NEEDS_EMBEDDING.sub(_embedded, address)}"
    return text if len(text) <= _ORCPT_LIMIT else ""


def wants(notify: str, event: str) -> bool:
    """Whether a recipient's NOTIFY (`""`: not given) asks for reports of SUCCESS, FAILURE or DELAY."""
    return event in (notify or _UNASKED).upper().split(",")


def both(first: str, second: str) -> str:
    """One NOTIFY for a recipient who was given two."""
    if first == second:
        return first
    return ",".join(event for event in _EVENTS if wants(first, event) or wants(second, event)) or "NEVER"


def decode_xtext(text: str) -> str:
    """What an ENVID or the address of an ORCPT says."""
    return _ENCODED.sub(lambda match: chr(int(match[1], 16)), text)


def _notify(value: str) -> str:
    words = value.upper().split(",")
    if words == ["NEVER"]:
        return "NEVER"
    if not set(words) <= set(_EVENTS):
        raise ParameterError("NOTIFY is NEVER, or some of SUCCESS, FAILURE and DELAY")
    return ",".join(event for event in _EVENTS if event in words)


def _orcpt(value: str, *, smtputf8: bool) -> str:
    kind, semicolon, address = value.partition(";")
    if not (semicolon and address and _TYPE.fullmatch(kind)):
        raise ParameterError("ORCPT is a type, a semicolon and an address")
    international = kind.lower() == "utf-8"
    text = f"{kind};{_utf8_address(address, smtputf8=smtputf8) if international else _xtext(address)}"
    if len(text) > _ORCPT_LIMIT:
        raise ParameterError("ORCPT is too long")
    return text


def _xtext(value: str) -> str:
    """`value` as xtext that encodes printable ASCII and nothing else: that is all a report can show."""
    text = decode_xtext(value)
    if not _XTEXT.fullmatch(value) or not _PRINTABLE.fullmatch(text):
        raise ParameterError("not printable ASCII in xtext")
    return _NEEDS_XTEXT.sub(_hexadecimal, text)


def _utf8_address(value: str, *, smtputf8: bool) -> str:
    """An international address in ASCII, whatever form it came in: the upstream may not be given it in any other."""
    if not value.isascii() and not smtputf8:
        raise ParameterError("UTF-8 needs SMTPUTF8")
    try:
        text = _EMBEDDED.sub(lambda match: chr(int(match[1] or match[2], 16)), value)
    except ValueError:
        raise ParameterError("no such character") from None
    if not text.translate(_JOINERS).isprintable():
        raise ParameterError("control characters in ORCPT")
    return _NEEDS_EMBEDDING.sub(_embedded, text)


def _hexadecimal(match: re.Match[str]) -> str:
    return f"+{ord(match[0]):02X}"


def _embedded(match: re.Match[str]) -> str:
    return f"\\x{{{ord(match[0]):X}}}"
