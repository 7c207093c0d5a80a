"""How long the relay takes until it listens, and how much memory it has while it does nothing."""

import re
import statistics
import time
from pathlib import Path

from tests.support.process import RelayProcess
from tests.support.upstream import unused_port

STARTS = 5
START_LIMIT_SECONDS = 2.0  # on a busy machine; alone it is well under one
MEMORY_LIMIT_MB = 60

CONFIG = """
hostname: relay.test
listeners: [{{bind: "127.0.0.1:0", name: local}}]
upstreams:
  up: {{host: 127.0.0.1, port: {port}, security: none}}
routes:
  - {{sender: "*", upstream: up}}
spool: {{directory: {directory}}}
log: {{format: json}}
"""


def resident_megabytes(pid: int) -> float:
    status = Path(f"/proc/{pid}/status").read_text()
    match = re.search(r"^VmRSS:\s+(\d+) kB$", status, re.MULTILINE)
    assert match, status
    return int(match[1]) / 1024


async def test_the_relay_listens_soon_and_is_small(tmp_path: Path) -> None:
    relay = RelayProcess(CONFIG.format(port=unused_port(), directory=tmp_path / "spool"), directory=tmp_path)
    times, sizes = [], []
    for _ in range(STARTS):
        began = time.perf_counter()
        async with relay:
            times.append(time.perf_counter() - began)
            sizes.append(resident_megabytes(relay.pid))
            assert await relay.terminate() == 0
    seconds, megabytes = statistics.median(times), max(sizes)
    print(f"listens after {seconds:.2f} s (median of {STARTS}; {min(times):.2f} to {max(times):.2f}); {megabytes:.0f} MB resident")
    assert seconds < START_LIMIT_SECONDS
    assert megabytes < MEMORY_LIMIT_MB
