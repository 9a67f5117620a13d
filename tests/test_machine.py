"""What a process may use, as the files of a container say it."""

from __future__ import annotations

from pathlib import Path

import pytest

from gptrt.machine import cpu_quota, memory_limit, peak_memory, physical_memory


@pytest.mark.parametrize(
    ("files", "cores", "memory"),
    [
        ({"cpu.max": "150000 100000", "memory.max": "1048576"}, 1.5, 1 << 20),
        ({"cpu.max": "max 100000", "memory.max": "max"}, None, None),
        (
            {
                "cpu/cpu.cfs_quota_us": "200000",
                "cpu/cpu.cfs_period_us": "100000",
                "memory/memory.limit_in_bytes": "4096",
            },
            2.0,
            4096,
        ),
        (
            {
                "cpu/cpu.cfs_quota_us": "-1",
                "cpu/cpu.cfs_period_us": "100000",
                "memory/memory.limit_in_bytes": "9223372036854771712",
            },
            None,
            None,
        ),
        ({}, None, None),
    ],
    ids=["version 2", "version 2 without limits", "version 1", "version 1 without limits", "none"],
)
def test_the_limits_of_a_container_are_read(
    tmp_path: Path, files: dict[str, str], cores: float | None, memory: int | None
) -> None:
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text + "\n")
    assert cpu_quota(tmp_path) == cores
    assert memory_limit(tmp_path) == memory


def test_a_process_has_had_more_than_it_made_and_less_than_there_is() -> None:
    held = bytearray(b"x" * (64 << 20))
    peak, there = peak_memory(), physical_memory()
    if peak is not None:
        assert peak > len(held)
    if peak is not None and there is not None:
        assert peak < there
