"""Every directory in tests/config_bad holds one file and the findings it must give, word for word and place for place."""

import shutil
from pathlib import Path

import pytest

from relay.config.load import examine

CASES = sorted(path for path in (Path(__file__).parents[1] / "config_bad").iterdir() if path.is_dir())
ENVIRON = {"ACME_PASSWORD": "s3cret", "EMPTY": "", "LONG_PASSWORD": "x" * 256}
ONLY_WARNINGS = {
    "warnings",
    "provider-hints",
    "logins-of-nobody",
    "users-without-auth",
    "empty-but-allowed",
    "ports-and-security",
    "listeners-without-networks",
}


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_bad_file_gives_its_findings(case: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copyfile(case / "config.yaml", tmp_path / "config.yaml")
    (tmp_path / "config.yaml").chmod(0o600)
    monkeypatch.chdir(tmp_path)
    config, findings = examine("config.yaml", ENVIRON)
    assert "".join(f"{finding}\n" for finding in findings) == (case / "expected.txt").read_text()
    assert (config is not None) == (case.name in ONLY_WARNINGS)


def test_there_are_cases() -> None:
    assert len(CASES) > 30


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_no_finding_shows_a_secret(case: Path) -> None:
    expected = (case / "expected.txt").read_text()
    assert "hunter2" not in expected
    assert "s3cret" not in expected
