"""One process of `evbus bench`: reads what to do from standard input, writes what it did to standard output."""

from __future__ import annotations

import sys

from evbus.cli.bench_spec import Link, Result
from evbus.errors import EvbusError


def main() -> int:
    """Run until the work is done, or the parent goes away."""
    link = Link()
    spec = link.spec()
    if spec.asynchronous:
        from evbus.cli.bench_aio import run
    else:
        from evbus.cli.bench_sync import run
    try:
        result = run(spec, link)
    except (EvbusError, OSError) as error:
        result = Result(role=spec.role, problems=[str(error)])
    link.result(result)
    return 0


if __name__ == "__main__":
    sys.exit(main())
