"""`relay check`: say everything that is wrong with the configuration, one finding a line, and send nothing.

Exit code 0 when the file can be used, 78 when it cannot; `--strict` makes warnings count as 1.
"""

import argparse
import os
from typing import Any

from relay.cli.options import EX_CONFIG, EX_FAILED


def add_parser(subparsers: Any) -> None:
    parser = subparsers.add_parser(
        "check",
        help="validate the configuration",
        description="Validate the configuration file, resolve its secrets, load its certificates. Sends nothing.",
    )
    parser.add_argument("--strict", action="store_true", help="exit with 1 when there are warnings")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    from relay.cli.table import counted
    from relay.config.findings import ConfigError
    from relay.config.load import examine, find_config

    try:
        path = find_config(options.config, os.environ)
    except ConfigError as error:
        print(error)
        return EX_CONFIG
    config, findings = examine(path, os.environ, thorough=True)
    for finding in findings:
        print(finding)
    errors = sum(finding.severity == "error" for finding in findings)
    warnings = len(findings) - errors
    counts = [counted(number, word) for number, word in ((errors, "error"), (warnings, "warning")) if number]
    if config is None:
        print(f"{path}: {', '.join(counts)}")
        return EX_CONFIG
    built = f"{counted(len(config.upstreams), 'upstream')}, {counted(len(config.routes), 'route')}"
    print(f"{path}: {built}: {', '.join(['ok', *counts])}")
    return EX_FAILED if warnings and options.strict else 0
