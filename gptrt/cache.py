"""The KV cache: per layer one key and one value buffer that the graph updates in place."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass
class KVCache:
    """What has been read so far, `length` of `capacity` positions in each of `batch` rows.

    `buffers` belongs to the session that made the cache. Positions at or after `length` are never
    read, so going back is setting `length` back.
    """

    batch: int
    capacity: int
    buffers: Any
    length: int = 0
