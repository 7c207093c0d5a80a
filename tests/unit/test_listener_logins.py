"""Logins at a listener: to whom they are offered, of whom demanded, and what is said and noted."""

import json
from pathlib import Path
from typing import Any

import pytest

from relay.clock import ManualClock
from relay.config.listeners import Listener, User
from relay.listener.access import Peer
from relay.listener.credentials import Credentials
from relay.listener.login import Given
from relay.listener.logins import Logins
from relay.mail.envelope import Origin
from relay.observe.journal import Journal

ORIGIN = Origin("local", "192.0.2.1", "", "S1")


class Desk:
    """Logins with a journal and counters that can be read."""

    def __init__(self, directory: Path, settings: dict[str, Any], credentials: Credentials | None = None) -> None:
        self.path = directory / "journal.log"
        self._file = self.path.open("ab")
        self._journal = Journal(ManualClock(), format="json", level="debug", descriptor=self._file.fileno())
        self.counted: list[str] = []
        self.logins = Logins(Listener.model_validate(settings), credentials, self._journal, count=self.counted.append)

    def events(self) -> list[dict[str, Any]]:
        self._journal.close()
        self._file.close()
        return [json.loads(line) for line in self.path.read_text().splitlines()]


HOME, AWAY, UNIX = Peer("127.0.0.1"), Peer("10.1.2.3"), Peer(uid=1000)


@pytest.mark.parametrize(
    ("settings", "peer", "offers"),
    [
        ({"auth": "none", "auth_without_tls": True}, HOME, False),
        ({"auth": "none"}, AWAY._replace(secure=True), False),
        ({"auth": "optional"}, HOME, True),
        ({"auth": "optional"}, Peer("::1"), True),
        ({"auth": "optional"}, Peer("127.9.9.9"), True),
        ({"auth": "optional"}, UNIX, True),
        ({"auth": "optional"}, AWAY, False),
        ({"auth": "required"}, AWAY, False),
        ({"auth": "required"}, AWAY._replace(secure=True), True),
        ({"auth": "required", "auth_without_tls": True}, AWAY, True),
        ({"auth": "required", "security": "starttls", "require_tls": True}, HOME, False),
        ({"auth": "required", "security": "starttls", "require_tls": True}, HOME._replace(secure=True), True),
        ({"auth": "required", "security": "starttls", "require_tls": True, "auth_without_tls": True}, AWAY, False),
    ],
)
def test_a_login_is_offered_where_nobody_can_read_it(settings: dict[str, Any], peer: Peer, offers: bool, tmp_path: Path) -> None:
    desk = Desk(tmp_path, settings)
    assert desk.logins.offers(peer) is offers
    assert (desk.logins.refusal(peer, ORIGIN, inside=False) is None) is offers
    assert [event["reply"] for event in desk.events()] == ([] if offers else ["538 5.7.11 Authentication needs TLS"])
    assert desk.counted == ([] if offers else ["auth"])


@pytest.mark.parametrize(
    ("settings", "peer", "demands"),
    [
        ({"auth": "none"}, AWAY, False),
        ({"auth": "optional"}, AWAY, False),
        ({"auth": "required"}, HOME, True),
        ({"auth": "required"}, UNIX, True),
        ({"auth": "required", "auth_exempt": "10.1.2.0/24"}, AWAY, False),
        ({"auth": "required", "auth_exempt": ["10.1.2.0/24"]}, Peer("10.1.3.1"), True),
        ({"auth": "required", "auth_exempt": ["10.1.2.0/24"]}, UNIX, True),
        ({"auth": "required", "auth_exempt": ["10.1.2.0/24"]}, Peer("10.1.3.1"), True),
    ],
)
def test_a_login_is_demanded_of_all_but_the_exempt(settings: dict[str, Any], peer: Peer, demands: bool, tmp_path: Path) -> None:
    desk = Desk(tmp_path, settings)
    assert desk.logins.demands(peer) is demands
    assert desk.events() == []


async def test_a_failed_login_is_noted_with_what_the_client_called_itself(tmp_path: Path) -> None:
    credentials = Credentials(
        {"erp": User.model_validate({"password": "s3cret", "senders": "*"})}, ManualClock(), delay=lambda failures: 0.0
    )
    desk = Desk(tmp_path, {"auth": "required"}, credentials)
    assert (await desk.logins.verify(Given("erp", "wrong"), ORIGIN)).code == 535
    assert (await desk.logins.verify(Given("e\u202erp", "hunter2"), ORIGIN)).code == 535
    assert (await desk.logins.verify(Given("erp", "s3cret"), ORIGIN)).code == 235
    credentials.close()
    common = {"level": "warning", "event": "auth-failed", "session": "S1", "listener": "local", "client": "192.0.2.1"}
    events = desk.events()
    assert [event["user"] for event in events] == ["erp", "e rp"]
    assert all(event.items() >= common.items() for event in events)
    assert "hunter2" not in str(events)
    assert desk.counted == ["auth", "auth"]


async def test_a_login_that_is_not_looked_at_is_told_to_come_again(tmp_path: Path) -> None:
    credentials = Credentials({}, ManualClock())
    credentials.close()
    desk = Desk(tmp_path, {"auth": "required"}, credentials)
    assert str(await desk.logins.verify(Given("erp", "x"), ORIGIN)) == "454 4.7.0 Too many logins, try again later"
    assert [event["event"] for event in desk.events()] == ["refused"]


async def test_without_users_nobody_is_right(tmp_path: Path) -> None:
    desk = Desk(tmp_path, {"auth": "required"})
    assert (await desk.logins.verify(Given("erp", "x"), ORIGIN)).code == 535
    assert len(desk.events()) == 1


def test_who_has_logged_in_or_begun_a_transaction_does_not_log_in(tmp_path: Path) -> None:
    desk = Desk(tmp_path, {"auth": "required"})
    for origin, inside in ((ORIGIN._replace(user="erp"), False), (ORIGIN, True)):
        reply = desk.logins.refusal(HOME, origin, inside=inside)
        assert reply is not None
        assert reply.code == 503
    assert desk.events() == []
