"""`relay hash-password`: turn an app's password into what `users.NAME.password_hash` takes.

At a terminal it asks twice and shows nothing; else it reads one line of standard input. Never an argument: others could see it.
"""

import argparse
import sys
from typing import Any

from relay.cli.options import EX_USAGE, fail


def add_parser(subparsers: Any) -> None:
    """Add `hash-password` to the commands."""
    parser = subparsers.add_parser(
        "hash-password",
        help="hash the password of an app that logs in",
        description="Read a password, at a terminal or as one line of standard input, and print its hash for `password_hash`.",
    )
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Print the hash, and return the exit code."""
    from relay.config.password import hash_password

    try:
        password = _asked() if sys.stdin.isatty() else _read()
    except EOFError:
        return _fail("nothing was typed")
    if password is None:
        return _fail("the two were not the same")
    try:
        print(hash_password(password))
    except ValueError as error:
        return _fail(f"the password {error}")
    return 0


def _asked() -> str | None:
    import getpass

    password = getpass.getpass("Password: ")
    return password if getpass.getpass("Once more: ") == password else None


def _read() -> str:
    """The first line, as UTF-8 whatever the locale is: that is how it comes in a login."""
    line: bytes = sys.stdin.buffer.readline()
    return line.decode("utf-8", "surrogateescape").removesuffix("\n").removesuffix("\r")


def _fail(text: str) -> int:
    return fail(f"relay hash-password: {text}", EX_USAGE)
