"""The testing kit: a bus for a test, what was published on it, and faults.

With pytest, in `conftest.py` (or a test module of a project without one)::

    pytest_plugins = ["evbus.testing"]

gives the fixtures `evbus_server`, `evbus_client` and `evbus_memory`. Without pytest::

    from evbus.testing import MemoryBus

    with MemoryBus() as bus:
        client = bus.client()

It is not registered with pytest by itself: that would import evbus in every run of pytest in the environment, and have
pytest rewrite all of evbus's modules, for people who do not test with it. PYTEST_DONT_REWRITE: nothing here is a test,
and it may be imported before pytest looks at it.
"""

from __future__ import annotations

from evbus.testing._bus import Bus, MemoryBus, ServerBus

__all__ = ["Bus", "MemoryBus", "ServerBus"]

#: Loaded by pytest together with this module, so that only pytest imports pytest.
pytest_plugins = ("evbus.testing.fixtures",)
