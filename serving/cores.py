"""How many cores this process may use: its affinity and its control group's allowance, whichever is less.

A container that may use half of a 64-core machine's time on one core sees 64 cores; with as many threads the kernel
would stop all of them for most of every period, and the slowest answer would wait for the next.
"""

import math
import os
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

_CGROUPS = Path("/sys/fs/cgroup")
_OWN_CGROUPS = Path("/proc/self/cgroup")


def usable_cores(cgroups: Path = _CGROUPS, own_cgroups: Path = _OWN_CGROUPS) -> int:
    """Return how many cores this process may use, at least 1; part of a core counts as one.

    Control groups are mounted at `cgroups`, and the file `own_cgroups` says which of them this process is in.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    allowed = _allowance(cgroups, own_cgroups)
    return max(1, cores if allowed is None else min(cores, math.ceil(allowed)))


def _allowance(cgroups: Path, own_cgroups: Path) -> float | None:
    """Return the least number of cores that this process's groups and those above them grant; None if they do not say.

    Inside a container the path in `own_cgroups` may be the host's and exist nowhere here; its end, the mount itself, is
    then the container's own group.
    """
    try:
        lines = own_cgroups.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:  # not Linux
        return None
    granted: list[float] = []
    for line in lines:
        _, controllers, path = [*line.split(":", 2), "", ""][:3]
        if not controllers:  # version 2, one tree for all
            granted += [cores for folder in _upwards(cgroups, path) if (cores := _version_2(folder)) is not None]
        elif "cpu" in controllers.split(","):
            for mount in dict.fromkeys((controllers, "cpu", "cpu,cpuacct")):
                folders = _upwards(cgroups / mount, path)
                granted += [cores for folder in folders if (cores := _version_1(folder)) is not None]
    return min(granted, default=None)


def _upwards(mount: Path, path: str) -> Iterator[Path]:
    """Yield the folder of a group, of those above it, and of the mount."""
    group = PurePosixPath(path.lstrip("/"))
    if ".." not in group.parts:  # such a path leads out of what is mounted here
        for step in (group, *group.parents):
            if step != PurePosixPath():
                yield mount / step
    yield mount


def _version_2(folder: Path) -> float | None:
    """Read `cpu.max`: microseconds per period, or the word max."""
    quota, _, period = _read(folder / "cpu.max").partition(" ")
    return _ratio(quota, period or "100000")


def _version_1(folder: Path) -> float | None:
    """Read `cpu.cfs_quota_us`, -1 for no limit, and its period."""
    return _ratio(_read(folder / "cpu.cfs_quota_us"), _read(folder / "cpu.cfs_period_us"))


def _ratio(quota: str, period: str) -> float | None:
    if not (quota.isascii() and quota.isdigit() and period.isascii() and period.isdigit()):
        return None  # "max", "-1", or no such file
    return int(quota) / int(period) if int(quota) and int(period) else None


def _read(file: Path) -> str:
    try:
        return file.read_text(encoding="ascii", errors="replace").strip()
    except OSError:
        return ""
