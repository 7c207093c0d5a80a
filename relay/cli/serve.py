"""`relay serve`: run in the foreground until SIGTERM."""

import argparse
import os
import sys


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = subparsers.add_parser("serve", help="run the relay in the foreground")
    parser.add_argument("-c", "--config", default=argparse.SUPPRESS, help="the configuration file")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    from relay.config.load import ConfigError, find_config, load

    try:
        config = load(find_config(options.config, os.environ))
    except ConfigError as error:
        for finding in error.findings:
            print(finding, file=sys.stderr)
        return 78
    from relay import app

    return app.run(config)
