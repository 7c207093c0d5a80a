"""Get a secret from where the file says it is: the file itself, encrypted or not, the environment, another file, systemd, a command.

A secret's value leaves a `Secret` only by `reveal()`: not by print, log, repr, pickle or traceback. What goes wrong is said
without the value and without a command's output. A file, a systemd credential and a command are asked again by `read_again`.
"""

import os
import select
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Final, NamedTuple, NoReturn

_COMMAND_TIMEOUT_SECONDS = 10
_FILE_LIMIT_OCTETS = 65536  # no credential is longer; a key file with its chain is not
_FORMS = "text, or one of {env: NAME}, {file: PATH}, {credential: NAME}, {command: [argv…]}, {encrypted: TEXT}"


_TEXT: Final = {"type": "string", "minLength": 1}
_SCHEMAS: Final = {
    "env": _TEXT | {"description": "the environment variable that holds it"},
    "file": _TEXT | {"description": "the file that holds it; one line break at its end is dropped"},
    "credential": _TEXT | {"description": "a systemd credential, in $CREDENTIALS_DIRECTORY"},
    "command": {
        "type": "array",
        "items": _TEXT,
        "minItems": 1,
        "description": "a command with its arguments, run without a shell, that prints it",
    },
    "encrypted": _TEXT | {"description": "what `relay secret encrypt` made of it"},
}
#: What an editor may offer where a secret is wanted (JSON Schema).
SECRET_SCHEMA: Final[dict[str, Any]] = {
    "title": "Secret",
    "description": "text, or where to get it",
    "anyOf": [
        _TEXT,
        *(
            {"type": "object", "properties": {form: schema}, "required": [form], "additionalProperties": False}
            for form, schema in _SCHEMAS.items()
        ),
    ],
}


_FORM_NAMES: Final = frozenset(_SCHEMAS)


class SecretError(ValueError):
    """The secret cannot be had; the message says why and never holds the secret."""


class Secret:
    """A value that must not be seen. `source` says where it came from: `env ACME_PASSWORD`, or `the file` for plain text.

    `read` gets the value from there again, and blocks; None where it cannot change. `path` is the file behind it, if there is one. No
    dataclass: `asdict` and a model's dump would open it.
    """

    __slots__ = ("_read", "_value", "path", "source")

    def __init__(
        self, value: str, source: str = "the file", *, read: Callable[[], str] | None = None, path: Path | None = None
    ) -> None:  # fmt: skip
        self._value = value
        self._read = read
        self.source = source
        self.path = path

    def reveal(self) -> str:
        """The value, for the one place that sends it."""
        return self._value

    def read_again(self) -> "Secret":
        """The secret as its source has it now: another one, or this very one where nothing has changed. Blocks. Raises ValueError."""
        value = self._read() if self._read is not None else self._value
        return self if value == self._value else Secret(value, self.source, read=self._read, path=self.path)

    @property
    def is_plain(self) -> bool:
        """Whether it stood in the configuration itself."""
        return self.source == "the file"

    @property
    def can_change(self) -> bool:
        """Whether its source may have another one while the program runs."""
        return self._read is not None

    def __repr__(self) -> str:
        return f"Secret(from {self.source})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Secret) and self._value == other._value

    def __hash__(self) -> int:
        return hash(self._value)

    def __reduce__(self) -> NoReturn:
        raise TypeError("a secret cannot be pickled")


class Use(NamedTuple):
    """A place that uses a secret: `upstream acme: its secret`, the secret in use, and how another one takes its place.

    `take` is given the one that was in use when the new one was read, and answers whether it still was and the new one is.
    """

    name: str
    current: Callable[[], Secret]
    take: Callable[[Secret, Secret], bool]


def _no_key(_: str) -> str:
    raise SecretError("there is no key to open it with")


def resolve(
    source: Any,
    environ: Mapping[str, str],
    *,
    base: Path = Path(),
    check: Callable[[str], object] | None = None,
    decrypt: Callable[[str], str] = _no_key,
) -> Secret:
    """The secret that `source`, a string or one of the forms of the file, stands for.

    `base` is where relative file names begin. `check` raises ValueError for a value that is of no use, whenever one is read; `decrypt`
    opens an encrypted one. Raises what they do or SecretError, also for an empty secret.
    """
    if isinstance(source, Secret):
        return source
    if isinstance(source, str):
        return Secret(_checked(lambda: source, "the file", check))
    if not isinstance(source, Mapping) or len(source) != 1:
        raise SecretError(f"must be {_FORMS}")
    ((form, where),) = source.items()
    if form not in _FORM_NAMES:
        # The key may itself be a secret that someone wrote in braces: it is not repeated.
        raise SecretError(f"must be {_FORMS}")
    if form != "command" and (not isinstance(where, str) or not where):
        meant = "must be a text from `relay secret encrypt`" if form == "encrypted" else f"must name one thing, as in {_FORMS}"
        raise SecretError(f"{form}: {meant}")
    if form == "env":
        if where.startswith("$"):
            raise SecretError("env: write the name of the variable without $ and braces")
        if where not in environ:
            raise SecretError(f"the environment variable {where} is not set")
        return Secret(_checked(lambda: environ[where], f"env {where}", check), f"env {where}")
    if form == "encrypted":
        return Secret(_checked(lambda: decrypt(where), "encrypted text", check), "encrypted text")
    if form == "command":
        path, ask, name = None, partial(_from_command, where), f"command {_words(where)[0]}"
    else:
        path = (base / Path(os.path.expanduser(where))).absolute() if form == "file" else _credential_path(where, environ)
        ask, name = partial(read_file, path), f"{form} {where}"
    read = partial(_checked, ask, name, check)
    return Secret(read(), name, read=read, path=path)


def _checked(ask: Callable[[], str], source: str, check: Callable[[str], object] | None) -> str:
    value, name = ask(), "the secret" if source == "the file" else f"the secret from {source}"
    if not value:
        raise SecretError(f"{name} is empty")
    try:
        value.encode()
    except UnicodeEncodeError:  # the environment may hold any octets
        raise SecretError(f"{name} is not UTF-8 text") from None
    if check is not None:
        check(value)
    return value


def _credential_path(name: str, environ: Mapping[str, str]) -> Path:
    directory = environ.get("CREDENTIALS_DIRECTORY")
    if not directory:
        raise SecretError(f"no credential {name}: $CREDENTIALS_DIRECTORY is not set; systemd sets it with LoadCredential=")
    if "/" in name or name in (".", ".."):
        raise SecretError("credential: must be a name, not a path")
    return Path(directory, name).absolute()


def read_file(path: Path) -> str:
    """The text of a file that is small enough for a secret, without one line break at its end. Raises SecretError."""
    try:
        # Without waiting for somebody to write to a pipe: then it is empty, and the relay starts all the same.
        with open(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK)) as file:
            os.set_blocking(file.fileno(), True)
            content = file.read(_FILE_LIMIT_OCTETS + 1)
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not a usable file name"
        raise SecretError(f"cannot read {path}: {reason}") from None
    if len(content) > _FILE_LIMIT_OCTETS:
        raise SecretError(f"{path} is too large for a secret")
    return _decoded(content, str(path))


def _words(argv: Any) -> Sequence[str]:
    if not isinstance(argv, list | tuple) or not argv or not all(isinstance(word, str) and word for word in argv):
        raise SecretError("command: must be a list of words, such as [pass, show, relay/acme]")
    return argv


def _from_command(argv: Sequence[str]) -> str:
    null, deadline = subprocess.DEVNULL, time.monotonic() + _COMMAND_TIMEOUT_SECONDS
    try:
        with subprocess.Popen(argv, bufsize=0, stdin=null, stdout=subprocess.PIPE, stderr=null) as child:
            try:
                assert child.stdout is not None, "it is a pipe"
                printed = _printed(child.stdout.fileno(), deadline)
                if len(printed) > _FILE_LIMIT_OCTETS:
                    raise SecretError(f"the command {argv[0]} prints too much for a secret")
                code = child.wait(max(0.0, deadline - time.monotonic()))
            except BaseException:
                child.kill()
                raise
    except (TimeoutError, subprocess.TimeoutExpired):
        reason = f"took longer than {_COMMAND_TIMEOUT_SECONDS} s"
    except (OSError, ValueError) as error:
        if isinstance(error, SecretError):
            raise
        reason = f"cannot be run: {error.strerror if isinstance(error, OSError) else 'not a usable command'}"
    else:
        if code == 0:
            return _decoded(printed, f"the output of {argv[0]}")
        reason = f"was killed by signal {-code}" if code < 0 else f"failed with exit code {code}"
    raise SecretError(f"the command {argv[0]} {reason}")


def _printed(descriptor: int, deadline: float) -> bytes:
    """What comes through a pipe until its end, or until it is more than any secret has. Raises TimeoutError."""
    poll, found = select.poll(), b""
    poll.register(descriptor, select.POLLIN)
    while len(found) <= _FILE_LIMIT_OCTETS:
        if not poll.poll(1000 * max(0.0, deadline - time.monotonic())):
            raise TimeoutError
        if not (piece := os.read(descriptor, _FILE_LIMIT_OCTETS)):
            break
        found += piece
    return found


def _decoded(content: bytes, where: str) -> str:
    try:
        text = content.decode("utf-8-sig")  # the mark that some editors put first is no part of any secret
    except UnicodeDecodeError:
        raise SecretError(f"{where} is not UTF-8 text") from None
    return text.removesuffix("\n").removesuffix("\r")
