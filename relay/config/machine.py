"""What the configuration asks the machine: its name, where a service keeps its state, whether a file holds certificates.

Everything is asked when a value is read, so that a wrong one is a finding with a place in the file; what a file looks like, later, too.
"""

import functools
import os
import socket
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

#: The control socket's name, in a directory of the machine's or the spool's.
CONTROL = "control.sock"


class Places(NamedTuple):
    """Where a relay keeps its mail and hears its operator."""

    spool: Path
    control: Path


@functools.cache
def default_hostname() -> str:
    """The machine's name, as qualified as it knows it. May ask the resolver once."""
    qualified = socket.getfqdn()
    return qualified if "." in qualified else socket.gethostname()


def default_directory(environ: Mapping[str, str]) -> Path:
    """Where the spool is when the file does not say."""
    # systemd gives several directories with colons between them; the first is the unit's own.
    return Path(environ.get("STATE_DIRECTORY", "").partition(":")[0] or "relay-data")


def default_control(environ: Mapping[str, str], spool: Path) -> Path:
    """Where the control socket is when the file does not say."""
    runtime = environ.get("RUNTIME_DIRECTORY", "").partition(":")[0]
    return (Path(runtime) if runtime else spool) / CONTROL


def is_missing(path: Path) -> bool:
    """Whether there is nothing at `path`. What we may not look at is not missing: reading it says what is wrong."""
    try:
        path.stat()
    except OSError as error:
        return isinstance(error, FileNotFoundError | NotADirectoryError)
    return False


def certificate_file(path: Path) -> Path:
    """`path` again, once it is known to hold a PEM certificate. Raises ValueError."""
    if b"-----BEGIN CERTIFICATE-----" not in _content(path):
        raise ValueError(f"{path} holds no PEM certificate (no BEGIN CERTIFICATE line)")
    return path


def key_file(path: Path) -> Path:
    """`path` again, once it is known to hold a PEM private key. Raises ValueError."""
    if b"PRIVATE KEY-----" not in _content(path):
        raise ValueError(f"{path} holds no PEM private key (no BEGIN … PRIVATE KEY line)")
    return path


def stamp_of(path: str | Path) -> tuple[int, ...]:
    """What tells one content of a file from another, however it was renewed; of one that cannot be found, why."""
    try:
        status = os.stat(path)
    except OSError as error:
        return (error.errno or 0,)
    # The time of the inode's change, too: a key that could not be read and was given the right mode has no other.
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns


def _content(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except (OSError, ValueError) as error:
        raise ValueError(f"cannot read {path}: {error.strerror if isinstance(error, OSError) else 'no file name'}") from None


def pair_fault(certificate: Path, key: Path | None, *, called: str = "key") -> str:
    """What OpenSSL has against a certificate with its key; `""` when it takes them. No key: it is in the same file.

    `called`: how the configuration calls the key.
    """
    import ssl  # see trust_fault

    def ask() -> str:
        raise ValueError(f"the key in {key or certificate} has a passphrase, and nobody is there to type it: store it without one")

    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(certificate, key, password=ask)
    except ssl.SSLError as error:
        if error.reason == "KEY_VALUES_MISMATCH":
            return f"the key in {key} is not that of the certificate in {certificate}" if key else f"the key in {certificate} is another's"
        if key is None and b"PRIVATE KEY-----" not in certificate.read_bytes():
            return f"there is no key: name its file with `{called}`, or add it to {certificate}"
        return f"OpenSSL cannot use {certificate} with {key or 'the key in it'}: {error.reason or error.strerror or error}"
    except (OSError, ValueError) as error:
        return str(error)
    return ""


def trust_fault(path: Path) -> str:
    """What OpenSSL has against the certificates in `path`; `""` when it takes them."""
    import ssl  # 20 ms that `relay serve` spends when it first connects, and only `relay check` earlier

    try:
        ssl.create_default_context(cafile=path)
    except (OSError, ssl.SSLError) as error:
        return f"OpenSSL cannot read the certificates in {path}: {error.strerror or error}"
    return ""
