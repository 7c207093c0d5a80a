"""The log: one line an event, whoever reads it and however slowly."""

import asyncio
import json
import logging
import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from relay.clock import ManualClock
from relay.observe import journal as module
from relay.observe.journal import Journal, capture_logging

DELIVERY: dict[str, Any] = {
    "id": "A1", "session": "S1", "route": "acme", "upstream": "house", "sender": "a@acme.example", "recipients": "b@example.org", "size": 3,
    "reply": "250 2.0.0 Ok", "attempt": 2, "delay": 1.23456,
}  # fmt: skip

#: Every event, how to say it, and its level.
EVENTS: list[tuple[str, str, Callable[[Journal], None]]] = [
    ("listening", "info", lambda j: j.listening(listener="local", address="127.0.0.1:2525")),
    (
        "accepted",
        "info",
        lambda j: j.accepted(
            id="A1", session="S1", listener="local", client="::1", user="u", route="r", upstream="h", sender="<>", recipients="b@c", size=1
        ),
    ),
    ("refused", "info", lambda j: j.refused(session="S1", listener="local", client="::1", sender="a@b", recipients="c@d", reply="550 no")),
    ("sent", "info", lambda j: j.sent(**DELIVERY)),
    ("deferred", "warning", lambda j: j.deferred(**DELIVERY, next_try="in 60 s at house", in_doubt=True)),
    ("failed", "warning", lambda j: j.failed(**DELIVERY)),
    ("bounced", "info", lambda j: j.bounced(id="A1", bounce="A2", recipients="a@b", failed="c@d")),
    ("failed", "warning", lambda j: j.unbounced(id="A1", sender="<>", recipients="c@d", reason="why")),
    ("held", "warning", lambda j: j.held(id="A1", route="r", upstream="h", sender="a@b", recipients="c@d", reason="why")),
    ("degraded", "warning", lambda j: j.degraded(route="r", upstream="h", fallback="f", reply="refused")),
    ("recovered", "info", lambda j: j.recovered(route="r", upstream="h")),
    ("throttled", "warning", lambda j: j.throttled(upstream="h", reply="454")),
    ("auth-failed", "error", lambda j: j.auth_failed(upstream="h", user="u", reply="535")),
    ("draining", "info", lambda j: j.draining(sessions=1, attempts=2)),
    ("stopped", "info", lambda j: j.stopped(reason="SIGTERM")),
    ("fault", "error", lambda j: j.fault("a thing", ValueError("bad"), id="A1")),
    ("note", "warning", lambda j: j.note("warning", "a sentence")),
]


class Paper:
    """A file to write journals to."""

    def __init__(self, path: Path) -> None:
        self.descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)

    def journal(self, **options: Any) -> Journal:
        return Journal(ManualClock(1_800_000_000.25), **{"format": "text", "level": "debug", "descriptor": self.descriptor, **options})

    def text(self) -> str:
        return os.pread(self.descriptor, 1 << 20, 0).decode()

    def lines(self) -> list[str]:
        return self.text().splitlines()


@pytest.fixture
def paper(tmp_path: Path) -> Iterator[Paper]:
    built = Paper(tmp_path / "journal")
    yield built
    os.close(built.descriptor)


@pytest.mark.parametrize("format", ["text", "json"])
def test_every_event_is_one_line_with_its_time_level_and_name(paper: Paper, format: str) -> None:
    journal = paper.journal(format=format)
    for _, _, say in EVENTS:
        say(journal)
    journal.close()
    lines = paper.lines()
    assert len(lines) == len(EVENTS)
    for line, (name, level, _) in zip(lines, EVENTS, strict=True):
        if format == "json":
            event = json.loads(line)
            assert (event["time"], event["level"], event["event"]) == ("2027-01-15T08:00:00.250Z", level, name)
        else:
            assert line.startswith(f"2027-01-15T08:00:00.250Z {level} {name} ")


def test_a_delivery_has_the_fields_of_the_contract(paper: Paper) -> None:
    journal = paper.journal()
    journal.sent(**DELIVERY)
    journal.deferred(**DELIVERY, next_try="in 60 s at house", in_doubt=False)
    journal.deferred(**DELIVERY, next_try="in 60 s at house", in_doubt=True)
    journal.close()
    sent, deferred, doubted = paper.lines()
    assert sent == (
        "2027-01-15T08:00:00.250Z info sent id=A1 session=S1 route=acme upstream=house sender=a@acme.example recipients=b@example.org "
        'size=3 reply="250 2.0.0 Ok" status=sent attempt=2 delay=1.235'
    )
    assert deferred.endswith('status=deferred attempt=2 delay=1.235 next="in 60 s at house"')
    assert doubted.endswith("in_doubt=yes")


@pytest.mark.parametrize("level", ["debug", "info", "warning", "error"])
def test_only_events_of_the_level_and_above_are_written(paper: Paper, level: str) -> None:
    order = ["debug", "info", "warning", "error"]
    journal = paper.journal(level=level, format="json")
    for _, _, say in EVENTS:
        say(journal)
    journal.close()
    assert [json.loads(line)["event"] for line in paper.lines()] == [
        name for name, its_level, _ in EVENTS if order.index(its_level) >= order.index(level)
    ]


@pytest.mark.parametrize(
    "text", ["a b", 'say "hi"', "a=b", "back\\slash", "two\nlines", "tab\there", "carriage\rreturn", "\x85next\u2028line"]
)
@pytest.mark.parametrize("format", ["text", "json"])
def test_no_text_can_forge_a_line_or_a_field(paper: Paper, text: str, format: str) -> None:
    journal = paper.journal(format=format)
    journal.auth_failed(upstream="h", user="u", reply=text)
    journal.close()
    octets = paper.text()
    assert octets.count("\n") == 1
    assert "\r" not in octets
    if format == "json":
        assert json.loads(octets)["reply"] == text
    else:
        assert json.loads(octets.rstrip("\n").partition("reply=")[2]) == text


def test_what_is_empty_is_left_out_and_what_is_zero_is_not(paper: Paper) -> None:
    journal = paper.journal()
    journal.deferred(**{**DELIVERY, "session": "", "size": 0}, next_try="soon", in_doubt=False)
    journal.accepted(
        id="A1", session="S1", listener="local", client="::1", user="", route="r", upstream="h", sender="<>", recipients="b@c", size=0
    )
    journal.close()
    deferred, accepted = paper.lines()
    assert "session=" not in deferred
    assert "in_doubt" not in deferred
    assert "user=" not in accepted
    assert " size=0 " in deferred
    assert accepted.endswith(" size=0")


@pytest.mark.parametrize(("name", "say"), [(name, say) for name, _, say in EVENTS], ids=[name for name, _, _ in EVENTS])
def test_both_formats_have_the_same_fields_in_the_same_order(paper: Paper, name: str, say: Callable[[Journal], None]) -> None:
    for format in ("json", "text"):
        journal = paper.journal(format=format)
        say(journal)
        journal.close()
    first, second = paper.lines()
    event = json.loads(first)
    assert event["event"] == name
    assert [word.partition("=")[0] for word in second.split(" ")[3:] if "=" in word and not word.startswith('"')][: len(event) - 3] == list(
        event
    )[3:]


def test_a_surrogate_does_not_stop_the_log(paper: Paper) -> None:
    journal = paper.journal()
    journal.note("info", "odd \udcff name")
    journal.note("info", "after")
    journal.close()
    assert [line.rpartition("what=")[2] for line in paper.lines()] == ['"odd \\udcff name"', "after"]


def test_the_second_is_rendered_anew_when_it_changes(paper: Paper) -> None:
    clock = ManualClock(1_800_000_059.999)
    journal = Journal(clock, format="text", level="info", descriptor=paper.descriptor)
    journal.note("info", "one")
    clock.advance(0.0015)
    journal.note("info", "two")
    journal.close()
    assert [line.split()[0] for line in paper.lines()] == ["2027-01-15T08:00:59.999Z", "2027-01-15T08:01:00.000Z"]


def test_a_fault_has_its_traceback_on_the_same_line(paper: Paper) -> None:
    journal = paper.journal(format="json")
    try:
        raise ValueError("bad\nnews")
    except ValueError as error:
        journal.fault("a thing", error)
    journal.fault("a thing without one", None)
    journal.close()
    first, second = (json.loads(line) for line in paper.lines())
    assert "ValueError: bad\nnews" in first["traceback"]
    assert "traceback" not in second


# -- on a loop -------------------------------------------------------------------------------------------------------------


async def test_on_a_loop_lines_gather_and_errors_go_at_once(paper: Paper, eventually: Callable[..., Any]) -> None:
    journal = paper.journal()
    journal.attach(asyncio.get_running_loop())
    journal.note("info", "one")
    journal.note("info", "two")
    await asyncio.sleep(0)
    assert paper.text() == ""
    await eventually(lambda: len(paper.lines()) == 2, "both lines")
    journal.note("info", "three")
    journal.note("error", "four")
    await eventually(lambda: len(paper.lines()) == 4, "the error, and what came before it")
    assert [line.rpartition("=")[2] for line in paper.lines()] == ["one", "two", "three", "four"]
    journal.note("info", "five")
    journal.close()
    assert paper.lines()[-1].endswith("five")


@pytest.mark.parametrize("blocking", [True, False])
async def test_a_reader_who_does_not_read_stops_no_mail(blocking: bool) -> None:
    reading, writing = os.pipe()
    os.set_blocking(writing, blocking)  # who shares a terminal or a pipe with us may have set it
    journal = Journal(ManualClock(), format="text", level="info", descriptor=writing)
    journal.attach(asyncio.get_running_loop())
    for number in range(3000):
        journal.note("info", f"{number} {'x' * 100}")
        if number % 500 == 0:
            await asyncio.sleep(0)
    text: list[bytes] = []

    def read() -> None:
        while octets := os.read(reading, 65536):
            text.append(octets)

    reader = threading.Thread(target=read)
    reader.start()
    journal.close()
    os.close(writing)
    reader.join(timeout=60)
    os.close(reading)
    assert b"".join(text).count(b"\n") == 3000


def test_what_a_reader_who_does_not_read_has_missed_is_counted_and_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_WAITING_CHARACTERS", 100_000)
    reading, writing = os.pipe()
    journal = Journal(ManualClock(), format="text", level="info", descriptor=writing)
    for number in range(3000):
        journal.note("info", f"{number} {'x' * 100}")
    text: list[bytes] = []

    def read() -> None:
        while octets := os.read(reading, 65536):
            text.append(octets)

    reader = threading.Thread(target=read)
    reader.start()
    deadline = time.monotonic() + 60
    while journal._taken < journal._handed:
        assert time.monotonic() < deadline
        time.sleep(0.001)
    journal.note("info", "the last")
    journal.close()
    os.close(writing)
    reader.join(timeout=60)
    os.close(reading)
    lines = b"".join(text).decode().splitlines()
    lost = [int(line.partition('what="')[2].split()[0]) for line in lines if " lines of this log are lost" in line]
    assert sum(lost) > 1000
    assert len(lines) - 1 - len(lost) + sum(lost) == 3000
    assert any(line.endswith('what="the last"') for line in lines[-2:])


def test_only_short_texts_are_remembered(paper: Paper) -> None:
    journal = paper.journal()
    names = ",".join(f"r{number}@never-seen.example" for number in range(1000))
    module._known.cache_clear()
    journal = paper.journal()
    journal.sent(**{**DELIVERY, "recipients": names})
    journal.close()
    assert names in paper.text()
    assert module._known.cache_info().currsize == 4, "route, upstream, sender and reply"


def test_a_reader_who_has_gone_stops_no_mail() -> None:
    reading, writing = os.pipe()
    os.close(reading)
    journal = Journal(ManualClock(), format="text", level="info", descriptor=writing)
    for _ in range(10):
        journal.note("info", "nobody hears this")
    journal.close()
    os.close(writing)


# -- libraries -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def own_logging() -> Iterator[None]:
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    root.handlers[:] = handlers
    root.setLevel(level)


def test_warnings_and_errors_of_libraries_come_into_the_log_and_nothing_below(paper: Paper, own_logging: None) -> None:
    journal = paper.journal()
    capture_logging(journal)
    logger = logging.getLogger("mail.log")
    logger.debug("MAIL FROM:<app@acme.example>")
    logger.info("client app@acme.example")
    logger.warning("odd %s", "thing")
    try:
        raise RuntimeError("inside a library")
    except RuntimeError:
        logger.exception("failed")
    journal.close()
    first, second = paper.lines()
    assert first.endswith('warning note what="mail.log: odd thing"')
    assert " error note " in second
    assert "RuntimeError: inside a library" in second
    assert "app@acme.example" not in paper.text()
