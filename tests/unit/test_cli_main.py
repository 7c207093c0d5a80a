"""The command line as a whole: which commands there are, what the missing ones say, and what they cost to start."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from relay.cli import main

ROOT = Path(__file__).resolve().parents[2]
HEAVY = ("aiosmtpd", "aiosmtplib", "apsw", "asyncio", "cryptography", "pydantic", "smtplib", "ssl", "uvloop", "yaml")


def exit_code(*argv: str) -> int:
    try:
        return main(argv)
    except SystemExit as end:
        assert isinstance(end.code, int)
        return end.code


@pytest.mark.parametrize(
    "argv",
    [
        ["status"],
        ["pause", "acme"],
        ["resume", "acme"],
        ["reload"],
        ["dkim", "keygen", "--help"],
        ["import", "postfix"],
    ],
)
def test_what_is_not_built_says_so_and_is_a_usage_error(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_code(*argv) == 64
    captured = capsys.readouterr()
    assert captured.err == f"relay {argv[0]}: not available yet\n"
    assert captured.out == ""


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        ([], "required: COMMAND"),
        (["serve", "--upstream", "smtps://app@mail.example.com"], "relay serve: --upstream: not available yet\n"),
        (["nonsense"], "relay: there is no command 'nonsense'; `relay --help` lists them\n"),
        (["queue"], "required: VERB"),
        (["queue", "list", "--older-than", "5"], "must be a duration such as 30s"),
        (["queue", "list", "--state", "sent"], "invalid choice: 'sent'"),
        (["queue", "list", "--sender", "@acme.example"], "without the @"),
        (["queue", "list", "--json", "not-an-id"], "is not the id of a message"),
        (["queue", "list", "FFFFFFFFFFFFFFFFFFFFF"], "is not the id of a message"),
        (["queue", "list", "--upstream", ""], "must not be empty"),
        (["queue", "hold"], "name messages by their ids or by filters, or say --all"),
        (["queue", "drop", "--yes", "--json"], "name messages by their ids or by filters, or say --all"),
        (["queue", "retry", "--all", "--state", "deferred"], "--all goes without ids and filters"),
        (["queue", "hold", "--all", "--yes"], "unrecognized arguments: --yes"),
        (["queue", "bounce", "--sender", ""], "argument --sender"),
        (["queue", "show"], "required: ID"),
        (["queue", "show", "649D2A1B3C4D5", "649D2A1B3C4D6"], "unrecognized arguments"),
        (["queue", "show", "649D2A1B3C4D5", "--headers", "--content"], "not allowed with"),
        (["trace"], "required: ID"),
        (["secret"], "required: COMMAND"),
        (["secret", "keygen", "hunter2"], "unrecognized arguments"),
        (["log", "-n", "-1"], "-n"),
        (["log", "-n", "many"], "'many' is not a number of lines"),
        (["demo", "--port", "70000"], "'70000' is not a port"),
    ],
)
def test_a_wrong_command_line_is_a_usage_error(argv: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_code(*argv) == 64
    assert words in capsys.readouterr().err


def test_help_lists_what_there_is_and_nothing_else(capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_code("--help") == 0
    lines = capsys.readouterr().out.partition("COMMAND\n")[2].partition("\n\n")[0].splitlines()
    assert [line.split()[0] for line in lines] == [
        "serve",
        "check",
        "explain",
        "test",
        "demo",
        "queue",
        "log",
        "trace",
        "schema",
        "sendmail",
        "hash-password",
        "secret",
        "oauth",
    ]


@pytest.mark.parametrize("argv", [["-c", "FILE", "check"], ["check", "-c", "FILE"], ["check", "--config=FILE"]])
def test_the_file_may_be_named_before_and_after_the_command(argv: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "named.yaml"
    file.write_text("upstreams: {a: {host: a.example, senders: [a.example]}}\nroutes: [{sender: a.example, upstream: a}]\n")
    assert exit_code(*(word.replace("FILE", str(file)) for word in argv)) == 0
    assert "named.yaml: 1 upstream, 1 route: ok" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("code", "absent"),
    [
        ("from relay.cli import main\ntry: main(['--help'])\nexcept SystemExit: pass", HEAVY),
        ("import relay.cli.serve, relay.config.load, relay.app", ("cryptography", "smtplib")),
    ],
)
def test_starting_loads_nothing_that_it_does_not_need(code: str, absent: tuple[str, ...]) -> None:
    code += f"\nimport sys\nprint(*(name for name in {absent} if name in sys.modules), file=sys.stderr)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True, timeout=120)
    assert done.stderr.split() == []


@pytest.mark.parametrize("word", ["schema", "--help"])
def test_a_reader_that_goes_away_is_no_error(word: str) -> None:
    program = f"import sys; from relay.cli import main; sys.exit(main([{word!r}]))"
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, stdin=subprocess.DEVNULL, stdout=write, stderr=subprocess.PIPE, timeout=120
    )
    os.close(write)
    assert (done.returncode, done.stderr) == (0, b"")


@pytest.mark.parametrize(
    ("words", "redirection", "code", "said"),
    [
        (["schema"], ">&-", 0, ""),
        (["schema"], ">&- 2>&-", 0, ""),
        (["schema"], "> /dev/full", 75, "relay schema: the output cannot be written: No space left on device\n"),
        (["--help"], "> /dev/full", 75, "relay: the output cannot be written: No space left on device\n"),
        (["check", "--help"], "> /dev/full", 75, "relay check: the output cannot be written: No space left on device\n"),
    ],
)
def test_output_that_cannot_be_written_is_no_traceback(words: list[str], redirection: str, code: int, said: str) -> None:
    program = f"import sys; from relay.cli import main; sys.exit(main({words}))".replace("'", '"')
    command = f"{sys.executable} -c '{program}' {redirection}"
    done = subprocess.run(["bash", "-c", command], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr) == (code, said)
