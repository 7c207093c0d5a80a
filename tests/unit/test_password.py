"""Stored passwords: the hash of RFC 7914 as the file has it, and names and passwords as they compare (RFC 4013)."""

from base64 import b64encode

import pytest

from relay.config.password import checked, hash_password, parse_hash, prepared

# RFC 7914 section 12, the third vector.
VECTOR = bytes.fromhex(
    "7023bdcb3afd7348461c06cd81fd38ebfda8fbba904f8e3ea9b543f6545da1f2d5432955613f0fcf62d49705242a9af9e61e85dc0d651e40dfcf017b45575887"
)


def test_the_vector_of_the_rfc_verifies_with_padding_and_without() -> None:
    salt, digest = b64encode(b"SodiumChloride").decode(), b64encode(VECTOR).decode()
    stored = parse_hash(f"scrypt$16384$8$1${salt}${digest}")
    assert stored == parse_hash(f"scrypt$16384$8$1${salt.rstrip('=')}${digest.rstrip('=')}")
    assert stored.matches("pleaseletmein")
    assert not stored.matches("pleaseletmeout")


def test_a_made_hash_verifies_its_password_alone_and_never_comes_twice() -> None:
    first, second = hash_password("pässwort"), hash_password("pässwort")
    assert first != second
    assert parse_hash(first).matches(prepared("pa\u0308sswort"))
    assert not parse_hash(first).matches("passwort")
    assert "ssword" not in repr(parse_hash(first))
    assert first.rpartition("$")[2] not in repr(parse_hash(first))


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("hunter2", "must be a hash from"),
        ("$2b$12$abcdefghijklmnopqrstuv", "must be a hash from"),
        ("scrypt$16384$8$1$QUFBQUFBQUFB", "must be a hash from"),
        ("scrypt$16384$8$1$QUFBQUFBQUFB$QUFB", "16 to 64"),
        ("scrypt$16384$8$1$QUFB$QUFBQUFBQUFBQUFBQUFBQUFBQUFBQUFB", "at least 8"),
        ("scrypt$16384$8$1$QUFBQUFBQUFBA$QUFBQUFBQUFBQUFBQUFBQUFBQUFBQUFB", "not base64"),
        ("scrypt$16383$8$1$QUFBQUFBQUFB$QUFBQUFBQUFBQUFBQUFBQUFBQUFBQUFB", "power of two"),
        ("scrypt$1$8$1$QUFBQUFBQUFB$QUFBQUFBQUFBQUFBQUFBQUFBQUFBQUFB", "power of two"),
        ("scrypt$16384$0$1$QUFBQUFBQUFB$QUFBQUFBQUFBQUFBQUFBQUFBQUFBQUFB", "at least 1"),
        ("scrypt$16384$8$0$QUFBQUFBQUFB$QUFBQUFBQUFBQUFBQUFBQUFBQUFBQUFB", "at least 1"),
        ("scrypt$1048576$8$1$QUFBQUFBQUFB$QUFBQUFBQUFBQUFBQUFBQUFBQUFBQUFB", "too much"),
        ("scrypt$16384$8$1000$QUFBQUFBQUFB$QUFBQUFBQUFBQUFBQUFBQUFBQUFBQUFB", "too much"),
    ],
)
def test_what_is_no_hash_or_too_dear_is_refused_without_being_repeated(text: str, why: str) -> None:
    with pytest.raises(ValueError, match=why) as caught:
        parse_hash(text)
    assert text not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "form"),
    [
        ("user", "user"),
        ("USER", "USER"),
        ("I\u00adX", "IX"),  # RFC 4013 section 3
        ("\u00aa", "a"),
        ("\u2168", "IX"),
        ("a\u00a0b", "a b"),
        ("u\u0308", "ü"),
        ("\u0627\u0628", "\u0627\u0628"),
        ("\U0001f511", "\U0001f511"),
    ],
)
def test_names_and_passwords_compare_as_saslprep_has_them(text: str, form: str) -> None:
    assert prepared(text) == form
    assert prepared(form) == form


@pytest.mark.parametrize("text", ["\x07", "a\tb", "a\x7f", "\u0080", "a\u200e", "\u0627\x31", "\u0627a\u0627", "\ue000", "\udc80"])
def test_characters_that_saslprep_forbids_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match="must not"):
        prepared(text)


@pytest.mark.parametrize(("text", "why"), [("", "empty"), ("\u00ad", "empty"), ("x" * 256, "255 bytes"), ("ü" * 128, "255 bytes")])
def test_what_no_client_can_send_is_not_stored(text: str, why: str) -> None:
    with pytest.raises(ValueError, match=why):
        checked(text)
    with pytest.raises(ValueError, match=why):
        hash_password(text)
