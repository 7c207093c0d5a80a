"""What runs sendmail in earnest, with relay-sendmail in its place: PHP's mail(), git send-email, cron and mail(1)'s way."""

import os
import pwd
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest

from tests.system.clients import SENDER, Line, line_of, sendmail_in, split_ours

Tool = Callable[[str], str]
ME = pwd.getpwuid(os.getuid()).pw_name


@pytest.fixture
async def line(tmp_path: Path) -> AsyncIterator[Line]:
    async with line_of(tmp_path) as found:
        yield found


def environment(line: Line) -> dict[str, str]:
    return {
        "RELAY_SMTP": f"{line.host}:{line.port}",
        "RELAY_DROP": str(line.relay.directory / "spool" / "drop"),
        "RELAY_DOMAIN": "acme.example",
        "HOME": str(line.relay.directory),
    }


PHP = r"""
$me = "app@acme.example";
$headers = "From: App <app@acme.example>\r\nCc: her@example.org\r\nBcc: him@example.org\r\nX-Utf8: \u{fc}";
echo mail("You <you@example.org>", "=?utf-8?b?R3LDvMOfZQ==?=", "one\n.\n..two\r\nthree", $headers, "-f$me") ? "sent " : "refused ";
echo mail("you@example.org", "no From", "body") ? "sent " : "refused ";
echo mail("you@example.org", "not ours", "body", "From: x@globex.example", "-fx@globex.example") ? "sent " : "refused ";
"""


async def test_php_mail(line: Line, tool: Tool) -> None:
    command = (tool("php"), "-n", "-d", f"sendmail_path={sendmail_in(line.relay.directory)} -t -i", "-r", PHP)
    said = await line.run(*command, **environment(line))
    assert "sent sent " in said and "550 5.7.1" in said and said.endswith("refused ")
    first, second = sorted(await line.arrived(2), key=lambda transaction: len(transaction.recipients), reverse=True)
    assert (first.sender, first.recipients) == (SENDER, ["you@example.org", "her@example.org", "him@example.org"])
    ours, theirs = split_ours(first.content)
    assert ours == ["Received", "Message-ID", "Date"]
    assert (
        theirs
        == (
            "To: You <you@example.org>\r\nSubject: =?utf-8?b?R3LDvMOfZQ==?=\r\nFrom: App <app@acme.example>\r\nCc: her@example.org\r\n"
            "X-Utf8: \u00fc\r\n\r\none\r\n.\r\n..two\r\nthree\r\n"
        ).encode()
    )
    assert (second.sender, second.recipients) == (f"{ME}@acme.example", ["you@example.org"])
    assert f"<{ME}@acme.example>".encode() in second.content or f"From: {ME}@acme.example".encode() in second.content


async def test_php_mail_while_no_relay_runs(line: Line, tool: Tool) -> None:
    assert await line.relay.terminate() == 0
    script = 'var_dump(mail("you@example.org", "later", "body", "From: app@acme.example", "-fapp@acme.example"));'
    command = (tool("php"), "-n", "-d", f"sendmail_path={sendmail_in(line.relay.directory)} -t -i", "-r", script)
    assert await line.run(*command, **environment(line)) == "bool(true)\n"
    await line.relay.start()
    (transaction,) = await line.arrived()
    assert (transaction.sender, transaction.recipients) == (SENDER, ["you@example.org"])


PATCH = b"""From 1111111111111111111111111111111111111111 Mon Sep 17 00:00:00 2001
From: App <app@acme.example>
Date: Fri, 15 Jan 2027 08:00:00 +0000
Subject: [PATCH] dots

.
---
 a | 1 +

diff --git a/a b/a
--- a/a
+++ b/a
@@ -0,0 +1 @@
+.
"""


@pytest.mark.parametrize("setting", ["smtpServer", "sendmailCmd"])
async def test_git_send_email(line: Line, tool: Tool, setting: str) -> None:
    if not Path("/usr/lib/git-core/git-send-email").exists():
        tool("git send-email, the Debian package git-email,")
    (line.relay.directory / "0001-dots.patch").write_bytes(PATCH)
    settings = [f"{setting}={sendmail_in(line.relay.directory)}", "envelopeSender=app@acme.example", "confirm=never", "suppressCc=all"]
    me = ["-c", "user.name=App", "-c", "user.email=app@acme.example"]
    await line.run(
        tool("git"), *me, *(word for text in settings for word in ("-c", f"sendemail.{text}")), "send-email", "--quiet",
        "--to=you@example.org", "--bcc=her@example.org", "0001-dots.patch", **environment(line), GIT_CONFIG_NOSYSTEM="1",
    )  # fmt: skip
    (transaction,) = await line.arrived()
    assert (transaction.sender, transaction.recipients) == (SENDER, ["you@example.org", "her@example.org"])
    assert b"\r\nSubject: [PATCH] dots\r\n" in transaction.content and b"her@" not in transaction.content
    assert b"\r\n\r\n.\r\n---\r\n" in transaction.content and transaction.content.endswith(b"+.\r\n")


# What Debian's cron writes and how it calls sendmail; Red Hat's has the other options.
CRON = b"""From: root (Cron Daemon)
To: root
Subject: Cron <root@host> echo hello
MIME-Version: 1.0
Content-Type: text/plain; charset=UTF-8
Content-Transfer-Encoding: 8bit
X-Cron-Env: <SHELL=/bin/sh>

hello
.
"""


@pytest.mark.parametrize("options", ["-FCronDaemon -i -B8BITMIME -oem", "-FCronDaemon -i -odi -oem -oi -t -f root"])
async def test_cron(line: Line, options: str) -> None:
    await line.run(
        sendmail_in(line.relay.directory), *options.split(), *([] if "-t" in options else ["root"]), stdin=CRON, **environment(line)
    )
    (transaction,) = await line.arrived()
    assert (transaction.sender, transaction.recipients) == (f"{'root' if '-f' in options else ME}@acme.example", ["root@acme.example"])
    ours, theirs = split_ours(transaction.content)
    assert ours == ["Received", "Message-ID", "Date"]
    assert theirs == CRON.replace(b"root (", b"root@acme.example (").replace(b"\n", b"\r\n")


async def test_a_job_that_says_nothing_in_the_language_of_the_locale_is_mailed_all_the_same(line: Line) -> None:
    """cron sets no locale; neither arguments nor the message need be UTF-8."""
    name = "J\udcf6rg"  # Latin-1, as the system hands it over
    code = await line.run(
        sendmail_in(line.relay.directory), "-F", name, "-f", SENDER, "you@example.org", stdin=b"\xff\n", LC_ALL="C", **environment(line)
    )
    assert code == ""
    (transaction,) = await line.arrived()
    assert transaction.content.endswith(b"\r\n\r\n\xff\r\n")
