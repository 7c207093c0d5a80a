"""What several commands have in common: exit codes, where the configuration is, and the word for a command that is not built."""

import argparse
import os
import sys
from collections.abc import Iterable
from typing import Any, NoReturn

# As the contract has them; the last three are those of sysexits.h.
EX_FAILED, EX_USAGE, EX_TEMPFAIL, EX_CONFIG = 1, 64, 75, 78


def fail(text: str, code: int) -> int:
    """Say what is wrong, and return the exit code."""
    print(text, file=sys.stderr)
    return code


def write_no_more() -> None:
    """Standard output leads nowhere from here on: nothing may be written at exit either."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def add_config(parser: argparse.ArgumentParser) -> None:
    """Add `-c`, which people write before the command or after it."""
    places = "default: $RELAY_CONFIG, else ./config.yaml, else /etc/relay/config.yaml"
    parser.add_argument("-c", "--config", metavar="PATH", default=argparse.SUPPRESS, help=places)


def add_unavailable(subparsers: Any, names: Iterable[str]) -> None:
    """Add commands that the help does not list and that only say that they are not available yet, whatever follows them."""
    for name in names:
        parser = subparsers.add_parser(name, add_help=False, prefix_chars="\0")  # no argument begins so: none is taken for an option
        parser.add_argument("arguments", nargs="*")
        parser.set_defaults(run=_say_so, unavailable=parser.prog)


class Unavailable(argparse.Action):
    """An option that the help does not list and that only says that it is not available yet."""

    def __call__(self, parser: argparse.ArgumentParser, *_: object, **__: object) -> NoReturn:
        parser.error(f"{self.option_strings[0]}: not available yet")


def _say_so(options: argparse.Namespace) -> int:
    return fail(f"{options.unavailable}: not available yet", EX_USAGE)
