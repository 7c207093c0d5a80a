"""Signals at the wrong moment, to the real process."""

import signal
import sys
from pathlib import Path

import pytest

from tests.support.process import RelayProcess

# The command is run while the configuration is read: what it sends to its parent comes before anybody can answer it.
_CONFIG = """
listeners: [{{bind: "127.0.0.1:0"}}]
upstreams:
  acme: {{host: smtp.acme.example, username: acme, password: {{command: [{python}, -c, {script}]}}}}
routes: [{{sender: acme.example, upstream: acme}}]
log: {{format: json}}
"""
_ONCE = "import os, pathlib; here = pathlib.Path('sent'); here.exists() or (here.touch(), os.kill(os.getppid(), {number})); print('secret')"


@pytest.mark.timeout(60)
async def test_a_reload_that_comes_before_the_relay_listens_is_done_when_it_does(tmp_path: Path) -> None:
    config = _CONFIG.format(python=sys.executable, script=f'"{_ONCE.format(number=int(signal.SIGHUP))}"')
    async with RelayProcess(config, directory=tmp_path) as relay:
        await relay.event("note", what="1 secrets from files and commands read again: 0 changed, 0 could not be read")
        relay.signal(signal.SIGHUP)
        assert await relay.terminate() == 0
