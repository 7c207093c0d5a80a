"""Get a secret from where the file says it is: the file itself, the environment, another file, systemd, a command.

A secret's value leaves a `Secret` only by `reveal()`: not by print, log, repr, pickle or traceback. What goes wrong is said
without the value and without a command's output. A file, a systemd credential and a command are asked again by `read_again`.
"""

import os
import stat
import subprocess
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Final, NoReturn

_COMMAND_TIMEOUT_SECONDS = 10
_FILE_LIMIT_OCTETS = 65536  # no credential is longer; a key file with its chain is not
_FORMS = "text, or one of {env: NAME}, {file: PATH}, {credential: NAME}, {command: [argv…]}"


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


class SecretError(ValueError):
    """The secret cannot be had; the message says why and never holds the secret."""


class Secret:
    """A value that must not be seen. `source` says where it came from: `env ACME_PASSWORD`, or `the file` for plain text.

    `read` gets the value from there again, and blocks; None where it cannot change. No dataclass: `asdict` and a model's dump would
    open it.
    """

    __slots__ = ("_read", "_value", "source")

    def __init__(self, value: str, source: str = "the file", *, read: Callable[[], str] | None = None) -> None:
        self._value = value
        self._read = read
        self.source = source

    def reveal(self) -> str:
        """The value, for the one place that sends it."""
        return self._value

    def read_again(self) -> "Secret":
        """The secret as its source has it now: another one, or this very one where nothing has changed. Blocks. Raises ValueError."""
        value = self._read() if self._read is not None else self._value
        return self if value == self._value else Secret(value, self.source, read=self._read)

    @property
    def is_plain(self) -> bool:
        """Whether it stood in the configuration itself."""
        return self.source == "the file"

    @property
    def is_in_file(self) -> bool:
        """Whether it costs next to nothing to look whether it has changed."""
        return self.source.startswith(("file ", "credential "))

    def __repr__(self) -> str:
        return f"Secret(from {self.source})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Secret) and self._value == other._value

    def __hash__(self) -> int:
        return hash(self._value)

    def __reduce__(self) -> NoReturn:
        raise TypeError("a secret cannot be pickled")


def resolve(
    source: Any, environ: Mapping[str, str], *, base: Path = Path(), check: Callable[[str], object] | None = None
) -> Secret:  # fmt: skip
    """The secret that `source`, a string or one of the forms of the file, stands for.

    `base` is where relative file names begin. `check` raises ValueError for a value that is of no use, whenever one is read. Raises
    that or SecretError, also for an empty secret.
    """
    if isinstance(source, Secret):
        return source
    if isinstance(source, str):
        return Secret(_checked(lambda: source, "the file", check))
    if not isinstance(source, Mapping) or len(source) != 1:
        raise SecretError(f"must be {_FORMS}")
    ((form, where),) = source.items()
    if form == "encrypted":
        raise SecretError("the form {encrypted: …} is not available yet")
    if form not in ("env", "file", "credential", "command"):
        # The key may itself be a secret that someone wrote in braces: it is not repeated.
        raise SecretError(f"must be {_FORMS}")
    if form != "command" and (not isinstance(where, str) or not where):
        raise SecretError(f"{form}: must name one thing, as in {_FORMS}")
    if form == "env":
        if where not in environ:
            raise SecretError(f"the environment variable {where} is not set")
        return Secret(_checked(lambda: environ[where], f"env {where}", check), f"env {where}")
    if form == "command":
        ask, name = partial(_from_command, where), f"command {_words(where)[0]}"
    else:
        path = (base / Path(where).expanduser()).absolute() if form == "file" else _credential_path(where, environ)
        ask, name = partial(_from_file, path), f"{form} {where}"
    read = partial(_checked, ask, name, check)
    return Secret(read(), name, read=read)


def _checked(ask: Callable[[], str], source: str, check: Callable[[str], object] | None) -> str:
    value = ask()
    if not value:
        raise SecretError("the secret is empty" if source == "the file" else f"the secret from {source} is empty")
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


def _from_file(path: Path) -> str:
    try:
        with path.open("rb") as file:
            if stat.S_ISDIR(os.fstat(file.fileno()).st_mode):
                raise SecretError(f"cannot read {path}: Is a directory")
            content = file.read(_FILE_LIMIT_OCTETS + 1)
    except (OSError, ValueError) as error:
        if isinstance(error, SecretError):
            raise
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
    try:
        done = subprocess.run(
            argv,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            timeout=_COMMAND_TIMEOUT_SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired:
        reason = f"took longer than {_COMMAND_TIMEOUT_SECONDS} s"
    except (OSError, ValueError) as error:
        reason = f"cannot be run: {error.strerror if isinstance(error, OSError) else 'not a usable command'}"
    else:
        if done.returncode == 0:
            return _decoded(done.stdout, f"the output of {argv[0]}")
        reason = f"was killed by signal {-done.returncode}" if done.returncode < 0 else f"failed with exit code {done.returncode}"
    raise SecretError(f"the command {argv[0]} {reason}")


def _decoded(content: bytes, where: str) -> str:
    try:
        text = content.decode()
    except UnicodeDecodeError:
        raise SecretError(f"{where} is not UTF-8 text") from None
    return text.removesuffix("\n").removesuffix("\r")
