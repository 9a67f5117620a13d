"""What the machine, or the container around us, lets this process use."""

from __future__ import annotations

import os
import sys
from pathlib import Path


def usable_cores() -> int:
    """Cores that this process may use: its affinity, bounded by the quota of its container."""
    affinity = getattr(os, "sched_getaffinity", None)  # Linux only
    cores = len(affinity(0)) if affinity else os.cpu_count() or 1
    return max(1, min(cores, round(cpu_quota() or cores)))


def cpu_quota(root: Path = Path("/sys/fs/cgroup")) -> float | None:
    """Cores' worth of time that the container may use; None if it is not limited."""
    try:
        if (root / "cpu.max").exists():  # cgroup v2: "quota period", or "max period"
            quota, period = (root / "cpu.max").read_text().split()
        else:  # v1: -1 is no limit
            quota = (root / "cpu/cpu.cfs_quota_us").read_text()
            period = (root / "cpu/cpu.cfs_period_us").read_text()
        return int(quota) / int(period) if int(quota) > 0 else None
    except (OSError, ValueError):
        return None


def memory_limit(root: Path = Path("/sys/fs/cgroup")) -> int | None:
    """Bytes that the container may use; None if it is not limited."""
    for name in ("memory.max", "memory/memory.limit_in_bytes"):  # cgroup v2, v1
        try:
            limit = int((root / name).read_text())
        except (OSError, ValueError):  # not there, or "max"
            continue
        return limit if limit < 1 << 60 else None
    return None


def physical_memory() -> int | None:
    """Bytes that the machine has; None where the system does not tell."""
    return _pages("SC_PHYS_PAGES")


def free_memory() -> int | None:
    """Bytes of it that nobody uses; None where the system does not tell."""
    return _pages("SC_AVPHYS_PAGES")


def _pages(name: str) -> int | None:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf(name)
    except (AttributeError, OSError, ValueError):  # Windows has none of it, macOS not all
        return None


def peak_memory() -> int | None:
    """The most bytes of memory that this process has had; None where the system does not tell.

    What Linux gives through getrusage begins with that of the process which started this one.
    """
    status = Path("/proc/self/status")
    if status.is_file():
        lines = (line.split() for line in status.read_text().splitlines())
        return next((1024 * int(words[1]) for words in lines if words[0] == "VmHWM:"), None)
    try:
        import resource
    except ImportError:  # Windows
        return None
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
