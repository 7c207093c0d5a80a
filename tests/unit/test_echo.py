"""What the other side repeats of a secret is taken out of its words, also where it repeats only a part of it."""

from base64 import b64encode

import pytest

from relay.upstream.echo import without_secrets

PASSWORD = "Correct-Horse-9-Staple"
LINE = b64encode(f"\0relay@acme.example\0{PASSWORD}".encode()).decode()


@pytest.mark.parametrize(
    ("said", "left"),
    [
        (f"no such login: {LINE}", "no such login: (secret)"),
        (f"no such login: {LINE[:20]}", "no such login: (secret)"),
        (f"no such login: {LINE[:20]}... (too long)", "no such login: (secret)... (too long)"),
        (f"bad command 'AUTH PLAIN {LINE[9:-7]}'", "bad command 'AUTH PLAIN (secret)'"),
        (f"AUTH PLAIN {LINE.upper()}", "AUTH PLAIN (secret)"),
        (f"AUTH PLAIN {LINE[:24]} {LINE[24:]}", "AUTH PLAIN (secret) (secret)"),
        (f"wrong password {PASSWORD}", "wrong password (secret)"),
        (f"wrong password {PASSWORD[:9]}", "wrong password (secret)"),
        (f"wrong password {PASSWORD[-9:]}, {PASSWORD[3:12]}", "wrong password (secret), (secret)"),
        (f"{PASSWORD}{PASSWORD}", "(secret)"),
        ("Username and Password not accepted", "Username and Password not accepted"),
        ("credentials not correct, nor staples", "credentials not correct, nor staples"),
        ("user-9-st unknown", "user-9-st unknown"),
        ("the horse-9 unknown", "the (secret) unknown"),
        ("", ""),
    ],
)
def test_what_is_repeated_of_a_secret_is_taken_out_whole_or_in_part(said: str, left: str) -> None:
    assert without_secrets(said, [LINE, PASSWORD, ""], piece=8) == left


def test_a_short_secret_is_taken_out_where_it_is_whole() -> None:
    assert without_secrets("x9 is no password, x is none", ["x9"], piece=8) == "(secret) is no password, x is none"
    assert without_secrets("Wrong password wrong", ["wrong"], piece=8) == "Wrong password (secret)"


def test_words_of_a_passphrase_stay_and_more_of_it_does_not() -> None:
    said = "Wrong user: something wrong, some hint"
    assert without_secrets(said, ["something wrong"], piece=8) == "Wrong user: (secret), some hint"
    said = "That is a big wrong thing"  # seven characters are in both, and a blank is no sign
    assert without_secrets(said, ["something wrong"], piece=8) == said


def test_letters_of_other_scripts_change_no_lengths() -> None:
    assert without_secrets("İİİ geheimnis ẞẞ", ["GEHEIMNIS"], piece=8) == "İİİ (secret) ẞẞ"
    assert without_secrets("falsch: pässwörtchen", ["pässwörtchen"], piece=12) == "falsch: (secret)"
