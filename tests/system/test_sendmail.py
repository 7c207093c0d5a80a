"""relay-sendmail as a program of its own: before a relay that runs, one that does not, and one that refuses."""

import asyncio
import os
import shlex
import stat
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from tests.support.process import REPOSITORY
from tests.system.clients import NOWHERE, OCTETS, SENDER, Line, execute, line_of, sendmail_in, split_ours

LF = OCTETS.replace(b"\r\n", b"\n")


@pytest.fixture
async def line(tmp_path: Path) -> AsyncIterator[Line]:
    async with line_of(tmp_path) as found:
        yield found


async def send(line: Line, *arguments: str, stdin: bytes = LF, name: str = "sendmail", **environment: str) -> tuple[int, str]:
    known = {
        "RELAY_SMTP": f"{line.host}:{line.port}",
        "RELAY_DROP": str(line.relay.directory / "spool" / "drop"),
        "RELAY_DOMAIN": "acme.example",
    }
    return await execute(sendmail_in(line.relay.directory, name=name), *arguments, stdin=stdin, **{**known, **environment})


async def test_a_message_with_recipients_arrives_octet_by_octet(line: Line) -> None:
    assert await send(line, "-i", "-f", SENDER, "you@example.org,her@example.org", "-t@example.org") == (0, "")
    (transaction,) = await line.arrived()
    assert (transaction.sender, transaction.recipients) == (SENDER, ["you@example.org", "her@example.org", "-t@example.org"])
    assert "BODY=8BITMIME" in transaction.parameters
    assert split_ours(transaction.content) == (["Received"], OCTETS)


async def test_recipients_come_from_the_header_and_bcc_goes(line: Line) -> None:
    message = (
        b"To: You <you@example.org>,\n  root\nCc: friends: her@example.org;\nBcc: him@example.org\nSubject: hi\n\nhello\n.\nnot this\n"
    )
    assert await send(line, "-t", "-F", "The App", "also@example.org", stdin=message) == (0, "")
    (transaction,) = await line.arrived()
    user = transaction.sender.partition("@")[0]
    assert transaction.sender == f"{user}@acme.example"
    assert transaction.recipients == ["also@example.org", "you@example.org", "root@acme.example", "her@example.org", "him@example.org"]
    ours, theirs = split_ours(transaction.content)
    assert ours == ["Received", "Message-ID", "Date"]
    assert (
        theirs
        == (
            f"From: The App <{user}@acme.example>\r\nTo: You <you@example.org>,\r\n  root\r\nCc: friends: her@example.org;\r\n"
            "Subject: hi\r\n\r\nhello\r\n"
        ).encode()
    )


async def test_the_null_sender_is_a_sender(line: Line) -> None:
    message = b"From: app@acme.example\nTo: you@example.org\n\nhello\n"
    assert await send(line, "-t", "-f", "<>", stdin=message) == (0, "")
    (transaction,) = await line.arrived()
    assert transaction.sender == ""


async def test_more_recipients_than_a_message_may_have_get_it_all_the_same(tmp_path: Path) -> None:
    recipients = [f"r{number}@example.org" for number in range(70)]
    async with line_of(tmp_path, listeners='[{bind: "127.0.0.1:0", recipients: 30}]') as line:
        assert await send(line, "-i", "-f", SENDER, *recipients) == (0, "")
        transactions = await line.arrived(3)
    assert sorted(len(transaction.recipients) for transaction in transactions) == [10, 30, 30]
    assert sorted(address for transaction in transactions for address in transaction.recipients) == sorted(recipients)


TO = ["-f", SENDER, "you@example.org"]
FROM = b"From: app@acme.example\n\n"
REFUSED: list[tuple[list[str], bytes, int, str]] = [
    (["-Z", "you@example.org"], LF, 64, "unknown option -Z"),
    (["-bd"], b"", 64, "the relay is started with `relay serve`"),
    ([], LF, 64, "no recipient is given, neither here nor with -t"),
    (["-t"], b"Subject: x\n\n", 64, "no recipient is given, neither here nor in the header"),
    (["-t"], b"To: you her\n\n", 65, "'you her' is not an address"),
    (["you\nRSET"], LF, 65, "'you RSET' is not an address"),
    (["you@@example.org"], LF, 65, "you@@example.org: 501 5.1.3 Bad recipient address"),
    (["her@example.org", "you@@example.org"], LF, 65, "you@@example.org: 501 5.1.3 Bad recipient address"),
    (["-f", "app@@acme.example", "you@example.org"], LF, 65, "501 5.1.7 Bad sender address"),
    (["-f", "app@unknown.example", "you@example.org"], LF, 77, "550 5.7.1"),
    (TO, b"From: other@globex.example\n\n", 77, "550 5.7.1 Not one of the senders"),
    (TO, FROM + b"x" * 3_000_000 + b"\n", 65, "554 5.6.0 A line of the message is too long"),
    (TO, FROM + b"x\n" * 3_000_000, 65, "552 5.3.4 Message too large"),
]


async def test_a_refusal_is_told_and_nobody_gets_anything(tmp_path: Path) -> None:
    async with line_of(tmp_path, listeners='[{bind: "127.0.0.1:0", message_size: 5MB}]') as line:
        for arguments, message, code, words in REFUSED:
            found, said = await send(line, *arguments, stdin=message)
            assert found == code and said.startswith("sendmail: ") and words in said and said.count("\n") == 1, (arguments, found, said)
        assert line.relay.events("accepted") == []
        assert os.listdir(line.relay.directory / "spool" / "drop") == []


@pytest.mark.parametrize(
    ("arguments", "name", "words"),
    [
        (["-bp"], "sendmail", "`relay queue list`"),
        ([], "mailq", "`relay queue list`"),
        (["--help"], "sendmail", "usage: sendmail"),
        (["-q"], "sendmail", ""),
        (["-bi"], "sendmail", ""),
        ([], "newaliases", ""),
    ],
)
async def test_what_is_not_mail_needs_no_relay(tmp_path: Path, arguments: list[str], name: str, words: str) -> None:
    code, said = await execute(sendmail_in(tmp_path, name=name), *arguments, RELAY_SMTP=NOWHERE)
    assert code == 0 and words in said and bool(said) is bool(words)


async def test_without_a_relay_it_waits_in_the_drop_folder_and_goes_out_when_there_is_one(line: Line) -> None:
    drop = line.relay.directory / "spool" / "drop"
    assert await line.relay.terminate() == 0
    code, said = await send(line, "-v", "-i", "-f", SENDER, "you@example.org")
    assert code == 0 and f"waits for it as {drop}/" in said
    (path,) = drop.iterdir()
    assert stat.S_IMODE(path.stat().st_mode) == 0o640
    await line.relay.start()
    (transaction,) = await line.arrived()
    assert split_ours(transaction.content) == (["Received"], OCTETS)
    assert os.listdir(drop) == []
    (accepted,) = line.relay.events("accepted")
    assert accepted["client"] == f"uid:{os.getuid()}"


async def test_without_relay_and_folder_it_says_try_again(tmp_path: Path) -> None:
    code, said = await execute(
        sendmail_in(tmp_path), "you@example.org", stdin=LF, RELAY_SMTP=f"unix:{tmp_path}/none", RELAY_DROP=str(tmp_path / "none")
    )  # fmt: skip
    assert code == 75
    assert said.startswith(f"sendmail: the relay cannot be reached ({tmp_path}/none: No such file or directory; ")
    assert said.endswith("nothing was sent, try again\n")


async def test_what_is_wrong_with_the_variable_is_said_and_the_message_goes_elsewhere(tmp_path: Path) -> None:
    drop = tmp_path / "drop"
    drop.mkdir()
    code, said = await execute(sendmail_in(tmp_path), "-v", "you@example.org", stdin=LF, RELAY_SMTP="here:there", RELAY_DROP=str(drop))
    assert code == 0 and "$RELAY_SMTP is host:port or unix:/path, not 'here:there'; " in said
    assert len(os.listdir(drop)) == 1


GREETING, HELLO = b"220 x\r\n", b"250-x\r\n250 PIPELINING\r\n"


@pytest.mark.parametrize(
    ("script", "code", "dropped"),
    [
        ([], 0, ["you@example.org"]),
        ([b"garbage\r\n"], 0, ["you@example.org"]),
        ([b"421 4.3.2 bye\r\n"], 0, ["you@example.org"]),
        ([b"554 5.7.1 not you\r\n"], 0, ["you@example.org"]),
        ([GREETING], 0, ["you@example.org"]),
        ([GREETING, HELLO, b"530 5.7.0 log in\r\n"], 0, ["you@example.org"]),
        ([GREETING, HELLO, b"451 4.3.0 fault\r\n"], 0, ["you@example.org"]),
        ([GREETING, HELLO, b"452 4.3.1 full\r\n"], 75, []),
        ([GREETING, HELLO, b"250 ok\r\n", b"250 ok\r\n", b"452 4.3.1 full\r\n"], 75, []),
        ([GREETING, HELLO, b"250 ok\r\n", b"250 ok\r\n", b"354 go\r\n", b"451 4.3.0 fault\r\n"], 0, ["you@example.org"]),
        ([GREETING, HELLO, b"250 ok\r\n", b"250 ok\r\n", b"354 go\r\n"], 0, ["you@example.org"]),
        ([GREETING, HELLO, b"250 ok\r\n", b"250 ok\r\n", b"354 go\r\n", b"550 5.1.1 unknown\r\n"], 67, []),
        ([GREETING, HELLO, b"250 ok\r\n", b"250 ok\r\n", b"354 go\r\n", b"554 oops\r\n"], 69, []),
        ([GREETING, HELLO, b"250 ok\r\n", b"250 ok\r\n", b"354 go\r\n", b"250 ok\r\n"], 0, []),
        ([GREETING, b"502 what\r\n", b"250 x\r\n", b"250 ok\r\n", b"250 ok\r\n", b"354 go\r\n", b"250 ok\r\n"], 0, []),
    ],
)
async def test_whatever_a_server_says_nothing_is_lost(tmp_path: Path, script: list[bytes], code: int, dropped: list[str]) -> None:
    """Each reply is sent when something has come, the first at once; after the last one the server hangs up."""
    ended = asyncio.Event()

    async def play(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        for number, reply in enumerate(script):
            if number:
                content = script[number - 1].startswith(b"354")
                await (reader.readuntil(b"\r\n.\r\n") if content else reader.readline())
            writer.write(reply)
            await writer.drain()
        writer.close()
        ended.set()

    server = await asyncio.start_unix_server(play, str(tmp_path / "socket"))
    (tmp_path / "drop").mkdir()
    async with server:
        found, said = await execute(
            sendmail_in(tmp_path), "-f", SENDER, "you@example.org", stdin=LF, RELAY_SMTP=f"unix:{tmp_path / 'socket'}",
            RELAY_DROP=str(tmp_path / "drop"),
        )  # fmt: skip
        await ended.wait()
    assert found == code, said
    contents = [path.read_bytes() for path in (tmp_path / "drop").iterdir()]
    assert [content.split(b"\r\n")[2].decode() for content in contents] == [f"RCPT TO:<{recipient}>" for recipient in dropped]


async def test_smtp_on_standard_input_is_the_relays(line: Line) -> None:
    session = (
        b"EHLO me\r\nMAIL FROM:<app@acme.example>\r\nRCPT TO:<you@example.org>\r\nDATA\r\n"
        + OCTETS.replace(b"\r\n.", b"\r\n..")
        + b".\r\nQUIT\r\n"
    )
    code, said = await send(line, "-bs", stdin=session)
    assert code == 0
    assert said.startswith("220 relay.example ESMTP") and "250 2.0.0 Ok: queued as" in said and said.endswith("221 2.0.0 Bye\r\n")
    (transaction,) = await line.arrived()
    assert split_ours(transaction.content) == (["Received"], OCTETS)


async def test_smtp_on_standard_input_without_a_relay_is_a_reply_too(tmp_path: Path) -> None:
    code, said = await execute(sendmail_in(tmp_path), "-bs", stdin=b"EHLO me\r\n", RELAY_SMTP=NOWHERE)
    assert code == 75 and said.startswith("421 4.3.2 No relay answers")


async def test_it_is_also_a_command_of_relay(line: Line) -> None:
    code, said = await execute(
        sys.executable, "-c", "import sys; from relay.cli import main; sys.exit(main())", "sendmail", "-t", "-f", SENDER, "-i", stdin=LF,
        RELAY_SMTP=f"{line.host}:{line.port}", PYTHONPATH=str(REPOSITORY),
    )  # fmt: skip
    assert (code, said) == (0, "")
    (transaction,) = await line.arrived()
    assert split_ours(transaction.content) == (["Received"], OCTETS)


def test_it_loads_next_to_nothing() -> None:
    """Each of these would add to the time that every mail of a script costs."""
    heavy = (
        "argparse",
        "asyncio",
        "dataclasses",
        "email",
        "inspect",
        "ipaddress",
        "json",
        "logging",
        "pathlib",
        "re",
        "ssl",
        "subprocess",
        "typing",
    )
    code = f"import sys, relay.sendmail; print(*(name for name in {heavy} if name in sys.modules), file=sys.stderr)"
    done = subprocess.run([sys.executable, "-S", "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=True, timeout=120)
    assert done.stderr.split() == []


async def test_a_terminal_that_is_gone_changes_nothing(line: Line) -> None:
    """With -v it shows the dialogue; a mail that was taken is not sent again because nobody could see that."""
    program = sendmail_in(line.relay.directory)
    script = f"exec {program} -v -i -f {SENDER} you@example.org >&- 2>&-"
    code, said = await execute("/bin/sh", "-c", script, stdin=LF, RELAY_SMTP=f"{line.host}:{line.port}")
    assert (code, said) == (0, "")
    await line.arrived()


async def test_a_log_that_is_full_changes_nothing(line: Line) -> None:
    """What is wrong is told on standard error, which a cron job may have sent to a full disk."""
    program = sendmail_in(line.relay.directory)
    for arguments, expected in ((["you@@example.org"], 65), (["-N", "sometimes", "you@example.org"], 0)):
        script = shlex.join([program, "-i", "-f", SENDER, *arguments]) + " 2>/dev/full"
        assert await execute("/bin/sh", "-c", script, stdin=LF, RELAY_SMTP=f"{line.host}:{line.port}") == (expected, "")
    await line.arrived()
