"""The memory that runs are bound to: keys and values, ids that go in, logits that come out.

For the single-token step everything is bound once, when it is first taken, and only rewritten in
place: binding anew costs more than all other Python work of a step.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gptrt.engine import Capture, Engine, Memory
from gptrt.format import (
    ATTENTION_MASK,
    CACHE_PARTS,
    INPUT_IDS,
    LOGITS,
    NUM_LOGITS_TO_KEEP,
    POSITION_IDS,
    CacheLayout,
    past_name,
    present_name,
)
from gptrt.interrupt import Interrupt

Ids = NDArray[np.int64]

_PLAIN_RUNS = 8  # of a step before it is captured, which takes as long as some of them
_SAME = 2**-7  # of the largest logit, between two ways to the same: fp16 knows 11 bits


def cache_names(layout: CacheLayout) -> list[tuple[str, str]]:
    """Past and present of every key and value."""
    slots = ((layer, part) for layer in range(layout.layers) for part in CACHE_PARTS)
    return [(past_name(*slot), present_name(*slot)) for slot in slots]


class BoundCache:
    """The memory of one cache: keys and values on the device, and the single-token step.

    `values` are [batch, kv_heads, capacity, head_dim] each, in the order of `cache_names`.
    """

    def __init__(
        self, engine: Engine, layout: CacheLayout, vocab_size: int, values: Sequence[Memory]
    ) -> None:
        self.engine, self.vocab_size, self.values = engine, vocab_size, values
        self._layout = layout
        self._single: SingleStep | None = None

    def single(self, capacity: int) -> SingleStep:
        """Made when it is first needed, then kept."""
        if self._single is None:
            kind = SingleStep if self.engine.cuda is None else CudaStep
            self._single = kind(self, self.values[0].shape[0], capacity)
        return self._single

    def bind(self, binding: Any) -> None:
        """As past and as present: the same memory, updated in place."""
        names = cache_names(self._layout)
        for (past, present), memory in zip(names, self.values, strict=True):
            place = (memory.device, 0, memory.dtype, memory.shape, memory.pointer)
            binding.bind_input(past, *place)
            binding.bind_output(present, *place)

    def rows(self, start: int, stop: int) -> BoundCache:
        values = [memory.rows(start, stop) for memory in self.values]
        return BoundCache(self.engine, self._layout, self.vocab_size, values)

    def copy_row(self, source: BoundCache, start: int, stop: int) -> None:
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


class Pass:
    """The bound memory of a run over ids [batch, new] with a mask [batch, length]."""

    def __init__(
        self, buffers: BoundCache, shape: tuple[int, int], *, length: int, keep: int
    ) -> None:
        batch, self._new = shape
        self._engine = buffers.engine
        self._ids, self._positions = (np.zeros(shape, np.int64) for _ in range(2))
        self._mask = np.zeros((batch, length), np.int64)
        self._keep = np.array([keep], np.int64)
        self.logits = np.empty((batch, keep, buffers.vocab_size), np.float32)
        self.binding = buffers.engine.new_binding()
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


class SingleStep(Pass):
    """One token a row, again and again: bound once, three numbers a row rewritten.

    A step of a large model has just streamed all its weights through the caches, so whatever runs
    here runs cold: writing through memoryviews takes a tenth of what array assignment does.
    The mask has its full length from the start; the graph counts the ones in each row.
    """

    def __init__(self, buffers: BoundCache, batch: int, capacity: int) -> None:
        super().__init__(buffers, (batch, 1), length=capacity, keep=1)
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


class CudaStep(SingleStep):
    """The same where inputs and logits have twins in the memory of the card, so that what is bound
    stays bound, and a CUDA graph can be captured over it."""

    _plain_runs = 0
    _capture: Capture | None = None

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
