"""`relay serve`: run in the foreground until SIGTERM or Ctrl-C, which drain it.

A configuration that cannot be used is told with all its findings and exit code 78, which the unit does not restart on; warnings go to
the log. Exit code 75: the port is taken or another relay holds the spool.
"""

import argparse
import os
import signal
import sys
from typing import Any

from relay.cli.options import EX_CONFIG, Unavailable

_NOT_YET = ("--upstream", "--listen", "--networks")  # a relay without a file


def add_parser(subparsers: Any) -> None:
    """Add `serve` to the commands."""
    parser = subparsers.add_parser(
        "serve", help="run the relay in the foreground", description="Run in the foreground until SIGTERM or Ctrl-C, which drain it."
    )
    for name in _NOT_YET:
        parser.add_argument(name, nargs="?", action=Unavailable, help=argparse.SUPPRESS)
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Serve, and return the exit code."""
    # A SIGHUP waits until the loop can answer it: by itself it would end the process, and to systemd that is no failure.
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGHUP})
    try:
        return _serve(options)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _serve(options: argparse.Namespace) -> int:
    from relay.config.findings import ConfigError
    from relay.config.load import examine, find_config

    try:
        config, findings = examine(find_config(options.config, os.environ))
    except ConfigError as error:
        config, findings = None, list(error.findings)
    if config is None:
        print("\n".join(map(str, findings)), file=sys.stderr)
        return EX_CONFIG
    from relay import app

    return app.run(config, warnings=[str(finding) for finding in findings])
