"""`relay explain`: the route and the reasons, for a person and for a script, and never a password."""

import argparse
import json
from pathlib import Path

import pytest

from relay.cli import explain
from relay.mail.outcome import rows_by_phase

CONFIG = """
hostname: relay.example.net
listeners: [{bind: "127.0.0.1:2525"}, {bind: "127.0.0.1:2526", name: inside}]
aliases: {root: [ops@acme.example, log@acme.example]}
users: {erp: {password: not-to-be-seen, senders: [acme.example, partner.example]}, crm: {password: not-to-be-seen, senders: "*"}}
upstreams:
  acme: {host: smtp.acme.example, username: relay@acme.example, password: not-to-be-seen, senders: [acme.example]}
  house: {host: smtp.house.example, security: tls, username: apikey, password: not-to-be-seen, null_sender: null@house.example}
routes:
  - {name: globex, sender: globex.example, upstream: house}
  - {name: inside, sender: acme.example, listener: inside, upstream: house}
  - name: acme
    sender: acme.example
    upstream: acme
    rewrite: {subject_prefix: "[acme] ", bcc: archive@acme.example}
    fallback: {upstream: house, rewrite: {envelope_sender: bounces@house.example}}
  - {name: crm, sender: partner.example, user: crm, upstream: house}
  - {name: spam, sender: spam.example, reject: not ours to send}
"""


def ask(tmp_path: Path, *words: str, config: str = CONFIG) -> int:
    """Run the command as the entry point does."""
    path = tmp_path / "config.yaml"
    path.write_text(config)
    path.chmod(0o600)
    parser = argparse.ArgumentParser()
    parser.add_argument("--config")
    explain.add_parser(parser.add_subparsers())
    options = parser.parse_args(["--config", str(path), "explain", *words])
    code: int = options.run(options)
    return code


def test_a_person_reads_the_route_the_upstreams_and_the_reasons(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert ask(tmp_path, "--from", "app@acme.example", "--to", "bob@example.org") == 0
    text = capsys.readouterr().out
    for part in (
        "route acme: sender acme.example",
        "upstream acme (smtp.acme.example:587, starttls)",
        "fallback house (smtp.house.example:465, tls)",
        "relay@acme.example",
        "bounces@house.example",
        "archive@acme.example",
        "-Subject: An example",
        "+Subject: [acme] An example",
        "globex: sender app@acme.example is not globex.example",
        "inside: listener 127.0.0.1:2525 is not inside",
    ):
        assert part in text
    assert "not-to-be-seen" not in text


def test_a_script_gets_json_for_every_recipient_of_an_alias(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert ask(tmp_path, "--json", "--from", "<app@acme.example>", "--to", "root") == 0
    text = capsys.readouterr().out
    answers = json.loads(text)
    assert [answer["recipient"] for answer in answers] == ["ops@acme.example", "log@acme.example"]
    assert answers[0]["route"] == "acme"
    assert [upstream["name"] for upstream in answers[0]["upstreams"]] == ["acme", "house"]
    assert [upstream["sender"] for upstream in answers[0]["upstreams"]] == ["app@acme.example", "bounces@house.example"]
    assert [considered["matched"] for considered in answers[0]["considered"]] == [False, False, True]
    assert "not-to-be-seen" not in text


@pytest.mark.parametrize(("sender", "words"), [("a@nobody.example", "no route takes it"), ("a@spam.example", "550 5.7.1 not ours to send")])
def test_the_exit_code_says_that_nothing_would_be_taken(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], sender: str, words: str
) -> None:
    assert ask(tmp_path, "--from", sender, "--to", "bob@example.org") == 1
    assert words in capsys.readouterr().out


def test_a_message_brings_its_own_header(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    message = tmp_path / "message.eml"
    message.write_bytes(b"From: Boss <boss@globex.example>\nBcc: hidden@example.org\nSubject: hi\n\nbody\n")
    assert ask(tmp_path, "--from", "app@acme.example", "--to", "bob@example.org", "--message", str(message)) == 1
    text = capsys.readouterr().out
    assert "-Bcc: hidden@example.org" in text and "+Subject: [acme] hi" in text
    assert "NOT PERMITTED    the From address boss@globex.example is not one of its senders: refused with 550 5.7.1" in text


def test_a_null_sender_goes_by_its_from(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    message = tmp_path / "message.eml"
    message.write_bytes(b"From: boss@globex.example\r\n\r\n")
    assert ask(tmp_path, "--json", "--from", "<>", "--to", "b@c.d", "--message", str(message)) == 0
    (answer,) = json.loads(capsys.readouterr().out)
    assert (answer["route"], answer["sender"], answer["upstreams"][0]["sender"]) == ("globex", "", "null@house.example")


@pytest.mark.parametrize(
    ("words", "code", "error"),
    [
        (["--from", "a@b.c"], 64, "--from and --to are needed"),
        (["--from", "a b@c.d", "--to", "x@y.z"], 64, "not an address"),
        (["--from", "a@b.c", "--to", "<>"], 64, "never null"),
        (["--from", "a@b.c", "--to", "x@y.z", "--message", "/nowhere/at/all"], 64, "cannot read /nowhere/at/all"),
    ],
)
def test_a_wrong_question_is_a_usage_error(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str], code: int, error: str
) -> None:
    assert ask(tmp_path, *words) == code
    assert error in capsys.readouterr().err


def test_a_broken_file_gives_its_findings(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert ask(tmp_path, "--from", "a@b.c", "--to", "x@y.z", config="routes: [{upstream: nowhere}]\n") == 78
    assert "nowhere" in capsys.readouterr().err


def test_a_bare_address_without_a_domain_to_complete_it_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert ask(tmp_path, "--from", "root", "--to", "x@y.z", config=CONFIG + "domain: null\n") == 64
    assert "root has no domain" in capsys.readouterr().err


def test_the_table_of_fates_has_a_line_for_every_row(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert ask(tmp_path, "--outcomes") == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["phase", "event", "status", "scope", "then", "why"]
    table = lines[: lines.index("")]
    assert len(table) == 1 + len(list(rows_by_phase()))
    assert max(map(len, table)) <= 120
    assert any(line.startswith('"slow down": the reply says throttl') for line in lines)
    assert any(line.split()[:5] == ["final", "2xx", "sent", "message", "-"] for line in lines)
    assert ask(tmp_path, "--outcomes", "--json") == 0
    assert json.loads(capsys.readouterr().out)[0]["phase"] == "resolve"


PROVIDERS = CONFIG.replace("smtp.house.example", "smtp.sendgrid.net").replace("host: smtp.acme.example", "provider: mailgun")


@pytest.mark.parametrize(
    ("name", "provider", "said"), [("acme", "mailgun", "is not allowed to send"), ("house", "sendgrid", "unauthenticated")]
)
def test_what_an_upstream_s_provider_says_comes_before_the_table(
    name: str, provider: str, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Whether the file names the provider, or its host alone."""
    assert ask(tmp_path, "--outcomes", "--upstream", name, config=PROVIDERS) == 0
    before, after = capsys.readouterr().out.split("Then, of every upstream:")
    assert f"First what {provider} says" in before
    assert said in before
    assert said not in after
    assert len(after.split("\n\n")[1].splitlines()) == 1 + len(list(rows_by_phase()))
    assert ask(tmp_path, "--outcomes", "--upstream", name, "--json", config=PROVIDERS) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [row["provider"] for row in rows] == sorted((row["provider"] for row in rows), key=bool, reverse=True)
    assert {row["provider"] for row in rows} == {provider, None}


def test_a_provider_s_replies_can_be_read_without_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert ask(tmp_path, "--outcomes", "--upstream", "brevo", config="upstreams: [") == 0
    assert "525 5.7.1" in capsys.readouterr().out
    assert ask(tmp_path, "--outcomes", "--upstream", "nobody") == 64
    assert "no such upstream or provider: nobody" in capsys.readouterr().err
    assert ask(tmp_path, "--outcomes", "--upstream", "acme") == 0
    assert "Nothing is known of its own replies" in capsys.readouterr().out
    assert ask(tmp_path, "--upstream", "acme", "--from", "app@acme.example", "--to", "x@y.example") == 64


def test_the_answer_names_the_provider(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert ask(tmp_path, "--from", "app@acme.example", "--to", "bob@example.org", "--json", config=PROVIDERS) == 0
    (answer,) = json.loads(capsys.readouterr().out)
    assert [each["provider"] for each in answer["upstreams"]] == ["mailgun", "sendgrid"]
    assert ask(tmp_path, "--from", "app@acme.example", "--to", "bob@example.org", config=PROVIDERS) == 0
    assert "    provider         mailgun\n" in capsys.readouterr().out
    assert ask(tmp_path, "--from", "app@acme.example", "--to", "bob@example.org") == 0
    assert "provider" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--listener", "insight"], "no such listener: insight; there is 127.0.0.1:2525, inside"),
        (["--client", "10.1.2"], "not an IP address, nor a user such as uid:1000: 10.1.2"),
        (["--client", "uid:root"], "not an IP address, nor a user such as uid:1000: uid:root"),
    ],
)
def test_a_listener_or_client_that_cannot_be_is_a_usage_error(
    words: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert ask(tmp_path, "--from", "app@acme.example", "--to", "bob@example.org", *words) == 64
    assert capsys.readouterr().err == f"{said}\n"


@pytest.mark.parametrize("words", [["--listener", "inside"], ["--client", "uid:1000"], ["--client", "2001:db8::1"]])
def test_a_listener_or_client_that_can_be_is_asked_about(words: list[str], tmp_path: Path) -> None:
    assert ask(tmp_path, "--from", "app@acme.example", "--to", "bob@example.org", *words) == 0


@pytest.mark.parametrize(
    ("user", "sender", "code", "part"),
    [
        ("erp", "app@acme.example", 0, "route acme: sender acme.example"),
        ("erp", "app@globex.example", 1, "553 5.7.1: the envelope sender app@globex.example is not one of its senders"),
        ("erp", "app@partner.example", 1, "crm: user erp is not crm"),
        ("crm", "app@partner.example", 0, "route crm: sender partner.example; user crm"),
        ("crm", "app@globex.example", 0, "route globex"),
        ("", "app@partner.example", 64, "no such user"),
    ],
)
def test_a_user_has_its_own_senders_and_routes(
    user: str, sender: str, code: int, part: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert ask(tmp_path, "--from", sender, "--to", "bob@example.org", "--user", user) == code
    printed = capsys.readouterr()
    assert part in printed.out + printed.err


def test_who_does_not_log_in_is_no_user(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert ask(tmp_path, "--from", "app@partner.example", "--to", "bob@example.org") == 1
    assert "crm: user (none) is not crm" in capsys.readouterr().out
