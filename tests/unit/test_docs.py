"""What the documents say, held against the program: configurations, commands, exit codes and the list of modules."""

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from relay.cli import main
from relay.config.load import examine

ROOT = Path(__file__).resolve().parents[2]
DOCUMENTS = (
    "README.md",
    "docs/listeners.md",
    "docs/logins.md",
    "docs/oauth.md",
    "docs/providers.md",
    "docs/durability.md",
    "docs/secrets.md",
    "docs/sendmail.md",
    "docs/operations.md",
    "docs/security.md",
    "docs/testing-upstreams.md",
    "docs/architecture.md",
    "CHANGELOG.md",
    "config.example.yaml",
)
QUEUE = {f"queue {verb}" for verb in ("list", "show", "retry", "hold", "release", "drop", "bounce")}
BUILT = {"serve", "check", "explain", "demo", "log", "trace", "schema", "test", "hash-password", "secret", "oauth", "sendmail", *QUEUE}
NOT_YET = "Not there yet"


def read(name: str) -> str:
    return (ROOT / name).read_text()


def section(text: str, title: str) -> str:
    return text.partition(f"\n## {title}\n")[2].partition("\n## ")[0]


def yaml_blocks() -> Iterator[tuple[str, str]]:
    for name in DOCUMENTS:
        for place, block in enumerate(re.findall(r"^```yaml\n(.*?)^```$", read(name), re.MULTILINE | re.DOTALL)):
            yield f"{name}-{place}", block


def findings(text: str, directory: Path) -> list[str]:
    """What the loader says about a text in a private file, with every environment variable set that it names."""
    file = directory / "config.yaml"
    file.write_text(text)
    file.chmod(0o600)
    environ = dict.fromkeys(re.findall(r"\{env: (\w+)\}", text), "dummy")
    return [str(finding) for finding in examine(file, environ)[1]]


@pytest.mark.parametrize(("name", "block"), [pytest.param(*found, id=found[0]) for found in yaml_blocks()])
def test_every_configuration_in_the_documents_is_valid_and_gives_no_warning(name: str, block: str, tmp_path: Path) -> None:
    fragment = "" if "routes:" in block else "upstreams: {a: {host: a.example}}\nroutes: [{upstream: a}]\n"
    assert findings(block + fragment, tmp_path) == []


def test_the_readme_has_a_configuration_of_fifteen_lines() -> None:
    assert max(len(block.splitlines()) for name, block in yaml_blocks() if name.startswith("README")) == 15


def test_a_wrong_configuration_in_a_document_would_be_seen(tmp_path: Path) -> None:
    block = next(block for name, block in yaml_blocks() if name == "README.md-0")
    assert len(findings(block.replace("upstream: house", "upstream: hause"), tmp_path)) > 0


def test_the_example_configuration_is_valid_and_gives_no_warning(tmp_path: Path) -> None:
    assert findings(read("config.example.yaml"), tmp_path) == []


def commands_in(text: str) -> set[str]:
    """The commands that a text names: in `code`, and at the beginning of an indented line."""
    code = re.findall(r"`(?:sudo -u relay )?(?:/opt/relay/bin/)?relay ([^`]*)`", text)
    launchers = r"(?:docker exec relay |(?:sudo -u relay )?/opt/relay/bin/)?"
    code += re.findall(rf"^ {{4,}}{launchers}relay ((?:-\S+ )?[a-z].*)$", text, re.MULTILINE)
    found = set()
    for words in (line.split() for line in code):
        verb = words[1] if words[0] == "queue" and len(words) > 1 else ""
        found.add(f"{words[0]} {verb}".strip() if re.fullmatch(r"[a-z-]+", words[0]) else "")
    return found - {"", "queue"}


def test_every_command_in_the_documents_exists(capsys: pytest.CaptureFixture[str]) -> None:
    readme = read("README.md")
    named = commands_in(readme.replace(section(readme, NOT_YET), "")).union(*(commands_in(read(name)) for name in DOCUMENTS[1:]))
    assert named == BUILT
    for command in named:
        with pytest.raises(SystemExit, match=r"^0$"):
            main([*command.split(), "--help"])
        assert capsys.readouterr().out.startswith(f"usage: relay {command}")


def test_every_command_that_the_readme_says_is_missing_is_missing(capsys: pytest.CaptureFixture[str]) -> None:
    missing = commands_in(section(read("README.md"), NOT_YET))
    assert len(missing) > 5
    for command in missing:
        assert main(command.split()) == 64
        assert capsys.readouterr().err == f"relay {command}: not available yet\n"


def modules_listed() -> set[str]:
    """The tree in the architecture page, by indentation."""
    block = re.search(r"^```\nrelay/\n(.*?)^```$", read("docs/architecture.md"), re.MULTILINE | re.DOTALL)
    assert block
    listed, folder = set(), ""
    for line in block[1].splitlines():
        name = line.split()[0]
        if name.endswith("/"):
            folder = name
        elif line.startswith("    "):
            listed.add(folder + name)
        else:
            listed.add(name)
    return listed


def test_the_architecture_page_lists_every_module_and_no_other() -> None:
    package = ROOT / "relay"
    modules = {path.relative_to(package).as_posix(): path for path in package.rglob("*.py")}
    said = {name for name, path in modules.items() if name != "__init__.py" and path.read_text().strip()}
    assert modules_listed() == said


@pytest.mark.parametrize("name", DOCUMENTS)
def test_files_that_a_document_names_exist(name: str) -> None:
    named = set(re.findall(r"`((?:docs|systemd|tests)/[\w./-]+|[\w.]+\.(?:md|example\.yaml)|LICENSE)`", read(name)))
    assert {path for path in named if not (ROOT / path).exists()} == set()


def test_the_events_that_operators_are_told_of_are_the_programs_own() -> None:
    events = set(re.findall(r'_event\(\s*(?:level|"\w+"),\s*"([a-z-]+)"', read("relay/observe/journal.py")))
    look = section(read("docs/operations.md"), "Look").partition("`relay queue list` shows")[0]
    told = {event for row in re.findall(r"^\| (`[^|]+) \|", look, re.MULTILINE) for event in re.findall(r"`([a-z-]+)`", row)}
    assert told == events
