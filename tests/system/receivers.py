"""Postfix and Exim as they are installed, each as an upstream that takes all mail and only keeps it: run from a directory of its own.

async with Postfix(tool("postfix"), chunking=False) as server:
    ...
    messages = server.messages()

Both want to be started by root and change to users of their own, so their directory is one that everybody may enter. Whatever either
of them took for a message is a message here: what was smuggled into one shows as two.
"""

import asyncio
import pwd
import shutil
import socket
import subprocess
import tempfile
from pathlib import Path
from types import TracebackType
from typing import NamedTuple, Self

from tests.support.client import Client
from tests.support.eventually import eventually


class Kept(NamedTuple):
    """A message as it is kept: with LF for line ends, as both do."""

    sender: str
    recipients: tuple[str, ...]
    content: bytes


class Receiver:
    """A server in `directory`, on a loopback port."""

    def __init__(self, program: str, *, chunking: bool) -> None:
        self.program = program
        self.chunking = chunking
        self.host = "127.0.0.1"
        self.port = 0
        self.directory = Path()
        self._process: asyncio.subprocess.Process | None = None

    async def __aenter__(self) -> Self:
        self.directory = Path(tempfile.mkdtemp(prefix="relay-receiver-"))
        self.directory.chmod(0o755)
        with socket.create_server((self.host, 0)) as free:
            self.port = free.getsockname()[1]
        self._process = await asyncio.create_subprocess_exec(*self.prepare(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            await eventually(self._answers, f"{self.program} to answer", within=20)
            async with Client(self.host, self.port) as client:
                await client.greet()
                assert ("CHUNKING" in client.extensions) is self.chunking
                await client.quit()
        except BaseException as error:
            await self.__aexit__(type(error), error, None)
            raise
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        assert self._process is not None
        async with asyncio.timeout(30):
            if self._process.returncode is None:
                await self.stop(self._process)
            await self._process.wait()
        if error is not None and self.log.exists():
            error.add_note(f"-- {self.log} --\n{self.log.read_text(errors='replace')[-4000:]}")
        shutil.rmtree(self.directory)

    def _answers(self) -> bool:
        assert self._process is not None
        assert self._process.returncode is None, f"{self.program} has ended: {self.log.read_text() if self.log.exists() else 'no log'}"
        try:
            socket.create_connection((self.host, self.port), 1).close()
        except OSError:
            return False
        return True

    @property
    def log(self) -> Path:
        raise NotImplementedError

    def prepare(self) -> list[str]:
        """Write its configuration; the command that runs it in the foreground."""
        raise NotImplementedError

    async def stop(self, process: asyncio.subprocess.Process) -> None:
        """Have it end."""
        process.terminate()

    def messages(self) -> list[Kept]:
        """All that it has taken, in no order."""
        raise NotImplementedError


class Postfix(Receiver):
    """Postfix, which holds every message. It has no defence of its own against bare line ends, as that is what is tried."""

    @property
    def log(self) -> Path:
        return self.directory / "queue" / "log"

    def prepare(self) -> list[str]:
        configuration, queue, data = (self.directory / name for name in ("conf", "queue", "data"))
        for path in (configuration, queue, data):
            path.mkdir()
        shutil.chown(data, "postfix")
        keywords = "" if self.chunking else "chunking"
        (configuration / "main.cf").write_text(
            f"compatibility_level = 3.6\nqueue_directory = {queue}\ndata_directory = {data}\nmyhostname = postfix.test\n"
            f"maillog_file = {self.log}\nmaillog_file_prefixes = {self.directory}\nmydestination =\nlocal_recipient_maps =\n"
            "inet_interfaces = 127.0.0.1\ninet_protocols = ipv4\nmynetworks = 127.0.0.0/8\nmessage_size_limit = 50000000\n"
            "smtpd_recipient_restrictions = static:HOLD, permit\nsmtpd_relay_restrictions = permit_mynetworks, reject\n"
            "smtpd_peername_lookup = no\n"
            f"smtpd_discard_ehlo_keywords = {keywords}\nsmtpd_forbid_bare_newline = no\nsmtpd_forbid_unauth_pipelining = no\n"
        )
        (configuration / "master.cf").write_text(
            f"{self.host}:{self.port} inet n - n - - smtpd\ncleanup unix n - n - 0 cleanup\nqmgr unix n - n 300 1 qmgr\n"
            "rewrite unix - - n - - trivial-rewrite\nanvil unix - - n - 1 anvil\nbounce unix - - n - 0 bounce\n"
            "postlog unix-dgram n - n - 1 postlogd\n"
        )
        return [self.program, "-c", str(configuration), "start-fg"]

    async def stop(self, process: asyncio.subprocess.Process) -> None:
        command = (self.program, "-c", str(self.directory / "conf"), "stop")  # what we started is a script that waits for the real one
        await (await asyncio.create_subprocess_exec(*command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)).wait()

    def messages(self) -> list[Kept]:
        queued = [path for folder in ("incoming", "active", "deferred", "hold") for path in (self.directory / "queue" / folder).rglob("*")]
        return [self._read(path) for path in queued if path.is_file()]

    def _read(self, path: Path) -> Kept:
        command = ["postcat", "-c", str(self.directory / "conf")]
        envelope = subprocess.run([*command, "-e", str(path)], capture_output=True, check=True, timeout=20).stdout.decode()
        content = subprocess.run([*command, "-hb", str(path)], capture_output=True, check=True, timeout=20).stdout
        fields = [line.split(": ", 1) for line in envelope.splitlines() if ": " in line]
        return Kept(
            next(value for name, value in fields if name == "sender"),
            tuple(value for name, value in fields if name == "original_recipient"),
            content,
        )


class Exim(Receiver):
    """Exim, which only queues."""

    @property
    def log(self) -> Path:
        return self.directory / "spool" / "mainlog"

    def prepare(self) -> list[str]:
        spool, program = self.directory / "spool", Path(self.program).resolve()
        spool.mkdir()
        shutil.chown(spool, pwd.getpwnam("Debian-exim").pw_uid)
        configuration = self.directory / "exim.conf"
        configuration.write_text(
            f"exim_path = {program}\nprimary_hostname = exim.test\nspool_directory = {spool}\nlog_file_path = {spool}/%slog\n"
            f"local_interfaces = {self.host}\ndaemon_smtp_ports = {self.port}\nacl_smtp_rcpt = accept\nqueue_only\nhost_lookup =\n"
            f"chunking_advertise_hosts = {'*' if self.chunking else ''}\ntls_advertise_hosts =\nkeep_environment =\nrfc1413_hosts =\n"
        )
        return [str(program), "-C", str(configuration), "-bdf", "-oP", str(spool / "pid")]

    def messages(self) -> list[Kept]:
        return [self._read(path) for path in (self.directory / "spool" / "input").rglob("*-H")]

    def _read(self, path: Path) -> Kept:
        lines = path.read_bytes().split(b"\n")
        sender = lines[2].decode().strip("<>")
        first = next(place for place, line in enumerate(lines) if line.isdigit())  # how many recipients: they follow, then the header
        recipients = tuple(line.decode() for line in lines[first + 1 : first + 1 + int(lines[first])])
        body = path.with_name(path.name.removesuffix("H") + "D").read_bytes().split(b"\n", 1)[1]
        return Kept(sender, recipients, b"\n".join(lines[first + 1 + int(lines[first]) :]) + b"\n" + body)
