"""The machine: cores to pin to, the processor time of a process, and what to print beside figures."""

from __future__ import annotations

import contextlib
import os
import platform
import resource
import time
from collections.abc import Iterator

__all__ = ["cores", "cpu_ns", "descriptors", "facts", "pinned", "rss_bytes"]


def cores() -> tuple[int, int] | None:
    """A core for the server and one for the load; None where there is one core only or no way to pin (macOS)."""
    if not hasattr(os, "sched_getaffinity"):
        return None
    usable = sorted(os.sched_getaffinity(0))
    return (usable[0], usable[1]) if len(usable) >= 2 else None


@contextlib.contextmanager
def pinned(core: int | None) -> Iterator[None]:
    """This thread, and every process that it starts meanwhile, runs on one core; None changes nothing."""
    if core is None:
        yield
        return
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {core})
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def cpu_ns(pid: int) -> int:
    """Processor time of a process so far, in nanoseconds: all its threads, user and system, also those that ended."""
    if platform.system() == "Linux":
        # The kernel's own clock of that process (clock_getcpuclockid(3) computes the id like this); exact to the
        # nanosecond, where /proc/PID/stat counts in steps of 10 ms.
        return time.clock_gettime_ns((~pid << 3) | 2)
    import psutil  # type: ignore[import-untyped,unused-ignore]  # the bench extra; needed only where there is no such clock

    times = psutil.Process(pid).cpu_times()
    return int((times.user + times.system) * 1e9)


def rss_bytes(pid: int) -> int:
    """Memory of a process that is in use and resident."""
    try:
        with open(f"/proc/{pid}/statm", encoding="ascii") as statm:
            return int(statm.read().split()[1]) * os.sysconf("SC_PAGESIZE")
    except FileNotFoundError:
        import psutil  # type: ignore[import-untyped,unused-ignore]  # as above

        return int(psutil.Process(pid).memory_info().rss)


def descriptors() -> int:
    """How many files this process may open, after asking for as many as it may."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = min(hard, 1 << 16) if hard != resource.RLIM_INFINITY else 1 << 16
    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(wanted, soft), hard))
    return resource.getrlimit(resource.RLIMIT_NOFILE)[0]


def facts() -> dict[str, object]:
    """What a figure depends on: printed with every table."""
    return {
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "cpu": _cpu_model(),
        "cores": os.cpu_count() or 0,
        "pinned": list(cores() or ()),
        "python": platform.python_version(),
    }


def _cpu_model() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            for line in lines:
                if line.startswith("model name"):
                    return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or "unknown"
