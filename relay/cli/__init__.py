"""The command line: one module for each command, loaded only when it is asked for.

A command's module adds its parser and imports what it needs only when it runs, so that `relay --help` is quick. Commands that the
contract names and that are not built say so instead of being unknown.

Exit codes: 0 ok, 1 the test failed, 64 usage, 75 try again, 78 configuration error (sysexits.h).
"""

import argparse
import errno
import io
import os
import sys
from collections.abc import Sequence
from importlib import import_module
from typing import NoReturn

from relay import __version__
from relay.cli.options import EX_TEMPFAIL, EX_USAGE, add_config, add_unavailable, fail, write_no_more

_EX_INTERRUPTED = 130  # 128 and the number of SIGINT, as a shell says it

_OUTPUT_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)

_COMMANDS = ("serve", "check", "explain", "test", "demo", "queue", "log", "trace", "schema", "sendmail", "hash-password", "secret", "oauth")
_WITH_FILE = ("serve", "check", "explain", "test")  # those that read the spool add `-c` with their filters
_NOT_YET = ("status", "pause", "resume", "reload", "dkim", "import")


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        if message.startswith("argument COMMAND: invalid choice: "):  # what argparse lists then has what is not built, too
            message = f"there is no command {message.split()[4]}; `{self.prog} --help` lists them"
        self.print_usage(sys.stderr)
        self.exit(EX_USAGE, f"{self.prog}: {message}\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and answer its exit code."""
    _open_what_is_closed()
    arguments = list(sys.argv[1:] if argv is None else argv)
    if arguments[:1] == ["sendmail"] and "--help" not in arguments:  # its grammar is not argparse's, nor may it load that much
        from relay.sendmail import main as sendmail

        return sendmail(arguments[1:], name="relay sendmail")
    parser = _Parser(prog="relay", description="Takes mail from old apps and forwards it through their owners' own upstreams.")
    parser.add_argument("--version", action="version", version=f"relay {__version__}")
    add_config(parser)
    parser.set_defaults(config=None)
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name in _COMMANDS:
        import_module(f"relay.cli.{name.replace('-', '_')}").add_parser(subparsers)
        if name in _WITH_FILE:
            add_config(subparsers.choices[name])
    add_unavailable(subparsers, _NOT_YET)
    options = argparse.Namespace(command="")
    try:
        return _answer(parser, arguments, options)
    except BrokenPipeError:  # the reader of a listing has gone
        write_no_more()
        return 0
    except OSError as error:
        if error.errno not in _OUTPUT_ERRORS or error.filename is not None:
            raise
        write_no_more()
        return fail(f"{f'relay {options.command}'.rstrip()}: the output cannot be written: {error.strerror}", EX_TEMPFAIL)
    except KeyboardInterrupt:
        return _EX_INTERRUPTED


def _answer(parser: argparse.ArgumentParser, arguments: list[str], options: argparse.Namespace) -> int:
    """Read the arguments into `options`, run the command, and write out all that was said, by `--help` too."""
    try:
        parser.parse_args(arguments, options)
        for stream in (sys.stdout, sys.stderr):  # a terminal that lacks a character gets a stand-in
            if isinstance(stream, io.TextIOWrapper):
                stream.reconfigure(errors="backslashreplace")
        code: int = options.run(options)
    finally:
        sys.stdout.flush()
    return code


def _open_what_is_closed() -> None:
    """Standard input and output that were closed lead nowhere: else the next file that is opened would be written to as if it were one."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest number that is free
    sys.stdout = sys.stdout or os.fdopen(1, "w", closefd=False)
    sys.stderr = sys.stderr or os.fdopen(2, "w", closefd=False)
