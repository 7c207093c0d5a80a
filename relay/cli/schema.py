"""`relay schema`: print the JSON Schema of the configuration, for editors and other checkers.

It describes what is built, shorthand forms included. A first line `# yaml-language-server: $schema=FILE` makes an editor use it.
"""

import argparse
import json
from typing import Any


def add_parser(subparsers: Any) -> None:
    parser = subparsers.add_parser(
        "schema",
        help="print the JSON Schema of the configuration",
        description="Print the JSON Schema of the configuration, for editors: # yaml-language-server: $schema=FILE",
    )
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    from relay.config.schema import json_schema

    print(json.dumps(json_schema(), indent=2, ensure_ascii=False))
    return 0
