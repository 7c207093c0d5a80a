"""`relay secret keygen` and `relay secret encrypt`: secrets that stand in the configuration as encrypted text.

A secret is asked for at a terminal, without showing it, or read from standard input; never an argument: others could see it. `--rotate`
re-encrypts what stands in whole files, where it stands, and touches nothing else in them. Exit code 1 when it could not be done.
"""

import argparse
import os
import re
import stat
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from relay.cli.options import EX_CONFIG, EX_FAILED, EX_USAGE, add_config, fail

if TYPE_CHECKING:
    from relay.config.encryption import Keyring

#: What `encrypt` made, in any text: a Fernet token begins with its version, 0x80, and four octets of time that are zero till 2106.
_ENCRYPTED = re.compile(r"[0-9a-f]{8}\.gAAAA[A-Za-z0-9_-]+={0,2}")
_SECRET_LIMIT_OCTETS = 65536  # as much as a file with a secret may have
_COMMENT = re.compile(r"(?:^|\s)#[^\n]*\Z")


class _Failure(Exception):
    """It could not be done, and why."""


def add_parser(subparsers: Any) -> None:
    """Add `secret` with its two commands."""
    parser = subparsers.add_parser(
        "secret", help="encrypt the secrets in the configuration", description="Make keys, and encrypt secrets with them."
    )
    commands = parser.add_subparsers(dest="secret_command", required=True, metavar="COMMAND")
    keygen = commands.add_parser(
        "keygen",
        help="make a key",
        description="Make a key and print it, or write it to a new file that only you can read. "
        "A key file holds one key a line, the newest first; the others still open what they have encrypted.",
    )
    keygen.add_argument("--out", metavar="FILE", type=Path, help="write it to this file, which must not exist yet")
    keygen.set_defaults(run=_keygen)
    encrypt = commands.add_parser(
        "encrypt",
        help="encrypt a secret",
        description="Read a secret, at a terminal or from standard input, and print it as it goes into the configuration. The key is "
        "looked for in --key-file, then where the configuration says (secrets.key_file), then in $RELAY_SECRET_KEY_FILE.",
    )
    add_config(encrypt)
    encrypt.add_argument("--key-file", metavar="FILE", type=Path, help="the file with the keys, newest first")
    encrypt.add_argument("--rotate", action="store_true", help="re-encrypt with the newest key: in FILEs, or from standard input to output")
    encrypt.add_argument("files", nargs="*", metavar="FILE", help="with --rotate: configuration files to change where they are")
    encrypt.set_defaults(run=_encrypt)


def _keygen(options: argparse.Namespace) -> int:
    from relay.config.encryption import new_key

    if options.out is None:
        print(new_key())
        return 0
    try:
        descriptor = os.open(options.out, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with open(descriptor, "w", encoding="ascii") as file:
            file.write(new_key() + "\n")
    except FileExistsError:
        return _fail(f"{options.out} exists already, and keys are never overwritten: write a new file, or add a line on top of this one")
    except (OSError, ValueError) as error:
        return _fail(f"cannot write {options.out}: {_reason(error)}")
    return 0


def _encrypt(options: argparse.Namespace) -> int:
    from relay.config.findings import ConfigError
    from relay.config.secrets import SecretError

    if options.files and not options.rotate:  # whatever it is, it is not repeated
        return fail("relay secret encrypt: a secret is no argument, others could see it: type it when asked, or pipe it in", EX_USAGE)
    try:
        ring = _ring(options)
        if not options.rotate:
            print(f'{{encrypted: "{ring.encrypt(_asked() if sys.stdin.isatty() else _read())}"}}')
        elif options.files:
            for name in options.files:
                _rotate(Path(name), ring)
        else:
            sys.stdout.write(_renewed(_decoded(sys.stdin.buffer.read(), "standard input"), ring, "standard input"))
    except ConfigError as error:
        return fail(str(error), EX_CONFIG)
    except (_Failure, SecretError) as error:
        return _fail(str(error))
    return 0


def _ring(options: argparse.Namespace) -> "Keyring":
    """Raises SecretError and ConfigError."""
    from relay.config.encryption import Keyring, keys_at
    from relay.config.findings import ConfigError
    from relay.config.load import find_config, keys

    if options.key_file is not None:
        return Keyring.from_file(options.key_file)
    try:
        path = find_config(options.config, os.environ)
    except ConfigError:  # a configuration is not needed
        return keys_at(None, os.environ).ring()
    return keys(path).ring()


def _asked() -> str:
    import getpass

    try:
        secret = getpass.getpass("Secret: ")
        if not secret:
            raise _Failure("the secret is empty")
        again = getpass.getpass("Once more: ")
        secret.encode()
    except EOFError:
        raise _Failure("nothing was typed") from None
    except UnicodeError:
        raise _Failure("what was typed is not UTF-8 text") from None
    if again != secret:
        raise _Failure("the two were not the same")
    return secret


def _read() -> str:
    """All of standard input, without the line break at its end: a key in JSON has many lines."""
    content = sys.stdin.buffer.read(_SECRET_LIMIT_OCTETS + 1)
    if len(content) > _SECRET_LIMIT_OCTETS:
        raise _Failure("standard input is too large for a secret")
    secret = _decoded(content, "standard input").removesuffix("\n").removesuffix("\r")
    if not secret:
        raise _Failure("the secret is empty")
    return secret


def _decoded(content: bytes, where: str) -> str:
    """As UTF-8 whatever the locale is: that is how it stands in the configuration."""
    try:
        return content.decode()
    except UnicodeDecodeError:
        raise _Failure(f"{where} is not UTF-8 text") from None


def _rotate(path: Path, ring: "Keyring") -> None:
    """Write the file anew beside itself and put it in its place: a crash leaves the old one or the new one."""
    try:
        path = path.resolve(strict=True)  # a symbolic link stays one
        old = path.read_bytes()
        content = _renewed(_decoded(old, str(path)), ring, str(path)).encode()
        if content != old:
            _replace(path, content)
    except (OSError, ValueError) as error:
        raise _Failure(f"cannot rewrite {path}: {_reason(error)}") from None


def _replace(path: Path, content: bytes) -> None:
    status, beside = path.stat(), path.with_name(f".{path.name}.{os.getpid()}")
    descriptor = os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        with open(descriptor, "wb") as file:
            file.write(content)
            if (status.st_uid, status.st_gid) != (os.geteuid(), os.getegid()):
                os.fchown(file.fileno(), status.st_uid, status.st_gid)
            os.fchmod(file.fileno(), stat.S_IMODE(status.st_mode))
            file.flush()
            os.fsync(file.fileno())
        beside.replace(path)
    except BaseException:
        beside.unlink(missing_ok=True)
        raise


def _renewed(text: str, ring: "Keyring", where: str) -> str:
    """The text with every encrypted secret in it encrypted with the newest key. Says on standard error what was done."""
    from relay.config.secrets import SecretError

    found = changed = 0

    def renew(match: re.Match[str]) -> str:
        nonlocal found, changed
        found += 1
        if ring.is_current(match[0]):
            return match[0]
        try:
            renewed = ring.encrypt(ring.decrypt(match[0]))
        except SecretError:
            if _COMMENT.search(text, max(0, text.rfind("\n", 0, match.start())), match.start()) is None:
                raise
            found -= 1  # an example, or a secret that nobody uses
            return match[0]
        changed += 1
        return renewed

    try:
        text = _ENCRYPTED.sub(renew, text)
    except SecretError as error:
        raise _Failure(f"{where}, encrypted secret no. {found}: {error}; nothing was changed") from None
    print(f"{where}: {changed} of {found} encrypted secrets re-encrypted", file=sys.stderr)
    return text


def _reason(error: OSError | ValueError) -> str:
    return error.strerror or str(error) if isinstance(error, OSError) else "no file name"


def _fail(text: str) -> int:
    return fail(f"relay secret: {text}", EX_FAILED)
