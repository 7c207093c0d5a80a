"""`relay queue hold` and its like: what is asked of the relay, what is printed, what is asked of a person, and answers that are none."""

import json
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from relay.cli import control, main
from tests.support.terminal import terminal

ONE, TWO = "649D2A1B3C4D5", "649D2A1B3C4D6"
MORE, END = {"version": 1, "more": True}, {"version": 1, "more": False}


class Answerer:
    """A control socket that gives the same answers to every request, and remembers the requests."""

    def __init__(self, path: Path) -> None:
        self.requests: list[dict[str, Any]] = []
        self.answers: bytes = b""
        self.matched: bytes = json.dumps({**END, "matched": 2}).encode() + b"\n"
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.bind(str(path))
        self._socket.listen()
        self._thread = threading.Thread(target=self._serve)
        self._thread.start()

    def will_say(self, *answers: dict[str, Any]) -> None:
        self.answers = b"".join(json.dumps(answer).encode() + b"\n" for answer in answers)

    def close(self) -> None:
        self._socket.shutdown(socket.SHUT_RDWR)
        self._thread.join()
        self._socket.close()

    def _serve(self) -> None:
        while True:
            try:
                connection, _ = self._socket.accept()
            except OSError:
                return
            with connection, connection.makefile("rb") as lines:
                self.requests.append(json.loads(lines.readline()))
                connection.sendall(self.matched if self.requests[-1]["verb"] == "count" else self.answers)


@pytest.fixture
def relay(tmp_path: Path) -> Iterator[Answerer]:
    answerer = Answerer(tmp_path / "control.sock")
    answerer.will_say({**MORE, "changed": [TWO], "skipped": {ONE: "being attempted"}}, END)
    yield answerer
    answerer.close()


Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Run:
    def run(*argv: str) -> tuple[int, str, str]:
        return main(["queue", *argv, "--spool", str(tmp_path)]), *capsys.readouterr()

    return run


@pytest.mark.parametrize(
    ("argv", "request_"),
    [
        (["retry", "--all"], {"verb": "retry", "selection": {}, "reason": ""}),
        (["hold", ONE.lower(), "1", "--reason", "why not"],
         {"verb": "hold", "selection": {"ids": [ONE, "0000000000001"]}, "reason": "why not"}),
        (["release", "--route", "r", "--upstream", "u"], {"verb": "release", "selection": {"route": "r", "upstream": "u"}, "reason": ""}),
        (["drop", "--sender", "ACME.example", "--recipient", "a@x.example"],
         {"verb": "drop", "selection": {"sender": "acme.example", "recipient": "a@x.example"}, "reason": ""}),
        (["bounce", "--state", "held", "--older-than", "2h"],
         {"verb": "bounce", "selection": {"state": "held", "older_than": 7200.0}, "reason": ""}),
        (["bounce", "--older-than", "0s"], {"verb": "bounce", "selection": {"older_than": 0.0}, "reason": ""}),
    ],
)  # fmt: skip
def test_the_relay_is_asked_for_what_was_typed(relay: Answerer, run: Run, argv: list[str], request_: dict[str, Any]) -> None:
    run(*argv)
    assert relay.requests == [{"version": 1, **request_}]


def test_every_message_has_a_line_oldest_first_and_the_sum_is_last(relay: Answerer, run: Run) -> None:
    out = f"{ONE}  left alone: being attempted\n{TWO}  held\n1 message held, 1 left alone\n"
    assert run("hold", "--all") == (0, out, "")
    assert run("hold", ONE, TWO) == (1, out, ""), "who was named was left alone"
    assert run("hold", TWO)[0] == 0, "and here another one"


def test_a_script_gets_one_object_a_message(relay: Answerer, run: Run) -> None:
    code, out, _ = run("drop", "--all", "--json")
    assert code == 0
    assert [json.loads(line) for line in out.splitlines()] == [
        {"id": ONE, "result": "left alone", "why": "being attempted"},
        {"id": TWO, "result": "dropped", "why": ""},
    ]


@pytest.mark.parametrize(("argv", "words"), [(["--all"], "queue is empty\n"), (["--state", "held"], "nothing in the queue is like that\n")])
def test_nothing_is_said_to_be_nothing(relay: Answerer, run: Run, argv: list[str], words: str) -> None:
    relay.will_say(END)
    assert run("release", *argv) == (0, words, "")
    assert run("release", *argv, "--json") == (0, "", "")


@pytest.mark.parametrize(
    ("answers", "words"),
    [
        (
            b'{"version":1,"error":"the spool cannot be written: disk I/O error","more":false}\n',
            "the spool cannot be written: disk I/O error",
        ),
        (b"", "the relay ended before it had answered"),
        (b'{"version":1,"changed":[],"skipped":{},"more":true}\n', "the relay ended before it had answered"),
        (b'{"version":1,"mor', "this is not the answer of a relay of this version; restart it"),
        (b"SSH-2.0-OpenSSH_9.2\r\n", "this is not the answer of a relay of this version; restart it"),
        (b'{"version":2,"more":false}\n', "this is not the answer of a relay of this version; restart it"),
        (b"[]\n", "this is not the answer of a relay of this version; restart it"),
    ],
)
def test_an_answer_that_is_none_is_75_in_words(relay: Answerer, run: Run, answers: bytes, words: str) -> None:
    relay.answers = answers
    assert run("hold", "--all") == (75, "", f"relay queue hold: {words}\n")


def test_a_relay_that_does_not_answer_is_not_waited_for_for_ever(tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(control, "_ANSWER_SECONDS", 0.05)
    with socket.socket(socket.AF_UNIX) as silent:
        silent.bind(str(tmp_path / "control.sock"))
        silent.listen()
        assert run("hold", "--all") == (75, "", "relay queue hold: the relay has not answered for 0 s\n")


def test_a_path_that_no_socket_can_have_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    deep = tmp_path / ("x" * 120)
    assert main(["queue", "hold", "--all", "--spool", str(deep)]) == 75
    assert "the relay cannot be asked at" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "typed", "question", "code", "verbs"),
    [
        (["drop", "--all"], "y\n", "Throw away 2 messages? [y/N]", 0, ["count", "drop"]),
        (["bounce", "--all"], "yes\n", "Give up 2 messages and send the reports? [y/N]", 0, ["count", "bounce"]),
        (["drop", "--all"], "\n", "nothing was done", 1, ["count"]),
        (["bounce", "--all"], "maybe\n", "nothing was done", 1, ["count"]),
        (["drop", "--all", "--yes"], "", "", 0, ["drop"]),
        (["hold", "--all"], "", "", 0, ["hold"]),
    ],
)
async def test_on_a_terminal_what_cannot_be_undone_is_asked_about(
    tmp_path: Path, relay: Answerer, argv: list[str], typed: str, question: str, code: int, verbs: list[str]
) -> None:
    printed, ended = await terminal(["queue", *argv, "--spool", str(tmp_path)], typed=typed)
    assert question in printed
    assert ("[y/N]" in printed) is bool(question)
    assert ended == code
    assert [request["verb"] for request in relay.requests] == verbs


async def test_nothing_is_not_asked_about(tmp_path: Path, relay: Answerer) -> None:
    relay.matched = json.dumps({**END, "matched": 0}).encode() + b"\n"
    relay.will_say(END)
    printed, code = await terminal(["queue", "drop", "--all", "--spool", str(tmp_path)])
    assert (printed, code) == ("queue is empty\r\n", 0)


def test_the_socket_is_found_through_the_configuration(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "config.yaml"
    for text, place in (
        (f"spool: {{directory: {tmp_path}/a}}", tmp_path / "a" / "control.sock"),
        (f"spool: {{directory: {tmp_path}/a}}\ncontrol: {tmp_path}/run/c", tmp_path / "run" / "c"),
    ):
        file.write_text(text)
        assert main(["queue", "hold", "--all", "-c", str(file)]) == 75
        words = f"relay queue hold: no relay is running with this spool (no control socket at {place})\n"
        assert capsys.readouterr().err == words
    file.write_text("control: [x]")
    assert main(["queue", "hold", "--all", "-c", str(file)]) == 78
    assert "control: must be the path of a socket" in capsys.readouterr().err


@pytest.mark.parametrize(("end", "code"), [(END, 1), ({**END, "error": "the relay is stopping"}, 75)])
def test_an_order_whose_report_nobody_reads_is_carried_out_and_its_exit_code_is_right(
    relay: Answerer, tmp_path: Path, end: dict[str, Any], code: int
) -> None:
    relay.will_say({**MORE, "changed": [TWO]}, {**MORE, "changed": [], "skipped": {ONE: "being attempted"}}, end)
    command = [sys.executable, "-c", "import sys; from relay.cli import main; sys.exit(main())"]
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run([*command, "queue", "retry", ONE, TWO, "--spool", tmp_path], stdout=writer, stderr=subprocess.PIPE, check=False)
    os.close(writer)
    assert (done.returncode, done.stderr.decode()) == (code, "relay queue retry: the relay is stopping\n" if code == 75 else "")


@pytest.mark.parametrize("reason", ["two\nlines", "x" * 501])
def test_a_reason_that_no_relay_would_take_is_a_mistake_of_who_gives_it(
    run: Run, relay: Answerer, reason: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        run("hold", "--all", "--reason", reason)
    assert ended.value.code == 64
    assert "argument --reason: the reason must" in capsys.readouterr().err
    assert relay.requests == []
