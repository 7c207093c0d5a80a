"""A certificate authority of our own, and the certificates that tests need: right names, wrong names, expired ones."""

import datetime
import ssl
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import trustme


@dataclass(frozen=True, slots=True)
class CertificateFiles:
    """PEM files of one certificate: the chain, and its key."""

    certificate: Path
    key: Path


class Authority:
    """A CA whose certificate is in `ca_file`; its certificates are good for an upstream on this machine."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._ca = trustme.CA()
        self.ca_file = directory / "ca.pem"
        self._ca.cert_pem.write_to_path(str(self.ca_file))
        self.server = self.context()

    def context(self, *names: str, expired: bool = False, days: float = 30) -> ssl.SSLContext:
        """A server's context for these names or addresses, good for so many days; the default is localhost, 127.0.0.1 and ::1."""
        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        self._issue(names, expired=expired, days=days).configure_cert(context)
        return context

    def client_context(self) -> ssl.SSLContext:
        """A client's context that trusts this CA alone and checks names."""
        return ssl.create_default_context(cafile=str(self.ca_file))

    def files(self, *names: str, expired: bool = False) -> CertificateFiles:
        """Certificate and key as files, for servers that are configured with paths."""
        certificate = self._issue(names, expired=expired)
        stem = f"{names[0] if names else 'localhost'}{'-expired' if expired else ''}"
        files = CertificateFiles(self._directory / f"{stem}.pem", self._directory / f"{stem}.key")
        files.certificate.write_bytes(b"".join(blob.bytes() for blob in certificate.cert_chain_pems))
        certificate.private_key_pem.write_to_path(str(files.key))
        return files

    def stranger(self) -> Self:
        """Another CA, that nobody who trusts this one trusts."""
        directory = self._directory / "stranger"
        directory.mkdir(exist_ok=True)
        return type(self)(directory)

    def _issue(self, names: tuple[str, ...], *, expired: bool, days: float = 30) -> trustme.LeafCert:
        now = datetime.datetime.now(datetime.UTC)
        return self._ca.issue_cert(
            *(names or ("localhost", "127.0.0.1", "::1")),
            not_before=now - datetime.timedelta(days=30),
            not_after=now + datetime.timedelta(days=-1 if expired else days),
        )
