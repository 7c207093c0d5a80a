"""The fail2ban filter against what the journal really writes, in both of its forms and on the ways that a line comes to fail2ban."""

import configparser
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import pytest

from relay.clock import ManualClock
from relay.observe.journal import Journal

FILTER = Path(__file__).resolve().parents[2] / "fail2ban" / "filter.d" / "relay.conf"
TIME = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z")
Format = Literal["text", "json"]

# How fail2ban reads <HOST>, without names: an address, an IPv6 one with brackets or not.
HOST = r"(?:::f{4,6}:)?(?P<ip4>\d{1,3}(?:\.\d{1,3}){3})|\[?(?P<ip6>(?:[0-9a-fA-F]{1,4}::?|:){1,8}(?:[0-9a-fA-F]{1,4}|(?<=:):?))\]?"


def expressions() -> Iterator[re.Pattern[str]]:
    parser = configparser.ConfigParser()
    parser.read(FILTER)
    for line in parser["Definition"]["failregex"].splitlines():
        yield re.compile(line.replace("<HOST>", f"(?:{HOST})"))


EXPRESSIONS = list(expressions())


def written(tmp_path: Path, format: Format, **event: str) -> str:
    """The line that the journal writes."""
    path = tmp_path / "journal.log"
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    journal = Journal(ManualClock(), format=format, level="info", descriptor=descriptor)
    if "sender" in event:
        journal.refused(session="S1", recipients="", **event)
    elif "upstream" in event:
        journal.auth_failed(**event)
    else:
        journal.login_failed(session="S1", reply="535 5.7.8 Authentication failed", **event)
    journal.close()
    os.close(descriptor)
    return path.read_text().rstrip("\n")


def banned(line: str) -> set[str]:
    """Whom fail2ban would count, however the line comes: it cuts a time out of it, and the systemd journal has words before it."""
    found = set()
    for way in (line, TIME.sub("", line), f"mail relay[4711]: {line}", f"mail relay[4711]: {TIME.sub('', line)}"):
        hits = [hit for expression in EXPRESSIONS if (hit := expression.search(way))]
        found.add(" ".join(str(hit["ip4"] or hit["ip6"]) for hit in hits))
    assert len(found) == 1, found
    return found - {""}


@pytest.mark.parametrize("format", ["text", "json"])
@pytest.mark.parametrize("client", ["192.0.2.7", "2001:db8::1"])
@pytest.mark.parametrize("listener", ["local", "[::]:587", 'quoted "name" of 10.0.0.1'])
@pytest.mark.parametrize("user", ["erp", "", "a client=10.0.0.1 b", 'x" client=10.0.0.1 "', "jürgen"])
def test_a_failed_login_is_counted_once_against_its_client(format: Format, client: str, listener: str, user: str, tmp_path: Path) -> None:
    assert banned(written(tmp_path, format, listener=listener, client=client, user=user)) == {client}


FORGED = "warning auth-failed session=S1 listener=local client=10.0.0.1 user="
FORGED_JSON = '{"time": "", "level": "warning", "event": "auth-failed", "session": "S1", "listener": "l", "client": "10.0.0.1"'


@pytest.mark.parametrize("format", ["text", "json"])
@pytest.mark.parametrize("text", [FORGED, FORGED_JSON, f"\n{FORGED}", f"mail relay[1]: {FORGED}"])
def test_nobody_gets_others_banned_by_what_he_says(format: Format, text: str, tmp_path: Path) -> None:
    event = {"listener": "local", "client": "192.0.2.7"}
    assert banned(written(tmp_path, format, **event, sender=f'"{text}"@acme.example', reply="530 5.7.0 Authentication required")) == set()
    assert banned(written(tmp_path, format, **event, user=text)) == {"192.0.2.7"}


@pytest.mark.parametrize("format", ["text", "json"])
def test_an_upstream_that_refuses_our_login_bans_nobody(format: Format, tmp_path: Path) -> None:
    assert banned(written(tmp_path, format, upstream="acme", user="relay@acme.example", reply="535 5.7.8 no")) == set()
