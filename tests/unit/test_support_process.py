"""The process under test as other tests see it, with a stand-in for the relay's command: starts, says, stops, dies."""

from pathlib import Path

import pytest

from tests.support.eventually import NeverHappened
from tests.support.process import RelayDied, RelayProcess

STAND_IN = """
import json, pathlib, signal, sys

def say(**event):
    print(json.dumps(event), file=sys.stderr, flush=True)

def main():
    assert sys.argv[:3] == ["relay", "serve", "-c"], sys.argv
    mood = pathlib.Path(sys.argv[3]).read_text()
    if mood == "broken":
        print("config.yaml:1:1: no", file=sys.stderr)
        return 78
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    say(event="listening", listener="local", address="127.0.0.1:2525")
    say(event="listening", listener="six", address="[::1]:2526")
    say(event="sent", recipient="a@example.org")
    while True:
        signal.pause()
"""


@pytest.fixture
def stand_in(tmp_path: Path) -> dict[str, str]:
    package = tmp_path / "stand-in" / "relay"
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    (package / "cli.py").write_text(STAND_IN)
    return {"PYTHONPATH": str(package.parent)}


async def test_addresses_and_events_come_from_the_log(tmp_path: Path, stand_in: dict[str, str]) -> None:
    async with RelayProcess("fine", directory=tmp_path, environment=stand_in) as relay:
        assert relay.address() == relay.address("local") == ("127.0.0.1", 2525)
        assert relay.address("six") == ("::1", 2526)
        await relay.event("sent", recipient="a@example.org")
        assert relay.events("sent", recipient="b@example.org") == []
        with pytest.raises(NeverHappened, match=r"1 event\(s\) bounced"):
            await relay.event("bounced", within=0.02)
        with pytest.raises(LookupError, match="no listener 'x'"):
            relay.address("x")


async def test_it_stops_when_asked_dies_when_killed_and_starts_again(tmp_path: Path, stand_in: dict[str, str]) -> None:
    async with RelayProcess("fine", directory=tmp_path, environment=stand_in) as relay:
        assert await relay.terminate() == 0
        await relay.start()
        await relay.kill()
        assert not relay.running
        assert await relay.exited() == -9
        await relay.start()
        assert len(relay.events("sent")) >= 2
    assert not relay.running


async def test_a_relay_that_never_listens_is_an_error_that_tells_its_log(tmp_path: Path, stand_in: dict[str, str]) -> None:
    relay = RelayProcess("broken", directory=tmp_path, environment=stand_in)
    with pytest.raises(RelayDied, match="ended with 78") as caught:
        await relay.start()
    assert "config.yaml:1:1: no" in "".join(caught.value.__notes__)
