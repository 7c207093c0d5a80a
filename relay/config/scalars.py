"""What one unquoted word of the file means: text, a number, true, false or nothing.

YAML 1.1 reads `no` as false, `0755` as 493 and `12:30` as 750. Here only `true` and `false` are booleans and only plain decimal
numbers are numbers; every other word that a YAML reader may take for something else is refused with what to write instead. Pure.
"""

import re
import unicodedata
from typing import Final

from relay.config.values import Decimal, Whole

_NULLS: Final = {"", "~", "null", "Null", "NULL"}
_BOOLEANS: Final = {"true": True, "True": True, "TRUE": True, "false": False, "False": False, "FALSE": False}
_WHOLE = re.compile(r"[-+]?(?:0|[1-9][0-9]{0,17})")
_DECIMAL = re.compile(r"[-+]?(?:0|[1-9][0-9]{0,17})\.[0-9]{0,17}")

#: Words that YAML readers take for something else than they look like: pattern, what they take it for, what to write.
_SURPRISES: Final = (
    (re.compile(r"yes|on", re.IGNORECASE), "true", "write true, or quote it if it is text"),
    (re.compile(r"no|off", re.IGNORECASE), "false", "write false, or quote it if it is text"),
    (re.compile(r"[-+]?0[0-9][0-9_]*"), "an octal number", "write a number without the leading 0, or quote it if it is text"),
    (
        re.compile(r"[-+]?0[xo][0-9a-f_]+|[-+]?0b[01_]+", re.IGNORECASE),
        "a number",
        "write it in decimal, or quote it if it is text",
    ),
    (re.compile(r"[-+]?[0-9][0-9_]*(?::[0-5]?[0-9])+(?:\.[0-9_]*)?"), "a number to base 60", "quote it"),
    (re.compile(r"[-+]?[0-9]+_[0-9_]*(?:\.[0-9_]*)?"), "a number", "write it without _, or quote it if it is text"),
    (re.compile(r"[0-9]{4}-[0-9]{1,2}-[0-9]{1,2}(?:[Tt \t].*)?"), "a date", "quote it"),
    (re.compile(r"<<"), "a merge key", "write the keys out, or quote it if it is text"),
)
_FIRST_OF_SURPRISES: Final = frozenset("yYoOnN0123456789+-<")
#: How a secret begins that was to be a form of one, were it not for the blank that is missing.
SECRET_FORMS: Final = ("env:", "file:", "credential:", "command:", "encrypted:")
NOT_FILLED_IN: Final = "variables of the environment are not filled in"
_VARIABLE = re.compile(r"\$\{\w+\}|\A\$[A-Z_][A-Z0-9_]*(?:\Z|/)")
_TYPOGRAPHIC: Final = frozenset("\u2018\u2019\u201a\u201c\u201d\u201e\u00ab\u00bb")
#: With which an unquoted word begins that may be something else than text, or surprise somebody.
NOT_SURELY_TEXT: Final = _FIRST_OF_SURPRISES | {word[0] for word in (*_NULLS, *_BOOLEANS) if word}


def resolve_scalar(text: str) -> str | bool | Whole | Decimal | None:
    """The value of an unquoted word."""
    if text in _NULLS:
        return None
    if text in _BOOLEANS:
        return _BOOLEANS[text]
    if text[0] not in "-+0123456789":
        return text
    if _WHOLE.fullmatch(text):
        whole = Whole(text)
        whole.written = text
        return whole
    if _DECIMAL.fullmatch(text):
        decimal = Decimal(text)
        decimal.written = text
        return decimal
    return text


def surprise(text: str) -> str:
    """What to say about an unquoted word that readers of YAML take for something else; `""` when none does.

    Only the words for true and false are repeated: anything else may be a secret under a mistyped key.
    """
    if not text.isascii():
        return _unseen(text)
    if not text or text[0] not in _FIRST_OF_SURPRISES or _WHOLE.fullmatch(text):
        return ""
    if text[0].isalpha() and len(text) > 3:  # there are no longer words among them
        return ""
    for pattern, taken_for, advice in _SURPRISES:
        if pattern.fullmatch(text):
            shown = text if text.isalpha() else "this"
            return f"{shown} means {taken_for} to some readers of YAML: {advice}"
    return ""


def variable(text: str, *, secret: bool) -> str:
    """What to say about text with a variable of a shell's in it, which is nothing but text here; `""` when there is none."""
    if not _VARIABLE.search(text):
        return ""
    instead = "write {env: NAME}, or" if secret else "write what it stands for, or use"
    return f"{NOT_FILLED_IN}: {instead} single quotes if it is meant as it stands"


def _unseen(text: str) -> str:
    """What to say about an unquoted word with blanks around it that are none to YAML, or with quotes that are none."""
    for character in (text[0], text[-1]):
        if not character.isascii() and (character.isspace() or unicodedata.category(character) == "Cf"):
            return f"begins or ends with U+{ord(character):04X}, which nobody sees: remove it, or quote the text"
    if len(text) > 1 and text[0] in _TYPOGRAPHIC and text[-1] in _TYPOGRAPHIC:
        return f"{text[0]} and {text[-1]} are no quotes to YAML: write \" or '"
    return ""
