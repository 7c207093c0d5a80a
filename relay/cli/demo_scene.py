"""The demo's cast: three tenants, their providers, the configuration that knows them, and one message from each tenant's app.

Everything is in one directory: the CA, the passwords, the configuration, the spool. The third tenant's provider is a port on which
nobody listens; it is kept bound, so that nobody else begins to listen there.
"""

import secrets
import smtplib
import socket
from collections.abc import Callable
from dataclasses import dataclass
from email.message import EmailMessage
from pathlib import Path
from typing import Literal

from relay.cli.demo_certificates import Authority
from relay.cli.demo_upstream import Arrival, DemoUpstream

_PROVIDERS: tuple[tuple[str, Literal["starttls", "tls"], str], ...] = (
    ("acme", "starttls", "relay@acme.example"),
    ("globex", "tls", "mailer"),
    ("house", "starttls", "apikey"),
)
_SEND_SECONDS = 10.0

# What a person would write, but for the ports.
_CONFIGURATION = """\
hostname: relay.demo.example
listeners: [{{bind: {bind}}}]
upstreams:
  acme:    {{host: 127.0.0.1, port: {acme}, security: starttls, ca_file: ca.pem,
            username: relay@acme.example, password: {{file: acme.password}}, senders: [acme.example]}}
  globex:  {{host: 127.0.0.1, port: {globex}, security: tls, ca_file: ca.pem,
            username: mailer, password: {{file: globex.password}}, senders: [globex.example]}}
  initech: {{host: 127.0.0.1, port: {initech}, ca_file: ca.pem,                      # nobody answers there
            username: initech, password: {{file: initech.password}}, senders: [initech.example]}}
  house:   {{host: 127.0.0.1, port: {house}, ca_file: ca.pem,
            username: apikey, password: {{file: house.password}}, senders: [house.example]}}
routes:
  - {{name: acme, sender: acme.example, upstream: acme,
     rewrite: {{from: Acme Billing <no-reply@acme.example>, reply_to: original}}}}
  - {{name: globex, sender: globex.example, upstream: globex, rewrite: {{from: {{name: Globex Reports}}}}}}
  - {{name: initech, sender: initech.example, upstream: initech, fallback: {{upstream: house, rewrite:
     {{from: Initech via House <no-reply@house.example>, reply_to: original, envelope_sender: bounces@house.example}}}}}}
spool: {{directory: {spool}}}
control: {control}
shutdown_timeout: 3s
"""


@dataclass(frozen=True, slots=True)
class Letter:
    """One message of an app, and where it must arrive: at which provider, with whose login, with which From."""

    author: str
    sender: str
    recipient: str
    subject: str
    upstream: str
    login: str
    final_from: str

    def arrived_well(self, arrival: Arrival, final_from: str) -> bool:
        where = (arrival.upstream, arrival.login, arrival.recipients)
        return where == (self.upstream, self.login, (self.recipient,)) and final_from == self.final_from and arrival.tls.startswith("TLS")


LETTERS = (
    Letter(
        author="ERP <billing@acme.example>", sender="billing@acme.example", recipient="anna@customer.example",
        subject="Invoice 4711", upstream="acme", login="relay@acme.example", final_from="Acme Billing <no-reply@acme.example>",
    ),
    Letter(
        author="scanner@globex.example", sender="scanner@globex.example", recipient="bob@customer.example",
        subject="Scan of 3 pages", upstream="globex", login="mailer", final_from="Globex Reports <scanner@globex.example>",
    ),
    Letter(
        author="cron <root@initech.example>", sender="root@initech.example", recipient="carol@customer.example",
        subject="Backup finished", upstream="house", login="apikey", final_from="Initech via House <no-reply@house.example>",
    ),
)  # fmt: skip


class Scene:
    """The providers, the closed port, and the files. Close it."""

    def __init__(self, directory: Path, arrived: Callable[[Arrival], None]) -> None:
        self.config_file = directory / "config.yaml"
        self.log_file = directory / "relay.log"
        self._directory = directory
        authority = Authority(directory)
        self._upstreams = [
            DemoUpstream(name, authority.server(name), security=security, username=username, password=self._password(name), arrived=arrived)
            for name, security, username in _PROVIDERS
        ]
        self._password("initech")
        self._closed_port = socket.socket()
        self._closed_port.bind(("127.0.0.1", 0))
        self.ports = {"initech": int(self._closed_port.getsockname()[1])}

    async def open(self, bind: str) -> None:
        """Start the providers and write the configuration with the relay's own address."""
        for upstream in self._upstreams:
            self.ports[upstream.name] = await upstream.open()
        self.config_file.write_text(
            _CONFIGURATION.format(bind=bind, spool=self._directory / "spool", control=self._directory / "control", **self.ports)
        )
        self.config_file.chmod(0o600)

    async def close(self) -> None:
        for upstream in self._upstreams:
            await upstream.close()
        self._closed_port.close()

    def _password(self, name: str) -> str:
        password = secrets.token_urlsafe(12)
        path = self._directory / f"{name}.password"
        path.touch(mode=0o600)
        path.write_text(password + "\n")
        return password


def send(letter: Letter, host: str, port: int) -> str:
    """Hand the letter in as an old app does, and return the relay's last reply. Raises OSError and smtplib.SMTPException."""
    message = EmailMessage()
    message["From"], message["To"], message["Subject"] = letter.author, letter.recipient, letter.subject
    message.set_content("Sent by the demo of relay.\n")
    with smtplib.SMTP(host, port, timeout=_SEND_SECONDS) as app:
        app.ehlo()
        for code, text in (app.mail(letter.sender), app.rcpt(letter.recipient), app.data(message.as_bytes())):
            if code >= 400:
                raise smtplib.SMTPResponseException(code, text)
        return f"{code} {text.decode('utf-8', 'replace')}"


def free_port(host: str, wanted: int) -> int:
    """`wanted` if nobody listens there, else one that is free."""
    for port in (wanted, 0):
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((host, port))
                return int(probe.getsockname()[1])
            except OSError:
                if port == 0:
                    raise
    raise AssertionError("port 0 is free or raises")
