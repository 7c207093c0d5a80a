"""Logins nobody should try, at the real listener: nobody gets in who has not said a right name and password, and nothing breaks.

A failure prints how to reproduce it.
"""

import asyncio
import re
from base64 import b64decode, b64encode
from binascii import Error as Base64Error
from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.fuzz.test_listener import converse
from tests.support.front import Front

CODES = {214, 220, 221, 235, 250, 334, 354, 421, 454, 500, 501, 503, 504, 530, 535, 553, 554}
USERS = {"erp": {"password": "s3cret", "senders": ["acme.example"]}, "jürgen": {"password": "pässwort", "senders": ["acme.example"]}}
RIGHT = [(name, str(keys["password"])) for name, keys in USERS.items()]
_LINE = re.compile(rb"([2-5][0-9][0-9])([ -])([\x20-\x7e]*)")

PIECES = st.sampled_from(["erp", "s3cret", "jürgen", "pässwort", "\0", "", "x", "ju\u0308rgen", "\u00ad", "\xff", "s3cret\0", "A" * 300])
SECRETS = st.lists(PIECES, max_size=6).map("".join).flatmap(
    lambda text: st.sampled_from([text.encode(), text.encode("latin-1", "replace")])
)  # fmt: skip
BASE64 = st.one_of(SECRETS.map(b64encode), SECRETS.map(lambda secret: b64encode(secret).rstrip(b"=")), st.just(b"="), st.just(b"*"))
COMMANDS = st.one_of(
    BASE64,
    st.builds(lambda word, rest: word + b" " + rest, st.sampled_from([b"AUTH PLAIN", b"auth plain", b"AUTH LOGIN", b"AUTH"]), BASE64),
    st.sampled_from([b"AUTH PLAIN", b"AUTH LOGIN", b"AUTH plain", b"AUTH CRAM-MD5", b"EHLO x", b"RSET", b"QUIT", b"A" * 5000, b"*", b""]),
    st.sampled_from(
        [b"MAIL FROM:<app@acme.example>", b"RCPT TO:<you@x.example>", b"DATA", b"From: app@acme.example", b".", b"MAIL FROM:<>"]
    ),
    st.binary(max_size=30),
)


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[asyncio.Runner, Front]]:
    async def build() -> Front:
        return await Front(tmp_path_factory.mktemp("logins"), {"users": USERS}, listener={"auth": "required"}).__aenter__()

    with asyncio.Runner() as runner:
        front = runner.run(build())
        yield runner, front
        runner.run(front.__aexit__(None, None, None))
        assert front.events("fault") == []


def decoded(line: bytes) -> bytes:
    try:
        return b64decode(line + b"=" * (-len(line) % 4))
    except (Base64Error, ValueError):
        return b""


def may_have_logged_in(said: list[bytes]) -> bool:
    """Whether a right password was said at all, in either encoding, and a right name."""
    secrets = b"\n".join(decoded(word) for line in said for word in line.split())
    text = secrets.decode("utf-8", "ignore").replace("u\u0308", "ü").replace("\u00ad", "") + secrets.decode("latin-1")
    return any(name in text and password in text for name, password in RIGHT)


@settings(max_examples=500)
@given(said=st.lists(COMMANDS, max_size=12), packets=st.booleans())
def test_nobody_gets_in_without_a_right_name_and_password(scene: tuple[asyncio.Runner, Front], said: list[bytes], packets: bool) -> None:
    runner, front = scene
    front.clock.advance(3600)  # what has failed before is forgotten
    lines = [b"EHLO x\r\n", *(line + b"\r\n" for line in said)]
    heard = runner.run(converse(front, lines if packets else [b"".join(lines)]))
    replies = [_LINE.fullmatch(line) for line in heard.removesuffix(b"\r\n").split(b"\r\n")]
    codes = [int(reply[1]) if reply else 0 for reply in replies]
    assert set(codes) <= CODES, heard
    if not may_have_logged_in(said):
        assert 235 not in codes
    if 235 not in codes:
        assert 354 not in codes
        assert front.taken == []
    assert codes.count(235) <= 1


def test_the_right_ones_get_in(scene: tuple[asyncio.Runner, Front]) -> None:
    runner, front = scene
    for name, password in RIGHT:
        for encoding in ("utf-8", "latin-1"):
            front.clock.advance(3600)
            secret = b64encode(f"\0{name}\0{password}".encode(encoding))
            assert may_have_logged_in([b"AUTH PLAIN " + secret])
            assert b"\r\n235 " in runner.run(converse(front, [b"EHLO x\r\nAUTH PLAIN " + secret + b"\r\n"]))
