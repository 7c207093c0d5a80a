"""`relay demo`: the whole thing on this machine, without a configuration: three tenants, their providers, and the relay between.

Three messages go through at once, and what becomes of them is printed; then the relay stays for the person's own messages until
Ctrl-C or SIGTERM. It is the real relay with a real configuration file, both of which are shown. Nothing leaves the machine, and
nothing is left on it. `--once` ends after the three messages: exit code 0 if each arrived where it should, with the right login.
"""

import argparse
from typing import Any

from relay.cli.options import EX_FAILED, EX_TEMPFAIL, fail

_PORT = 2525


def add_parser(subparsers: Any) -> None:
    """Add `demo` to the commands."""
    parser = subparsers.add_parser(
        "demo",
        help="see it at work, without a configuration",
        description="Start two providers for two tenants, a third tenant whose provider is down, and the relay; send mail through all.",
    )
    parser.add_argument("--once", action="store_true", help="end after the three messages: 0 if each arrived where it should, else 1")
    parser.add_argument(
        "--port", type=_port, default=_PORT, metavar="N", help="where the relay listens; 0: anywhere (default: %(default)s)"
    )
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Play, and return the exit code."""
    import asyncio

    from relay.cli.demo_play import CannotPlay, play

    try:
        return EX_FAILED if not asyncio.run(play(port=options.port, once=options.once)) else 0
    except CannotPlay as error:
        return fail(f"relay demo: {error}", EX_TEMPFAIL)


def _port(text: str) -> int:
    if not text.isascii() or not text.isdigit() or int(text) > 65535:
        raise argparse.ArgumentTypeError(f"{text!r} is not a port")
    return int(text)
