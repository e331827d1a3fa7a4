"""What a measurement depends on: the machine, the versions, and what else ran on it meanwhile.

All of it comes from /proc; where there is none (not Linux) the answer is None or 0, never an error.
"""

import importlib.metadata
import os
import platform
import re
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

QUIET = 0.25
"""Cores that other processes may use while something is measured; beyond that the measurement is noisy."""


def machine() -> dict[str, Any]:
    """Return the processor, the cores this process may use, the memory in GiB and the system."""
    return {"processor": processor(), "cores": cores(), "memory_gib": memory_gib(), "system": platform.platform()}


def processor() -> str:
    """Return the processor's name."""
    try:
        found = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    except OSError:
        found = None
    return found[1] if found else platform.processor() or platform.machine()


def cores() -> int:
    """Return how many cores this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def memory_gib() -> float | None:
    """Return the machine's memory in GiB; None where nobody knows."""
    try:
        found = re.search(r"MemTotal:\s*(\d+) kB", Path("/proc/meminfo").read_text())
    except OSError:
        return None
    return round(int(found[1]) / 2**20, 1) if found else None


def versions(*packages: str) -> dict[str, str]:
    """Return the versions of Python and of those packages that are installed."""
    found = {"python": platform.python_version()}
    for package in packages:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def today() -> str:
    """Return the date as YYYY-MM-DD."""
    return time.strftime("%Y-%m-%d")


def busy_seconds() -> float | None:
    """Return the processor seconds that all processes used since the machine started; None where nobody knows."""
    try:
        fields = [int(field) for field in Path("/proc/stat").read_text().splitlines()[0].split()[1:]]
    except OSError:
        return None
    user, nice, system, _idle, _wait, interrupt, soft = fields[:7]
    return (user + nice + system + interrupt + soft) / os.sysconf("SC_CLK_TCK")


def foreign(busy_before: float | None, began: float, ours: float) -> float | None:
    """Return how many cores other processes used since `began` (of time.perf_counter); None where nobody knows.

    Args:
        busy_before: what `busy_seconds` said then.
        began: when.
        ours: processor seconds that were our own since then.
    """
    busy = busy_seconds()
    if busy is None or busy_before is None:
        return None
    return round(max(0.0, (busy - busy_before - ours) / (time.perf_counter() - began)), 2)


def processes(session: int) -> list[int]:
    """Return the processes of a session (that of a process started with `start_new_session`), and their descendants."""
    parents: dict[int, int] = {}
    found = set()
    for pid, fields in _stats():
        parents[pid] = int(fields[1])
        if int(fields[3]) == session:
            found.add(pid)
    grown = True
    while grown:
        children = {pid for pid, parent in parents.items() if parent in found} - found
        found |= children
        grown = bool(children)
    return sorted(found)


def cpu_seconds(pids: Iterable[int]) -> float:
    """Return the processor seconds that processes used so far; those that are gone count nothing."""
    ticks = 0
    for pid in pids:
        fields = _stat(pid)
        if fields is not None:
            ticks += int(fields[11]) + int(fields[12])
    return ticks / os.sysconf("SC_CLK_TCK")


def memory(pids: Iterable[int]) -> dict[str, float]:
    """Return the megabytes (10^6 bytes) that processes hold: resident, and with shared pages counted once (pss)."""
    total = {"resident_mb": 0.0, "pss_mb": 0.0}
    for pid in pids:
        try:
            text = Path(f"/proc/{pid}/smaps_rollup").read_text()
        except OSError:  # it ended
            continue
        for key, name in (("resident_mb", "Rss"), ("pss_mb", "Pss")):
            found = re.search(rf"^{name}:\s*(\d+) kB", text, re.MULTILINE)
            total[key] += int(found[1]) * 1024 / 1e6 if found else 0.0
    return {key: round(value, 1) for key, value in total.items()}


def _stats() -> Iterator[tuple[int, list[str]]]:
    for folder in Path("/proc").glob("[0-9]*"):
        fields = _stat(int(folder.name))
        if fields is not None:
            yield int(folder.name), fields


def _stat(pid: int) -> list[str] | None:
    """Return the fields of /proc/PID/stat from the state on: 0 state, 1 parent, 3 session, 11 user, 12 system time."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
