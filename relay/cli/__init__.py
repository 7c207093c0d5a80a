"""The command line: one module for each command, loaded only when it is asked for.

Exit codes: 0 ok, 1 the test failed, 64 usage, 75 try again, 78 configuration error (sysexits.h).
"""

import argparse
import sys
from collections.abc import Sequence
from importlib import import_module
from typing import NoReturn

from relay import __version__

EX_USAGE = 64

_COMMANDS = ("serve", "check", "explain", "demo", "queue", "log", "schema")


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.print_usage(sys.stderr)
        self.exit(EX_USAGE, f"{self.prog}: {message}\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and answer its exit code."""
    parser = _Parser(prog="relay", description="Takes mail from old apps and forwards it through their owners' own upstreams.")
    parser.add_argument("--version", action="version", version=f"relay {__version__}")
    parser.add_argument("-c", "--config", help="default: $RELAY_CONFIG, else ./config.yaml, else /etc/relay/config.yaml")
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name in _COMMANDS:
        import_module(f"relay.cli.{name}").add_parser(subparsers)
    options = parser.parse_args(argv)
    try:
        code: int = options.run(options)
    except BrokenPipeError:  # the reader of a listing has gone
        sys.stderr.close()
        return 0
    return code
