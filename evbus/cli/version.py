"""`evbus version`."""

from __future__ import annotations

import argparse
import sys

from evbus._version import __version__
from evbus.cli.common import EXIT_OK, Output

DESCRIPTION = "Print the version."
EXAMPLES = """\
examples:
  evbus version
  evbus version --json
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `evbus version`."""
    parser.add_argument("--json", action="store_true", help="print an object, with the versions of protocol and Python")


def run(args: argparse.Namespace) -> int:
    """Print it."""
    if not args.json:
        Output().line(f"evbus {__version__}")
        return EXIT_OK
    from evbus.wire import PROTOCOL_VERSION_MAX, PROTOCOL_VERSION_MIN

    Output().json(
        {
            "evbus": __version__,
            "protocol": [PROTOCOL_VERSION_MIN, PROTOCOL_VERSION_MAX],
            "python": ".".join(map(str, sys.version_info[:3])),
        }
    )
    return EXIT_OK
