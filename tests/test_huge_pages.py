"""Weights in huge pages: what is gathered, and that a model in use is."""

from __future__ import annotations

import ctypes
import mmap
import subprocess
import sys
from pathlib import Path

import pytest

from gptrt.huge_pages import dense_regions

ROOT = Path(__file__).parents[1]
MB = 1 << 20

SMAPS = """\
00400000-00b00000 r-xp 00000000 08:01 1234 /usr/bin/python
Size:               7168 kB
Rss:                7168 kB
VmFlags: rd ex mr
10000000-10500000 rw-p 00000000 00:00 0 [heap]
Size:               5120 kB
Rss:                4000 kB
Shared_Dirty:          0 kB
VmFlags: rd wr mr
7f0000100000-7f0000900000 rw-p 00000000 00:00 0\x20
Size:               8192 kB
Rss:                8192 kB
VmFlags: rd wr mr
7f1000000000-7f1000800000 rw-p 00000000 00:00 0\x20
Size:               8192 kB
Rss:                1024 kB
VmFlags: rd wr mr
7f1800000000-7f1800800000 rw-p 00000000 00:00 0\x20
Size:               8192 kB
Rss:                8192 kB
Shared_Clean:          0 kB
Shared_Dirty:       8192 kB
VmFlags: rd wr mr
7f2000000000-7f2000800000 rw-p 00000000 08:01 77 /data/weights
Size:               8192 kB
Rss:                8192 kB
VmFlags: rd wr mr
7ffc00000000-7ffc00800000 rw-p 00000000 00:00 0 [stack]
Size:               8192 kB
Rss:                8192 kB
VmFlags: rd wr mr
"""


def test_memory_that_is_private_and_mostly_filled_is_gathered_in_whole_pages() -> None:
    found = list(dense_regions(SMAPS, 2 * MB))
    assert found == [(0x10000000, 0x10400000), (0x7F0000200000, 0x7F0000800000)]


# Prints the text, and the kilobytes in huge pages before it and when they have been gathered.
_USE = """
import threading
from gptrt import Generator
def huge():
    with open("/proc/self/smaps_rollup") as file:
        return next(int(line.split()[1]) for line in file if line.startswith("AnonHugePages"))
asked = {"max_new_tokens": 80, "min_new_tokens": 80}
with Generator(threads=1) as gen:
    before, text = huge(), gen.generate("Once upon a time", **asked)
    for thread in threading.enumerate():
        if thread.name == "gptrt-huge-pages":
            thread.join()
    print(before, huge(), text == gen.generate("Once upon a time", **asked))
"""


def gathers() -> bool:
    """Whether this system makes huge pages when asked."""
    setting = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    if not setting.is_file() or "[never]" in setting.read_text():
        return False
    memory = mmap.mmap(-1, 8 * MB, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory.write(b"x" * (8 * MB))
    start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    aligned = -(-start // (4 * MB)) * 4 * MB
    failed: int = ctypes.CDLL(None).madvise(ctypes.c_void_p(aligned), ctypes.c_size_t(4 * MB), 25)
    return failed == 0


@pytest.mark.skipif(not gathers(), reason="this system makes no huge pages when asked")
def test_a_model_in_use_comes_to_lie_in_huge_pages_and_computes_the_same() -> None:
    done = subprocess.run(
        [sys.executable, "-c", _USE], cwd=ROOT, capture_output=True, text=True, check=True
    )
    before, after, same = done.stdout.split()
    assert int(after) >= int(before) + 4 * 1024
    assert same == "True"
