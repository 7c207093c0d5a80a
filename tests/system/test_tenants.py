"""Tenants on one host: each one's mail goes out by its own login, over connections that nobody else uses."""

import asyncio
from pathlib import Path

import pytest

from tests.support.upstream import Close, ScriptedUpstream
from tests.system.relays import running, to

TENANTS = ("a", "b", "c", "d")


@pytest.mark.parametrize("trouble", ["none", "a password changed", "connections break"])
async def test_each_tenant_is_known_by_its_own_login(tmp_path: Path, trouble: str) -> None:
    async with ScriptedUpstream(users={name: f"secret-{name}" for name in TENANTS}) as server:
        if trouble == "connections break":
            server.script("final", Close(), times=5)
        if trouble == "a password changed":
            server.script("auth", b"535 5.7.8 no", times=1)
        upstreams = {
            name: to(server, username=name, password=f"secret-{name}", senders=[f"{name}.example"], limits={"connections": 2})
            for name in TENANTS
        }
        routes = [{"name": name, "sender": f"{name}.example", "upstream": name} for name in TENANTS]
        async with running(tmp_path, upstreams=upstreams, routes=routes) as relay:
            await asyncio.gather(
                *(
                    relay.send(f"app@{name}.example", [f"{number}@example.org"], f"From: app@{name}.example\r\n\r\nhello\r\n".encode())
                    for number in range(10)
                    for name in TENANTS
                )
            )
            if trouble != "a password changed":
                await relay.empty()
                assert len(server.accepted) >= len(TENANTS) * 10
            else:
                await relay.event("sent", count=30)
        for transaction in server.transactions:
            assert transaction.sender == f"app@{transaction.user}.example"
        users: dict[int, set[str | None]] = {}
        for transaction in server.transactions:
            users.setdefault(transaction.connection, set()).add(transaction.user)
        assert all(len(known) == 1 for known in users.values())
