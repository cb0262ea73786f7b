"""`evbus run`: a worker process for handlers that a module declares."""

from __future__ import annotations

import argparse
import importlib
import logging
import os
import signal
import sys
import threading
import time
from types import ModuleType
from typing import TYPE_CHECKING, Any, Final

from evbus.cli.common import (
    EXIT_OK,
    EXIT_TIMEOUT,
    CommandError,
    UsageError,
    add_client_options,
    connect_options,
    say,
    server_url,
)
from evbus.cli.ending import Ending
from evbus.cli.lasting import add_lasting_options, lasting_error
from evbus.cli.values import duration
from evbus.errors import ConnectionLostError, EvbusError

if TYPE_CHECKING:
    from evbus.client import EventClient
    from evbus.message import Message
    from evbus.routers import EventRouter

DESCRIPTION = """\
Run the handlers of routers until SIGTERM or Ctrl-C. MODULE:NAME is an EventRouter called NAME in a module that can be
imported from here. The line "running" on standard error says that all handlers are subscribed. A signal ends it in
order: no more messages are taken in, those that wait are handled, and what was published is sent; another signal ends
it at once."""
EXAMPLES = """\
examples:
  evbus run archive:router
  evbus run shop.orders:router shop.mails:router -s 127.0.0.1:9100
  evbus run archive:router --app-dir src --drain 30
"""

_LOG_LEVELS: Final = ("debug", "info", "warning", "error")
_STOPPED: Final = 0

_log = logging.getLogger("evbus.run")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `evbus run`."""
    parser.add_argument("router", metavar="MODULE:NAME", nargs="+", help="routers, as archive:router")
    parser.add_argument(
        "--app-dir", default=".", metavar="DIR", help="where modules are looked for first (default: this directory)"
    )
    parser.add_argument(
        "--drain",
        type=duration,
        default=10.0,
        metavar="SECONDS",
        help="what a signal gives handlers to finish what waits; exit code 4 if they do not (default: %(default)g)",
    )
    parser.add_argument("--codec", choices=("msgpack", "json"), default="msgpack", help="for what handlers answer")
    parser.add_argument(
        "--log-level", choices=_LOG_LEVELS, default="info", help="of the log on standard error (default: %(default)s)"
    )
    add_lasting_options(parser)
    add_client_options(parser)


def run(args: argparse.Namespace) -> int:
    """Run the handlers until a signal comes."""
    import evbus

    # Before the modules are imported, so that what they log then is seen, and their own settings win.
    logging.basicConfig(
        format="%(asctime)s.%(msecs)03d %(levelname)s %(name)s: %(message)s",
        datefmt="%Y-%m-%d %H:%M:%S",
        level="DEBUG" if args.verbose else args.log_level.upper(),
    )
    routers = _load(args.router, args.app_dir)
    with Ending["int | Exception"]() as ending:
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda number, _frame: ending.put(number))

        def on_error(error: BaseException, message: Message | None) -> None:
            lasting = lasting_error(error, reconnects=args.reconnect)
            if lasting is not None:
                ending.put(lasting)
            elif message is None and not isinstance(error, ConnectionLostError):  # those the client has logged
                _log.error("%s", error)

        client = evbus.connect(
            server_url(args), name="evbus run", codec=args.codec, on_error=on_error, **connect_options(args)
        )
        with client:
            count = sum(len(_include(client, name, router)) for name, router in routers.items())
            # Whatever the log level is: whoever started us waits for it.
            say(f"running {count} handler{'s' if count != 1 else ''} of {', '.join(routers)} on {client.address}")
            return _stop(client, _first(ending), ending, args.drain)


def _include(client: EventClient, name: str, router: EventRouter) -> list[Any]:
    try:
        return client.include(router)
    except (TypeError, ValueError) as error:  # a handler or a subject that makes no sense
        raise UsageError(f"{name}: {error}") from error


def _first(ending: Ending[int | Exception]) -> int:
    """The number of the signal that ends us. Raises what ends us otherwise."""
    what = ending.wait()
    if isinstance(what, Exception):
        raise what
    return what


def _stop(client: EventClient, number: int, ending: Ending[int | Exception], drain_s: float) -> int:
    _log.info("%s: stopping; another one stops at once", signal.Signals(number).name)
    begun = time.monotonic()

    def stop() -> None:
        client.disconnect(timeout=drain_s)
        ending.put(_STOPPED)

    threading.Thread(target=stop, daemon=True).start()
    what = ending.wait()
    while isinstance(what, Exception):  # a connection lost on the way; the disconnect ends all the same
        _log.error("%s", what)
        what = ending.wait()
    if what != _STOPPED:
        # Handlers are at work that nobody waits for any more, and the interpreter's own end might.
        logging.shutdown()
        os._exit(128 + what)
    if time.monotonic() - begun >= drain_s:
        say(f"handlers did not finish within {drain_s:g} s; what waited for them is discarded")
        return EXIT_TIMEOUT
    return EXIT_OK


# --- finding routers --------------------------------------------------------------------------------------------------


def _load(names: list[str], app_dir: str) -> dict[str, EventRouter]:
    """The routers by their names as given.

    Raises:
        UsageError: a name leads to no router.
        CommandError: a module of the user's raises; its traceback is on standard error.
    """
    if not os.path.isdir(app_dir):
        raise UsageError(f"--app-dir {app_dir}: there is no such directory")
    sys.path.insert(0, os.path.abspath(app_dir))
    return {name: _load_one(name, app_dir) for name in names}


def _load_one(name: str, app_dir: str) -> EventRouter:
    from evbus.routers import EventRouter

    module_name, colon, path = name.partition(":")
    if not colon or not all(part.isidentifier() for part in [*module_name.split("."), *path.split(".")]):
        raise UsageError(f"{name!r} is not MODULE:NAME, as in archive:router")
    module = _import(module_name, app_dir)
    found: Any = module
    for part in path.split("."):
        if not hasattr(found, part):
            there = ", ".join(repr(f"{module_name}:{key}") for key in _routers_in(module, EventRouter))
            hint = f"; there is {there}" if there else "; and it has no EventRouter of another name either"
            raise UsageError(f"module {module_name!r} has no {path!r}{hint}")
        found = getattr(found, part)
    if not isinstance(found, EventRouter):
        raise UsageError(f"{name!r} is a {type(found).__qualname__}, not an EventRouter")
    if not any(True for _ in found.declared()):
        raise UsageError(f"{name!r} declares no handlers")
    return found


def _routers_in(module: ModuleType, kind: type) -> list[str]:
    return [name for name, value in vars(module).items() if isinstance(value, kind)]


def _import(name: str, app_dir: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is not None and (name == error.name or name.startswith(f"{error.name}.")):
            raise UsageError(
                f"there is no module {error.name!r} in {os.path.abspath(app_dir)}, nor installed; "
                "--app-dir says where modules are"
            ) from None
        raise CommandError(f"module {name!r} needs {error.name!r}, which is not installed") from error
    except EvbusError as error:
        _log.exception("importing %s", name)
        raise UsageError(f"module {name!r}: {error}") from error
    except Exception as error:
        _log.exception("importing %s", name)
        raise CommandError(f"module {name!r} cannot be imported: {type(error).__name__}: {error}") from error
