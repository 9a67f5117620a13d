"""Weights in huge pages, where Linux gives them.

A step reads all weights, and a processor remembers where some thousand pages are: of 4 KB each, few
megabytes. To look up the others takes time, in a virtual machine twice as much. So once a model has
shown that it is used, the kernel is asked to gather what it packed into pages of 2 MB
(MADV_COLLAPSE, since Linux 6.1). It copies them one by one, in a thread of its own that mostly
rests, while the model goes on; what they hold stays the same, and where there are no huge pages
nothing happens.
"""

from __future__ import annotations

import re
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

_SETTINGS = Path("/sys/kernel/mm/transparent_hugepage")
_MAPS = Path("/proc/self/smaps")
_COLLAPSE = 25  # madvise's MADV_COLLAPSE
IN_USE = 64  # runs of a model, after which it is: moving its weights takes as long as some of them
_REST = 9  # times as long as a page took: all of it at once would halve the speed meanwhile
_REGION = re.compile(r"([0-9a-f]+)-([0-9a-f]+) rw-p \S+ \S+ 0 *(?:\[heap\])?\n((?:\w+:.*\n)+)")
_FILLED = re.compile(r"^Rss: +(\d+) kB$", re.MULTILINE)
_SHARED = re.compile(r"^Shared_(?:Clean|Dirty): +[1-9]", re.MULTILINE)

_alone = threading.Lock()


def gather_in_background() -> None:
    """Of all private memory of this process. It is ended with the process, wherever it is."""
    if sys.platform == "linux":
        with suppress(RuntimeError):  # no thread to be had
            threading.Thread(target=gather, name="gptrt-huge-pages", daemon=True).start()


def gather(rest: float = _REST) -> None:
    """The same, here, with a rest after each page of so many times as long as it took. A system
    without huge pages, or told not to use them, is left alone."""
    import ctypes

    try:
        if "[never]" in (_SETTINGS / "enabled").read_text():
            return
        size = int((_SETTINGS / "hpage_pmd_size").read_text())
        madvise = ctypes.CDLL(None).madvise
        madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
        with _alone:
            for start, end in dense_regions(_MAPS.read_text(), size):
                for page in range(start, end, size):
                    began = time.perf_counter()
                    madvise(page, size, _COLLAPSE)  # what cannot be gathered stays as it is
                    time.sleep(rest * (time.perf_counter() - began))
    except (OSError, ValueError, AttributeError):
        return


def dense_regions(smaps: str, size: int) -> Iterator[tuple[int, int]]:
    """Where private memory begins and ends, in whole pages of `size` bytes; of what is hardly
    filled, none, as a huge page is filled from end to end, nor of what a fork still shares, as each
    process would have its own."""
    for found in _REGION.finditer(smaps):
        first, last = (int(address, 16) for address in found.group(1, 2))
        filled, shared = _FILLED.search(found[3]), _SHARED.search(found[3])
        start, end = -(-first // size) * size, last // size * size
        if start < end and filled and not shared and 2048 * int(filled[1]) >= last - first:
            yield start, end
