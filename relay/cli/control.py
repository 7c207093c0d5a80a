"""The commands' end of the control socket: ask the running relay, and say in words why it cannot be asked.

One connection for each request. The language is `admin.request`'s.
"""

import json
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

_VERSION = 1
# A page of an order takes milliseconds; a spool whose disk hangs may need longer, and then this says so.
_ANSWER_SECONDS = 60.0


class ControlError(Exception):
    """The relay could not be asked, or did not do it; the text says why."""


def ask(path: Path, request: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The relay's answers, as they come. Raises ControlError."""
    with _connected(path) as connection:
        connection.sendall(json.dumps({"version": _VERSION, **request}).encode() + b"\n")
        with connection.makefile("rb") as answers:
            for line in answers:
                answer = _understood(line)
                yield answer
                if not answer["more"]:
                    return
    raise ControlError("the relay ended before it had answered")


@contextmanager
def _connected(path: Path) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_UNIX) as connection:
        connection.settimeout(_ANSWER_SECONDS)
        try:
            connection.connect(str(path))
            yield connection
        except PermissionError:
            raise ControlError(f"{path} is for its owner and group alone; run this as the user that relay runs as") from None
        except (FileNotFoundError, NotADirectoryError, ConnectionRefusedError):
            raise ControlError(f"no relay is running with this spool (no control socket at {path})") from None
        except TimeoutError:
            raise ControlError(f"the relay has not answered for {_ANSWER_SECONDS:.0f} s") from None
        except OSError as error:
            raise ControlError(f"the relay cannot be asked at {path}: {error.strerror or error}") from None


def _understood(line: bytes) -> dict[str, Any]:
    try:
        answer = json.loads(line)
    except ValueError:
        answer = None
    if not isinstance(answer, dict) or answer.get("version") != _VERSION or not isinstance(answer.get("more"), bool):
        raise ControlError("this is not the answer of a relay of this version; restart it")
    if "error" in answer:
        raise ControlError(str(answer["error"]))
    return answer
