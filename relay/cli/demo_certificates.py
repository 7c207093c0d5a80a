"""A certificate authority that lives as long as one demo, and what its servers need of it.

Its private key never leaves memory; a server's key is on disk for the moment in which OpenSSL reads it.
"""

import datetime
import ipaddress
import ssl
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

_ADDRESS = ipaddress.ip_address("127.0.0.1")
_DAYS = 30  # longer than anybody leaves a demo running
_SIGNS_CERTIFICATES = x509.KeyUsage(
    digital_signature=False, content_commitment=False, key_encipherment=False, data_encipherment=False, key_agreement=False,
    key_cert_sign=True, crl_sign=False, encipher_only=False, decipher_only=False,
)  # fmt: skip


class Authority:
    """The CA. Its certificate is in `ca_file`."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._key = ec.generate_private_key(ec.SECP256R1())
        self._name = _name("relay demo CA")
        # Python 3.13 verifies strictly (VERIFY_X509_STRICT): a CA must say what its key is for, and name it (RFC 5280 section 4.2.1).
        certificate = self._build(self._name, self._key).add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        certificate = certificate.add_extension(_SIGNS_CERTIFICATES, critical=True)
        certificate = certificate.add_extension(x509.SubjectKeyIdentifier.from_public_key(self._key.public_key()), critical=False)
        self.ca_file = directory / "ca.pem"
        self.ca_file.write_bytes(certificate.sign(self._key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM))

    def server(self, name: str) -> ssl.SSLContext:
        """The context of a server on 127.0.0.1; `name` is only for people who look at its certificate."""
        key = ec.generate_private_key(ec.SECP256R1())
        certificate = self._build(_name(name), key).add_extension(
            x509.SubjectAlternativeName([x509.IPAddress(_ADDRESS), x509.DNSName("localhost")]), critical=False
        )
        pem = certificate.sign(self._key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)
        pem += key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
        path = self._directory / f"{name}.pem"
        path.touch(mode=0o600)
        path.write_bytes(pem)
        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        context.load_cert_chain(path)
        path.unlink()
        return context

    def _build(self, subject: x509.Name, key: ec.EllipticCurvePrivateKey) -> x509.CertificateBuilder:
        now = datetime.datetime.now(datetime.UTC)
        builder = x509.CertificateBuilder().subject_name(subject).issuer_name(self._name).public_key(key.public_key())
        builder = builder.serial_number(x509.random_serial_number()).add_extension(
            x509.AuthorityKeyIdentifier.from_issuer_public_key(self._key.public_key()), critical=False
        )
        # A clock that is a little behind somewhere shall not matter.
        return builder.not_valid_before(now - datetime.timedelta(hours=1)).not_valid_after(now + datetime.timedelta(days=_DAYS))


def _name(text: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text)])
