"""`relay queue list`, `queue show`, `log` and `trace`: for a person and for a script, with and without a configuration that can be used."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from relay.cli import main, selection
from relay.cli.table import Table, age, size, wait
from relay.clock import ManualClock
from relay.mail.envelope import Envelope, Origin, Recipient, Summary
from relay.mail.outcome import Phase, Status, outcome_of_reply
from relay.mail.reply import Reply
from relay.spool.base import STATES, Claim, Content, Draft, Lane, Next, Settlement
from relay.spool.sqlite import SqliteSpool
from tests.support.eventually import eventually
from tests.support.terminal import terminal

ROOT = Path(__file__).resolve().parents[2]
SENT = outcome_of_reply(Phase.FINAL, Reply(250, "2.0.0", "Ok: taken"))
LATER = outcome_of_reply(Phase.RCPT, Reply(450, "4.2.1", "mailbox busy"))


class Filler:
    """A spool with a relay's content, written at chosen times."""

    def __init__(self, directory: Path, now: float) -> None:
        self.clock = ManualClock(now)
        self.spool = SqliteSpool(directory, self.clock, backoff=lambda attempts: 60.0, keep_log_seconds=10**9)

    async def put(self, sender: str, *recipients: str, claimed: bool = True, octets: int = 5) -> Claim | None:
        envelope = Envelope(sender, tuple(Recipient(address) for address in recipients))
        summary, now = Summary("Änne <a@x.example>", "", "Grüße"), self.clock.now()
        content = Content(octets, b"x" * octets)
        draft = Draft(self.spool.new_id(), Lane("acme", "billing"), envelope, content, now, summary=summary, origin=Origin(), due=now)
        (claim,) = await self.spool.put([draft], [claimed])
        return claim

    async def end(self, claim: Claim | None, *statuses: Status, wait: float = 60.0, held: str = "") -> None:
        assert claim is not None
        outcomes = {r.address: SENT if s is Status.SENT else LATER for r, s in zip(claim.envelope.recipients, statuses, strict=True)}
        then = Next(self.clock.now() + wait, claim.lane, held=held) if Status.DEFERRED in statuses else None
        await self.spool.settle(Settlement(claim, outcomes, then))


@pytest.fixture
async def filled(tmp_path: Path) -> Path:
    """Two hours ago: one deferred for a day, one held; a minute ago: one due, one sent."""
    directory = tmp_path / "spool"
    filler = Filler(directory, time.time() - 7200)
    await filler.end(await filler.put("app@acme.example", "late@x.example", octets=4100), Status.DEFERRED, wait=86400.0)
    await filler.end(await filler.put("", "held@x.example"), Status.DEFERRED, held="no route takes its sender any more")
    filler.clock.advance(7140)
    await filler.put("app@acme.example", "a@x.example", "b@x.example", "c@x.example", claimed=False)
    await filler.end(await filler.put("app@acme.example", "fine@y.example"), Status.SENT)
    await filler.spool.close()
    return directory


Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(filled: Path, capsys: pytest.CaptureFixture[str]) -> Run:
    def run(*argv: str, spool: str | None = None) -> tuple[int, str, str]:
        code = main([*argv, *(["--spool", str(filled)] if spool is None else [])])
        return code, *capsys.readouterr()

    return run


def test_the_queue_is_a_table_with_a_summary(run: Run) -> None:
    code, out, _ = run("queue", "list")
    header, late, held, due, summary = out.splitlines()
    assert code == 0
    assert header.split() == ["ID", "STATE", "AGE", "TRIES", "SIZE", "ROUTE", "UPSTREAM", "SENDER", "RECIPIENTS", "NEXT", "LAST", "REPLY"]
    words = ["deferred", "2 h", "1", "4.1 kB", "billing", "acme", "app@acme.example", "late@x.example", "in 22 h", "450 4.2.1 mailbox busy"]
    assert re.split(r"\s{2,}", late)[1:] == words
    assert held.endswith("-        held: no route takes its sender any more")
    assert " <> " in held
    assert "a@x.example, b@x.example, and 1 more  now" in due
    assert summary == "3 messages, 5 recipients, 4.1 kB"
    for column in ("STATE", "ROUTE", "SENDER", "NEXT"):
        assert all(line[header.index(column) - 1] == " " != line[header.index(column)] for line in (late, held, due)), column


@pytest.mark.parametrize("form", [[], ["--json"]])
def test_a_queue_that_damage_keeps_from_being_listed_is_not_called_empty(filled: Path, run: Run, form: list[str]) -> None:
    database = filled / "spool.db"
    octets = database.read_bytes()
    database.write_bytes(octets[:4096] + b"\xff" * (len(octets) - 4096))
    code, out, err = run("queue", "list", *form)
    assert (code, out) == (75, "")
    assert err == "relay queue: the spool is damaged: some of what is waiting cannot be read and is not listed\n"


def test_the_queue_as_json_is_one_object_a_line(run: Run) -> None:
    code, out, _ = run("queue", "list", "--json", "--state", "deferred")
    (message,) = map(json.loads, out.splitlines())
    assert code == 0
    assert " ".join(message) == "id state route upstream sender recipients size created due attempts held reply in_doubt"
    assert (message["recipients"], message["size"], message["attempts"]) == (["late@x.example"], 4100, 1)
    assert message["created"].endswith("Z")
    assert message["due"] > message["created"]


@pytest.mark.parametrize(
    ("filters", "found"),
    [
        (["--older-than", "1h"], 2),
        (["--sender", "<>"], 1),
        (["--sender", "ACME.example"], 2),
        (["--recipient", "b@x.example"], 1),
        (["--route", "billing", "--upstream", "acme"], 3),
        (["--upstream", "other"], 0),
        (["FFFFFFFFFFFFF"], 0),
    ],
)
def test_the_queue_is_filtered(run: Run, filters: list[str], found: int) -> None:
    assert len(run("queue", "list", "--json", *filters)[1].splitlines()) == found
    people = run("queue", "list", *filters)[1].splitlines()
    assert people[-1].startswith(f"{found} message" if found else "nothing in the queue is like that")


def test_the_log_is_a_table_oldest_first(run: Run) -> None:
    code, out, _ = run("log")
    header, first, second, third, summary = out.splitlines()
    assert code == 0
    assert header.split() == ["TIME", "ID", "STATUS", "TRY", "DELAY", "ROUTE", "UPSTREAM", "SENDER", "RECIPIENT", "REPLY"]
    assert "deferred" in first and first.endswith("late@x.example  450 4.2.1 mailbox busy")
    assert "held@x.example" in second
    assert "sent" in third and third.endswith("fine@y.example  250 2.0.0 Ok: taken")
    assert summary == "3 lines"


def test_the_log_as_json_has_what_the_table_has_no_room_for(run: Run) -> None:
    (entry,) = map(json.loads, run("log", "--json", "--state", "sent")[1].splitlines())
    assert " ".join(entry) == "time id status route upstream sender recipient attempt delay size reply created to cc subject report"
    assert (entry["to"], entry["subject"], entry["delay"]) == ("Änne <a@x.example>", "Grüße", 0.0)


@pytest.mark.parametrize(
    ("argv", "recipients"),
    [
        (["-n", "1"], ["fine@y.example"]),
        (["-n", "0"], []),
        (["-n", "9"], ["late@x.example", "held@x.example", "fine@y.example"]),
        (["-n", "1", "--state", "deferred"], ["held@x.example"]),
        (["--recipient", "y.example"], ["fine@y.example"]),
        (["--older-than", "1h"], ["late@x.example", "held@x.example"]),
    ],
)
def test_the_log_is_filtered_and_cut(run: Run, argv: list[str], recipients: list[str]) -> None:
    assert [json.loads(line)["recipient"] for line in run("log", "--json", *argv)[1].splitlines()] == recipients


def test_the_story_of_one_message_is_in_the_log_under_its_id(run: Run) -> None:
    message_id = json.loads(run("queue", "list", "--json", "--state", "held")[1])["id"]
    (entry,) = map(json.loads, run("log", "--json", message_id.lower())[1].splitlines())
    assert entry["recipient"] == "held@x.example"


async def test_an_empty_spool_is_said_to_be_empty(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    await Filler(tmp_path, time.time()).spool.close()
    for argv, words in ((["queue", "list"], "queue is empty\n"), (["log"], "the log is empty\n")):
        assert main([*argv, "--spool", str(tmp_path)]) == 0
        assert capsys.readouterr().out == words
        assert main([*argv, "--json", "--spool", str(tmp_path)]) == 0
        assert capsys.readouterr().out == ""


def test_the_spool_is_found_through_a_file_whose_secrets_are_elsewhere(filled: Path, run: Run, tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    file.write_text(f"upstreams: {{a: {{host: h, username: u, password: {{env: NOT_IN_THIS_SHELL}}}}}}\nspool: {{directory: {filled}}}\n")
    code, out, _ = run("queue", "list", "-c", str(file), spool="file")
    assert code == 0
    assert out.endswith("3 messages, 5 recipients, 4.1 kB\n")


@pytest.mark.parametrize(
    ("text", "words", "code"),
    [
        ("spool: {directory: [], keep: 3d}", "config.yaml:1:20: spool.directory: must be the name of a directory", 78),
        ("spool: {directory: [], keep: 3d}", "spool.keep: unknown key 'keep', did you mean 'keep_log'?", 78),
        ("routes: [", "config.yaml:1:", 78),
        (None, "there is no such file", 78),
        ("spool: {directory: /nowhere/at/all}", "relay queue: there is no spool in /nowhere/at/all", 75),
    ],
)
def test_a_spool_that_cannot_be_found_is_an_error(
    text: str | None, words: str, code: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "config.yaml"
    if text is not None:
        file.write_text(text)
    assert main(["queue", "list", "-c", str(file)]) == code
    captured = capsys.readouterr()
    assert words in captured.err
    assert captured.out == ""


async def test_following_prints_what_is_new_and_ends_on_interrupt(tmp_path: Path) -> None:
    filler = Filler(tmp_path / "spool", time.time())
    for n in range(12):
        await filler.end(await filler.put("app@acme.example", f"old{n}@x.example"), Status.SENT)
    # A shell starts what runs in its background with SIGINT ignored, and these tests may well be run there.
    code = "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler); from relay.cli import main; sys.exit(main())"
    output = tmp_path / "output"
    with output.open("wb") as out:
        process = subprocess.Popen(
            [sys.executable, "-c", code, "log", "--follow", "--json", "--spool", str(tmp_path / "spool")], cwd=ROOT, stdout=out, stderr=out
        )
    try:
        await eventually(lambda: "old11@" in output.read_text(), "the lines of before")
        await filler.end(await filler.put("app@acme.example", "new@x.example"), Status.SENT)
        await eventually(lambda: "new@" in output.read_text(), "the new line")
        os.kill(process.pid, signal.SIGINT)
        await eventually(lambda: process.poll() is not None, "the end")
    finally:
        process.kill()
        ended = process.wait()
        await filler.spool.close()
    assert ended == 0
    expected = [f"old{n}@x.example" for n in range(2, 12)] + ["new@x.example"]
    assert [json.loads(line)["recipient"] for line in output.read_text().splitlines()] == expected


@pytest.mark.parametrize(
    ("octets", "words"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1.0 kB"),
        (9949, "9.9 kB"),
        (52_428_800, "52 MB"),
        (999_600_000, "1.0 GB"),
        (3 * 10**15, "3000 TB"),
    ],
)
def test_sizes_are_words(octets: int, words: str) -> None:
    assert size(octets) == words


@pytest.mark.parametrize(
    ("seconds", "words"), [(-3, "now"), (0.5, "now"), (12, "12 s"), (60, "1 min"), (5400, "2 h"), (86400 * 3, "3 d")]
)  # fmt: skip
def test_ages_are_words(seconds: float, words: str) -> None:
    assert age(seconds) == words
    assert wait(seconds) == (words if words == "now" else f"in {words}")


def test_a_table_grows_from_page_to_page_and_has_one_header() -> None:
    table = Table(("N", "TEXT"), right=("N",))
    rows = [(str(n), "x") for n in range(201)]
    lines = [*table.lines(rows), *table.lines([("1000", "y")])]
    assert lines[0] == "  N  TEXT"
    assert lines[1] == "  0  x"
    assert lines[-1] == "1000  y"
    assert len(lines) == 203


# -- queue show and trace ------------------------------------------------------------------------------------------------------


def id_of(run: Run, state: str) -> str:
    return str(json.loads(run("queue", "list", "--json", "--state", state)[1].splitlines()[0])["id"])


def test_one_message_is_shown_with_all_that_is_known_of_it(run: Run) -> None:
    id = id_of(run, "deferred")
    code, out, _ = run("queue", "show", id.lower())
    rows = [tuple(re.split(r"\s{2,}", line, maxsplit=1)) for line in out.splitlines()]
    assert code == 0
    assert rows[0] == ("id", id)
    assert rows[1] == ("state", "deferred: to be tried in 22 h at acme")
    assert rows[2][1].endswith("Z, 2 h ago")
    assert rows[3:] == [
        ("came", "from relay itself"),
        ("sender", "app@acme.example"),
        ("recipients", "late@x.example"),
        ("To", "Änne <a@x.example>"),
        ("Subject", "Grüße"),
        ("size", "4.1 kB"),
        ("route", "billing"),
        ("upstream", "acme"),
        ("attempts", "1"),
        ("last reply", "450 4.2.1 mailbox busy"),
    ]


def test_one_message_as_json_has_more_than_the_list(run: Run) -> None:
    message = json.loads(run("queue", "show", "--json", id_of(run, "held"))[1])
    assert (message["state"], message["held"], message["subject"]) == ("held", "no route takes its sender any more", "Grüße")
    assert message["due"].endswith("Z"), "when it is given up"
    assert (message["client"], message["notify"], message["in_doubt_recipients"]) == ("", {}, [])


async def stored(directory: Path, *, content: bytes) -> str:
    filler = Filler(directory, time.time())
    recipients = (Recipient("a@x.example", in_doubt=True), Recipient("b@x.example", notify="FAILURE"))
    origin = Origin("local", "10.1.2.3", "erp", "S1", "app@acme.example")
    draft = Draft(
        filler.spool.new_id(), Lane("acme", "billing"), Envelope("app@acme.example", recipients), Content(len(content), content),
        filler.clock.now(), b"Received: by relay\r\n", origin,
    )  # fmt: skip
    await filler.spool.put([draft], [False])
    await filler.spool.close()
    return draft.id


@pytest.mark.parametrize("large", [False, True], ids=["in a row", "in a file"])
async def test_header_and_content_are_printed_as_they_are_stored(
    tmp_path: Path, capfdbinary: pytest.CaptureFixture[bytes], large: bool
) -> None:
    body = b"h\xc3\xa4llo \x1b[2J\r\n.\r\n" + (b"x" * 70 + b"\r\n") * (40_000 if large else 1)
    id = await stored(tmp_path, content=b"Subject: \xff hi\r\n\r\n" + body)
    assert main(["queue", "show", id, "--headers", "--spool", str(tmp_path)]) == 0
    assert capfdbinary.readouterr().out == b"Received: by relay\r\nSubject: \xff hi\r\n"
    assert main(["queue", "show", id, "--content", "--spool", str(tmp_path)]) == 0
    assert capfdbinary.readouterr().out == b"Received: by relay\r\nSubject: \xff hi\r\n\r\n" + body


async def test_a_terminal_gets_nothing_that_would_command_it(tmp_path: Path) -> None:
    id = await stored(tmp_path, content=b"Subject: \x1b]0;owned\x07\r\n\r\nh\xc3\xa4llo\x1b[2J\tyou\r\n")
    printed, code = await terminal(["queue", "show", id, "--content", "--spool", str(tmp_path)])
    assert code == 0
    assert "\x1b" not in printed
    assert "\x07" not in printed
    assert "Subject:  ]0;owned" in printed
    assert "hällo [2J you" in printed


async def test_what_is_special_about_a_recipient_is_shown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    id = await stored(tmp_path, content=b"Subject: hi\r\n\r\n")
    assert main(["queue", "show", id, "--spool", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert "came          from 10.1.2.3 as user erp at listener local in session S1\n" in out
    assert "sender        app@acme.example (header From: app@acme.example)\n" in out
    assert "recipients    a@x.example (in doubt: the upstream may have it)\n" in out
    assert "              b@x.example (NOTIFY=FAILURE)\n" in out
    assert main(["trace", id, "--spool", str(tmp_path)]) == 0
    assert capsys.readouterr().out.endswith(
        "from app@acme.example to a@x.example, b@x.example\n\nqueued for a@x.example, b@x.example\n"
        "due: to be tried now at acme\nin doubt: an upstream may have it already, so it goes to the same one again\n"
    )


async def test_content_that_is_missing_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    id = await stored(tmp_path, content=b"Subject: hi\r\n\r\n" + b"x" * 300_000)
    (tmp_path / "content" / id).unlink()
    assert main(["queue", "show", id, "--content", "--spool", str(tmp_path)]) == 75
    assert capsys.readouterr().err == "relay queue: the content cannot be read: No such file or directory\n"
    assert main(["queue", "show", id, "--spool", str(tmp_path)]) == 0


def test_a_message_that_is_not_queued_is_not_shown_but_traced(run: Run) -> None:
    id = json.loads(run("log", "--json", "--state", "sent")[1])["id"]
    words = f"relay queue: {id} is not in the queue; `relay trace {id}` says what became of it\n"
    assert run("queue", "show", id) == (1, "", words)
    code, out, _ = run("trace", id)
    first, second, subject, _, header, row, _, end = out.splitlines()
    assert code == 0
    assert re.fullmatch(rf"{id}, 5 B, accepted \S+Z", first)
    assert (second, subject, end) == (
        "from app@acme.example to fine@y.example",
        "Subject: Grüße",
        "no longer queued: every recipient has its result",
    )
    assert header.split() == ["TIME", "WHAT", "TRY", "DELAY", "ROUTE", "UPSTREAM", "RECIPIENT", "REPLY"]
    assert re.split(r"\s{2,}", row)[1:] == ["sent", "1", "0.0 s", "billing", "acme", "fine@y.example", "250 2.0.0 Ok: taken"]


def test_of_a_message_that_nobody_knows_nothing_is_told(run: Run) -> None:
    assert run("trace", "1") == (1, "", "relay trace: nothing is known of 0000000000001: it is not queued, nor in the delivery log\n")


async def test_the_report_about_a_message_is_part_of_its_story(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    filler = Filler(tmp_path, time.time())
    claim = await filler.put("app@acme.example", "gone@x.example")
    assert claim is not None
    refused = outcome_of_reply(Phase.RCPT, Reply(550, "5.1.1", "no such user"))
    report = Draft(
        filler.spool.new_id(),
        Lane("acme", "billing"),
        Envelope("", (Recipient("app@acme.example"),)),
        Content(6, b"report"),
        filler.clock.now(),
    )
    await filler.spool.settle(Settlement(claim, {"gone@x.example": refused}, None, report))
    assert main(["trace", claim.id, "--spool", str(tmp_path)]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == f"report {report.id} to the sender: due: to be tried now at acme"
    (taken,) = await filler.spool.claim(Lane("acme", "billing"), 1)
    await filler.end(taken, Status.SENT)
    await filler.spool.close()
    assert main(["trace", claim.id, "--json", "--spool", str(tmp_path)]) == 0
    story = json.loads(capsys.readouterr().out)
    assert " ".join(story) == "id queued log reports"
    assert [(each["status"], each["report"]) for each in story["log"]] == [("failed", report.id)]
    assert [(each["id"], each["queued"], each["log"][0]["status"]) for each in story["reports"]] == [(report.id, None, "sent")]
    assert main(["trace", claim.id, "--spool", str(tmp_path)]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == f"report {report.id} to the sender: sent: 250 2.0.0 Ok: taken"


def test_the_filter_of_states_has_those_of_the_spool() -> None:
    assert selection.STATES == STATES
