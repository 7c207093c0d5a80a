"""TLS settings: as many contexts as there are kinds of trust, and none that trusts more than it was told to."""

import asyncio
import ssl
from pathlib import Path
from typing import Any

import pytest

from relay.config.model import Upstream
from relay.upstream.tls import Contexts
from tests.support.certificates import Authority


def upstream(**keys: Any) -> Upstream:
    return Upstream.model_validate({"host": "smtp.acme.example", **keys})


async def test_upstreams_with_the_same_trust_share_one_context(tls: Authority) -> None:
    contexts = Contexts()
    first = await contexts.get(upstream(ca_file=str(tls.ca_file)))
    assert first is not None
    assert await contexts.get(upstream(ca_file=str(tls.ca_file), security="tls", host="other.example", username="x", password="y")) is first
    assert await contexts.get(upstream(ca_file=str(tls.ca_file), verify=False)) is not first
    assert await contexts.get(upstream()) is not first


async def test_a_context_is_made_once_also_for_those_who_ask_at_the_same_time(tls: Authority) -> None:
    contexts = Contexts()
    many = await asyncio.gather(*(contexts.get(upstream(ca_file=str(tls.ca_file))) for _ in range(10)))
    assert len({id(context) for context in many}) == 1


async def test_without_tls_there_is_no_context() -> None:
    assert await Contexts().get(upstream(security="none")) is None


async def test_a_named_ca_alone_is_trusted(tls: Authority) -> None:
    context = await Contexts().get(upstream(ca_file=str(tls.ca_file)))
    assert context is not None
    assert len(context.get_ca_certs()) == 1
    assert (context.check_hostname, context.verify_mode) == (True, ssl.CERT_REQUIRED)
    assert context.minimum_version is ssl.TLSVersion.TLSv1_2


async def test_the_systems_trust_store_is_the_default_and_verifies() -> None:
    context = await Contexts().get(upstream())
    assert context is not None
    assert (context.check_hostname, context.verify_mode) == (True, ssl.CERT_REQUIRED)


async def test_verification_can_be_switched_off_and_old_tls_stays_off() -> None:
    context = await Contexts().get(upstream(verify=False))
    assert context is not None
    assert (context.check_hostname, context.verify_mode) == (False, ssl.CERT_NONE)
    assert context.minimum_version is ssl.TLSVersion.TLSv1_2


async def test_a_ca_file_that_cannot_be_loaded_is_an_error_every_time(tmp_path: Path) -> None:
    contexts = Contexts()
    broken = tmp_path / "ca.pem"
    for _ in range(2):
        broken.write_text("no certificate")
        with pytest.raises(OSError):
            await contexts.get(upstream().model_copy(update={"ca_file": broken}))
    with pytest.raises(OSError):
        await contexts.get(upstream().model_copy(update={"ca_file": tmp_path / "gone.pem"}))
