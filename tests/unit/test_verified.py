"""Marks of verified upstreams: what they speak of, what they hide, and how the relay sees them."""

import errno
import json
import os
import random
import re
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from relay.clock import ManualClock
from relay.config.upstreams import Upstream
from relay.delivery import verified as verified_module
from relay.delivery.attempt import Attempts
from relay.delivery.breaker import Breakers
from relay.delivery.settle import Settler
from relay.delivery.verified import Marks, Verified
from relay.observe.metrics import Metrics
from relay.routing import Router
from relay.spool.memory import MemorySpool
from tests.unit.delivery import FakePool, Log, claim_of, config_of

PASSWORD = "hunter2-hunter2"
KEYS: dict[str, Any] = {"host": "smtp.acme.example", "username": "app", "password": PASSWORD}


def upstream(**keys: Any) -> Upstream:
    return Upstream.model_validate(KEYS | keys)


class House:
    """Marks in a directory, as a relay sees them whose settings can be changed."""

    def __init__(self, directory: Path) -> None:
        self.clock = ManualClock()
        self.marks = Marks(directory)
        self.settings = upstream()
        self.changed: list[str] = []
        self.verified = Verified(self.marks, lambda _: self.settings, self.clock)
        self.verified.changed = self.changed.append

    def record(self) -> None:
        self.marks.record("acme", self.settings, now=self.clock.now())

    def holds(self) -> bool:
        self.clock.advance(5)
        return self.verified.objection("acme") is None


@pytest.fixture
def house(tmp_path: Path) -> Iterator[House]:
    yield House(tmp_path)


def content(directory: Path) -> dict[str, Any]:
    (file,) = (directory / "verified").iterdir()
    found: dict[str, Any] = json.loads(file.read_bytes())
    return found


def test_without_a_mark_everybody_is_deferred_to_a_fallback_and_told_what_to_do(house: House) -> None:
    outcome = house.verified.objection("acme")
    assert outcome is not None and outcome.fallback and not outcome.in_doubt and not outcome.throttled
    assert "run `relay test acme`" in outcome.reply.text
    assert house.verified.ready_at("acme") > house.clock.now()
    assert not house.changed, "what was never verified is not tested by the relay itself"


def test_a_mark_is_seen_within_seconds_and_holds_for_the_next_process_too(house: House, tmp_path: Path) -> None:
    assert house.verified.ready_at("acme") > house.clock.now()
    house.record()
    assert house.verified.ready_at("acme") > house.clock.now(), "it is not looked for every time"
    house.clock.advance(2.1)
    assert house.verified.ready_at("acme") == 0.0 and house.verified.objection("acme") is None
    assert House(tmp_path).holds()


@pytest.mark.parametrize(
    "keys",
    [
        {"host": "smtp2.acme.example"}, {"host": ["smtp.acme.example", "smtp2.acme.example"]}, {"port": 2587}, {"security": "tls"},
        {"verify": False}, {"username": "app2"}, {"password": "hunter3-hunter3"}, {"auth": "login"}, {"source_address": "192.0.2.1"},
        {"auth": "xoauth2", "password": None, "oauth2": {"provider": "google", "client_id": "a"}}, {"ehlo": "other.example"},
    ],
)  # fmt: skip
def test_other_settings_are_not_verified_and_are_to_be_tested(house: House, keys: dict[str, Any]) -> None:
    house.record()
    assert house.holds()
    house.settings = upstream(**keys)
    assert not house.holds()
    assert house.changed == ["acme"] and house.verified.is_changed("acme")
    outcome = house.verified.objection("acme")
    assert outcome is not None and "have changed" in outcome.reply.text
    house.record()
    assert house.holds()


@pytest.mark.parametrize(
    "keys", [{"description": "x"}, {"limits": {"connections": 9}}, {"timeouts": {"command": "9s"}}, {"senders": ["acme.example"]}]
)
def test_settings_that_the_way_in_does_not_depend_on_keep_the_mark(house: House, keys: dict[str, Any]) -> None:
    house.record()
    house.settings = upstream(**keys)
    assert house.holds()


def test_another_ca_in_the_same_file_is_another_trust(house: House, tmp_path: Path) -> None:
    file = tmp_path / "ca.pem"
    file.write_text("-----BEGIN CERTIFICATE-----\none")
    house.settings = upstream(ca_file=str(file))
    house.record()
    assert house.holds()
    file.write_text("-----BEGIN CERTIFICATE-----\ntwo")
    house.settings = upstream(ca_file=str(file))
    assert not house.holds()


def test_a_refresh_token_that_rotates_keeps_the_mark_and_another_client_secret_does_not(house: House) -> None:
    def with_tokens(**keys: Any) -> Upstream:
        oauth2 = {"provider": "google", "client_id": "a", "client_secret": "s", "refresh_token": "r1", **keys}
        return upstream(password=None, oauth2=oauth2)

    house.settings = with_tokens()
    house.record()
    house.settings = with_tokens(refresh_token="r2")
    assert house.holds()
    house.settings = with_tokens(client_secret="other")
    assert not house.holds()


def test_the_mark_is_no_oracle_for_the_password(house: House, tmp_path: Path) -> None:
    house.record()
    first = content(tmp_path)
    assert len(first["secret"]) == 4 and PASSWORD not in json.dumps(first)
    house.record()
    assert content(tmp_path)["salt"] == first["salt"], "each salt would give away 16 bits more"
    house.settings = upstream(password="another")
    house.record()
    second = content(tmp_path)
    assert second["settings"] == first["settings"], "the long digest does not depend on the password"
    assert (tmp_path / "verified").stat().st_mode & 0o777 == 0o700
    assert next((tmp_path / "verified").iterdir()).stat().st_mode & 0o777 == 0o600


def test_the_same_password_of_two_upstreams_looks_different(house: House, tmp_path: Path) -> None:
    salt = b"\0" * 16
    from relay.delivery.verified import fingerprint

    assert fingerprint("acme", upstream(), salt).secret != fingerprint("globex", upstream(), salt).secret


@pytest.mark.parametrize("text", ["", "{", "[]", '{"version": 2}', '{"version": 1, "upstream": "globex", "salt": "00"}', "\xff"])
def test_a_mark_that_cannot_be_read_is_none_and_is_replaced(house: House, tmp_path: Path, text: str) -> None:
    house.record()
    next((tmp_path / "verified").iterdir()).write_text(text, encoding="latin-1")
    assert not house.holds() and not house.changed
    house.record()
    assert house.holds()


@pytest.mark.parametrize("key", ["settings", "secret"])
def test_a_mark_with_damage_in_it_is_one_of_other_settings(house: House, tmp_path: Path, key: str) -> None:
    house.record()
    damaged = content(tmp_path) | {key: "gr\u00f6\u00dfe"}
    next((tmp_path / "verified").iterdir()).write_text(json.dumps(damaged))
    assert not house.holds() and house.changed == ["acme"]


def test_a_mark_that_goes_away_is_missed(house: House, tmp_path: Path) -> None:
    house.record()
    assert house.holds()
    next((tmp_path / "verified").iterdir()).unlink()
    assert not house.holds()


@pytest.mark.parametrize("name", ["a/b", "..", "x" * 300, "größe", "a b%2F"])
def test_any_name_of_an_upstream_has_a_file_of_its_own_below_the_directory(tmp_path: Path, name: str) -> None:
    marks = Marks(tmp_path)
    marks.record(name, upstream(), now=0.0)
    assert marks.read(name) is not None
    assert [file.parent.name for file in tmp_path.rglob("*") if file.is_file()] == ["verified"]


def test_what_keeps_a_mark_from_being_written_is_told_with_its_place(tmp_path: Path) -> None:
    (tmp_path / "verified").write_text("a file")
    with pytest.raises(OSError, match="verified"):
        Marks(tmp_path).record("acme", upstream(), now=0.0)


def test_a_disk_that_is_full_is_told_with_its_place_and_nothing_is_left_on_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match=re.escape(f"{tmp_path}/verified: No space left on device")):
        Marks(tmp_path).record("acme", upstream(), now=0.0)
    assert not list((tmp_path / "verified").iterdir())


def test_a_link_in_the_place_of_the_directory_is_not_followed(tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    spool = tmp_path / "spool"
    spool.mkdir()
    (spool / "verified").symlink_to(elsewhere)
    with pytest.raises(OSError, match="verified"):
        Marks(spool).record("acme", upstream(), now=0.0)
    assert not list(elsewhere.iterdir())


def test_a_link_in_the_place_of_a_mark_is_replaced_and_not_followed(house: House, tmp_path: Path) -> None:
    house.record()
    (file,) = (tmp_path / "verified").iterdir()
    file.unlink()
    other = tmp_path / "other"
    other.write_text("of somebody else")
    file.symlink_to(other)
    house.record()
    assert house.holds() and not file.is_symlink() and other.read_text() == "of somebody else"
    assert [each.name for each in (tmp_path / "verified").iterdir()] == [file.name], "nothing is left beside it"


# -- marks that cannot be written, and what mail hears ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("look_up", "owner"),
    [(lambda _: SimpleNamespace(pw_name="relay"), "belongs to relay;"), (dict[int, Any]().__getitem__, "belongs to uid 0;")],
    ids=["named", "unnamed"],
)
def test_who_may_not_write_hears_whose_it_is(
    house: House, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, look_up: Any, owner: str
) -> None:
    def refuse(*_: Any, **__: Any) -> int:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(verified_module.os, "open", refuse)
    monkeypatch.setattr("pwd.getpwuid", look_up)
    os.chown(tmp_path, 0, -1)
    with pytest.raises(PermissionError, match=owner):
        house.record()


def test_where_nobody_can_look_it_belongs_to_another_user(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(house.marks, "_record", refuse)
    monkeypatch.setattr(verified_module.os, "stat", refuse)
    with pytest.raises(PermissionError, match="belongs to another user"):
        house.record()


def test_root_makes_no_spool_and_others_keep_what_they_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    house = House(tmp_path / "none")
    monkeypatch.setattr(verified_module.os, "geteuid", lambda: 0)
    with pytest.raises(FileNotFoundError, match="does not exist yet"):
        house.record()
    monkeypatch.setattr(verified_module.os, "geteuid", lambda: 1000)
    house.record()
    assert house.holds()


def test_a_ca_file_that_has_gone_is_another_trust(house: House, tmp_path: Path) -> None:
    file = tmp_path / "ca.pem"
    file.write_text("-----BEGIN CERTIFICATE-----\none")
    house.settings = upstream(ca_file=str(file))
    house.record()
    settings = house.settings.model_copy()
    file.unlink()
    house.settings = settings
    assert not house.holds()


async def test_mail_of_a_route_that_asks_for_it_goes_by_the_fallback_untried(house: House, tmp_path: Path) -> None:
    config = config_of([{"name": "acme", "sender": "acme.example", "upstream": "acme", "fallback": "house", "verified_only": True}])
    log, router, metrics, pool = Log(tmp_path, house.clock), Router(config), Metrics(), FakePool()
    breakers = Breakers(config.retry, log.journal, metrics, house.clock)
    attempts = Attempts(config, router, pool, log.journal, house.clock, breakers=breakers, verified=house.verified)  # type: ignore[arg-type]
    claim = claim_of("you@example.org")
    result = await attempts.send(claim, fresh=True)
    assert (result.tried, pool.handed) == (False, [])
    settler = Settler(
        config, router, MemorySpool(tmp_path, house.clock, backoff=lambda _: 60.0), log.journal, house.clock, rng=random.Random(1),
        breakers=breakers, metrics=metrics, verified=house.verified,
    )  # fmt: skip
    decided = settler._plan(claim, result)
    assert (decided.fallback, decided.next and decided.next.counted) == ("house", False)
    house.record()
    house.clock.advance(5)
    assert (await attempts.send(claim, fresh=True)).tried
    await settler._spool.close()
    log.text()
