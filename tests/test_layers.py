"""The walls of the house, enforced: who may import whom, one module per foreign library, names, and sizes.

Reads the source with `ast`, so that an import inside a function or under TYPE_CHECKING counts like any other. The checker is
tested on made-up sources below: every rule is seen to fail.
"""

import ast
import sys
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path

import pytest

PACKAGE = "relay"
ROOT = Path(__file__).resolve().parents[1]

#: Top to bottom. A room imports rooms of lower layers, and itself; its neighbours on the same layer only where ALSO says so.
LAYERS: tuple[frozenset[str], ...] = (
    frozenset({"app", "cli", "__main__"}),
    frozenset({"listener", "admin"}),
    frozenset({"intake", "delivery"}),
    frozenset({"spool", "upstream", "observe"}),
    frozenset({"routing"}),
    frozenset({"config"}),
    frozenset({"mail", "clock", "unix", "sendmail"}),
)
ALSO = {("cli", "app"), ("__main__", "cli")}

#: Which modules may know a foreign library. One that is not listed needs a decision first.
FOREIGN: dict[str, tuple[str, ...]] = {
    "aiosmtpd": ("listener/*.py",),
    "aiosmtplib": ("upstream/opening.py",),
    "apsw": ("spool/sqlite*.py",),
    "cryptography": ("cli/demo*.py", "config/encryption.py", "listener/selfsigned.py", "upstream/assertion.py", "upstream/look.py"),
    "prometheus_client": ("observe/metrics.py",),
    "pydantic": ("config/*.py",),
    "pydantic_core": ("config/*.py",),
    "uvloop": ("app.py",),
    "yaml": ("config/load.py",),
}

FORBIDDEN_NAMES = {"utils", "util", "helpers", "helper", "common", "manager", "misc"}
MODULE_LINES = 400
FUNCTION_LINES = 60


def findings(path: str, source: str) -> list[str]:
    """What is wrong with the module at `path` (relative to the package, with slashes), as `path:line: text`."""
    tree = ast.parse(source)
    found = [*_import_findings(path, tree), *_size_findings(path, source, tree)]
    found += [(1, f"a module is not called {part!r}") for part in Path(path).with_suffix("").parts if part in FORBIDDEN_NAMES]
    return [f"{path}:{line}: {text}" for line, text in sorted(found)]


def _import_findings(path: str, tree: ast.Module) -> Iterator[tuple[int, str]]:
    room = Path(path).parts[0].removesuffix(".py")
    if room == "__init__":
        room = ""
    elif _layer(room) is None:
        yield 1, f"the room {room!r} has no layer"
        return
    for line, name in _imports(path, tree):
        top, _, rest = name.partition(".")
        if top == PACKAGE:
            target = rest.partition(".")[0]
            if target and not (room and _may_import(room, target)):
                yield line, f"{room or PACKAGE} must not import {PACKAGE}.{target}"
        elif top not in sys.stdlib_module_names and not any(fnmatch(path, pattern) for pattern in FOREIGN.get(top, ())):
            yield line, f"{top} is imported only by {', '.join(FOREIGN[top])}" if top in FOREIGN else f"{top} is not a dependency"


def _layer(room: str) -> int | None:
    return next((index for index, rooms in enumerate(LAYERS) if room in rooms), None)


def _may_import(room: str, target: str) -> bool:
    upper, lower = _layer(room), _layer(target)
    if upper is None or lower is None:
        return False
    return room == target or upper < lower or (room, target) in ALSO


def _imports(path: str, tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Every imported module as a dotted name; `from relay import x` names relay.x where x is a room."""
    package = [PACKAGE, *Path(path).parts[:-1]]
    for node in ast.walk(tree):
        match node:
            case ast.Import(names=names):
                yield from ((node.lineno, alias.name) for alias in names)
            case ast.ImportFrom(module=module, names=names, level=level):
                base = ".".join([*(package[: len(package) - level + 1] if level else []), *([module] if module else [])])
                if base == PACKAGE:
                    yield from ((node.lineno, f"{base}.{alias.name}") for alias in names if not _is_dunder(alias.name))
                else:
                    yield node.lineno, base
            case ast.Call(func=ast.Attribute(attr="import_module") | ast.Name(id="import_module" | "__import__"), args=[first, *_]):
                yield node.lineno, _spelled(first)


def _spelled(argument: ast.expr) -> str:
    """The beginning of a computed module name, as far as it stands in the source; `relay.?` when nothing does."""
    if isinstance(argument, ast.JoinedStr) and argument.values:
        argument = argument.values[0]
    if isinstance(argument, ast.Constant) and isinstance(argument.value, str):
        return argument.value
    return f"{PACKAGE}.?"


def _is_dunder(name: str) -> bool:
    return name.startswith("__") and name.endswith("__")


def _size_findings(path: str, source: str, tree: ast.Module) -> Iterator[tuple[int, str]]:
    length = len(source.splitlines())
    if length > MODULE_LINES:
        yield 1, f"{length} lines, at most {MODULE_LINES}"
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.end_lineno:
            length = node.end_lineno - node.lineno + 1
            if length > FUNCTION_LINES:
                yield node.lineno, f"{node.name}() has {length} lines, at most {FUNCTION_LINES}"


MODULES = sorted(file.relative_to(ROOT / PACKAGE).as_posix() for file in (ROOT / PACKAGE).rglob("*.py"))


@pytest.mark.parametrize("path", MODULES)
def test_a_module_stays_within_its_walls(path: str) -> None:
    found = findings(path, (ROOT / PACKAGE / path).read_text())
    assert not found, "\n".join(found)


def test_there_are_modules_to_check() -> None:
    assert "mail/outcome.py" in MODULES


# -- the checker itself ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("mail/reply.py", "import re\nfrom relay.mail.envelope import Recipient"),
        ("mail/reply.py", "from relay import __version__"),
        ("cli/serve.py", "from relay.app import run"),
        ("cli/demo_tls.py", "def f():\n    import cryptography.x509"),
        ("cli/__init__.py", "import importlib\nimportlib.import_module(f'relay.cli.{name}')"),
        ("app.py", "import uvloop\nfrom relay import clock, listener\nimport relay.spool.sqlite"),
        ("listener/server.py", "from relay.intake import Intake\nfrom aiosmtpd.smtp import SMTP"),
        ("spool/sqlite_schema.py", "import apsw"),
        ("config/model.py", "import pydantic\nfrom relay.mail import address"),
        ("__init__.py", "__version__ = '1'"),
        ("__main__.py", "from relay.cli import main"),
        ("delivery/retry.py", "def f():\n" + "    pass\n" * (FUNCTION_LINES - 1)),
        ("delivery/retry.py", "\n" * MODULE_LINES),
    ],
)
def test_what_is_allowed_is_not_found(path: str, source: str) -> None:
    assert findings(path, source) == []


@pytest.mark.parametrize(
    ("path", "source", "finding"),
    [
        ("mail/reply.py", "from relay.config.model import Config", "1: mail must not import relay.config"),
        ("mail/reply.py", "import relay.clock", "1: mail must not import relay.clock"),
        ("mail/reply.py", "from relay import routing", "1: mail must not import relay.routing"),
        ("mail/reply.py", "from .. import routing", "1: mail must not import relay.routing"),
        ("mail/reply.py", "from ..spool.base import Spool", "1: mail must not import relay.spool"),
        ("intake.py", "from relay.delivery.retry import x", "1: intake must not import relay.delivery"),
        ("delivery/attempt.py", "x = 1\nimport relay.intake", "2: delivery must not import relay.intake"),
        ("spool/sqlite.py", "from relay.observe import journal", "1: spool must not import relay.observe"),
        ("config/lint.py", "from relay.routing import match", "1: config must not import relay.routing"),
        ("app.py", "from relay.cli import main", "1: app must not import relay.cli"),
        ("admin/http.py", "def f():\n    from relay.listener import server", "2: admin must not import relay.listener"),
        ("upstream/pool.py", "if TYPE_CHECKING:\n    import relay.app", "2: upstream must not import relay.app"),
        ("upstream/pool.py", "import_module('relay.app')", "1: upstream must not import relay.app"),
        ("upstream/pool.py", "__import__(name)", "1: upstream must not import relay.?"),
        ("__init__.py", "from relay.app import run", "1: relay must not import relay.app"),
        ("listener/server.py", "import relay.attic", "1: listener must not import relay.attic"),
        ("attic/old.py", "", "1: the room 'attic' has no layer"),
        ("config/model.py", "import yaml", "1: yaml is imported only by config/load.py"),
        ("upstream/pool.py", "from aiosmtplib.errors import X", "1: aiosmtplib is imported only by upstream/opening.py"),
        ("spool/memory.py", "import apsw", "1: apsw is imported only by spool/sqlite*.py"),
        ("cli/serve.py", "import uvloop", "1: uvloop is imported only by app.py"),
        ("cli/check.py", "import pydantic", "1: pydantic is imported only by config/*.py"),
        (
            "cli/check.py",
            "from cryptography import x509",
            "1: cryptography is imported only by cli/demo*.py, config/encryption.py, listener/selfsigned.py, "
            "upstream/assertion.py, upstream/look.py",
        ),
        ("intake.py", "import aiosmtpd", "1: aiosmtpd is imported only by listener/*.py"),
        ("intake.py", "import requests", "1: requests is not a dependency"),
        ("delivery/utils.py", "", "1: a module is not called 'utils'"),
        ("spool/common/base.py", "", "1: a module is not called 'common'"),
        ("delivery/retry.py", "\n" * (MODULE_LINES + 1), f"1: {MODULE_LINES + 1} lines, at most {MODULE_LINES}"),
        ("delivery/retry.py", "async def f():\n" + "    pass\n" * FUNCTION_LINES, "1: f() has 61 lines, at most 60"),
    ],
)
def test_what_is_not_allowed_is_found(path: str, source: str, finding: str) -> None:
    assert findings(path, source) == [f"{path}:{finding}"]
