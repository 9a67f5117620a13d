"""How fast this machine reads memory: the limit of decoding, which reads every weight once a token.

Each thread takes the maximum of its own part of a buffer of 512 MiB, far larger than any cache
here; numpy does that with vector instructions and without Python's lock. A worker like those of
the peers, so that its rounds are interleaved with theirs.
"""

from __future__ import annotations

import sys
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np

_BYTES = 512 << 20
_PASSES = 3


def main() -> None:
    threads = int(sys.argv[1])
    parts = np.array_split(np.ones(_BYTES // 4, np.float32), threads)
    with ThreadPoolExecutor(threads) as pool:
        print("{}", flush=True)
        for _ in sys.stdin:
            began = time.perf_counter()
            for _ in range(_PASSES):
                list(pool.map(np.max, parts))
            seconds = time.perf_counter() - began
            print(f'{{"gb_s": {_PASSES * _BYTES / seconds / 1e9}}}', flush=True)


if __name__ == "__main__":
    main()
