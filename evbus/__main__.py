"""`python -m evbus` is the same as `evbus`."""

from __future__ import annotations

import sys

from evbus.cli import main

if __name__ == "__main__":
    sys.exit(main())
