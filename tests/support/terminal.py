"""One command of relay's on a terminal: what it prints there, with what is typed into it.

printed, code = await terminal(["queue", "drop", "--all"], typed="y\n")
"""

import asyncio
import os
import pty
import subprocess
import sys
from collections.abc import Sequence

from tests.support.process import REPOSITORY

_LAUNCH = "import sys; from relay.cli import main; sys.argv[0] = 'relay'; sys.exit(main())"


async def terminal(argv: Sequence[str], *, typed: str = "") -> tuple[str, int]:
    """All three streams are the terminal. What is typed is echoed, as terminals do."""
    return await asyncio.to_thread(_run, argv, typed)


def _run(argv: Sequence[str], typed: str) -> tuple[str, int]:
    ours, theirs = pty.openpty()
    try:
        process = subprocess.Popen([sys.executable, "-c", _LAUNCH, *argv], cwd=REPOSITORY, stdin=theirs, stdout=theirs, stderr=theirs)
        os.close(theirs)
        os.write(ours, typed.encode())
        printed = b""
        try:
            while octets := os.read(ours, 4096):
                printed += octets
        except OSError:  # EIO: the other end is closed
            pass
        return printed.decode(), process.wait(timeout=60)
    finally:
        os.close(ours)
