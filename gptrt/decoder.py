"""The decoder: ids and a cache in, logits out.

`run` is the hot path. For the single-token step everything is bound once, when the cache is made,
and only rewritten in place: binding anew costs more than all other Python work of a step.
"""

from __future__ import annotations

import hashlib
import math
import warnings
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from gptrt.architecture import ModelConfig
from gptrt.cache import KVCache
from gptrt.engine import Capture, Device, Engine, Memory
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
    past_name,
    present_name,
)
from gptrt.interrupt import Interrupt

_GRAPH_FILES = (GRAPH_FILE, GRAPH_DATA_FILE)
_PLAIN_RUNS = 8  # of a step before it is captured, which takes as long as some of them
_SAME = 2**-7  # of the largest logit, between two ways to the same: fp16 knows 11 bits

Ids = NDArray[np.int64]
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
        values = [memory(shape, layout.dtype) for _ in _cache_names(layout)]
        return KVCache.empty(batch, capacity, _Buffers(self, values))

    def cache_bytes(self, capacity: int, batch: int = 1) -> int:
        """What `new_cache` takes."""
        layout = self.manifest.cache
        return 2 * layout.layers * batch * capacity * position_bytes(layout)

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
        buffers: _Buffers = cache.buffers  # type: ignore[assignment]
        if new == 1:
            step: _Pass = buffers.single(cache.capacity)
        else:
            kept = min(keep or new, new)
            step = _Pass(self, buffers, (batch, new), length=cache.length + new, keep=kept)
        step.load(ids, [row.length for row in cache.filled])
        step.run(interrupt)
        cache.advance(new)
        return step.logits

    def hidden_states(
        self, ids: Sequence[int], cache: KVCache, *, interrupt: Interrupt | None = None
    ) -> Hidden:
        """Read ids as `run` does, in a cache of one row: what the head reads of each of them,
        float32 [new, n_embd]. Raises BundleError for a bundle that was exported without."""
        if not self.manifest.hidden_states:
            raise no_hidden_states()
        _, new = check_ids([ids], cache)
        step = _Pass(self, cache.buffers, (1, new), length=cache.length + new, keep=1)  # type: ignore[arg-type]
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


def position_bytes(layout: CacheLayout) -> int:
    """Of one key or value of one position in one layer."""
    return layout.kv_heads * layout.head_dim * np.dtype(layout.dtype).itemsize


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


class _Buffers:
    """The memory of one cache: keys and values on the device, and the single-token step."""

    def __init__(self, decoder: Decoder, values: Sequence[Memory]) -> None:
        self.values = values  # [batch, kv_heads, capacity, head_dim] each
        self._decoder = decoder
        self._single: _SingleStep | None = None

    def single(self, capacity: int) -> _SingleStep:
        """Made when it is first needed, then kept."""
        if self._single is None:
            kind = _SingleStep if self._decoder.engine.cuda is None else _CudaStep
            self._single = kind(self._decoder, self, self.values[0].shape[0], capacity)
        return self._single

    def bind(self, binding: Any) -> None:
        """As past and as present: the same memory, updated in place."""
        names = _cache_names(self._decoder.manifest.cache)
        for (past, present), memory in zip(names, self.values, strict=True):
            place = (memory.device, 0, memory.dtype, memory.shape, memory.pointer)
            binding.bind_input(past, *place)
            binding.bind_output(present, *place)

    def rows(self, start: int, stop: int) -> _Buffers:
        return _Buffers(self._decoder, [memory.rows(start, stop) for memory in self.values])

    def copy_row(self, source: _Buffers, start: int, stop: int) -> None:
        for memory, other in zip(self.values, source.values, strict=True):
            memory.copy_positions(other, start, stop)

    def read(self, length: int) -> bytes:
        return b"".join(memory.positions(length).tobytes() for memory in self.values)

    def write(self, data: bytes, length: int) -> None:
        at = 0
        for memory in self.values:
            shape = (memory.shape[1], length, memory.shape[3])
            values = np.frombuffer(data, memory.dtype, math.prod(shape), at)
            memory.set_positions(values.reshape(shape))
            at += values.nbytes
        if at != len(data):
            raise ValueError(f"{len(data)} bytes instead of {at}")


class _Pass:
    """The bound memory of a run over ids [batch, new] with a mask [batch, length]."""

    def __init__(
        self, decoder: Decoder, buffers: _Buffers, shape: tuple[int, int], *, length: int, keep: int
    ) -> None:
        batch, self._new = shape
        self._engine = decoder.engine
        self._ids, self._positions = (np.zeros(shape, np.int64) for _ in range(2))
        self._mask = np.zeros((batch, length), np.int64)
        self._keep = np.array([keep], np.int64)
        self.logits = np.empty((batch, keep, decoder.vocab_size), np.float32)
        self.binding = decoder.engine.new_binding()
        buffers.bind(self.binding)
        self._bind()

    def _bind(self) -> None:
        self.bind_output(LOGITS, self.logits)
        self._bind_inputs()

    def bind_output(self, name: str, array: NDArray[np.float32]) -> None:
        """Have a run fill the array."""
        self.binding.bind_output(name, "cpu", 0, np.float32, array.shape, array.ctypes.data)

    def load(self, ids: Ids | Sequence[Sequence[int]], starts: Sequence[int]) -> None:
        """Take ids [batch, new] for the positions from `starts` [batch] on."""
        self._ids[...] = ids
        self._positions[...] = np.array(starts)[:, None] + np.arange(self._new)
        self._mask[:] = 1  # rows of a pass are equally long
        if self._engine.device != "cpu":  # binding copied the values of then
            self._bind_inputs()

    def run(self, interrupt: Interrupt | None = None) -> None:
        """From what was loaded to the logits."""
        self._engine.run(self.binding, interrupt)

    def _bind_inputs(self) -> None:
        for name, array in (
            (INPUT_IDS, self._ids),
            (ATTENTION_MASK, self._mask),
            (POSITION_IDS, self._positions),
            (NUM_LOGITS_TO_KEEP, self._keep),
        ):
            pointer = array.ctypes.data
            self.binding.bind_input(name, "cpu", 0, np.int64, array.shape, pointer)


class _SingleStep(_Pass):
    """One token a row, again and again: bound once, three numbers a row rewritten.

    A step of a large model has just streamed all its weights through the caches, so whatever runs
    here runs cold: writing through memoryviews takes a tenth of what array assignment does.
    The mask has its full length from the start; the graph counts the ones in each row.
    """

    def __init__(self, decoder: Decoder, buffers: _Buffers, batch: int, capacity: int) -> None:
        super().__init__(decoder, buffers, (batch, 1), length=capacity, keep=1)
        self._capacity = capacity
        self._filled = [0] * batch  # ones in each row of the mask
        arrays = (self._ids, self._positions, self._mask)
        self._id_at, self._position_at, self._mask_at = (a.reshape(-1).data for a in arrays)

    def load(self, ids: Ids | Sequence[Sequence[int]], starts: Sequence[int]) -> None:
        for row, ((token,), start) in enumerate(zip(ids, starts, strict=True)):
            if self._filled[row] != start:  # after a longer pass, or after going back
                self._mask[row, :start] = 1
                self._mask[row, start:] = 0
            self._id_at[row] = token
            self._position_at[row] = start
            self._mask_at[row * self._capacity + start] = 1
            self._filled[row] = start + 1


class _CudaStep(_SingleStep):
    """The same where inputs and logits have twins in the memory of the card, so that what is bound
    stays bound, and a CUDA graph can be captured over it."""

    def _bind(self) -> None:
        cuda, memory = self._engine.cuda, self._engine.memory
        assert cuda is not None
        self._cuda, (batch, capacity) = cuda, self._mask.shape
        # All that changes lies side by side: it takes one copy.
        self._inputs = cuda.pinned((batch * (2 + capacity),), np.int64)
        self._twin = memory(self._inputs.shape, "int64")
        sizes, at = (batch, batch, batch * capacity), 0
        parts = []
        for name, size in zip((INPUT_IDS, POSITION_IDS, ATTENTION_MASK), sizes, strict=True):
            shape = (batch, size // batch)
            parts.append(self._inputs[at : at + size].reshape(shape))
            self.binding.bind_input(
                name, "cuda", 0, np.int64, shape, self._twin.pointer + at * self._inputs.itemsize
            )
            at += size
        self._ids, self._positions, self._mask = parts
        keep = self._keep
        self.binding.bind_input(
            NUM_LOGITS_TO_KEEP, "cpu", 0, np.int64, keep.shape, keep.ctypes.data
        )
        self.logits = cuda.pinned(self.logits.shape, np.float32)
        self._logits_twin = memory(self.logits.shape, "float32")
        place = (0, np.float32, self.logits.shape, self._logits_twin.pointer)
        self.binding.bind_output(LOGITS, "cuda", *place)
        self._plain_runs = 0
        self._capture: Capture | None = None

    def run(self, interrupt: Interrupt | None = None) -> None:
        self._cuda.copy(self._twin.pointer, self._inputs.ctypes.data, self._inputs.nbytes)
        if self._capture is not None:
            if interrupt is not None:
                interrupt.check()
            self._replay(self._capture)
            return
        self._engine.run(self.binding, interrupt)
        self._fetch()
        self._plain_runs += 1
        if self._plain_runs == _PLAIN_RUNS and self._engine.captures:
            self._capture = self._checked_capture()

    def _checked_capture(self) -> Capture | None:
        """The last run once more, captured; nothing and a warning if it gives something else."""
        plain, capture = self.logits.copy(), self._engine.new_capture()
        self._replay(capture)
        apart, large = np.abs(self.logits - plain).max(), np.abs(plain).max()
        if apart <= _SAME * large:
            return capture
        why = f"a CUDA graph gave logits that are {apart:.3g} from those without: going on without"
        warnings.warn(why, RuntimeWarning, stacklevel=2)
        self.logits[...] = plain
        return None

    def _replay(self, capture: Capture) -> None:
        self._engine.run(self.binding, capture=capture)
        self._fetch()

    def _fetch(self) -> None:
        logits = self.logits
        self._cuda.copy(logits.ctypes.data, self._logits_twin.pointer, logits.nbytes)


def _cache_names(layout: CacheLayout) -> list[tuple[str, str]]:
    """Past and present of every key and value."""
    parts: tuple[Literal["key", "value"], ...] = ("key", "value")
    return [(past_name(n, p), present_name(n, p)) for n in range(layout.layers) for p in parts]


# --- what the graph takes and gives, against the manifest ---------------------------------------

_TYPES = {"float32": "tensor(float)", "float16": "tensor(float16)", "int8": "tensor(int8)"}
_INT64 = "tensor(int64)"


def _check_graph(engine: Engine, manifest: Manifest) -> None:
    """Raises BundleError with every name, type and dimension that is not as promised."""
    layout = manifest.cache
    cache = (_TYPES[layout.dtype], (None, layout.kv_heads, None, layout.head_dim))
    names = _cache_names(layout)
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
