"""What several commands have in common: where the configuration is, and the word for a command that is not built."""

import argparse
import sys
from collections.abc import Iterable
from typing import Any

_EX_USAGE = 64


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


def _say_so(options: argparse.Namespace) -> int:
    print(f"{options.unavailable}: not available yet", file=sys.stderr)
    return _EX_USAGE
