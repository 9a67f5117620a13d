"""The decoder: ids and a cache in, logits out.

`run` is the hot path.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gptrt.architecture import ModelConfig
from gptrt.cache import KVCache
from gptrt.engine import Device, Engine
from gptrt.errors import BundleError, PromptError
from gptrt.format import (
    ATTENTION_MASK,
    GRAPH_DATA_FILE,
    GRAPH_FILE,
    HIDDEN_STATES,
    INPUT_IDS,
    LOGITS,
    NUM_LOGITS_TO_KEEP,
    POSITION_IDS,
    Bundle,
    CacheLayout,
    Manifest,
)
from gptrt.interrupt import Interrupt
from gptrt.passes import BoundCache, Pass, cache_names
from gptrt.passes import Ids as Ids

_GRAPH_FILES = (GRAPH_FILE, GRAPH_DATA_FILE)

Logits = NDArray[np.float32]
Hidden = NDArray[np.float32]


class Decoder:
    """A bundle's graph on one device.

    `context` is how many positions there are, `vocab_size` how many ids, `fingerprint` what only
    the same graph and weights have. Threads may call `run` at
    the same time, each with a cache of its own. Raises what `Engine` does, and BundleError if the
    graph is not what the manifest says.
    """

    def __init__(
        self,
        bundle: Bundle,
        *,
        device: Device = "auto",
        threads: int | None = None,
        cuda_graphs: bool = False,
    ) -> None:
        self.manifest = bundle.manifest
        self.context = bundle.manifest.model.n_positions
        self.vocab_size = bundle.manifest.model.vocab_size
        dtype = bundle.manifest.cache.dtype
        graph = bundle.file(GRAPH_FILE)
        self.engine = Engine(
            graph, device=device, threads=threads, cache_dtype=dtype, cuda_graphs=cuda_graphs
        )
        _check_graph(self.engine, self.manifest)
        hashes = sorted((n, f.sha256) for n, f in self.manifest.files.items() if n in _GRAPH_FILES)
        self.fingerprint = hashlib.sha256(repr(hashes).encode()).hexdigest()

    def new_cache(self, capacity: int, batch: int = 1) -> KVCache:
        """An empty cache for `capacity` positions in each of `batch` rows."""
        check_capacity(capacity, self.context)
        layout, memory = self.manifest.cache, self.engine.memory
        shape = (batch, layout.kv_heads, capacity, layout.head_dim)
        values = [memory(shape, layout.dtype) for _ in cache_names(layout)]
        return KVCache.empty(
            batch, capacity, BoundCache(self.engine, layout, self.vocab_size, values)
        )

    def cache_bytes(self, capacity: int, batch: int = 1) -> int:
        """What `new_cache` takes."""
        return cache_bytes(self.manifest.cache, capacity, batch)

    def run(
        self,
        ids: Ids | Sequence[Sequence[int]],
        cache: KVCache,
        *,
        keep: int = 1,
        interrupt: Interrupt | None = None,
    ) -> Logits:
        """Read ids [batch, new] after what each row of `cache` holds: logits float32
        [batch, kept, vocab].

        `keep` asks for the last so many positions, 0 for all. The array is valid until the next
        run with this cache. Prefill and decode are the same call. A batch above 1 takes many ids
        at once only while its cache is empty; of one id a row, rows may be of any length. Raises
        PromptError, and Interrupted, which leaves the cache as it was.
        """
        batch, new = check_ids(ids, cache)
        buffers: BoundCache = cache.buffers  # type: ignore[assignment]
        if new == 1:
            step: Pass = buffers.single(cache.capacity)
        else:
            kept = min(keep or new, new)
            step = Pass(buffers, (batch, new), length=cache.length + new, keep=kept)
        step.load(ids, [row.length for row in cache.filled])
        step.run(interrupt)
        cache.advance(new)
        return step.logits

    def hidden_states(
        self, ids: Sequence[int], cache: KVCache, *, interrupt: Interrupt | None = None
    ) -> Hidden:
        """Read ids as `run` does, in a cache of one row: the last hidden state of each of them,
        float32 [new, n_embd]. Raises BundleError for a bundle that was exported without."""
        if not self.manifest.hidden_states:
            raise no_hidden_states()
        _, new = check_ids([ids], cache)
        buffers: BoundCache = cache.buffers  # type: ignore[assignment]
        step = Pass(buffers, (1, new), length=cache.length + new, keep=1)
        hidden = np.empty((1, new, _width(self.manifest)), np.float32)
        step.bind_output(HIDDEN_STATES, hidden)
        step.load([ids], [cache.length])
        step.run(interrupt)
        cache.advance(new)
        rows: Hidden = hidden[0]
        return rows


def no_hidden_states() -> BundleError:
    """What a decoder without them raises."""
    return BundleError(
        "a bundle that gives hidden states",
        found="one that was exported without",
        do="export it with `gptrt-export convert --hidden-states`",
    )


def _width(manifest: Manifest) -> int:
    assert isinstance(manifest.model, ModelConfig), "foreign graphs have a decoder of their own"
    return manifest.model.n_embd


def cache_bytes(layout: CacheLayout, capacity: int, batch: int) -> int:
    """Of keys and values for `capacity` positions in each of `batch` rows."""
    position = layout.kv_heads * layout.head_dim * np.dtype(layout.dtype).itemsize
    return 2 * layout.layers * position * capacity * batch


def check_capacity(capacity: int, context: int) -> None:
    """Raises PromptError for more positions than there are."""
    if not 1 <= capacity <= context:
        raise PromptError(
            f"1 to {context} tokens", found=f"{capacity}", do="shorten the text or split it"
        )


def check_ids(ids: Ids | Sequence[Sequence[int]], cache: KVCache) -> tuple[int, int]:
    """[batch, new] of ids that `cache` has room for. Raises PromptError."""
    batch, new = len(ids), len(ids[0])
    room = cache.capacity - cache.length
    if new > room or batch != cache.batch or new == 0:
        raise PromptError(
            f"1 to {room} more tokens in {cache.batch} rows",
            found=f"{new} in {batch}",
            do="make the cache as large as prompt and new tokens together",
        )
    if batch > 1 and new > 1 and cache.length:
        raise PromptError(
            "one token at a time in each row", found=f"{new}", do="read the prompts in one run"
        )
    return batch, new


# --- what the graph takes and gives, against the manifest ---------------------------------------

_TYPES = {"float32": "tensor(float)", "float16": "tensor(float16)", "int8": "tensor(int8)"}
_INT64 = "tensor(int64)"


def _check_graph(engine: Engine, manifest: Manifest) -> None:
    """Raises BundleError with every name, type and dimension that is not as promised."""
    layout = manifest.cache
    cache = (_TYPES[layout.dtype], (None, layout.kv_heads, None, layout.head_dim))
    names = cache_names(layout)
    inputs = dict.fromkeys((INPUT_IDS, ATTENTION_MASK, POSITION_IDS), (_INT64, (None, None)))
    optional = {NUM_LOGITS_TO_KEEP: (_INT64, (1,))}
    outputs = {LOGITS: ("tensor(float)", (None, None, manifest.model.vocab_size))}
    if manifest.hidden_states:
        outputs[HIDDEN_STATES] = ("tensor(float)", (None, None, _width(manifest)))
    try:
        faults = [
            *_differences("input", engine.inputs, inputs | {past: cache for past, _ in names}),
            *_differences("optional input", engine.optional_inputs, optional),
            *_differences("output", engine.outputs, outputs | {now: cache for _, now in names}),
        ]
    except UnicodeDecodeError as e:
        faults = [f"a name that is no text: {e}"]
    if faults:
        raise BundleError(
            f"the inputs and outputs of a {layout.layers}-layer decoder",
            found="; ".join(faults),
            do="export the bundle again",
        )


def _differences(
    kind: str, found: list[Any], wanted: Mapping[str, tuple[str, Sequence[int | None]]]
) -> list[str]:
    """None in a wanted shape is any dimension; so is a name or None in a found one."""
    nodes = {node.name: node for node in found}
    faults = [f"{kind} {name} is unknown" for name in nodes if name not in wanted]
    for name, (dtype, shape) in wanted.items():
        if name not in nodes:
            faults.append(f"{kind} {name} is missing")
        elif nodes[name].type != dtype or not _fits(nodes[name].shape, shape):
            faults.append(f"{kind} {name} is {nodes[name].type} {nodes[name].shape}")
    return faults


def _fits(found: list[int | str | None], wanted: Sequence[int | None]) -> bool:
    pairs = zip(found, wanted, strict=False)
    return len(found) == len(wanted) and all(
        w is None or not isinstance(f, int) or f == w for f, w in pairs
    )
