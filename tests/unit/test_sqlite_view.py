"""The operator's view, read from a spool that a relay holds, that nobody holds, and that is not there."""

import os
import stat
from collections.abc import AsyncIterator
from pathlib import Path
from types import SimpleNamespace

import apsw
import pytest

from relay.clock import ManualClock
from relay.mail.envelope import Envelope, Origin, Recipient, Summary
from relay.mail.outcome import Failure, Outcome, Phase, outcome_of_failure, outcome_of_reply
from relay.mail.reply import Reply
from relay.spool.base import FILE_ABOVE_BYTES, Claim, Content, Draft, Lane, Next, Selection, Settlement, SpoolError
from relay.spool.sqlite import SqliteSpool
from relay.spool.sqlite_view import Details, SqliteView
from tests.contract.drafts import octets_of

ACME, GLOBEX, HOUSE = Lane("acme", "acme"), Lane("globex", "globex"), Lane("house", "acme")
SENT = outcome_of_reply(Phase.FINAL, Reply(250, "2.0.0", "taken"))
LATER = outcome_of_reply(Phase.RCPT, Reply(450, "4.2.1", "busy"))
REFUSED = outcome_of_reply(Phase.RCPT, Reply(550, "5.1.1", "nobody"))
DOUBT = outcome_of_failure(Phase.FINAL, Failure.CLOSED, "lost")


class Desk:
    """A spool that tests fill, and views of it."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.clock = ManualClock()
        self.spool = SqliteSpool(directory, self.clock, backoff=lambda attempts: 60.0, keep_log_seconds=3600)
        self.views: list[SqliteView] = []

    async def put(self, sender: str, *recipients: str, lane: Lane = ACME, claimed: bool = False) -> Claim | Draft:
        envelope = Envelope(sender, tuple(Recipient(address) for address in recipients))
        summary = Summary(", ".join(recipients), "", "Räksmörgås")
        now = self.clock.now()
        draft = Draft(self.spool.new_id(), lane, envelope, Content(5, b"hello"), now, b"", Origin(), summary, due=now)
        (claim,) = await self.spool.put([draft], [claimed])
        return claim or draft

    async def end(self, claim: Claim | Draft, then: Next | None = None, **outcomes: Outcome) -> None:
        assert isinstance(claim, Claim)
        by_address = {r.address: outcomes[r.address.partition("@")[0]] for r in claim.envelope.recipients}
        await self.spool.settle(Settlement(claim, by_address, then))

    def view(self) -> SqliteView:
        self.views.append(SqliteView(self.directory, self.clock))
        return self.views[-1]


@pytest.fixture
async def desk(tmp_path: Path) -> AsyncIterator[Desk]:
    desk = Desk(tmp_path / "spool")
    yield desk
    for view in desk.views:
        view.close()
    await desk.spool.close()


async def fill(desk: Desk) -> None:
    """One message in each state, an hour old but for the last."""
    await desk.put("app@acme.example", "due@x.example", "two@sub.y.example")
    await desk.put("app@acme.example", "active@x.example", claimed=True)
    deferred = await desk.put("App+tag@acme.example", "deferred@x.example", "done@x.example", claimed=True)
    held = await desk.put("", "held@x.example", lane=GLOBEX, claimed=True)
    await desk.end(deferred, Next(desk.clock.now() + 60, HOUSE), deferred=LATER, done=SENT)
    await desk.end(held, Next(desk.clock.now(), GLOBEX, counted=False, held="no route"), held=LATER)
    desk.clock.advance(3600)
    await desk.put("app@globex.example", "young@x.example", lane=GLOBEX)


async def test_each_state_is_named_beside_a_relay_that_holds_the_spool(desk: Desk) -> None:
    await fill(desk)
    queued = list(desk.view().queued())
    assert [(q.recipients[0].partition("@")[0], q.state) for q in queued] == [
        ("due", "due"),
        ("active", "active"),
        ("deferred", "deferred"),
        ("held", "held"),
        ("young", "due"),
    ]
    deferred = queued[2]
    assert deferred.lane == HOUSE
    assert deferred.recipients == ("deferred@x.example",)
    assert (deferred.attempts, deferred.last_reply, deferred.size, deferred.in_doubt) == (1, "450 4.2.1 busy", 5, False)
    assert deferred.due - deferred.created == 60
    assert queued[3].held == "no route"


async def test_the_spool_is_read_the_same_after_its_relay_has_stopped(tmp_path: Path) -> None:
    desk = Desk(tmp_path / "spool")
    await fill(desk)
    held = desk.view()
    before = [*held.queued()], [*held.log()]
    held.close()
    await desk.spool.close()
    view = SqliteView(desk.directory, desk.clock)
    assert ([*view.queued()], [*view.log()]) == before
    assert len(before[0]) == 5
    view.close()


@pytest.mark.parametrize(
    ("selection", "expected"),
    [
        (Selection(route="acme"), "due active deferred"),
        (Selection(upstream="acme"), "due active"),
        (Selection(upstream="house", route="acme"), "deferred"),
        (Selection(sender="acme.example"), "due active deferred"),
        (Selection(sender="app@acme.example"), "due active deferred"),
        (Selection(sender="app+tag@acme.example"), "deferred"),
        (Selection(sender="<>"), "held"),
        (Selection(recipient="*.y.example"), "due"),
        (Selection(recipient="y.example"), ""),
        (Selection(recipient="deferred@x.example"), "deferred"),
        (Selection(recipient="done@x.example"), ""),
        (Selection(state="due"), "due young"),
        (Selection(state="held"), "held"),
        (Selection(older_than=1800.0), "due active deferred held"),
        (Selection(older_than=1800.0, state="due"), "due"),
        (Selection(route="nobody"), ""),
        (Selection(ids=frozenset({"1"})), ""),
    ],
)
async def test_filters_select_together(desk: Desk, selection: Selection, expected: str) -> None:
    await fill(desk)
    assert " ".join(q.recipients[0].partition("@")[0] for q in desk.view().queued(selection)) == expected


async def test_messages_are_found_by_their_ids(desk: Desk) -> None:
    await fill(desk)
    view = desk.view()
    wanted = frozenset(q.id for q in view.queued() if q.state in ("active", "held"))
    assert {q.id for q in view.queued(Selection(ids=wanted))} == wanted


async def test_one_message_is_shown_with_all_that_is_stored_of_it(desk: Desk) -> None:
    recipients = (Recipient("a@x.example", "NEVER", "rfc822;b@x.example"), Recipient("c@x.example"))
    envelope = Envelope("app@acme.example", recipients, smtputf8=True, ret="HDRS", envid="x")
    origin, summary = Origin("local", "::1", "erp", "S1", "app@acme.example"), Summary("a", "c", "s")
    small, large = b"Subject: s\r\n\r\nhello\r\n", b"L" * (FILE_ABOVE_BYTES + 1)
    for octets in (small, large):
        draft = Draft(
            desk.spool.new_id(), ACME, envelope, Content(len(octets), octets), desk.clock.now(), b"Received: x\r\n", origin, summary
        )  # fmt: skip
        await desk.spool.put([draft], [False])
        view = desk.view()
        queued = view.message(draft.id)
        assert queued is not None
        assert (queued.id, queued.state, queued.recipients, queued.size) == (draft.id, "due", ("a@x.example", "c@x.example"), len(octets))
        assert view.details(draft.id) == Details(envelope, origin, summary, b"Received: x\r\n")
        content = view.content(draft.id)
        assert content is not None
        assert octets_of(content) == octets


async def test_of_a_message_that_is_not_there_nothing_is_shown(desk: Desk) -> None:
    await desk.put("app@acme.example", "a@x.example")
    view = desk.view()
    assert (view.message("1"), view.details("1"), view.content("1")) == (None, None, None)


async def test_content_that_is_missing_is_an_error_in_words(desk: Desk) -> None:
    draft = await desk.put("app@acme.example", "a@x.example")
    writer = apsw.Connection(str(desk.directory / "spool.db"))
    writer.execute("DELETE FROM content")
    writer.close()
    with pytest.raises(SpoolError, match=f"the content of {draft.id} is missing from the spool"):
        desk.view().content(draft.id)


async def test_a_recipient_in_doubt_is_shown_as_such(desk: Desk) -> None:
    claim = await desk.put("app@acme.example", "a@x.example", claimed=True)
    await desk.end(claim, Next(desk.clock.now(), ACME), a=DOUBT)
    (queued,) = desk.view().queued()
    assert queued.in_doubt


async def test_the_log_has_one_line_for_each_recipient_of_an_attempt(desk: Desk) -> None:
    claim = await desk.put("app@acme.example", "a@x.example", "b@y.example", claimed=True)
    desk.clock.advance(2.5)
    await desk.end(claim, a=SENT, b=REFUSED)
    view = desk.view()
    first, second = view.log()
    assert (first.recipient, first.status, first.delay, first.attempt, first.reply) == ("a@x.example", "sent", 2.5, 1, "250 2.0.0 taken")
    assert (second.recipient, second.status, second.reply) == ("b@y.example", "failed", "550 5.1.1 nobody")
    assert first.summary.subject == "Räksmörgås"
    assert first.id == claim.id
    assert [e.recipient for e in view.log(Selection(state="failed"))] == ["b@y.example"]
    assert [e.recipient for e in view.log(Selection(recipient="x.example"))] == ["a@x.example"]
    assert [e.recipient for e in view.log(Selection(ids=frozenset({claim.id})))] == ["a@x.example", "b@y.example"]
    assert not [*view.log(Selection(older_than=1.0))]


async def test_a_listing_longer_than_a_page_is_whole_and_in_order(desk: Desk) -> None:
    claims = [await desk.put("app@acme.example", f"r{n}@x.example", claimed=True) for n in range(7)]
    addresses = [f"r{n}@x.example" for n in range(7)]
    for n, claim in enumerate(claims[:-1]):
        await desk.end(claim, Next(desk.clock.now() + 1, ACME), **{f"r{n}": LATER})
    view = desk.view()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("relay.spool.sqlite_view._PAGE_ROWS", 3)
        assert [q.recipients[0] for q in view.queued()] == addresses
        assert [e.recipient for e in view.log()] == addresses[:-1]
        assert [e.recipient for e in view.log(last=4)] == addresses[2:6]
        assert [e.recipient for e in view.log(last=0)] == []
        assert [e.recipient for e in view.log(Selection(recipient="r1@x.example"), last=4)] == addresses[1:2]


async def test_the_last_lines_of_the_log_are_found_without_reading_what_is_before_them(
    desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    monkeypatch.setattr("relay.spool.sqlite_view._PAGE_ROWS", 2)
    for number in range(8):
        address = "rare@x.example" if number >= 7 else f"r{number}@x.example"
        await desk.end(await desk.put("app@acme.example", address, claimed=True), rare=SENT, **{f"r{number}": SENT})
    view, pages = desk.view(), list[str]()
    page = view._page
    monkeypatch.setattr(view, "_page", lambda text, values: (pages.append(text), page(text, values))[1])
    assert [e.recipient for e in view.log(Selection(recipient="rare@x.example"), last=1)] == ["rare@x.example"]
    assert len(pages) == 1


async def test_new_lines_of_the_log_are_those_after_its_former_end(desk: Desk) -> None:
    view = desk.view()
    assert view.end_of_log() == 0
    await desk.end(await desk.put("app@acme.example", "a@x.example", claimed=True), a=SENT)
    mark = view.end_of_log()
    await desk.end(await desk.put("app@acme.example", "b@x.example", claimed=True), b=SENT)
    assert [e.recipient for e in view.log(after=mark)] == ["b@x.example"]
    assert [e.recipient for e in view.log(until=mark)] == ["a@x.example"]


async def test_a_view_neither_writes_nor_keeps_a_transaction_open(desk: Desk) -> None:
    await fill(desk)
    view = desk.view()
    half_read = view.queued()
    next(half_read)
    with pytest.raises(apsw.ReadOnlyError):
        view._database.execute("DELETE FROM message")
    writer = apsw.Connection(str(desk.directory / "spool.db"))
    assert writer.execute("SELECT count(*) FROM message").get == 5
    assert writer.wal_checkpoint(mode=apsw.SQLITE_CHECKPOINT_TRUNCATE) == (0, 0)  # it would be busy if a reader held the log
    writer.close()
    assert len([*half_read]) == 4


def test_a_directory_without_a_spool_is_an_error_and_stays_empty(tmp_path: Path) -> None:
    with pytest.raises(SpoolError, match=r"there is no spool in .* \(no spool.db\)"):
        SqliteView(tmp_path, ManualClock())
    assert not list(tmp_path.iterdir())


def test_a_file_that_is_no_database_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "spool.db").write_text("this is not a database, it only has its name" * 100)
    with pytest.raises(SpoolError, match="cannot be read"):
        SqliteView(tmp_path, ManualClock())


@pytest.mark.parametrize(("version", "words"), [(0, "has not finished starting"), (99, "another version of relay")])
def test_a_database_of_another_schema_is_an_error(tmp_path: Path, version: int, words: str) -> None:
    database = apsw.Connection(str(tmp_path / "spool.db"))
    database.pragma("user_version", version)
    database.execute("CREATE TABLE t (x)")
    database.close()
    with pytest.raises(SpoolError, match=words):
        SqliteView(tmp_path, ManualClock())


async def test_what_a_view_leaves_behind_is_no_more_readable_than_the_spool(desk: Desk) -> None:
    await desk.put("app@acme.example", "a@x.example")
    await desk.spool.close()
    os.chmod(desk.directory / "spool.db", 0o600)
    view = desk.view()
    assert len([*view.queued()]) == 1
    assert all(stat.S_IMODE(path.stat().st_mode) == 0o600 for path in desk.directory.glob("spool.db*"))
    desk.spool = SqliteSpool(desk.directory, desk.clock, backoff=lambda attempts: 60.0, keep_log_seconds=3600)


def test_on_a_file_system_that_cannot_be_written_the_advice_is_a_copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "spool.db").symlink_to(tmp_path / "elsewhere" / "spool.db")
    monkeypatch.setattr(Path, "stat", lambda _: None)  # it is there, and cannot be opened
    with pytest.raises(SpoolError, match="run this as the user"):
        SqliteView(tmp_path, ManualClock())
    monkeypatch.setattr(os, "statvfs", lambda _: SimpleNamespace(f_flag=os.ST_RDONLY))
    with pytest.raises(SpoolError, match="copy the directory to where you can write"):
        SqliteView(tmp_path, ManualClock())
