"""What the machine, or the container around us, lets this process use."""

from __future__ import annotations

import os
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
