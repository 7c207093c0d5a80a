"""`relay serve` as a process: what it says about a file that is broken or unwise, and when it cannot have its port or its spool."""

import socket
from pathlib import Path

import pytest

from relay.cli import main
from tests.support.process import RelayProcess

CONFIG = """\
hostname: relay.example.net
listeners: [{{bind: "127.0.0.1:{port}"}}]
upstreams:
  acme: {{host: 127.0.0.1, port: 9, security: none, senders: [acme.example]}}
  spare: {{host: 127.0.0.1, port: 9, security: none, senders: [spare.example]}}
routes: [{{sender: acme.example, upstream: acme}}]
spool: {{directory: {spool}}}
log: {{format: json}}
"""


def test_a_broken_file_gives_all_its_findings_and_78(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "config.yaml"
    file.write_text("upstreams: {a: {host: h, prot: 25}}\nroutes: [{sender: a.example, upstream: b}]\n")
    assert main(["serve", "-c", str(file)]) == 78
    err = capsys.readouterr().err
    assert f"{file}:1:26: upstreams.a.prot: unknown key 'prot', did you mean 'port'?" in err
    assert f"{file}:2:40: routes[0].upstream: unknown upstream 'b'" in err


def test_a_missing_file_is_78(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["serve", "-c", str(tmp_path / "nothing.yaml")]) == 78
    assert "there is no such file" in capsys.readouterr().err


async def test_warnings_go_to_the_log_before_it_listens(tmp_path: Path) -> None:
    async with RelayProcess(CONFIG.format(port=0, spool=tmp_path / "spool"), directory=tmp_path) as relay:
        assert await relay.terminate() == 0
    events = relay.events()
    (warning,) = [event for event in events if event["event"] == "note" and "spare" in event["what"]]
    assert warning["level"] == "warning"
    assert events.index(warning) < events.index(relay.events("listening")[0])


async def test_a_port_that_is_taken_is_75(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        config = CONFIG.format(port=taken.getsockname()[1], spool=tmp_path / "spool")
        relay = RelayProcess(config, directory=tmp_path)
        with pytest.raises(Exception, match="ended with 75"):
            await relay.start()
    assert "address already in use" in relay.log().lower()
    assert 'reason="it could not start"' in relay.log() or '"reason": "it could not start"' in relay.log()
    assert "Traceback" not in relay.log()


async def test_a_spool_that_is_held_is_75(tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    for directory in (first, second):
        directory.mkdir()
    config = CONFIG.format(port=0, spool=tmp_path / "spool")
    async with RelayProcess(config, directory=first) as holder:
        relay = RelayProcess(config, directory=second)
        with pytest.raises(Exception, match="ended with 75"):
            await relay.start()
        assert f"is in use by another relay (process {holder.pid})" in relay.log()
        assert await holder.terminate() == 0
