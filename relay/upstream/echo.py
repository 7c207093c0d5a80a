"""What the other side repeats of a secret that it was shown: taken out before its words are logged or told.

A few servers repeat the line that they did not like, and some of them only its beginning. So not only the secret is looked for, but
every piece of it that is long enough to be no accident. Pure.
"""

from collections.abc import Iterable
from itertools import groupby
from string import ascii_lowercase, ascii_uppercase
from typing import Final

_HIDDEN: Final = "(secret)"
_FOLD: Final = str.maketrans(ascii_uppercase, ascii_lowercase)  # some servers repeat commands in capitals; `lower` changes lengths


def without_secrets(text: str, secrets: Iterable[str], *, piece: int) -> str:
    """`text` with "(secret)" for every one of `secrets`, and for every part of one that has `piece` characters or more.

    Two fewer are enough with a digit or a sign among them. Shorter words that happen to be in the secret, too, stay: hiding them would tell
    of it, as it does where longer ones are hidden.
    """
    folded = text.translate(_FOLD)
    bare = bytearray(len(text))
    for secret in secrets:
        shown, heard = (secret.translate(_FOLD), folded) if len(secret) >= piece else (secret, text)  # a short one may be a word
        for length in {min(piece - 2, len(shown)), min(piece, len(shown))} - {0}:
            pieces = {shown[start : start + length] for start in range(len(shown) - length + 1)}
            if length < min(piece, len(shown)):
                pieces = {part for part in pieces if not part.replace(" ", "").isalpha()}
            for start in range(len(text) - length + 1):
                if heard[start : start + length] in pieces:
                    bare[start : start + length] = b"\1" * length
    runs = groupby(range(len(text)), key=bare.__getitem__)
    return "".join(_HIDDEN if hidden else "".join(map(text.__getitem__, places)) for hidden, places in runs)
