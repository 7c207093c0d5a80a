"""Read the file: YAML with positions, then the model, then what concerns several keys, and every error at once.

The parser's events are read one by one instead of its finished objects: so anchors, tags, duplicate keys and YAML 1.1's surprises
are seen, positions are kept, and neither size nor depth of a hostile file can exhaust the stack. The one module that knows yaml.
"""

import gc
import os
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import yaml
from pydantic import ValidationError

from relay.config import certificates, consistency, encryption, lint, machine, oauth, syntax, wording
from relay.config.findings import BROKEN, ConfigError, Finding, KeyPath, Problem, Severity, dotted, holds_secret
from relay.config.model import Config, keys_of
from relay.config.scalars import NOT_SURELY_TEXT, SECRET_FORMS, resolve_scalar, surprise, variable

__all__ = ["ConfigError", "Finding", "examine", "find_config", "keys", "load", "partly", "places"]

_Loader: Final[Any] = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
_SYSTEM_FILE: Final = Path("/etc/relay/config.yaml")
_FILE_LIMIT_OCTETS: Final = 64 * 2**20  # a hundred thousand routes need a third of it
_DEPTH_LIMIT: Final = 24  # the deepest key of the contract is at 8
_REPAIRS: Final = 20
_UNPRINTABLE = re.compile("[^\t\n\r\x20-\x7e\x85\xa0-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
_NO_COLON: Final = "a colon with a blank behind it is missing here; or quote the value before, if the comma belongs to that"
_CUT = re.compile(r"[ \t]+#")


def find_config(given: str | Path | None, environ: Mapping[str, str]) -> Path:
    """The file to read: the one given, else `$RELAY_CONFIG`, else ./config.yaml, else /etc/relay/config.yaml.

    Raises ConfigError when there is nothing to read.
    """
    if given is not None:
        return Path(given)
    if named := environ.get("RELAY_CONFIG"):
        return Path(named)
    for path in (Path("config.yaml"), _SYSTEM_FILE):
        if not machine.is_missing(path):
            return path
    looked = f"$RELAY_CONFIG (not set), ./config.yaml, {_SYSTEM_FILE}"
    raise ConfigError([Finding("", 0, 0, "", f"no configuration file: looked at {looked}; name one with -c")])


def load(path: str | Path, environ: Mapping[str, str] = os.environ) -> Config:
    """The configuration in `path`, its secrets resolved. Raises ConfigError with everything that was found."""
    config, findings = examine(path, environ)
    if config is None:
        raise ConfigError(findings)
    return config


def places(path: str | Path, environ: Mapping[str, str] = os.environ) -> machine.Places:
    """The places that `path` names, whatever else is wrong in it: an operator's shell need not have the secrets of the service.

    Raises ConfigError when the file cannot be read, or its `spool` or `control` not be understood.
    """
    config = partly(path, environ, machine.Places._fields)
    return machine.Places(config.spool.directory, config.control)


def keys(path: str | Path, environ: Mapping[str, str] = os.environ) -> encryption.Keys:
    """The keys for the encrypted secrets in `path`, whatever else is wrong in it. Raises ConfigError."""
    return encryption.keys_at(partly(path, environ, ("secrets",)).secrets.key_file, environ)


def partly(
    path: str | Path, environ: Mapping[str, str], sections: tuple[str, ...], *, narrowed: Callable[[dict[str, Any]], None] | None = None
) -> Config:
    """A configuration that has nothing but these sections of the file; `narrowed` may take more away. Raises ConfigError."""
    try:
        document = _parse(str(path), _read(Path(path))[0])
    except _Unreadable as error:
        raise ConfigError([Finding(str(path), error.line, error.column, "", error.message)]) from None
    if not document.complete or {(key,) for key in sections} & document.broken:
        raise ConfigError(document.findings)
    value = {"hostname": "localhost"} | {key: document.value[key] for key in sections if key in document.value}
    if narrowed is not None:
        narrowed(value)
    base = Path(path).parent
    try:
        return Config.model_validate(value, context={"environ": environ, "base": base, "keys": keys_of(value, base, environ)})
    except ValidationError as error:
        raise ConfigError(document.located(list(wording.problems(error, document.value)))) from None


def examine(path: str | Path, environ: Mapping[str, str] = os.environ, *, thorough: bool = False) -> tuple[Config | None, list[Finding]]:
    """The configuration, None when it has errors, and all errors and warnings in the order of the file.

    `thorough` also asks OpenSSL about every certificate file.
    """
    with _no_collection():
        return _examine(path, environ, thorough=thorough)


@contextmanager
def _no_collection() -> Iterator[None]:
    """Ten thousand tenants are two million objects without a cycle: looking at them again and again is a third of the time."""
    was = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was:
            gc.enable()


def _examine(path: str | Path, environ: Mapping[str, str], *, thorough: bool) -> tuple[Config | None, list[Finding]]:
    file = str(path)
    try:
        text, readable = _read(Path(path))
    except _Unreadable as error:
        return None, [Finding(file, error.line, error.column, "", error.message)]
    document = _parse(file, text)
    if not hasattr(yaml, "CSafeLoader"):
        slow = "this Python's PyYAML lacks libyaml: reading takes five times as long"
        document.findings.append(Finding(file, 0, 0, "", slow, "warning"))
    config = None
    if document.complete:
        problems: list[Problem] = list(consistency.problems(document.value))
        keys = keys_of(document.value, Path(path).parent, environ)
        try:
            config = Config.model_validate(document.value, context={"environ": environ, "base": Path(path).parent, "keys": keys})
        except ValidationError as error:
            problems += wording.problems(error, document.value)
        if config is not None:
            if not problems:  # a mistyped name alone would give two more, and what is empty one against what is missing
                problems += lint.improbable(config)
                problems += [Problem(path, "is empty: write null if that is meant", "warning") for path in document.empty]
            problems += lint.unguarded(config, exposed=readable)
            problems += (*lint.circular(config), *lint.colliding(config))
            problems += encryption.problems(keys, named=config.secrets.key_file is not None)
            problems += (*certificates.problems(config), *oauth.unready(config)) if thorough else ()
        document.findings += document.located(problems)
    findings = sorted(dict.fromkeys(document.findings), key=lambda finding: (finding.line, finding.column))
    broken = any(finding.severity == "error" for finding in findings)
    return (None if broken else config), findings


class _Unreadable(Exception):
    def __init__(self, message: str, *, line: int = 0, column: int = 0) -> None:
        self.message, self.line, self.column = message, line, column


def _read(path: Path) -> tuple[str, bool]:
    """The text of the file, and whether everybody may read it."""
    try:
        with path.open("rb") as file:
            mode = os.fstat(file.fileno()).st_mode
            content = file.read(_FILE_LIMIT_OCTETS + 1)
    except FileNotFoundError:
        raise _Unreadable("there is no such file") from None
    except (OSError, ValueError) as error:
        raise _Unreadable(f"cannot be read: {error.strerror if isinstance(error, OSError) else 'no file name'}") from None
    if len(content) > _FILE_LIMIT_OCTETS:
        raise _Unreadable(f"is larger than {_FILE_LIMIT_OCTETS >> 20} MiB")
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line, column = _place(error.object[: error.start].decode(errors="replace"))
        what = f"byte 0x{error.object[error.start]:02x} is not UTF-8: save the file as UTF-8"
        raise _Unreadable(what, line=line + 1, column=column + 1) from None
    if unfit := _UNPRINTABLE.search(text):
        line, column = _place(text[: unfit.start()])
        what = f"control character U+{ord(unfit[0]):04X}: the file must be plain text"
        raise _Unreadable(what, line=line + 1, column=column + 1)
    return text, bool(mode & 0o004)  # not the group: that is how a service reads a file that root owns


def _place(before: str) -> syntax.Mark:
    """Line and column, from 0, behind `before`."""
    lines = syntax.LINE_BREAK.split(before)
    return len(lines) - 1, len(lines[-1])


@dataclass(slots=True)
class _Document:
    """Plain values, where each of them and its key stands, and what was wrong on the way."""

    file: str
    value: Any = None
    values: dict[KeyPath, Any] = field(default_factory=dict)  # the parser's own marks
    keys: dict[KeyPath, Any] = field(default_factory=dict)
    broken: set[KeyPath] = field(default_factory=set)
    empty: list[KeyPath] = field(default_factory=list)
    findings: list[Finding] = field(default_factory=list)
    complete: bool = False

    def located(self, problems: list[Problem]) -> list[Finding]:
        """The problems with line and column, without those that only follow from what is already known to be broken."""
        known = {(finding.line, finding.column) for finding in self.findings if finding.severity == "error"}
        found = [self._locate(problem) for problem in problems if not self._is_known(problem.path)]
        return [finding for finding in found if (finding.line, finding.column) not in known]

    def _is_known(self, path: KeyPath) -> bool:
        return bool(self.broken) and any(path[:length] in self.broken for length in range(len(path) + 1))

    def _locate(self, problem: Problem) -> Finding:
        path = problem.path[:-1] if problem.at == "missing" else problem.path
        while path and path not in self.values:
            path = path[:-1]
        found = self.keys if problem.at in ("key", "missing") and path in self.keys else self.values
        line, column = _mark(found.get(path)) or (0, 0)
        return Finding(self.file, line + 1, column + 1, dotted(problem.path), problem.message, problem.severity)


def _parse(file: str, text: str) -> _Document:
    """Read the text; where a value begins with a character that YAML refuses, say so, blank it and read on."""
    repaired: dict[syntax.Mark, str] = {}
    while True:
        reader = _Reader(file, text, repaired)
        try:
            reader.read()
        except yaml.MarkedYAMLError as error:
            lines = syntax.LINE_BREAK.split(text)
            place, context = _mark(error.problem_mark), _mark(error.context_mark)
            place = min(place or context or (0, 0), (len(lines) - 1, len(lines[-1])))  # the end may be said to be a line below
            fault = syntax.explain(lines, str(error.problem), place=place, context=context)
            if fault.length and len(repaired) < _REPAIRS and fault.place not in repaired:
                repaired[fault.place] = fault.message
                text = syntax.blanked(text, fault)
                continue
            line, column = min(fault.place, (len(lines) - 1, len(lines[-1])))  # nor may what is missing be
            finding = Finding(file, line + 1, column + 1, "", fault.message)
            reader.document.findings.append(finding)
            for mark, message in repaired.items():
                if mark > (reader.last_line, 0):
                    reader.document.findings.append(Finding(file, mark[0] + 1, mark[1] + 1, "", message))
        except _TooDeep as error:
            where = Finding(file, error.place[0] + 1, error.place[1] + 1, "", f"more than {_DEPTH_LIMIT} levels deep")
            reader.document.findings.append(where)
        return reader.document


def _mark(mark: Any) -> syntax.Mark | None:
    return (mark.line, mark.column) if mark else None


class _TooDeep(Exception):
    def __init__(self, place: syntax.Mark) -> None:
        self.place = place


class _Reader:
    """Turns the events of one file into a document."""

    def __init__(self, file: str, text: str, repaired: dict[syntax.Mark, str]) -> None:
        self.document = _Document(file)
        self._text = text
        self._repaired = repaired
        self._event: Any = None
        self._get_event = _Loader(text).get_event
        self._unsuspicious: set[str] = set()  # keys that may stand anywhere without a word

    def read(self) -> None:
        """Read the only document. Raises yaml.MarkedYAMLError and _TooDeep."""
        self._next()  # the stream's start
        event = self._next()
        if not isinstance(event, yaml.StreamEndEvent):
            event = self._next()
            self.document.value = self._value(event, ())
            self._next()  # the document's end
            if not isinstance(after := self._next(), yaml.StreamEndEvent):
                self._complain((), after, "one file holds one document: what follows --- is not read")
        self.document.complete = isinstance(self.document.value, dict)
        if self.document.value is None and not self.document.findings:
            empty = "the file is empty: a configuration has at least upstreams and routes"
            self.document.findings.append(Finding(self.document.file, 1, 1, "", empty))
        elif not self.document.complete and () not in self.document.broken:
            self._complain((), event, "must be a mapping of keys such as upstreams and routes")

    @property
    def last_line(self) -> int:
        """Where the event begins that was read last; -1: before the first."""
        return self._event.start_mark.line if self._event is not None else -1

    def _next(self) -> Any:
        self._event = self._get_event()
        return self._event

    def _refuse(self, path: KeyPath, event: Any, message: str) -> None:
        """The value at `path` cannot be used: nothing more is said about it."""
        self.document.broken.add(path)
        self._complain(path, event, message)

    def _complain(self, path: KeyPath, event: Any, message: str, *, severity: Severity = "error") -> None:
        mark = event.start_mark
        finding = Finding(self.document.file, mark.line + 1, mark.column + 1, dotted(path), message, severity)
        self.document.findings.append(finding)

    def _value(self, event: Any, path: KeyPath) -> Any:
        if len(path) > _DEPTH_LIMIT:
            raise _TooDeep((event.start_mark.line, event.start_mark.column))
        self.document.values.setdefault(path, event.start_mark)
        if isinstance(event, yaml.AliasEvent):
            self._refuse(path, event, "begins with *, an alias to YAML, which is not used here: quote it if it is text")
            return BROKEN
        if event.anchor is not None or event.tag is not None:
            self._check_properties(event, path)
        if isinstance(event, yaml.ScalarEvent):
            return self._scalar(event, path)
        if isinstance(event, yaml.MappingStartEvent):
            return self._mapping(path)
        items: list[Any] = []
        while not isinstance(event := self._next(), yaml.SequenceEndEvent):
            items.append(self._value(event, (*path, len(items))))
        return items

    def _check_properties(self, event: Any, path: KeyPath) -> None:
        if event.anchor is not None:
            self._refuse(path, event, "begins with &, an anchor to YAML, which is not used here: quote it if it is text")
        elif event.tag is not None:
            self._refuse(path, event, "begins with !, a tag to YAML, which is not used here: quote it if it is text")

    def _mapping(self, path: KeyPath) -> dict[str, Any]:
        mapping: dict[str, Any] = {}
        keys, values = self.document.keys, self.document.values
        while not isinstance(event := self._next(), yaml.MappingEndEvent):
            if not isinstance(event, yaml.ScalarEvent):
                self._refuse((*path, "?"), event, "a key must be text; quote a value that begins with { or [ or *")
                self._skip(event)
                self._skip(self._next())
                continue
            key = event.value
            below = (*path, key)
            if key not in self._unsuspicious or event.style or event.anchor is not None or event.tag is not None:
                self._check_key(event, below)
            if key in mapping:
                first = keys[below].line + 1
                name = "this key" if holds_secret(path) else repr(key)
                self._complain(below, event, f"duplicate key {name}, first in line {first}")
                self._value(self._next(), below)
                continue
            keys[below] = event.start_mark
            word, event = event, self._next()
            ends: Any = (word.end_mark, event.start_mark)
            if isinstance(event, yaml.ScalarEvent) and not event.value and ends[0].index == ends[1].index:
                self._complain(path, word, _NO_COLON)  # which does not repeat it: it may be the rest of a secret
                continue
            if isinstance(event, yaml.ScalarEvent) and event.anchor is None and event.tag is None and len(below) <= _DEPTH_LIMIT:
                values.setdefault(below, event.start_mark)  # as `_value` would, for what most values are
                mapping[key] = self._scalar(event, below)
            else:
                mapping[key] = self._value(event, below)
        return mapping

    def _skip(self, event: Any) -> None:
        """Read past one value, however deep it is."""
        depth = 0
        while True:
            depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
            if depth == 0:
                return
            event = self._next()

    def _check_key(self, event: Any, below: KeyPath) -> None:
        self._check_properties(event, below)
        if event.style:
            if message := self._repaired.get((event.start_mark.line, event.start_mark.column)):
                self._refuse(below, event, message)
        elif event.value in ("", "~"):
            self._complain(below, event, "a key is missing before the colon")
        elif odd := surprise(event.value):
            self._complain(below, event, odd)
        else:
            self._unsuspicious.add(event.value)

    def _scalar(self, event: Any, path: KeyPath) -> Any:
        if self._repaired and (message := self._repaired.get((event.start_mark.line, event.start_mark.column))):
            self._refuse(path, event, message)
            return BROKEN
        text: str = event.value
        if "$" in text and event.style != "'" and path[-1:] != ("env",) and (odd := variable(text, secret=holds_secret(path))):
            self._complain(path, event, odd, severity="warning")
        if event.style:
            return text
        if text.startswith(SECRET_FORMS) and holds_secret(path[-1:]):
            self._refuse(path, event, "a blank is missing behind the colon; or quote it if it is the secret itself")
            return BROKEN
        doubtful = not text or text[0] in NOT_SURELY_TEXT or not text.isascii()
        if doubtful and (odd := surprise(text)):
            self._refuse(path, event, odd)
            return BROKEN
        if _CUT.match(self._text, event.end_mark.index) and holds_secret(path):
            if not text:
                self._refuse(path, event, "is empty, as # begins a comment: quote a secret that begins with it")
                return BROKEN
            message = "YAML ends this secret before ' #': quote it if that belongs to it"
            self._complain(path, event, message, severity="warning")
        if not text:
            self.document.empty.append(path)
        return resolve_scalar(text) if doubtful else text
