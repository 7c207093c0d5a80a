"""How content is cut and stuffed on its way out. What a transaction says and hears is held against real sockets in tests/contract."""

from collections.abc import AsyncIterator

import hypothesis
from hypothesis import strategies

from relay.mail.content import stuff
from relay.upstream.transaction import _stuffed


async def cut(octets: bytes, places: list[int]) -> AsyncIterator[bytes]:
    """`octets` in slices, cut at these places."""
    for begin, end in zip([0, *places], [*places, len(octets)], strict=True):
        yield octets[begin:end]


@hypothesis.given(
    lines=strategies.lists(strategies.sampled_from([b"", b".", b"..", b".a", b"a.", b"a\r", b"\n.", b"\r", b"abc"]), max_size=12),
    places=strategies.lists(strategies.integers(0, 60), max_size=8),
)
async def test_slices_are_stuffed_as_if_they_had_never_been_cut(lines: list[bytes], places: list[int]) -> None:
    whole = b"\r\n".join([*lines, b""])
    _, *rest = [piece async for piece in cut(whole, sorted(min(place, len(whole)) for place in [0, *places]))]
    got = [piece async for piece in _stuffed(rest[0], cut(b"".join(rest[1:]), []))]
    assert b"".join(got) == stuff(whole) + b".\r\n"

    async def remaining() -> AsyncIterator[bytes]:
        for piece in rest[1:]:
            yield piece

    assert b"".join([piece async for piece in _stuffed(rest[0], remaining())]) == stuff(whole) + b".\r\n"


async def test_the_final_dot_is_never_a_slice_of_its_own() -> None:
    slices = [piece async for piece in _stuffed(b"a\r\n", cut(b"b\r\nc\r\n", [3]))]
    assert slices == [b"a\r\n", b"b\r\n", b"c\r\n.\r\n"]


async def test_content_without_a_line_end_is_not_collected() -> None:
    slices = [len(piece) async for piece in _stuffed(b"x" * 1000, cut(b"x" * 100_000, list(range(1000, 100_000, 1000))))]
    assert max(slices) <= 1003
