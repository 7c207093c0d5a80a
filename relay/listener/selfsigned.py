"""A certificate that we sign ourselves, where a listener has TLS and names none: better than clear text, and proof of nothing.

It is kept in a file, so that a device which was told to trust it still does after a restart. The one module here that makes keys.
"""

import datetime
import os
from pathlib import Path
from typing import Final

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.x509.oid import NameOID

_DAYS: Final = 3650
_LEFT: Final = datetime.timedelta(days=30)


def self_signed(directory: Path, hostname: str, *, old: bool) -> Path:
    """The file with a certificate for `hostname` and its key: as it is when it still serves, else made. Raises OSError.

    `old`: with an RSA key, which is what clients know that know no TLS 1.2.
    """
    path = directory / f"self-signed{'-rsa' if old else ''}.pem"
    if not _serves(path, hostname):
        new = path.with_suffix(".new")
        new.unlink(missing_ok=True)
        with os.fdopen(os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
            file.write(_made(hostname, old=old))
        new.replace(path)
    return path


def fingerprint(path: Path) -> str:
    """SHA-256 of the certificate in `path`, as other programs show it."""
    return x509.load_pem_x509_certificate(path.read_bytes()).fingerprint(hashes.SHA256()).hex(":").upper()


def _serves(path: Path, hostname: str) -> bool:
    try:
        pem = path.read_bytes()
        certificate = x509.load_pem_x509_certificate(pem)
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        key = serialization.load_pem_private_key(pem, None)
    except (OSError, ValueError, TypeError, x509.ExtensionNotFound):
        return False
    if certificate.not_valid_after_utc - datetime.datetime.now(datetime.UTC) < _LEFT:
        return False
    return hostname in names.get_values_for_type(x509.DNSName) and key.public_key() == certificate.public_key()


def _made(hostname: str, *, old: bool) -> bytes:
    key = rsa.generate_private_key(65537, 2048) if old else ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, hostname[:64])])
    now = datetime.datetime.now(datetime.UTC)
    builder = x509.CertificateBuilder().subject_name(name).issuer_name(name).public_key(key.public_key())
    builder = builder.serial_number(x509.random_serial_number())
    builder = builder.not_valid_before(now - datetime.timedelta(days=1)).not_valid_after(now + datetime.timedelta(days=_DAYS))
    builder = builder.add_extension(x509.SubjectAlternativeName([x509.DNSName(hostname)]), critical=False)
    builder = builder.add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
    certificate = builder.sign(key, hashes.SHA256())
    secret = key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    return certificate.public_bytes(serialization.Encoding.PEM) + secret
