"""`relay check`, and the example that everybody starts from."""

import argparse
import re
from pathlib import Path

import pytest

from relay.cli import check
from relay.config.load import examine
from relay.config.model import Config

EXAMPLE = Path(__file__).parents[2] / "config.example.yaml"
GOOD = 'upstreams: {acme: {host: smtp.acme.example}}\nroutes: [{sender: "*", upstream: acme}]\n'
UNWISE = GOOD.replace("smtp.acme.example", "smtp.acme.example, verify: false")
BAD = UNWISE.replace("upstream: acme", "upstream: acne, x: 1")


@pytest.mark.parametrize(
    ("content", "strict", "code", "last"),
    [
        (GOOD, False, 0, "config.yaml: 1 upstream, 1 route: ok"),
        (GOOD, True, 0, "config.yaml: 1 upstream, 1 route: ok"),
        (UNWISE, False, 0, "config.yaml: 1 upstream, 1 route: ok, 1 warning"),
        (UNWISE, True, 1, "config.yaml: 1 upstream, 1 route: ok, 1 warning"),
        (BAD, False, 78, "config.yaml: 2 errors"),
        (BAD, True, 78, "config.yaml: 2 errors"),
        (BAD.replace(", x: 1", ""), False, 78, "config.yaml: 1 error, 1 warning"),
    ],
)
def test_check_ends_with_a_summary_and_a_code(
    content: str,
    strict: bool,
    code: int,
    last: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("config.yaml").write_text(content)
    assert run("check", *(["--strict"] if strict else [])) == code
    *findings, summary = capsys.readouterr().out.splitlines()
    assert summary == last
    assert all(re.match(r"config\.yaml:\d+:\d+: ", line) for line in findings)
    assert len(findings) == sum(map(int, re.findall(r"(\d+) (?:error|warning)", summary)))


def test_check_reads_the_file_it_is_given(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("check", config=str(tmp_path / "none.yaml")) == 78
    assert capsys.readouterr().out.splitlines() == [
        f"{tmp_path}/none.yaml: there is no such file",
        f"{tmp_path}/none.yaml: 1 error",
    ]


def test_check_without_a_file_says_where_it_looked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("RELAY_CONFIG", raising=False)
    monkeypatch.setattr("relay.config.load._SYSTEM_FILE", tmp_path / "etc.yaml")
    assert run("check") == 78
    assert "./config.yaml" in capsys.readouterr().out


def test_the_example_is_accepted_without_a_warning(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    for name in re.findall(r"{env: (\w+)}", EXAMPLE.read_text()):
        monkeypatch.setenv(name, "dummy")
    assert run("check", "--strict", config=str(EXAMPLE)) == 0
    assert capsys.readouterr().out == f"{EXAMPLE}: 3 upstreams, 5 routes: ok\n"


def test_the_example_shows_every_key_that_is_built() -> None:
    text = EXAMPLE.read_text()
    missing = {name for section in sections(Config) for name in section if not re.search(rf"(^|[\s{{#-]){name}:", text, re.MULTILINE)}
    assert not missing


def test_the_commented_keys_of_the_example_are_accepted_too(tmp_path: Path) -> None:
    (tmp_path / "ca.pem").write_text("-----BEGIN CERTIFICATE-----\n")
    (tmp_path / "key.pem").write_text("-----BEGIN PRIVATE KEY-----\n")
    text = re.sub(r"^( +)# (?=\w+: )", r"\1", EXAMPLE.read_text(), flags=re.MULTILINE)
    certificates, keys = ("acme-ca.pem", "tls/fullchain.pem", "tls/acme-client.pem"), ("tls/key.pem", "tls/acme-client.key")
    for name, file in (*((name, "ca.pem") for name in certificates), *((name, "key.pem") for name in keys)):
        text = text.replace(f"/etc/relay/{name}", file)
    (tmp_path / "config.yaml").write_text(text)
    config, findings = examine(tmp_path / "config.yaml", dict.fromkeys(re.findall(r"{env: (\w+)}", text), "dummy"))
    assert findings == []
    assert config is not None
    assert config.upstreams["acme"].ca_file == tmp_path / "ca.pem"
    assert config.upstreams["acme"].client_key == tmp_path / "key.pem"
    assert config.upstreams["globex"].ehlo == "globex.example"
    assert config.spool.directory == Path("/var/lib/relay")


def sections(top: type[Config]) -> list[list[str]]:
    """The keys of every section of the file, out of its schema."""
    schema = top.model_json_schema()
    return [list(schema["properties"]), *(list(part["properties"]) for part in schema["$defs"].values())]


def run(*words: str, config: str | None = None) -> int:
    parser = argparse.ArgumentParser()
    check.add_parser(parser.add_subparsers())
    options = parser.parse_args(words, argparse.Namespace(config=config))
    code = options.run(options)
    assert isinstance(code, int)
    return code
