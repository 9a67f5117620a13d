"""The session: ids and a cache in, logits out. The one file of the runtime that knows onnxruntime.

`run` is the hot path. For the single-token step everything is bound once, the mask at its full
length, and a step rewrites three numbers in place: id, position and one more 1 in the mask. After a
step has streamed all weights through the caches, Python runs cold there, and every call that is
not made saves ten times what it costs in a warm loop.
"""

from __future__ import annotations

import os
import sys
import time
import warnings
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
    past_name,
    present_name,
)

Ids = NDArray[np.int64]
Logits = NDArray[np.float32]
Device = Literal["auto", "cpu", "cuda"]


class Session:
    """A bundle's graph on one device.

    Threads may call `run` at the same time, each with a cache of its own. `device` "auto" takes
    CUDA where this onnxruntime has it and the bundle fits it. `seconds_in_graph` adds up the
    wall time spent inside onnxruntime.

    Raises DependencyError without onnxruntime, DeviceError if the device cannot run the bundle,
    BundleError if the graph is not what the manifest says.
    """

    def __init__(
        self, bundle: Bundle, *, device: Device = "auto", threads: int | None = None
    ) -> None:
        self.manifest = bundle.manifest
        self.threads = _check_threads(threads)
        self.seconds_in_graph = 0.0
        self._ort = import_onnxruntime()
        self.device = _choose_device(self._ort, device)
        self._session = self._open(bundle.file(GRAPH_FILE))
        self._check_graph()

    def new_cache(self, capacity: int, batch: int = 1) -> KVCache:
        """An empty cache for `capacity` positions in each of `batch` rows."""
        return KVCache(batch, capacity, _Buffers(self, capacity, batch))

    def run(self, ids: Ids, cache: KVCache, *, keep: int = 1) -> Logits:
        """Read ids [batch, new] after what `cache` holds: logits [batch, kept, vocab], fp32.

        `keep` asks for the last so many positions, 0 for all. The array is valid until the next
        run with this cache. Prefill and decode are the same call.
        """
        batch, new = ids.shape
        total = cache.length + new
        if total > cache.capacity or batch != cache.batch:
            raise PromptError(
                f"at most {cache.capacity} tokens in {cache.batch} rows",
                found=f"{total} in {batch}",
                do="shorten the prompt or ask for fewer new tokens",
            )
        buffers: _Buffers = cache.buffers
        step = buffers.one if new == 1 else _Pass(buffers, new, keep or new, total)
        step.load(ids, cache.length, total)
        began = time.perf_counter()
        self._session.run_with_iobinding(step.binding)
        self.seconds_in_graph += time.perf_counter() - began
        cache.length = total
        return step.logits

    def _open(self, path: Path) -> Any:
        ort = self._ort
        options = ort.SessionOptions()
        options.intra_op_num_threads = self.threads  # unset, it counts the host's cores
        options.inter_op_num_threads = 1
        options.execution_mode = ort.ExecutionMode.ORT_SEQUENTIAL
        options.log_severity_level = 3
        wanted = _PROVIDERS[self.device]
        try:
            session = ort.InferenceSession(str(path), options, providers=[wanted])
        except Exception as e:  # onnxruntime has no common base class for its errors
            raise BundleError(
                f"a graph in {path} that onnxruntime {ort.__version__} can open on {self.device}",
                found=str(e),
                do="update onnxruntime, or export the bundle again",
            ) from e
        if wanted not in session.get_providers():
            raise DeviceError(
                f"{wanted}", found=f"only {session.get_providers()} loaded", do=_CUDA_HELP
            )
        return session

    def _check_graph(self) -> None:
        """What the graph takes and gives must be what the manifest says. Lists every fault."""
        dtype = {"float32": "tensor(float)", "float16": "tensor(float16)"}[
            self.manifest.cache.dtype
        ]
        wanted = dict.fromkeys((INPUT_IDS, ATTENTION_MASK, POSITION_IDS), ("tensor(int64)", 2))
        wanted |= dict.fromkeys(self.past_names, (dtype, 4))
        found = {i.name: (i.type, len(i.shape)) for i in self._session.get_inputs()}
        faults = [
            f"{n} is {found.get(n)}, wanted {w}" for n, w in wanted.items() if found.get(n) != w
        ]
        faults += [f"unknown input {name}" for name in found.keys() - wanted.keys()]
        outputs = {o.name for o in self._session.get_outputs()}
        faults += [f"output {n} is missing" for n in {LOGITS, *self.present_names} - outputs]
        if faults:
            raise BundleError(
                f"the inputs and outputs of a {self.manifest.cache.layers}-layer decoder",
                found="; ".join(sorted(faults)),
                do="export the bundle again",
            )

    @property
    def past_names(self) -> list[str]:
        return [
            past_name(n, p) for n in range(self.manifest.cache.layers) for p in ("key", "value")
        ]

    @property
    def present_names(self) -> list[str]:
        layers = range(self.manifest.cache.layers)
        return [present_name(n, p) for n in layers for p in ("key", "value")]


class _Buffers:
    """What a cache needs to run: its tensors on the device and the single-token pass."""

    def __init__(self, session: Session, capacity: int, batch: int) -> None:
        layout = session.manifest.cache
        shape = (batch, layout.kv_heads, capacity, layout.head_dim)
        make = session._ort.OrtValue.ortvalue_from_shape_and_type
        self.session, self.batch = session, batch
        self.layers = [
            (past, present, make(shape, np.dtype(layout.dtype), session.device, 0))
            for past, present in zip(session.past_names, session.present_names, strict=True)
        ]
        self.one = _Pass(self, new=1, keep=1, masked=capacity)


class _Pass:
    """One run's worth of bound memory for `new` tokens a row, usable at any position.

    `masked` is the length of the mask; the graph counts its ones to learn how much is valid.
    """

    def __init__(self, buffers: _Buffers, new: int, keep: int, masked: int) -> None:
        session, batch = buffers.session, buffers.batch
        self.ids, self.positions = (np.zeros((batch, new), np.int64) for _ in range(2))
        self.mask = np.zeros((batch, masked), np.int64)
        self.keep = np.array([keep], np.int64)
        self.logits = np.empty((batch, keep, session.manifest.model.vocab_size), np.float32)
        self.filled = 0  # ones in the mask
        self.binding = session._session.io_binding()
        self.on_host = session.device == "cpu"
        for past, present, value in buffers.layers:  # the same memory: updated in place
            self.binding.bind_ortvalue_input(past, value)
            self.binding.bind_ortvalue_output(present, value)
        pointer = self.logits.ctypes.data
        self.binding.bind_output(LOGITS, "cpu", 0, np.float32, self.logits.shape, pointer)
        self._bind_inputs()

    def load(self, ids: Ids, start: int, total: int) -> None:
        """Take ids [batch, new] for positions `start` to `total`."""
        self.ids[...] = ids
        if total - start == 1 == total - self.filled:  # the step after the step before
            self.positions[...] = start
            self.mask[:, start] = 1
        else:
            self.positions[...] = np.arange(start, total)
            self.mask[:, :total] = 1
            self.mask[:, total:] = 0
        self.filled = total
        if not self.on_host:  # binding copied the values to the device: copy the new ones
            self._bind_inputs()

    def _bind_inputs(self) -> None:
        for name, array in (
            (INPUT_IDS, self.ids),
            (ATTENTION_MASK, self.mask),
            (POSITION_IDS, self.positions),
            (NUM_LOGITS_TO_KEEP, self.keep),
        ):
            self.binding.bind_input(name, "cpu", 0, np.int64, array.shape, array.ctypes.data)


# --- opening onnxruntime ----------------------------------------------------------------------

_PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}
_CUDA_HELP = "pip install 'gptrt[cuda]' and its CUDA libraries, or use device='cpu'"
_TELEMETRY = "ORT_DISABLE_TELEMETRY"


def import_onnxruntime() -> Any:
    """onnxruntime, its telemetry off: later than its import nothing turns it off any more."""
    if "onnxruntime" in sys.modules and os.environ.get(_TELEMETRY) != "1":
        warnings.warn(
            f"onnxruntime was imported before gptrt, without {_TELEMETRY}=1: it may write files "
            "and use the network; set the variable before that import",
            RuntimeWarning,
            stacklevel=3,
        )
    os.environ[_TELEMETRY] = "1"
    try:
        import onnxruntime
    except ImportError as e:
        raise DependencyError(
            "onnxruntime", found=str(e), do="pip install 'gptrt[cpu]' or 'gptrt[cuda]'"
        ) from e
    return onnxruntime


def _choose_device(ort: Any, device: str) -> Literal["cpu", "cuda"]:
    if device not in ("auto", "cpu", "cuda"):
        raise DeviceError("device auto, cpu or cuda", found=repr(device), do="choose one of them")
    available = ort.get_available_providers()
    if device == "cuda" and _PROVIDERS["cuda"] not in available:
        raise DeviceError(
            "an onnxruntime with the CUDA provider", found=", ".join(available), do=_CUDA_HELP
        )
    return "cuda" if device == "cuda" else "cpu"


def _check_threads(threads: int | None) -> int:
    if threads is None:
        return usable_cores()
    if not 1 <= threads <= 1024:
        raise OptionError("1 to 1024 threads", found=str(threads), do="leave it out for all cores")
    return threads


def usable_cores() -> int:
    """Cores that this process may use: its affinity, bounded by the container's quota."""
    cores = (
        len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    )
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        return max(1, min(cores, round(int(quota) / int(period))))
    except (OSError, ValueError):  # no cgroup, or quota "max"
        return cores
