"""`relay sendmail`: the same as `relay-sendmail`, for who has only the one program.

Its arguments are sendmail's, which argparse cannot read: `main` hands them over before anything is parsed. What is here is for
`relay --help` and `relay sendmail --help`.
"""

import argparse
from typing import Any


def add_parser(subparsers: Any) -> None:
    """Add `sendmail` to the commands."""
    parser = subparsers.add_parser(
        "sendmail",
        help="what /usr/sbin/sendmail does",
        description="Take a message from standard input, as /usr/sbin/sendmail does; also installed as relay-sendmail.",
        usage="relay sendmail [-t] [-i] [-f SENDER] [-F NAME] [-N WHEN] [-R full|hdrs] [-V ENVID] [-v] [-bm|-bs|-bp] [RECIPIENT ...]",
        epilog="Options that other sendmails know and Postfix's ignores are ignored here, too.",
        add_help=False,
    )
    parser.add_argument("--help", action="help", help="show this")
    parser.add_argument("arguments", nargs="*", metavar="RECIPIENT")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Send, where only recipients are given."""
    from relay.sendmail import main

    return main(options.arguments, name="relay sendmail")
