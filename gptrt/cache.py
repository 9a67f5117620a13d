"""The KV cache: what a sequence has been read of so far, so that it is never read again."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass
class KVCache:
    """`length` of `capacity` positions are filled, in each of `batch` rows.

    `buffers` belong to the decoder that made the cache. Positions from `length` on are never
    looked at, so going back is setting `length` back.
    """

    batch: int
    capacity: int
    buffers: Any = None
    length: int = 0
