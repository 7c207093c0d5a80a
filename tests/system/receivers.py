"""Real mail servers as they are installed, each as an upstream that takes mail and only keeps it: run from a directory of its own.

    async with Postfix(tool("postfix"), chunking=False) as server:
        ...
        messages = server.messages()

With a `Submission` it has two more ports, for STARTTLS and for TLS, on which nobody sends without a login. They want to be started by
root and change to users of their own, so their directory is one that everybody may enter. Whatever one of them took for a message is a
message here: what was smuggled into one shows as two.
"""

import asyncio
import os
import pwd
import shutil
import socket
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import ClassVar, NamedTuple, Self

from tests.support.certificates import CertificateFiles
from tests.support.client import Client
from tests.support.eventually import eventually
from tests.support.upstream import unused_port

USER, PASSWORD = "acme", "p@ss w0rd%1"
#: What these servers say no to, where they are for submission: a sender that belongs to another login, a recipient, and one for now.
STRANGER, NOBODY, LATER = "stranger@acme.example", "nobody@example.org", "later@example.org"
SIZE_LIMIT = 3_000_000


class Submission(NamedTuple):
    """What a server with logins has beside its programs: a certificate for this machine."""

    certificate: CertificateFiles


class Kept(NamedTuple):
    """A message as it is kept: with LF for line ends, as all of them do."""

    sender: str
    recipients: tuple[str, ...]
    content: bytes


class Receiver:
    """A server in `directory`, on loopback ports. `deferring`: whether it has LATER come again, from the next start on."""

    mechanisms: ClassVar[tuple[str, ...]] = ("plain", "login", "cram-md5")

    def __init__(self, program: str, *, chunking: bool, submission: Submission | None = None) -> None:
        self.program = program
        self.chunking = chunking
        self.submission = submission
        self.deferring = True
        self.host = "127.0.0.1"
        self.port = self.starttls_port = self.tls_port = 0
        self.directory = Path()
        self._process: asyncio.subprocess.Process | None = None

    async def __aenter__(self) -> Self:
        self.directory = Path(tempfile.mkdtemp(prefix="relay-receiver-"))
        self.directory.chmod(0o755)
        self.port, self.starttls_port, self.tls_port = unused_ports(3)
        try:
            await self.start()
            async with Client(self.host, self.port) as client:
                await client.greet()
                assert ("CHUNKING" in client.extensions) is self.chunking
                await client.quit()
        except BaseException as error:
            await self.__aexit__(type(error), error, None)
            raise
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        await self.stop()
        if error is not None:
            error.add_note(f"-- {self.log} --\n{self.log_text()[-4000:]}")
        await eventually(self._gone, "the last of its processes to leave its directory")

    def _gone(self) -> bool:
        shutil.rmtree(self.directory, ignore_errors=True)
        return not self.directory.exists()

    async def start(self) -> None:
        """Run it, again after a stop, with what it has kept."""
        self._process = await self._run(self.prepare())
        ports = [self.port, self.starttls_port, self.tls_port] if self.submission else [self.port]
        for port in ports:
            await eventually(lambda port=port: self._answers(port), f"{self.program} to answer on port {port}", within=60)

    async def stop(self) -> None:
        """Have it end as an administrator would."""
        if self._process is not None:
            await self._end(self._process)
            self._process = None

    async def _run(self, command: Sequence[str]) -> asyncio.subprocess.Process:
        with self.directory.joinpath("output").open("ab") as output:
            return await asyncio.create_subprocess_exec(*command, stdin=subprocess.DEVNULL, stdout=output, stderr=output)

    async def _end(self, process: asyncio.subprocess.Process) -> None:
        async with asyncio.timeout(30):
            if process.returncode is None:
                process.terminate()
            await process.wait()

    def _answers(self, port: int) -> bool:
        assert self._process is not None
        assert self._process.returncode is None, f"{self.program} has ended: {self.log_text()}"
        try:
            socket.create_connection((self.host, port), 1).close()
        except OSError:
            return False
        return True

    def log_text(self) -> str:
        files = (self.directory / "output", self.log)
        return "".join(file.read_text(errors="replace") for file in files if file.exists())

    @property
    def log(self) -> Path:
        raise NotImplementedError

    def prepare(self) -> list[str]:
        """Write its configuration; the command that runs it in the foreground."""
        raise NotImplementedError

    def messages(self) -> list[Kept]:
        """All that it has taken, in no order."""
        raise NotImplementedError

    def failed_logins(self) -> int:
        """How many logins it has refused, as its log has it."""
        raise NotImplementedError


class Postfix(Receiver):
    """Postfix, which holds every message. It has no defence of its own against bare line ends, as that is what is tried.

    Its logins are Cyrus SASL's: passwords in a database of saslpasswd2.
    """

    def __init__(self, program: str, *, chunking: bool, submission: Submission | None = None) -> None:
        super().__init__(program, chunking=chunking, submission=submission)
        self._seen: set[str] = set()

    @property
    def log(self) -> Path:
        return self.directory / "queue" / "log"

    def prepare(self) -> list[str]:
        configuration, queue, data = (self.directory / name for name in ("conf", "queue", "data"))
        for path in (configuration, queue, data):
            path.mkdir(exist_ok=True)
        shutil.chown(data, "postfix")
        for name in ("active", "bounce", "defer", "deferred", "hold", "incoming", "private", "public", "corrupt", "pid"):
            (queue / name).mkdir(exist_ok=True)
            shutil.chown(queue / name, "root" if name == "pid" else "postfix")
        (queue / "quick-start").touch()  # it need not look at all of its installation, which takes seconds
        keywords = "" if self.chunking else "chunking"
        limit = SIZE_LIMIT if self.submission else 50_000_000
        main = (
            f"compatibility_level = 3.6\nqueue_directory = {queue}\ndata_directory = {data}\nmyhostname = postfix.test\n"
            f"maillog_file = {self.log}\nmaillog_file_prefixes = {self.directory}\nmydestination =\nlocal_recipient_maps =\n"
            f"inet_interfaces = 127.0.0.1\ninet_protocols = ipv4\nmynetworks = 127.0.0.0/8\nmessage_size_limit = {limit}\n"
            "smtpd_recipient_restrictions = static:HOLD, permit\nsmtpd_relay_restrictions = permit_mynetworks, reject\n"
            "smtpd_peername_lookup = no\nlocal_header_rewrite_clients =\n"
            f"smtpd_discard_ehlo_keywords = {keywords}\nsmtpd_forbid_bare_newline = no\nsmtpd_forbid_unauth_pipelining = no\n"
        )
        master = (
            f"{self.host}:{self.port} inet n - n - - smtpd\ncleanup unix n - n - 0 cleanup\nqmgr unix n - n 300 1 qmgr\n"
            "rewrite unix - - n - - trivial-rewrite\nanvil unix - - n - 1 anvil\nbounce unix - - n - 0 bounce\n"
            "postlog unix-dgram n - n - 1 postlogd\ntlsmgr unix - - n 1000? 1 tlsmgr\n"
        )
        if self.submission:
            later = f"{{{LATER} = 450 4.2.1 come again later}} " if self.deferring else ""
            main += (
                f"smtpd_tls_cert_file = {self.submission.certificate.certificate}\nsmtpd_tls_key_file = {self.submission.certificate.key}\n"
                f"smtpd_sender_login_maps = inline:{{ {{{STRANGER} = another}} }}, static:{{{USER}, {USER}@postfix.test}}\n"
                f"refused = inline:{{ {later}{{{NOBODY} = 550 5.1.1 no such user}} }}\n"
                "submission = permit_sasl_authenticated, reject\n"
                "checks = reject_sender_login_mismatch, check_recipient_access $refused, static:HOLD, permit\n" + self._logins()
            )
            doors = ((self.starttls_port, "smtpd_tls_security_level=encrypt"), (self.tls_port, "smtpd_tls_wrappermode=yes"))
            master += "".join(
                f"{self.host}:{port} inet n - n - - smtpd\n -o smtpd_sasl_auth_enable=yes -o smtpd_tls_auth_only=yes -o {option}\n"
                " -o smtpd_relay_restrictions=$submission -o smtpd_recipient_restrictions=$checks\n"
                for port, option in doors
            )
        for name, text in (("main.cf", main), ("master.cf", master)):
            (configuration / name).write_text(text)
            os.utime(configuration / name, (1, 1))  # it waits two seconds for whoever may still be writing a file as new as that
        return [self.program, "-c", str(configuration), "start-fg"]

    def _logins(self) -> str:
        """Where its users are, as settings."""
        database = self.directory / "sasldb"
        command = ("saslpasswd2", "-p", "-c", "-u", "postfix.test", "-f", str(database), USER)
        subprocess.run(command, input=PASSWORD.encode(), check=True, timeout=120, capture_output=True)
        shutil.chown(database, "postfix")
        settings = self.directory / "conf" / "sasl"  # where Debian's looks; elsewhere it is a setting
        settings.mkdir(exist_ok=True)
        (settings / "smtpd.conf").write_text(
            f"pwcheck_method: auxprop\nauxprop_plugin: sasldb\nsasldb_path: {database}\nmech_list: PLAIN LOGIN CRAM-MD5\n"
        )
        return f"cyrus_sasl_config_path = {settings}\nsmtpd_sasl_local_domain = postfix.test\n"

    async def _end(self, process: asyncio.subprocess.Process) -> None:
        # What we started is a script that waits for the real one.
        await (await self._run((self.program, "-c", str(self.directory / "conf"), "stop"))).wait()
        await super()._end(process)

    def messages(self) -> list[Kept]:
        queued = [path for folder in ("incoming", "active", "deferred", "hold") for path in (self.directory / "queue" / folder).rglob("*")]
        # What it was still writing when it had to stop is not executable, and no mail to it either.
        files = [str(path) for path in queued if path.is_file() and path.stat().st_mode & 0o100]
        return self._read_all(files)

    def unseen(self) -> list[Kept]:
        """What it holds and has not been asked for by this before: for those who ask often."""
        names = {path.name for path in (self.directory / "queue" / "hold").iterdir() if path.stat().st_mode & 0o100}
        new = sorted(names - self._seen)
        self._seen |= names
        return self._read_all([str(self.directory / "queue" / "hold" / name) for name in new])

    def _read_all(self, files: list[str]) -> list[Kept]:
        return [kept for start in range(0, len(files), 500) for kept in self._read(files[start : start + 500])]

    def _read(self, files: list[str]) -> list[Kept]:
        command = ["postcat", "-c", str(self.directory / "conf"), *files]
        rest = subprocess.run(command, capture_output=True, check=True, timeout=60).stdout
        found = []
        for file in map(str.encode, files):
            envelope, _, rest = rest.partition(b"*** MESSAGE CONTENTS %b ***\n" % file)
            content, _, rest = rest.partition(b"*** HEADER EXTRACTED %b ***\n" % file)
            fields = [line.split(": ", 1) for line in envelope.decode().splitlines() if ": " in line]
            sender = next(value for name, value in fields if name == "sender")
            found.append(Kept(sender, tuple(value for name, value in fields if name == "original_recipient"), content))
        return found

    def failed_logins(self) -> int:
        return self.log_text().count("authentication failed")


class PostfixWithDovecot(Postfix):
    """Postfix that asks Dovecot who may log in."""

    def __init__(self, program: str, *, chunking: bool, submission: Submission | None = None) -> None:
        super().__init__(program, chunking=chunking, submission=submission)
        self._dovecot: asyncio.subprocess.Process | None = None

    async def start(self) -> None:
        if self._dovecot is None:
            configuration, users = self.directory / "dovecot.conf", self.directory / "users"
            users.write_text(f"{USER}:{{PLAIN}}{PASSWORD}\n")
            configuration.write_text(
                f"base_dir = {self.directory / 'run'}\nlog_path = {self.directory / 'output'}\nprotocols =\nssl = no\n"
                "auth_mechanisms = plain login cram-md5\n"
                f"passdb {{\n driver = passwd-file\n args = {users}\n}}\nuserdb {{\n driver = static\n args = uid=nobody gid=nogroup\n}}\n"
                f"service auth {{\n unix_listener {self.directory / 'login'} {{\n  mode = 0666\n }}\n}}\n"
            )
            self._dovecot = await self._run(("dovecot", "-F", "-c", str(configuration)))
            await eventually((self.directory / "login").exists, "Dovecot to listen", within=60)
        await super().start()

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        if self._dovecot is not None:
            await self._end_plainly(self._dovecot)
        await super().__aexit__(kind, error, traceback)

    async def _end_plainly(self, process: asyncio.subprocess.Process) -> None:
        await Receiver._end(self, process)

    def _logins(self) -> str:
        return f"smtpd_sasl_type = dovecot\nsmtpd_sasl_path = {self.directory / 'login'}\n"


class Exim(Receiver):
    """Exim, which only queues."""

    @property
    def log(self) -> Path:
        return self.directory / "spool" / "mainlog"

    def prepare(self) -> list[str]:
        spool, program = self.directory / "spool", Path(self.program).resolve()
        spool.mkdir(exist_ok=True)
        shutil.chown(spool, pwd.getpwnam("Debian-exim").pw_uid)
        configuration = self.directory / "exim.conf"
        ports = f"{self.port} : {self.starttls_port} : {self.tls_port}" if self.submission else f"{self.port}"
        configuration.write_text(
            f"exim_path = {program}\nprimary_hostname = exim.test\nspool_directory = {spool}\nlog_file_path = {spool}/%slog\n"
            f"local_interfaces = {self.host}\ndaemon_smtp_ports = {ports}\nqueue_only\nhost_lookup =\n"
            f"chunking_advertise_hosts = {'*' if self.chunking else ''}\nkeep_environment =\nrfc1413_hosts =\n"
            + (self._submission(self.submission) if self.submission else "acl_smtp_rcpt = accept\ntls_advertise_hosts =\n")
        )
        return [str(program), "-C", str(configuration), "-bdf", "-oP", str(spool / "pid")]

    def _submission(self, submission: Submission) -> str:
        certificate, key = self.directory / "certificate.pem", self.directory / "key.pem"
        for source, target in ((submission.certificate.certificate, certificate), (submission.certificate.key, key)):
            shutil.copyfile(source, target)  # it reads them as the user that it runs as
            shutil.chown(target, pwd.getpwnam("Debian-exim").pw_uid)
        later = f"  defer recipients = {LATER}\n        message = 4.2.1 come again later\n" if self.deferring else ""
        known = f"and{{{{eq{{$auth%d}}{{{USER}}}}}{{eq{{$auth%d}}{{{PASSWORD.replace('%', '%%')}}}}}}}"
        return (
            f"tls_certificate = {certificate}\ntls_privatekey = {key}\ntls_advertise_hosts = *\ntls_on_connect_ports = {self.tls_port}\n"
            f"message_size_limit = {SIZE_LIMIT}\nsmtputf8_advertise_hosts = *\nauth_advertise_hosts = ${{if def:tls_in_cipher{{*}}}}\n"
            "acl_smtp_mail = sender\nacl_smtp_rcpt = recipient\n"
            f"begin acl\nsender:\n  accept condition = ${{if eq{{$received_port}}{{{self.port}}}}}\n"
            "  deny !authenticated = *\n       message = 5.7.1 authentication required\n"
            f"  deny senders = {STRANGER}\n  accept\n"
            f"recipient:\n  deny recipients = {NOBODY}\n       message = 5.1.1 no such user\n{later}  accept\n"
            "begin authenticators\n"
            f"plain:\n  driver = plaintext\n  public_name = PLAIN\n  server_condition = ${{if {known % (2, 3)}}}\n"
            "  server_set_id = $auth2\n"
            "login:\n  driver = plaintext\n  public_name = LOGIN\n  server_prompts = Username:: : Password::\n"
            f"  server_condition = ${{if {known % (1, 2)}}}\n  server_set_id = $auth1\n"
            f"cram:\n  driver = cram_md5\n  public_name = CRAM-MD5\n  server_secret = ${{if eq{{$auth1}}{{{USER}}}{{{PASSWORD}}}fail}}\n"
            "  server_set_id = $auth1\n"
        )

    def messages(self) -> list[Kept]:
        return [self._read(path) for path in (self.directory / "spool" / "input").rglob("*-H")]

    def _read(self, path: Path) -> Kept:
        """Its own format: who it is for, a blank line, then each header field behind its length and a letter."""
        lines = path.read_bytes().split(b"\n")
        sender = lines[2].decode().strip("<>")
        first = next(place for place, line in enumerate(lines) if line.isdigit())  # how many recipients: they follow, then the header
        end = first + 1 + int(lines[first])
        recipients = tuple(line.decode() for line in lines[first + 1 : end])
        rest, fields = b"\n".join(lines[end + 1 :]), []
        while rest:
            length, letter = int(rest[:3]), rest[3:4]
            if letter != b"*":  # one that it has replaced
                fields.append(rest[5 : 5 + length])
            rest = rest[5 + length :]
        body = path.with_name(path.name.removesuffix("H") + "D").read_bytes().split(b"\n", 1)[1]
        return Kept(sender, recipients, b"".join(fields) + b"\n" + body)

    def failed_logins(self) -> int:
        return self.log_text().count("Incorrect authentication data")


class OpenSmtpd(Receiver):
    """OpenSMTPD, which has its paths built in and so gets a root directory of its own; what it takes stays in its queue.

    The program is one unpacked together with the libraries that it needs. It reads credentials anew for each login.
    """

    mechanisms = ("plain", "login")
    _IDS: ClassVar = {"opensmtpd": 65_101, "opensmtpq": 65_102}

    @property
    def log(self) -> Path:
        return self.directory / "no-log"  # it goes to its output

    def prepare(self) -> list[str]:
        root = self.directory / "root"
        if not root.exists():
            self._make_root(root)
        assert self.submission, "there is no other use for it"
        certificate = self.submission.certificate
        for source, name in ((certificate.certificate, "certificate.pem"), (certificate.key, "key.pem")):
            shutil.copyfile(source, root / "etc" / name)
        (root / "etc" / "key.pem").chmod(0o600)
        hashed = subprocess.run(["openssl", "passwd", "-6", "-stdin"], input=PASSWORD.encode(), capture_output=True, check=True).stdout
        (root / "etc" / "users").write_text(f"{USER} {hashed.decode()}")
        options = 'pki "here" auth <users> hostname "opensmtpd.test" filter "checks"'
        checks = '"stranger", "nobody", "later"' if self.deferring else '"stranger", "nobody"'
        (root / "etc" / "smtpd.conf").write_text(
            'pki "here" cert "/etc/certificate.pem"\npki "here" key "/etc/key.pem"\ntable users file:/etc/users\n'
            f"smtp max-message-size {SIZE_LIMIT}\n"
            f'filter "stranger" phase mail-from match mail-from {{ "{STRANGER}" }} reject "550 5.7.1 not yours"\n'
            f'filter "nobody" phase rcpt-to match rcpt-to {{ "{NOBODY}" }} reject "550 5.1.1 no such user"\n'
            f'filter "later" phase rcpt-to match rcpt-to {{ "{LATER}" }} reject "450 4.2.1 come again later"\n'
            f'filter "checks" chain {{ {checks} }}\n'
            f"listen on 127.0.0.1 port {self.port}\n"
            f"listen on 127.0.0.1 port {self.starttls_port} tls-require {options}\n"
            f"listen on 127.0.0.1 port {self.tls_port} smtps {options}\n"
            'action "keep" relay host "smtp://127.0.0.1:1"\nmatch from any auth for any action "keep"\n'
        )
        return ["chroot", str(root), "/usr/sbin/smtpd", "-d", "-f", "/etc/smtpd.conf"]

    def _make_root(self, root: Path) -> None:
        shutil.copytree(Path(self.program).resolve().parents[2], root, symlinks=True)
        for name in ("dev", "etc/ssl/certs", "var/spool/smtpd", "var/empty", "var/lib/opensmtpd/empty", "var/run", "tmp"):
            (root / name).mkdir(parents=True, exist_ok=True)
        (root / "var/spool/smtpd").chmod(0o711)
        (root / "dev/null").touch()
        users = "".join(f"{name}:x:{number}:{number}::/var/lib/opensmtpd/empty:/bin/false\n" for name, number in self._IDS.items())
        (root / "etc/passwd").write_text(f"root:x:0:0::/:/bin/sh\n{users}")
        (root / "etc/group").write_text("root:x:0:\n" + "".join(f"{name}:x:{number}:\n" for name, number in self._IDS.items()))
        assert self.submission
        shutil.copyfile(self.submission.certificate.certificate, root / "etc/ssl/certs/ca-certificates.crt")

    def messages(self) -> list[Kept]:
        found = []
        for path in (self.directory / "root/var/spool/smtpd/queue").glob("*/*/message"):
            envelopes = [dict(line.split(": ", 1) for line in file.read_text().splitlines() if ": " in line)
                         for file in path.parent.iterdir() if file != path]  # fmt: skip
            found.append(
                Kept(envelopes[0]["sender"].removeprefix("@"), tuple(envelope["rcpt"] for envelope in envelopes), path.read_bytes())
            )
        return found

    def failed_logins(self) -> int:
        return self.log_text().count("result=permfail")


def unused_ports(count: int) -> list[int]:
    """As many ports that nobody uses, each another."""
    ports: set[int] = set()
    while len(ports) < count:
        ports.add(unused_port())
    return list(ports)
