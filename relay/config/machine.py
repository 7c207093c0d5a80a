"""What the configuration asks the machine: its name, where a service keeps its state, whether a file holds certificates.

Everything is asked when a value is read, so that a wrong one is a finding with a place in the file.
"""

import functools
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


def certificate_file(path: Path) -> Path:
    """`path` again, once it is known to hold a PEM certificate. Raises ValueError."""
    try:
        content = path.read_bytes()
    except (OSError, ValueError) as error:
        raise ValueError(f"cannot read {path}: {error.strerror if isinstance(error, OSError) else 'no file name'}") from None
    if b"-----BEGIN CERTIFICATE-----" not in content:
        raise ValueError(f"{path} holds no PEM certificate (no BEGIN CERTIFICATE line)")
    return path


def trust_fault(path: Path) -> str:
    """What OpenSSL has against the certificates in `path`; `""` when it takes them."""
    import ssl  # 20 ms that `relay serve` spends when it first connects, and only `relay check` earlier

    try:
        ssl.create_default_context(cafile=path)
    except (OSError, ssl.SSLError) as error:
        return f"OpenSSL cannot read the certificates in {path}: {error.strerror or error}"
    return ""
