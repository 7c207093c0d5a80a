"""`relay demo` as a person meets it: a process of its own, real sockets, nothing left behind."""

import os
import re
import signal
import smtplib
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.support.eventually import eventually

ROOT = Path(__file__).resolve().parents[2]
LAUNCH = "import sys; from relay.cli import main; sys.argv[0] = 'relay'; sys.exit(main())"


class Demo:
    """A running demo, whose temporary files go to `scratch` and whose words to `output`."""

    def __init__(self, directory: Path, *argv: str) -> None:
        self.scratch = directory / "tmp"  # short: sockets' paths are
        self.scratch.mkdir()
        self.output = directory / "output"
        with self.output.open("wb") as out:
            environment = {**os.environ, "TMPDIR": str(self.scratch), "PYTHONPATH": str(ROOT)}
            command = [sys.executable, "-c", LAUNCH, "demo", *argv]
            self.process = subprocess.Popen(command, cwd=directory, env=environment, stdin=subprocess.DEVNULL, stdout=out, stderr=out)

    def text(self) -> str:
        return self.output.read_text()

    async def said(self, words: str) -> None:
        def heard() -> bool:
            return words in self.text() or self.process.poll() is not None

        await eventually(heard, f"the demo to say {words!r}", within=60)
        assert words in self.text(), self.text()

    async def ended(self) -> int:
        await eventually(lambda: self.process.poll() is not None, "the demo to end", within=60)
        return self.process.wait()

    def blocks(self) -> list[dict[str, str]]:
        """One for each message that was shown: its title, and its rows by label."""
        found = []
        for block in re.findall(r"^\d+ +\S+ → [^\n]*\n(?:    \S[^\n]*\n)+", self.text(), re.MULTILINE):
            title, *rows = block.splitlines()
            found.append({"title": title, **{row[4:16].strip(): row[16:] for row in rows}})
        return found


@contextmanager
def demo(directory: Path, *argv: str) -> Iterator[Demo]:
    running = Demo(directory, *argv)
    try:
        yield running
    finally:
        running.process.kill()
        running.process.wait()


async def test_once_shows_three_messages_at_their_right_upstreams_and_leaves_nothing(tmp_path: Path) -> None:
    with demo(tmp_path, "--once", "--port", "0") as running:
        assert await running.ended() == 0, running.text()
        acme, globex, initech = running.blocks()
        assert (acme["upstream"].split()[0], acme["credential"]) == ("acme", "relay@acme.example, password accepted")
        assert acme["From"] == "ERP <billing@acme.example>  →  Acme Billing <no-reply@acme.example>"
        assert "STARTTLS, TLSv1.3" in acme["upstream"]
        assert (globex["upstream"].split()[0], globex["credential"]) == ("globex", "mailer, password accepted")
        assert "TLS from the start, TLSv1.3" in globex["upstream"]
        assert (initech["upstream"].split()[0], initech["credential"]) == ("house", "apikey, password accepted")
        assert re.fullmatch(r"initech is down \(127.0.0.1:\d+: Connection refused\): its fallback house takes over", initech["degraded"])
        assert initech["Reply-To"] == "cron <root@initech.example>"
        assert "degraded" not in acme | globex
        assert "\x1b" not in running.text()
        assert not list(running.scratch.iterdir())


@pytest.mark.parametrize("ending", [signal.SIGINT, signal.SIGTERM])
async def test_it_stays_for_the_persons_own_mail_until_a_signal(tmp_path: Path, ending: signal.Signals) -> None:
    with demo(tmp_path, "--port", "0") as running:
        await running.said("Ctrl-C ends the demo")
        found = re.search(r"swaks --server 127.0.0.1:(\d+) --from you@acme.example", running.text())
        assert found
        with smtplib.SMTP("127.0.0.1", int(found[1]), timeout=60) as app:
            app.sendmail("you@globex.example", ["friend@example.org"], "From: you@globex.example\nSubject: mine\n\nhello")
            with pytest.raises(smtplib.SMTPSenderRefused):
                app.sendmail("you@nobody.example", ["friend@example.org"], "From: you@nobody.example\n\nhello")
        await running.said("4   you@globex.example → friend@example.org  mine")
        await running.said("refused     you@nobody.example: 550 5.7.1")
        running.process.send_signal(ending)
        assert await running.ended() == 0, running.text()
        assert running.text().endswith("The demo has ended; its files are removed.\n")
        assert len(running.blocks()) == 4
        assert not list(running.scratch.iterdir())


async def test_the_one_liner_it_prints_works(tmp_path: Path) -> None:
    with demo(tmp_path, "--port", "0") as running:
        await running.said("Ctrl-C ends the demo")
        found = re.search(r"^ +python3 (-c .*)$", running.text(), re.MULTILINE)
        assert found
        done = subprocess.run(f"{sys.executable} {found[1]}", shell=True, capture_output=True, text=True, timeout=120, check=False)
        assert (done.returncode, done.stderr) == (0, "")
        await running.said("4   you@globex.example → friend@example.org  hello")


async def test_a_port_that_is_taken_is_said_and_another_one_used(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with demo(tmp_path, "--once", "--port", str(port)) as running:
            assert await running.ended() == 0
            assert f"127.0.0.1:{port} is taken, or not for this user: the relay listens on 127.0.0.1:" in running.text()
            assert f"127.0.0.1:{port} instead" not in running.text()


async def test_no_password_is_shown(tmp_path: Path) -> None:
    with demo(tmp_path, "--port", "0") as running:
        await running.said("Ctrl-C ends the demo")
        (directory,) = running.scratch.iterdir()
        passwords = [path.read_text().strip() for path in directory.glob("*.password")]
        assert len(passwords) == 4
        for password in passwords:
            assert password not in running.text()
            assert password not in (directory / "relay.log").read_text()
