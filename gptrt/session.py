"""The session: ids and a cache in, logits out. The one file of the runtime that knows onnxruntime.

`run` is the hot path. For the single-token step everything is bound once, when the cache is made,
and only rewritten in place: binding anew costs more than all other Python work of a step.
"""

from __future__ import annotations

import os
import sys
import time
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from gptrt.cache import KVCache
from gptrt.errors import BundleError, DependencyError, DeviceError, OptionError, PromptError
from gptrt.format import (
    ATTENTION_MASK,
    GRAPH_FILE,
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
from gptrt.machine import usable_cores

Ids = NDArray[np.int64]
Logits = NDArray[np.float32]
Device = Literal["auto", "cpu", "cuda"]


class Session:
    """A bundle's graph on one device.

    Threads may call `run` at the same time, each with a cache of its own. `graph_seconds` adds up
    the time spent inside onnxruntime; with several threads it is only roughly right.

    "auto" is CUDA where onnxruntime has it and the bundle is in float16, else the CPU. Raises
    DependencyError without onnxruntime, DeviceError if the device cannot run the bundle,
    OptionError for an impossible number of threads, BundleError if the graph is damaged or is not
    what the manifest says.
    """

    def __init__(
        self, bundle: Bundle, *, device: Device = "auto", threads: int | None = None
    ) -> None:
        self.manifest = bundle.manifest
        self.threads = _checked_threads(threads)
        self.graph_seconds = 0.0
        self._ort = import_onnxruntime()
        self.device, self._session = self._open(bundle.file(GRAPH_FILE), device)
        _check_graph(self._session, self.manifest)

    def new_cache(self, capacity: int, batch: int = 1) -> KVCache:
        """An empty cache for `capacity` positions in each of `batch` rows."""
        longest = self.manifest.cache.max_length
        if not 1 <= capacity <= longest:
            raise PromptError(
                f"1 to {longest} tokens", found=f"{capacity}", do="shorten the text or split it"
            )
        return KVCache(batch, capacity, _Buffers(self, capacity, batch))

    def run(self, ids: Ids | Sequence[Sequence[int]], cache: KVCache, *, keep: int = 1) -> Logits:
        """Read ids [batch, new] after what `cache` holds: logits float32 [batch, kept, vocab].

        `keep` asks for the last so many positions, 0 for all. The array is valid until the next
        run with this cache. Prefill and decode are the same call. Rows are equally long; a batch
        above 1 takes many ids at once only while its cache is empty. Raises PromptError.
        """
        batch, new = len(ids), len(ids[0])
        total = cache.length + new
        if total > cache.capacity or batch != cache.batch or new == 0:
            raise PromptError(
                f"1 to {cache.capacity - cache.length} more tokens in {cache.batch} rows",
                found=f"{new} in {batch}",
                do="make the cache as large as prompt and new tokens together",
            )
        if batch > 1 and new > 1 and cache.length:
            raise PromptError(
                "one token at a time in each row", found=f"{new}", do="read the prompts in one run"
            )
        buffers: _Buffers = cache.buffers
        if new == 1:
            step: _Pass = buffers.single
        else:
            kept = min(keep or new, new)
            step = _Pass(self, buffers, (batch, new), length=total, keep=kept)
        step.load(ids, cache.length)
        began = time.perf_counter()
        self._session.run_with_iobinding(step.binding)
        self.graph_seconds += time.perf_counter() - began
        cache.length = total
        return step.logits

    def new_binding(self) -> Any:
        """An IOBinding of onnxruntime, nothing bound yet."""
        return self._session.io_binding()

    def cache_value(self, shape: tuple[int, ...]) -> Any:
        """Memory on the device for the keys or the values of one layer."""
        dtype = np.dtype(self.manifest.cache.dtype)
        return self._ort.OrtValue.ortvalue_from_shape_and_type(shape, dtype, self.device, 0)

    def _open(self, path: Path, device: Device) -> tuple[Literal["cpu", "cuda"], Any]:
        """The device that it came to be and onnxruntime's session on it."""
        if device not in ("auto", "cpu", "cuda"):
            raise DeviceError("device auto, cpu or cuda", found=repr(device), do="choose one")
        if device == "cpu":
            return "cpu", self._open_on(path, "cpu")
        try:
            _check_cuda(self._ort, self.manifest.cache)
            return "cuda", self._open_on(path, "cuda")
        except DeviceError:
            if device == "cuda":
                raise
            return "cpu", self._open_on(path, "cpu")

    def _open_on(self, path: Path, device: Literal["cpu", "cuda"]) -> Any:
        ort, provider = self._ort, _PROVIDERS[device]
        options = ort.SessionOptions()
        options.intra_op_num_threads = self.threads  # unset, it is the number of the host's cores
        options.inter_op_num_threads = 1
        options.execution_mode = ort.ExecutionMode.ORT_SEQUENTIAL
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_ALL
        options.log_severity_level = 3  # errors
        try:
            session = ort.InferenceSession(str(path), options, providers=[provider])
        except Exception as e:  # its exceptions have no common base
            if type(e).__name__ == "NotImplemented":
                raise DeviceError(
                    f"{device} kernels for every operator of {path}",
                    found=str(e),
                    do="update onnxruntime, choose another device, or export for this one",
                ) from e
            raise BundleError(
                f"a graph in {path} that onnxruntime {ort.__version__} can open",
                found=str(e),
                do="update onnxruntime, or export the bundle again",
            ) from e
        if provider not in session.get_providers():  # it fell back to the CPU with a log line
            raise DeviceError(
                f"{provider} to load", found="that its libraries are missing", do=_CUDA_HELP
            )
        return session


class _Buffers:
    """The memory of one cache: keys and values on the device, and the single-token step."""

    def __init__(self, session: Session, capacity: int, batch: int) -> None:
        layout = session.manifest.cache
        shape = (batch, layout.kv_heads, capacity, layout.head_dim)
        self.values = [(*names, session.cache_value(shape)) for names in _cache_names(layout)]
        self.single = _SingleStep(session, self, batch, capacity)


class _Pass:
    """The bound memory of a run over ids [batch, new] with a mask [batch, length]."""

    def __init__(
        self, session: Session, buffers: _Buffers, shape: tuple[int, int], *, length: int, keep: int
    ) -> None:
        batch, self._new = shape
        self._ids, self._positions = (np.zeros(shape, np.int64) for _ in range(2))
        self._mask = np.zeros((batch, length), np.int64)
        self._keep = np.array([keep], np.int64)
        self.logits = np.empty((batch, keep, session.manifest.model.vocab_size), np.float32)
        self.binding = session.new_binding()
        self._shares_memory = session.device == "cpu"
        for past, present, value in buffers.values:  # the same memory: updated in place
            self.binding.bind_ortvalue_input(past, value)
            self.binding.bind_ortvalue_output(present, value)
        pointer = self.logits.ctypes.data
        self.binding.bind_output(LOGITS, "cpu", 0, np.float32, self.logits.shape, pointer)
        self._bind_inputs()

    def load(self, ids: Ids | Sequence[Sequence[int]], start: int) -> None:
        """Take ids [batch, new] for the positions from `start` on."""
        self._ids[...] = ids
        self._positions[...] = np.arange(start, start + self._new)
        self._mask[:, : start + self._new] = 1
        self._bind_again()

    def _bind_again(self) -> None:
        if not self._shares_memory:  # binding copied the values of then to the device
            self._bind_inputs()

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
    The mask has its full length from the start; the graph counts the ones in it.
    """

    def __init__(self, session: Session, buffers: _Buffers, batch: int, capacity: int) -> None:
        super().__init__(session, buffers, (batch, 1), length=capacity, keep=1)
        self._capacity = capacity
        self._filled = 0  # ones in a row of the mask
        arrays = (self._ids, self._positions, self._mask)
        self._id_at, self._position_at, self._mask_at = (a.reshape(-1).data for a in arrays)

    def load(self, ids: Ids | Sequence[Sequence[int]], start: int) -> None:
        if self._filled != start:  # after a longer pass, or after going back
            self._mask[:, :start] = 1
            self._mask[:, start:] = 0
        for row, (token,) in enumerate(ids):
            self._id_at[row] = token
            self._position_at[row] = start
            self._mask_at[row * self._capacity + start] = 1
        self._filled = start + 1
        self._bind_again()


def _cache_names(layout: CacheLayout) -> list[tuple[str, str]]:
    """Past and present of every key and value."""
    parts: tuple[Literal["key", "value"], ...] = ("key", "value")
    return [(past_name(n, p), present_name(n, p)) for n in range(layout.layers) for p in parts]


# --- what the graph takes and gives, against the manifest ---------------------------------------

_TYPES = {"float32": "tensor(float)", "float16": "tensor(float16)", "int8": "tensor(int8)"}
_INT64 = "tensor(int64)"


def _check_graph(session: Any, manifest: Manifest) -> None:
    """Raises BundleError with every name, type and dimension that is not as promised."""
    layout = manifest.cache
    cache = (_TYPES[layout.dtype], (None, layout.kv_heads, None, layout.head_dim))
    names = _cache_names(layout)
    inputs = dict.fromkeys((INPUT_IDS, ATTENTION_MASK, POSITION_IDS), (_INT64, (None, None)))
    optional = {NUM_LOGITS_TO_KEEP: (_INT64, (1,))}
    outputs = {LOGITS: ("tensor(float)", (None, None, manifest.model.vocab_size))}
    faults = [
        *_differences("input", session.get_inputs(), inputs | {past: cache for past, _ in names}),
        *_differences("optional input", session.get_overridable_initializers(), optional),
        *_differences("output", session.get_outputs(), outputs | {now: cache for _, now in names}),
    ]
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


# --- opening onnxruntime ------------------------------------------------------------------------

_PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}
_CUDA_HELP = "pip install 'gptrt[cuda]' and its CUDA libraries, or use device='cpu'"
_TELEMETRY = "ORT_DISABLE_TELEMETRY"


def import_onnxruntime() -> Any:
    """onnxruntime, its telemetry off: that works before its import and not later.

    Raises DependencyError without it; warns if the application imported it first.
    """
    if "onnxruntime" in sys.modules and os.environ.get(_TELEMETRY) != "1":
        warnings.warn(
            f"onnxruntime was imported before gptrt and without {_TELEMETRY}=1, so it may write "
            "files and use the network; set the variable before that import",
            RuntimeWarning,
            stacklevel=3,
        )
    os.environ[_TELEMETRY] = "1"
    try:
        import onnxruntime
    except ImportError as e:
        raise DependencyError(
            "the package onnxruntime",
            found=str(e),
            do="pip install 'gptrt[cpu]' (or 'gptrt[cuda]')",
        ) from e
    return onnxruntime


def _check_cuda(ort: Any, layout: CacheLayout) -> None:
    """Raises DeviceError if CUDA cannot run the bundle; else loads its libraries."""
    available = ort.get_available_providers()
    if _PROVIDERS["cuda"] not in available:
        raise DeviceError(
            "an onnxruntime with the CUDA provider", found=", ".join(available), do=_CUDA_HELP
        )
    if layout.dtype != "float16":  # its attention kernel has no other type, and would run on CPU
        raise DeviceError(
            "a bundle in float16 for CUDA",
            found=layout.dtype,
            do="export it with `gptrt-export convert --quantize fp16`, or use device='cpu'",
        )
    if hasattr(ort, "preload_dlls"):  # finds CUDA libraries that came as Python packages
        ort.preload_dlls()


def _checked_threads(threads: int | None) -> int:
    if threads is None:
        return usable_cores()
    if isinstance(threads, bool) or not isinstance(threads, int) or not 1 <= threads <= 1024:
        raise OptionError(
            "1 to 1024 threads", found=repr(threads), do="leave it out to use every core"
        )
    return threads
