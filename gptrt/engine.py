"""onnxruntime: the one file that knows it. A graph is opened and run on bound memory."""

from __future__ import annotations

import itertools
import math
import os
import sys
import time
import warnings
import weakref
from collections import Counter
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from gptrt.cuda import Cuda
from gptrt.errors import BundleError, DependencyError, DeviceError, OptionError, first_line
from gptrt.huge_pages import IN_USE, gather_in_background
from gptrt.interrupt import Interrupt
from gptrt.machine import usable_cores

Device = Literal["auto", "cpu", "cuda"]

_PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}
_CUDA_HELP = "pip install 'gptrt[cuda]' and its CUDA libraries, or use device='cpu'"
_TELEMETRY = "ORT_DISABLE_TELEMETRY"
_CACHE_LINE = 64  # bytes
_COPIED = 1 << 29  # bytes, to measure by: far more than the caches of a card
# Operators that are the model itself. All others may well run on the CPU: they compute shapes.
_COMPUTE = {
    *("MatMul", "Gemm", "MatMulNBits", "GatherBlockQuantized", "Softmax"),
    *("Attention", "MultiHeadAttention", "GroupQueryAttention"),
    *("LayerNormalization", "SimplifiedLayerNormalization", "SkipLayerNormalization"),
    *("SkipSimplifiedLayerNormalization", "Gelu", "FastGelu", "BiasGelu", "QuickGelu"),
}


@dataclass(frozen=True)
class Memory:
    """A tensor on a device, to be bound by its address: whole, or some of its rows.

    `owner` keeps it alive: an array on the CPU, else a value of onnxruntime's, and `cuda` makes its
    copies. Where rows have positions it is [rows, heads, positions, width], and its first row is
    what is copied.
    """

    device: str
    pointer: int
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    owner: Any
    cuda: Cuda | None = None

    def rows(self, start: int, stop: int) -> Memory:
        """The same memory, of these rows only."""
        row = math.prod(self.shape[1:]) * self.dtype.itemsize
        owner = self.owner[start:stop] if self.device == "cpu" else self.owner
        shape = (stop - start, *self.shape[1:])
        return Memory(self.device, self.pointer + start * row, shape, self.dtype, owner, self.cuda)

    def copy_positions(self, source: Memory, start: int, stop: int) -> None:
        """Take those from `start` to `stop` of another's first row into the first row."""
        if self.cuda is None:
            self.owner[0, :, start:stop] = source.owner[0, :, start:stop]
            return
        places = (self._from(start), source._from(start))
        self.cuda.copy_rows(*places, (stop - start) * self._width, self.shape[1])

    def positions(self, length: int) -> NDArray[Any]:
        """The first of them, [heads, length, width]."""
        if self.cuda is None:
            array: NDArray[Any] = self.owner[0, :, :length]
            return array
        found = np.empty((self.shape[1], length, self.shape[3]), self.dtype)
        size = length * self._width
        self.cuda.copy_rows((found.ctypes.data, size), self._from(0), size, self.shape[1])
        return found

    def set_positions(self, values: NDArray[Any]) -> None:
        """The opposite."""
        length = values.shape[1]
        if self.cuda is None:
            self.owner[0, :, :length] = values
            return
        values, size = np.ascontiguousarray(values), length * self._width
        self.cuda.copy_rows(self._from(0), (values.ctypes.data, size), size, self.shape[1])

    @property
    def _width(self) -> int:
        """Bytes of a position."""
        return self.shape[3] * self.dtype.itemsize

    def _from(self, position: int) -> tuple[int, int]:
        """Where it is in the first head, and how far apart heads lie."""
        return self.pointer + position * self._width, self.shape[2] * self._width


class Engine:
    """A graph that onnxruntime has opened on one device.

    `inputs`, `optional_inputs` and `outputs` are onnxruntime's nodes: name, type, shape. `seconds`
    adds up the time spent in runs; with several threads it is only roughly right. `elsewhere`
    counts the operators that run on the CPU though the device is another: they compute shapes.

    "auto" is CUDA where onnxruntime has it and the cache is in float16, else the CPU. With
    `cuda_graphs` a run can be captured there, where the graph allows it. Raises DependencyError
    without onnxruntime, DeviceError if the device cannot run the graph, OptionError for an
    impossible number of threads, BundleError if the graph is damaged.
    """

    captures = False  # whether a run can be captured

    def __init__(
        self,
        graph: Path,
        *,
        device: Device = "auto",
        threads: int | None = None,
        cache_dtype: str | None = None,
        cuda_graphs: bool = False,
    ) -> None:
        self.threads = _checked_threads(threads)
        self.seconds = 0.0
        self._runs = 0
        self._ort = import_onnxruntime()
        self.device, self._session = self._open(graph, device, cache_dtype, cuda_graphs)
        self.cuda = Cuda() if self.device == "cuda" else None
        self.elsewhere = _on_the_cpu(self._session) if self.cuda else Counter[str]()
        self._plain = self._run_options() if self.captures else None
        # While a run is captured nothing else may use the card.
        self._alone = self.cuda.lock if self.cuda and self.captures else nullcontext()
        self.inputs, self.outputs = self._session.get_inputs(), self._session.get_outputs()
        self.optional_inputs = self._session.get_overridable_initializers()

    def new_binding(self) -> Any:
        """An IOBinding of onnxruntime, nothing bound yet."""
        return self._session.io_binding()

    def memory(self, shape: tuple[int, ...], dtype: str) -> Memory:
        """A tensor on the device, not yet filled."""
        if self.device == "cpu":
            array = _aligned(shape, np.dtype(dtype))
            return Memory("cpu", array.ctypes.data, shape, array.dtype, array)
        with self._alone:
            value = self._ort.OrtValue.ortvalue_from_shape_and_type(
                shape, np.dtype(dtype), self.device, 0
            )
        return Memory(self.device, value.data_ptr(), shape, np.dtype(dtype), value, self.cuda)

    def value_of(self, array: NDArray[Any]) -> Any:
        """An OrtValue on the device with the numbers of an array."""
        return self._ort.OrtValue.ortvalue_from_numpy(array, self.device, 0)

    def run(
        self, binding: Any, interrupt: Interrupt | None = None, capture: Capture | None = None
    ) -> None:
        """With a capture what was bound is captured the first time, and replayed from then on.
        Raises Interrupted if it was ended before its end."""
        began = time.perf_counter()
        options = self._plain if interrupt is None else interrupt.handle(self._run_options)
        if capture is not None:
            options = capture.options
        try:
            with self._alone:
                self._session.run_with_iobinding(binding, options)
        except Exception as e:  # its exceptions have no common base
            if interrupt is not None:
                interrupt.check()
            raise BundleError(
                "a graph that runs", found=first_line(e), do="export the bundle again"
            ) from e
        finally:
            self.seconds += time.perf_counter() - began
        self._runs += 1
        if self._runs == IN_USE and self.device == "cpu":
            gather_in_background()

    def new_capture(self) -> Capture:
        """What a run is to be captured as."""
        return Capture(self._session, self._run_options)

    def bandwidth(self) -> float | None:
        """Bytes a second of the device's memory, measured; None on the CPU."""
        if self.cuda is None:
            return None
        source, target = (self.memory((_COPIED,), "uint8") for _ in range(2))
        return self.cuda.bandwidth(target.pointer, source.pointer, _COPIED)

    def _run_options(self, graph: int = -1) -> Any:
        """-1: not captured. Each run looks for this entry; that it is not there costs 35
        microseconds to find out."""
        options = self._ort.RunOptions()
        options.add_run_config_entry("gpu_graph_id", str(graph))
        return options

    def _open(
        self, path: Path, device: Device, cache_dtype: str | None, cuda_graphs: bool
    ) -> tuple[Literal["cpu", "cuda"], Any]:
        """The device that it came to be and onnxruntime's session on it."""
        if device not in ("auto", "cpu", "cuda"):
            raise DeviceError("device auto, cpu or cuda", found=repr(device), do="choose one")
        if device == "cpu" and cuda_graphs:
            raise OptionError(
                "device cuda for cuda_graphs", found="cpu", do="leave one of them out"
            )
        if device == "cpu":
            return "cpu", self._open_on(path, "cpu")
        try:
            _check_cuda(self._ort, cache_dtype)
            return "cuda", self._open_on_cuda(path, cuda_graphs)
        except DeviceError:
            if device == "cuda":
                raise
            return "cpu", self._open_on(path, "cpu")

    def _open_on_cuda(self, path: Path, cuda_graphs: bool) -> Any:
        """Raises DeviceError if part of the model would run on the CPU."""
        session = None
        if cuda_graphs:
            try:
                session = self._open_on(path, "cuda", {"enable_cuda_graph": "1"})
            except BundleError as e:
                why = f"without CUDA graphs, which {path} does not allow: {e.found}"
                warnings.warn(why, RuntimeWarning, stacklevel=2)
        self.captures = session is not None
        session = session or self._open_on(path, "cuda")
        elsewhere = _on_the_cpu(session)
        if heavy := sorted(_COMPUTE & elsewhere.keys()):
            raise DeviceError(
                f"CUDA kernels for every operator of {path}",
                found=", ".join(f"{elsewhere[name]} x {name} on the CPU" for name in heavy),
                do="export it in int4, int8 or fp16, or use device='cpu'",
            )
        return session

    def _open_on(
        self, path: Path, device: Literal["cpu", "cuda"], settings: dict[str, str] | None = None
    ) -> Any:
        ort, provider = self._ort, _PROVIDERS[device]
        options = ort.SessionOptions()
        options.intra_op_num_threads = self.threads  # unset, it is the number of the host's cores
        options.inter_op_num_threads = 1
        options.execution_mode = ort.ExecutionMode.ORT_SEQUENTIAL
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_ALL
        options.log_severity_level = 3  # errors
        if device == "cuda":
            options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
        if settings:
            options.log_severity_level = 4  # that it does not allow them is told by the exception
        try:
            providers = [(provider, settings or {})]
            session = ort.InferenceSession(str(path), options, providers=providers)
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


class Capture:
    """A run as a CUDA graph: its kernels, over the memory that was bound, started all at once."""

    _numbers = itertools.count(1)

    def __init__(self, session: Any, options: Callable[[int], Any]) -> None:
        number = next(self._numbers)
        self.options = options(number)
        weakref.finalize(self, session.release_captured_graph, number)


def _on_the_cpu(session: Any) -> Counter[str]:
    """How many operators of each kind a session on another device runs there."""
    return Counter(
        node.op_type
        for part in session.get_provider_graph_assignment_info()
        if part.ep_name == _PROVIDERS["cpu"]
        for node in part.get_nodes()
    )


def _aligned(shape: tuple[int, ...], dtype: np.dtype[Any]) -> NDArray[Any]:
    """Zeros on the border of a cache line. Memory that is never written is never really taken."""
    size = math.prod(shape) * dtype.itemsize
    raw = np.zeros(size + _CACHE_LINE, np.uint8)
    start = -raw.ctypes.data % _CACHE_LINE
    return raw[start : start + size].view(dtype).reshape(shape)


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


def _check_cuda(ort: Any, cache_dtype: str | None) -> None:
    """Raises DeviceError if CUDA cannot run the graph; else loads its libraries."""
    available = ort.get_available_providers()
    if _PROVIDERS["cuda"] not in available:
        raise DeviceError(
            "an onnxruntime with the CUDA provider", found=", ".join(available), do=_CUDA_HELP
        )
    # Its attention kernel has no other type, and would run on the CPU.
    if cache_dtype not in (None, "float16"):
        raise DeviceError(
            "a bundle in float16 for CUDA",
            found=str(cache_dtype),
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
