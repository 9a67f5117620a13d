"""Decoders that other tools exported, run.

Their graphs share most of our names, but the cache grows: each run takes the keys and values so far
and gives those and the new ones back.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gptrt.cache import KVCache
from gptrt.decoder import (
    Hidden,
    Ids,
    Logits,
    check_capacity,
    check_ids,
    no_hidden_states,
)
from gptrt.engine import Device, Engine
from gptrt.errors import BundleError
from gptrt.foreign import ForeignFolder, warn_of
from gptrt.format import (
    ATTENTION_MASK,
    INPUT_IDS,
    LOGITS,
    NUM_LOGITS_TO_KEEP,
    POSITION_IDS,
)
from gptrt.interrupt import Interrupt
from gptrt.tokenizer import Tokenizer

_USE_CACHE_BRANCH = "use_cache_branch"  # of optimum's merged decoders
_INTEGERS = {"tensor(int64)": np.int64, "tensor(int32)": np.int32, "tensor(bool)": np.bool_}
_FLOATS = {"tensor(float)": "float32", "tensor(float16)": "float16"}


def open_parts(
    folder: ForeignFolder, *, device: Device = "auto", threads: int | None = None
) -> tuple[ForeignDecoder, Tokenizer]:
    """What a generator needs, with a warning that none of it is checked."""
    warn_of(folder)
    return ForeignDecoder(folder, device=device, threads=threads), folder.tokenizer()


@dataclass(frozen=True)
class _Slot:
    """One tensor of the cache: its names, and its shape [..., batch, heads, length, head_dim] with
    None where the batch and the length go."""

    past: str
    present: str
    shape: tuple[int | None, ...]
    dtype: str

    @property
    def itemsize(self) -> int:
        return np.dtype(self.dtype).itemsize

    def empty(self) -> NDArray[Any]:
        """Of one row."""
        *before, _, heads, _, width = self.shape
        return np.zeros((*before, 1, heads, 0, width), self.dtype)  # type: ignore[arg-type]


class ForeignDecoder:
    """A decoder that another tool exported: what `Decoder` is for a bundle of ours.

    Raises what `Engine` does, and BundleError with everything that such a graph should have and
    this one has not.
    """

    def __init__(
        self, folder: ForeignFolder, *, device: Device = "auto", threads: int | None = None
    ) -> None:
        self.context = folder.context
        self.engine = Engine(folder.graph, device=device, threads=threads)
        self._takes = {node.name: node for node in self.engine.inputs}
        gives = {node.name: node for node in self.engine.outputs}
        self._slots, faults = _slots(self._takes, gives, folder.config)
        known = {INPUT_IDS, ATTENTION_MASK, POSITION_IDS, NUM_LOGITS_TO_KEEP, _USE_CACHE_BRANCH}
        ours = self._takes.keys() - {slot.past for slot in self._slots}
        faults += [f"input {name} is unknown" for name in sorted(ours - known)]
        faults += [
            f"input {name} is {self._takes[name].type}"
            for name in sorted(ours & known)
            if self._takes[name].type not in _INTEGERS
        ]
        faults += [f"input {INPUT_IDS} is missing"] if INPUT_IDS not in self._takes else []
        logits = gives.get(LOGITS)
        size = logits.shape[-1] if logits is not None else None
        self.vocab_size = size if isinstance(size, int) else folder.config.get("vocab_size", 0)
        if logits is None or logits.type not in _FLOATS or not self.vocab_size:
            faults.append(f"output {LOGITS} is missing, or of no known type and size")
        if faults:
            raise BundleError(
                f"the inputs and outputs of a decoder with a cache in {folder.graph}",
                found="; ".join(faults),
                do="export it with its cache, as optimum, onnxruntime-genai or mobius do",
            )

    fingerprint = ""  # nobody has hashed its files

    def new_cache(self, capacity: int, batch: int = 1) -> KVCache:
        """An empty cache; its memory grows with what is read."""
        check_capacity(capacity, self.context)
        rows = [
            _GrownRow(self.engine, [slot.empty() for slot in self._slots]) for _ in range(batch)
        ]
        return KVCache.empty(batch, capacity, _Grown(rows))

    def cache_bytes(self, capacity: int, batch: int = 1) -> int:
        """What a cache takes that is full."""
        sizes = (math.prod(s for s in slot.shape if s) * slot.itemsize for slot in self._slots)
        return capacity * batch * sum(sizes)

    def run(
        self,
        ids: Ids | Sequence[Sequence[int]],
        cache: KVCache,
        *,
        keep: int = 1,
        interrupt: Interrupt | None = None,
    ) -> Logits:
        """As `Decoder.run`, one row after the other: each has keys and values of its own length."""
        _, new = check_ids(ids, cache)
        rows: list[_GrownRow] = cache.buffers.each  # type: ignore[attr-defined]
        kept = min(keep or new, new)
        logits = []
        for number, (row, row_ids) in enumerate(zip(rows, ids, strict=True)):
            start = cache.filled[number].length
            logits.append(self._run_row(np.asarray(row_ids), row, start, kept, interrupt))
        cache.advance(new)
        return np.stack(logits)

    def hidden_states(
        self, ids: Sequence[int], cache: KVCache, *, interrupt: Interrupt | None = None
    ) -> Hidden:
        """Raises BundleError: such graphs do not give them."""
        del ids, cache, interrupt
        raise no_hidden_states()

    def _run_row(
        self, ids: Ids, row: _GrownRow, start: int, kept: int, interrupt: Interrupt | None
    ) -> Logits:
        total = start + len(ids)
        row.go_back_to(start)
        values: dict[str, NDArray[Any]] = {
            INPUT_IDS: ids[None],
            ATTENTION_MASK: np.ones((1, total)),
            POSITION_IDS: np.arange(start, total)[None],
            NUM_LOGITS_TO_KEEP: np.full(len(self._shape(NUM_LOGITS_TO_KEEP)) * (1,), kept),
            _USE_CACHE_BRANCH: np.array([start > 0]),
        }
        binding = self.engine.new_binding()
        for name, value in values.items():
            if name in self._takes:
                array: NDArray[Any] = value.astype(_INTEGERS[self._takes[name].type])
                binding.bind_ortvalue_input(name, self.engine.value_of(array))
        for slot, past in zip(self._slots, row.values, strict=True):
            binding.bind_ortvalue_input(slot.past, past)
            binding.bind_output(slot.present, self.engine.device)
        binding.bind_output(LOGITS, "cpu")
        self.engine.run(binding, interrupt)
        *row.values, logits = binding.get_outputs()
        row.length = total
        return np.array(logits.numpy()[0, -kept:], np.float32)

    def _shape(self, name: str) -> Sequence[Any]:
        return self._takes[name].shape if name in self._takes else ()


class _GrownRow:
    """Keys and values of one row as the last run gave them."""

    def __init__(self, engine: Engine, arrays: Sequence[NDArray[Any]]) -> None:
        self._engine = engine
        self.arrays = arrays  # [..., 1, heads, length, head_dim]

    @property
    def arrays(self) -> list[NDArray[Any]]:
        return [value.numpy() for value in self.values]

    @arrays.setter
    def arrays(self, arrays: Sequence[NDArray[Any]]) -> None:
        self.values = [self._engine.value_of(np.ascontiguousarray(array)) for array in arrays]
        self.length = arrays[0].shape[-2]

    def go_back_to(self, length: int) -> None:
        """Forget what was read from position `length` on."""
        if length != self.length:
            self.arrays = [array[..., :length, :] for array in self.arrays]


@dataclass
class _Grown:
    """The rows of a cache, each as long as what it has read."""

    each: list[_GrownRow]

    def rows(self, start: int, stop: int) -> _Grown:
        return _Grown(self.each[start:stop])

    def copy_row(self, source: _Grown, start: int, stop: int) -> None:
        pairs = zip(self.each[0].arrays, source.each[0].arrays, strict=True)
        self.each[0].arrays = [
            np.concatenate((ours[..., :start, :], theirs[..., start:stop, :]), axis=-2)
            for ours, theirs in pairs
        ]

    def read(self, length: int) -> bytes:
        return b"".join(array[..., :length, :].tobytes() for array in self.each[0].arrays)

    def write(self, data: bytes, length: int) -> None:
        at, arrays = 0, []
        for old in self.each[0].arrays:
            shape = (*old.shape[:-2], length, old.shape[-1])
            arrays.append(np.frombuffer(data, old.dtype, math.prod(shape), at).reshape(shape))
            at += arrays[-1].nbytes
        if at != len(data):
            raise ValueError(f"{len(data)} bytes instead of {at}")
        self.each[0].arrays = arrays


def _slots(
    takes: Mapping[str, Any], gives: Mapping[str, Any], config: Mapping[str, Any]
) -> tuple[list[_Slot], list[str]]:
    """The cache of a graph, and what is wrong with it. A cache may be a tensor for each key and
    each value of a layer, or one for both of them, [2, batch, heads, length, head_dim]."""
    slots, faults = [], []
    for past in (name for name in takes if name.startswith("past")):
        rest = past.removeprefix("past_key_values").removeprefix("past")
        names = (f"present{rest}", f"present_key_values{rest}")
        present = next((name for name in names if name in gives), None)
        node = takes[past]
        if present is None:
            faults.append(f"output {names[0]} is missing")
        elif node.type not in _FLOATS or len(node.shape) not in (4, 5):
            faults.append(f"input {past} is {node.type} {node.shape}")
        else:
            *before, _, heads, _, width = node.shape
            heads, width = _heads(heads, config), _width(width, config)
            if not all(isinstance(size, int) for size in (*before, heads, width)):
                faults.append(f"input {past} has the shape {node.shape}, and no config says more")
            shape = (*before, None, heads, None, width)
            slots.append(_Slot(past, present, shape, _FLOATS[node.type]))
    if not slots and not faults:
        faults.append("inputs past_key_values.*.key and .value, or past_*, are missing")
    return slots, faults


def _heads(size: Any, config: Mapping[str, Any]) -> Any:
    keys = ("num_key_value_heads", "num_attention_heads", "n_head")
    return size if isinstance(size, int) else next((config[k] for k in keys if k in config), None)


def _width(size: Any, config: Mapping[str, Any]) -> Any:
    if isinstance(size, int) or "head_dim" in config:
        return size if isinstance(size, int) else config["head_dim"]
    width = config.get("hidden_size", config.get("n_embd"))
    heads = config.get("num_attention_heads", config.get("n_head"))
    divides = isinstance(width, int) and isinstance(heads, int) and heads > 0
    return width // heads if divides and width % heads == 0 else None
