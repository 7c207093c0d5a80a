"""The command line of sendmail as scripts and programs have written it since the eighties.

What Postfix takes is taken, what it ignores is ignored, what it refuses is refused; nothing here names a file that is read or written.
Options end at the first recipient or at `--`, so that no address that an application passes on becomes one. Pure.
"""

from collections.abc import Sequence

USAGE = "usage: {name} [-t] [-i] [-f SENDER] [-F NAME] [-N WHEN] [-R full|hdrs] [-V ENVID] [-v] [-bm|-bs|-bp] [RECIPIENT ...]"

_FLAGS = "GIUcimntvx"
_VALUED = "ABCFLNORVXbefhopqr"
_EVENTS = ("SUCCESS", "FAILURE", "DELAY")
_ENVID_LIMIT = 100  # RFC 3461 section 4.4


class UsageError(Exception):
    """The command line is wrong; the message says how."""


class Options:
    """What is asked for. `mode` is deliver, smtp, queue, help or nothing; `sender` is None where none was given."""

    def __init__(self) -> None:
        self.mode = "deliver"
        self.sender: str | None = None
        self.full_name: str | None = None
        self.recipients: list[str] = []
        self.from_header = False
        self.dot_ends = True
        self.notify = ""
        self.ret = ""
        self.envid = ""
        self.verbose = False
        self.warnings: list[str] = []


def parse(name: str, arguments: Sequence[str]) -> Options:
    """Read the arguments of a program that was called as `name`: mailq and newaliases are modes of their own. Raises UsageError."""
    options = Options()
    options.mode = {"mailq": "queue", "newaliases": "nothing"}.get(name, "deliver")
    left = list(arguments)
    while left and left[0].startswith("-") and left[0] != "-":
        word = left.pop(0)
        if word == "--":
            break
        if word == "--help":
            options.mode = "help"
        elif word == "-q":  # run the queue: the relay does that by itself
            options.mode = "nothing"
        else:
            _read(options, word[1:], left)
    options.recipients = left
    if options.from_header and options.mode != "deliver":
        raise UsageError("-t is for sending mail")
    return options


def _read(options: Options, letters: str, left: list[str]) -> None:
    """One word of options: flags, and perhaps one option with its value at the end, which may be the next word."""
    while letters:
        letter, letters = letters[0], letters[1:]
        if letter in _FLAGS:
            _set_flag(options, letter)
        elif letter not in _VALUED:
            raise UsageError(f"unknown option -{letter}")
        elif not letters and not left:
            raise UsageError(f"option -{letter} needs a value")
        else:
            _set_value(options, letter, letters or left.pop(0))
            return


def _set_flag(options: Options, letter: str) -> None:
    if letter == "t":
        options.from_header = True
    elif letter == "i":
        options.dot_ends = False
    elif letter == "v":
        options.verbose = True
    elif letter == "I":
        options.mode = "nothing"


def _set_value(options: Options, letter: str, value: str) -> None:
    if letter in "fr":
        options.sender = value
    elif letter == "F":
        options.full_name = value
    elif letter == "b":
        options.mode = _mode(value[:1])
    elif letter == "o" and value[:1] == "i":
        options.dot_ends = False
    elif letter == "q":
        if value[0] not in "0123456789IRS":
            raise UsageError(f"unknown option -q{value[0]}")
        options.mode = "nothing"
    elif letter == "B" and value.upper() not in ("7BIT", "8BITMIME"):
        raise UsageError("-B is 7BIT or 8BITMIME")
    elif letter == "X":
        raise UsageError(f"-X{value[:1]} is not supported")
    elif letter in "NRV":
        _set_wish(options, letter, value)


def _mode(letter: str) -> str:
    if letter in ("d", "l"):
        raise UsageError(f"-b{letter} is not supported: the relay is started with `relay serve`")
    if letter == "v":
        raise UsageError("-bv is not supported: `relay explain` says where mail would go")
    try:
        return {"m": "deliver", "s": "smtp", "p": "queue", "i": "nothing", "h": "nothing", "H": "nothing"}[letter]
    except KeyError:
        raise UsageError(f"-b{letter} is not supported") from None


def _set_wish(options: Options, letter: str, value: str) -> None:
    """RFC 3461's parameters. A wrong one is told and left out, for the mail matters more."""
    if letter == "R" and value.upper() in ("FULL", "HDRS"):
        options.ret = value.upper()
    elif letter == "V" and value.isascii() and value.isprintable() and len(envid := _xtext(value)) <= _ENVID_LIMIT:
        options.envid = envid
    elif letter == "N" and (notify := _notify(value)):
        options.notify = notify
    else:
        options.warnings.append(f"-{letter} {value!r} is ignored: it is malformed")


def _notify(value: str) -> str:
    words = [word.strip() for word in value.upper().split(",")]
    if words == ["NEVER"] or all(word in _EVENTS for word in words):
        return ",".join(words)
    return ""


def _xtext(text: str) -> str:
    """RFC 3461 section 4."""
    return "".join(character if "!" <= character <= "~" and character not in "+=" else f"+{ord(character):02X}" for character in text)
