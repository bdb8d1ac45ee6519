"""Check that enough memory is free."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

from ._checks import problem

_MEMINFO, _CGROUP = Path("/proc/meminfo"), Path("/sys/fs/cgroup")


def free_memory() -> int | None:
    """The free bytes of this machine and its container, or None if unknown."""
    free = []
    with suppress(OSError):
        lines = _MEMINFO.read_text(encoding="utf-8").splitlines()
        free += [1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")]
    if not free and hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        free.append(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    for folder, limit, usage in (
        (_CGROUP, "memory.max", "memory.current"),
        (_CGROUP / "memory", "memory.limit_in_bytes", "memory.usage_in_bytes"),
    ):
        with suppress(OSError, ValueError, KeyError):  # the file is missing, or the limit is "max"
            most, taken = (int((folder / name).read_text()) for name in (limit, usage))
            stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
            cached = int(stat["active_file"]) + int(stat["inactive_file"])  # can be dropped
            free.append(most - taken + cached)
    return min(free, default=None)


def check_memory(what: str, needed: int, fix: str) -> None:
    """Raise if many bytes are needed and fewer are free. Otherwise the system might kill a training hours later."""
    free = free_memory() if needed > 2**28 else None
    if free is not None and needed > free:
        rule = f"{what} takes {needed / 2**30:.1f} GiB, which must be free"
        raise problem(rule, got=f"{free / 2**30:.1f} GiB", fix=fix)
