"""Reading the file: where it is, what is no text or no YAML, and how long it may take."""

import errno
import os
import time
from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from relay.config.load import ConfigError, examine, find_config, load
from tests.support.certificates import Authority

MINIMAL = 'upstreams: {acme: {host: smtp.acme.example}}\nroutes: [{sender: "*", upstream: acme}]\n'


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "config.yaml"
    path.touch(mode=0o600)
    return path


def findings_in(path: Path, content: str | bytes, **environ: str) -> list[str]:
    """What is said about a file with this content, without the directory."""
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return [str(finding).removeprefix(f"{path.parent}/") for finding in examine(path, environ)[1]]


def test_a_small_file_loads(file: Path) -> None:
    file.write_text(MINIMAL)
    config = load(file, {})
    assert config.upstreams["acme"].host == ("smtp.acme.example",)
    assert config.routes[0].upstream == "acme"


def test_errors_raise_with_everything_that_was_found(file: Path) -> None:
    file.write_text("upstreams: {acme: {hots: a}}\nroutes: [{upstream: acne}]\n")
    with pytest.raises(ConfigError) as caught:
        load(file, {})
    assert [finding.where for finding in caught.value.findings] == [
        "upstreams.acme.host",
        "upstreams.acme.hots",
        "routes[0].upstream",
    ]
    assert str(caught.value).splitlines() == [str(finding) for finding in caught.value.findings]


def test_a_finding_has_its_parts(file: Path) -> None:
    file.write_text("upstreams: {acme: {host: a.example}}\nroutes:\n  - upstream: acme2\n")
    (finding,) = examine(file, {})[1]
    assert (finding.file, finding.line, finding.column) == (str(file), 3, 15)
    assert (finding.where, finding.severity) == ("routes[0].upstream", "error")
    assert finding.message == "unknown upstream 'acme2', did you mean 'acme'?"
    assert str(finding) == f"{file}:3:15: routes[0].upstream: unknown upstream 'acme2', did you mean 'acme'?"


def test_a_file_is_looked_for_in_four_places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("relay.config.load._SYSTEM_FILE", tmp_path / "etc.yaml")
    with pytest.raises(ConfigError) as caught:
        find_config(None, {})
    assert all(place in str(caught.value) for place in ("$RELAY_CONFIG", "./config.yaml", "etc.yaml", "-c"))
    (tmp_path / "etc.yaml").touch()
    assert find_config(None, {}) == tmp_path / "etc.yaml"
    Path("config.yaml").touch()
    assert find_config(None, {}) == Path("config.yaml")
    assert find_config(None, {"RELAY_CONFIG": "/missing"}) == Path("/missing")
    assert find_config("given.yaml", {"RELAY_CONFIG": "/missing"}) == Path("given.yaml")


def test_a_file_that_we_may_not_even_look_for_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stat, closed = Path.stat, tmp_path / "etc" / "config.yaml"  # as for anybody else where /etc/relay is for its group alone

    def refused(path: Path, **options: bool) -> os.stat_result:
        if path == closed:
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return stat(path, **options)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("relay.config.load._SYSTEM_FILE", closed)
    monkeypatch.setattr(Path, "stat", refused)
    assert find_config(None, {}) == closed


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"a: b\nc: \xe4\n", "config.yaml:2:4: byte 0xe4 is not UTF-8: save the file as UTF-8"),
        (MINIMAL.encode("utf-16"), "config.yaml:1:1: byte 0xff is not UTF-8: save the file as UTF-8"),
        (b"a: b\nc: \x00\n", "config.yaml:2:4: control character U+0000: the file must be plain text"),
        (b"a: b\nc: \x1b[1m\n", "config.yaml:2:4: control character U+001B: the file must be plain text"),
        (b"", "config.yaml:1:1: the file is empty: a configuration has at least upstreams and routes"),
        (b"---\n", "config.yaml:1:1: the file is empty: a configuration has at least upstreams and routes"),
        (b"text", "config.yaml:1:1: must be a mapping of keys such as upstreams and routes"),
    ],
)
def test_what_is_no_configuration_is_said(file: Path, content: bytes, said: str) -> None:
    assert findings_in(file, content) == [said]


def test_a_byte_order_mark_is_no_fault(file: Path) -> None:
    assert findings_in(file, b"\xef\xbb\xbf" + MINIMAL.encode()) == []


def test_windows_line_ends_are_no_fault(file: Path) -> None:
    assert findings_in(file, MINIMAL.replace("\n", "\r\n")) == []


def test_a_file_that_cannot_be_read_is_one_finding(tmp_path: Path) -> None:
    assert [str(finding) for finding in examine(tmp_path / "none", {})[1]] == [f"{tmp_path}/none: there is no such file"]
    assert [str(finding) for finding in examine(tmp_path, {})[1]] == [f"{tmp_path}: cannot be read: Is a directory"]


def test_a_huge_file_is_refused_unread(file: Path) -> None:
    with file.open("wb") as sparse:
        sparse.truncate(65 * 2**20)
    (finding,) = examine(file, {})[1]
    assert finding.message == "is larger than 64 MiB"


@pytest.mark.parametrize(
    "content", ["[" * 100_000, "{a: " * 100_000, "- " * 100_000, "a:\n" + "".join(f"{' ' * n}a:\n" for n in range(1, 900))]
)
def test_a_deep_file_is_a_finding(file: Path, content: str) -> None:
    said = findings_in(file, content)
    assert len(said) == 1
    assert "more than 24 levels deep" in said[0]


def test_keys_that_are_no_text_are_passed_over_however_deep(file: Path) -> None:
    said = findings_in(file, f"? {'[' * 500}{']' * 500}\n: 1\nupstreams: {{}}\n")
    assert said[1] == "config.yaml:1:3: ?: a key must be text; quote a value that begins with { or [ or *"
    assert len(said) == 3


def test_a_bad_key_hides_no_other(file: Path) -> None:
    said = findings_in(file, "upstreams:\n  acme: {host: 5x., tsl: 1, port: x}\n  b: [1]\nroutes:\n  - {upstream: x, sender: [], a: b}\n")
    assert [line.split(": ")[1] for line in said] == [
        "upstreams.acme.tsl",
        "upstreams.acme.port",
        "upstreams.b",
        "routes[0].upstream",
        "routes[0].sender",
        "routes[0].a",
    ]


def test_twenty_unquoted_stars_are_twenty_findings(file: Path) -> None:
    routes = "".join(f"  - {{sender: *.t{n}.example, upstream: acme}}\n" for n in range(20))
    said = findings_in(file, f"upstreams: {{acme: {{host: a.example}}}}\nroutes:\n{routes}")
    assert len(said) == 20
    assert all("quote the value: it begins with *" in line for line in said)


def test_numbers_are_taken_as_written_where_text_is_wanted(file: Path) -> None:
    file.write_text(
        "upstreams: {2024: {host: 1.2, username: 007x, password: 12345, description: 1.20}}\n"
        'routes: [{name: 7, sender: "*", upstream: 2024, rewrite: {set_headers: {X-N: 1.10}, subject_prefix: 3}}]\n'
    )
    config, findings = examine(file, {})
    assert [str(finding) for finding in findings] == [f"{file}:1:26: upstreams.2024.host: not an IP address: '1.2'"]
    file.write_text(file.read_text().replace("host: 1.2,", "host: a,"))
    config = load(file, {})
    upstream, rewrite = config.upstreams["2024"], config.routes[0].rewrite
    assert upstream.password is not None
    assert rewrite is not None
    assert (upstream.description, upstream.password.reveal(), config.routes[0].name) == ("1.20", "12345", "7")
    assert (rewrite.set_headers, rewrite.subject_prefix) == ({"X-N": "1.10"}, "3")


@pytest.mark.parametrize("written", ["true", "True", "TRUE"])
def test_true_and_false_are_the_only_booleans(file: Path, written: str) -> None:
    assert findings_in(file, MINIMAL.replace("smtp.acme.example", f"a.example, verify: {written}")) == []
    for other in ("yes", "Yes", "on", "ON", "off", "No"):
        (said,) = findings_in(file, MINIMAL.replace("smtp.acme.example", f"a.example, verify: {other}"))
        assert f"{other} means" in said


@pytest.mark.parametrize(
    "password",
    ["0755", "12:30", "1_000", "2024-01-01", "0xbeef", "*hunter2", "*.hunter2", "&hunter2 x", "!hunter2 x", "{hunter2: x}",
     "[hunter2]", "@hunter2", "%hunter2", "`hunter2`", '"hunter2" x', "'hunter2' x", "hunter2: x", "|hunter2", ">hunter2",
     "[hunter2] x", "{hunter2} x", "no", "x" * 256 + "hunter2", '"hunter2\\u0007"', "{env: hunter2: x}",
     "{hunter2: 1, hunter2: 2}", "? hunter2"],
)  # fmt: skip
def test_a_badly_written_password_is_not_repeated(file: Path, password: str) -> None:
    for key in ("password", "pasword"):
        said = findings_in(
            file, f"upstreams:\n  a:\n    host: a.example\n    username: a\n    {key}: {password}\nroutes: [{{upstream: a}}]\n"
        )
        assert said
        secret = password if password[0].isdigit() else "hunter2"
        assert not any(secret in line for line in said if key == "password")
        assert not any(secret in line for line in said if "duplicate" not in line)


def test_a_plain_secret_in_a_file_for_others_is_a_warning(file: Path) -> None:
    content = MINIMAL.replace("smtp.acme.example", "a.example, username: a, password: s3cret")
    assert findings_in(file, content) == []
    file.chmod(0o640)
    assert findings_in(file, content) == []
    file.chmod(0o644)
    (said,) = findings_in(file, content)
    assert said.startswith("config.yaml:1:60: upstreams.acme.password: warning: a secret in a file that others can read")
    assert findings_in(file, content.replace("s3cret", "{env: A}"), A="x") == []


def test_names_of_files_begin_where_the_configuration_is(file: Path) -> None:
    (file.parent / "secret").write_text("s3cret\n")
    (file.parent / "ca.pem").write_text("-----BEGIN CERTIFICATE-----\n")
    file.write_text(MINIMAL.replace("smtp.acme.example", "a, ca_file: ca.pem, username: a, password: {file: secret}"))
    upstream = load(file, {}).upstreams["acme"]
    assert upstream.ca_file == file.parent / "ca.pem"
    assert upstream.password is not None
    assert upstream.password.reveal() == "s3cret"


def test_openssl_is_asked_when_a_check_is_thorough(file: Path) -> None:
    (file.parent / "ca.pem").write_text("-----BEGIN CERTIFICATE-----\nnonsense\n-----END CERTIFICATE-----\n")
    file.write_text(MINIMAL.replace("smtp.acme.example", "a.example, ca_file: ca.pem"))
    assert examine(file, {})[1] == []
    config, (finding,) = examine(file, {}, thorough=True)
    assert config is None
    assert finding.where == "upstreams.acme.ca_file"
    assert "OpenSSL cannot read the certificates" in finding.message


def test_a_client_certificate_and_its_key_are_tried_when_a_check_is_thorough(file: Path, tls: Authority) -> None:
    one, two = tls.files("one.example"), tls.files("two.example")
    acme = f"upstreams: {{acme: {{host: smtp.acme.example, client_certificate: {one.certificate}, client_key: {one.key}}}}}\n"
    file.write_text(acme + "routes: [{upstream: acme}]\n")
    assert examine(file, {}, thorough=True)[1] == []
    file.write_text(file.read_text().replace(str(one.key), str(two.key)))
    config, (finding,) = examine(file, {}, thorough=True)
    assert config is None
    assert finding.where == "upstreams.acme.client_certificate"
    assert finding.message == f"the key in {two.key} is not that of the certificate in {one.certificate}"
    file.write_text(file.read_text().replace(f", client_key: {two.key}", ""))
    (finding,) = examine(file, {}, thorough=True)[1]
    assert finding.message == f"there is no key: name its file with `client_key`, or add it to {one.certificate}"
    file.write_text("upstreams: {acme: {host: a.example, client_key: " + str(one.key) + "}}\nroutes: [{upstream: acme}]\n")
    assert "there is a client_key but no client_certificate" in str(examine(file, {})[1])


def test_a_listeners_certificate_and_key_are_tried_when_a_check_is_thorough(file: Path, tls: Authority) -> None:
    one, other = tls.files("one.example"), tls.files("other.example")
    listener = f"{{bind: '127.0.0.1:0', security: tls, certificate: {one.certificate}, key: %s}}"
    file.write_text(f"{MINIMAL}listeners: [{listener % one.key}]\n")
    assert examine(file, {}, thorough=True)[1] == []
    file.write_text(f"{MINIMAL}listeners: [{listener % other.key}]\n")
    assert examine(file, {})[1] == []
    config, (finding,) = examine(file, {}, thorough=True)
    assert config is None
    assert finding.where == "listeners[0].certificate"
    assert finding.message == f"the key in {other.key} is not that of the certificate in {one.certificate}"
    file.write_text(f"{MINIMAL}listeners: [{listener.replace(', key: %s', '')}]\n")
    (finding,) = examine(file, {}, thorough=True)[1]
    assert finding.message == f"there is no key: name its file with `key`, or add it to {one.certificate}"


def test_the_spool_is_where_systemd_says(file: Path) -> None:
    file.write_text(MINIMAL)
    assert load(file, {}).spool.directory == Path("relay-data")
    assert load(file, {"STATE_DIRECTORY": "/var/lib/relay:/var/lib/other"}).spool.directory == Path("/var/lib/relay")
    file.write_text(f"{MINIMAL}spool: {{directory: /srv/spool}}\n")
    assert load(file, {"STATE_DIRECTORY": "/var/lib/relay"}).spool.directory == Path("/srv/spool")


def test_reading_without_libyaml_works_and_is_a_warning(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("relay.config.load._Loader", yaml.SafeLoader)
    monkeypatch.delattr(yaml, "CSafeLoader")
    (said,) = findings_in(file, MINIMAL)
    assert said == "config.yaml: warning: this Python's PyYAML lacks libyaml: reading takes five times as long"
    assert "routes[0].sender: quote the value" in findings_in(file, MINIMAL.replace('"*"', "*.a.example"))[1]


def test_five_thousand_routes_load_in_seconds(file: Path) -> None:
    file.write_text(many_routes(5000))
    began = time.process_time()
    config, findings = examine(file, {})
    assert time.process_time() - began < 5  # about half a second on an idle machine
    assert config is not None
    assert len(config.routes) == 5000
    assert len(findings) == 1  # upstreams without senders


def test_five_thousand_errors_take_no_longer(file: Path) -> None:
    file.write_text(many_routes(5000).replace("upstream: t", "upstream: x").replace("sender:", "sendr:"))
    began = time.process_time()
    findings = examine(file, {})[1]
    assert time.process_time() - began < 5
    assert len(findings) == 10_000


def many_routes(count: int) -> str:
    upstreams = "".join(f"  t{n}: {{host: smtp{n}.example}}\n" for n in range(50))
    routes = "".join(f"  - sender: t{n}.example\n    recipient: '*'\n    upstream: t{n % 50}\n" for n in range(count))
    return f"upstreams:\n{upstreams}routes:\n{routes}"


WORDS = [
    "upstreams",
    "routes",
    "acme",
    "host",
    "password",
    "a.example",
    "sender",
    ": ",
    "\n",
    "  ",
    "- ",
    "*",
    "&a",
    "[",
    "]",
    "{",
    "}",
    '"',
    "'",
]
WORDS += [
    ", ",
    "#",
    "!x",
    "|",
    ">",
    "?",
    "yes",
    "0755",
    "null",
    "\t",
    "---\n",
    "%",
    "@",
    "<<",
    "\u2028",
    "é",
    "upstream",
    "fallback",
    "rewrite",
    "from",
]


def test_a_file_that_ends_too_soon_is_at_fault_in_its_last_line(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text("[0\n,")
    config, findings = examine(path, os.environ)
    assert config is None
    assert [finding.line for finding in findings] == [2]


@settings(max_examples=150)
@given(st.one_of(st.text(), st.lists(st.sampled_from(WORDS), max_size=40).map("".join)))
def test_whatever_the_text_there_are_findings_and_no_exception(tmp_path_factory: pytest.TempPathFactory, text: str) -> None:
    path = tmp_path_factory.getbasetemp() / "fuzzed.yaml"
    path.write_bytes(text.encode("utf-8", "surrogatepass"))
    config, findings = examine(path, os.environ)
    assert config is not None or any(finding.severity == "error" for finding in findings)
    lines = text.count("\n") + text.count("\r") + text.count("\x85") + text.count("\u2028") + text.count("\u2029") + 1
    assert all(0 <= finding.line <= lines for finding in findings)
