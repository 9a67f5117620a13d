"""onnxruntime: the one file that knows it. A graph is opened and run on bound memory."""

from __future__ import annotations

import math
import os
import sys
import time
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from gptrt.errors import BundleError, DependencyError, DeviceError, OptionError, first_line
from gptrt.interrupt import Interrupt
from gptrt.machine import usable_cores

Device = Literal["auto", "cpu", "cuda"]

_PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}
_CUDA_HELP = "pip install 'gptrt[cuda]' and its CUDA libraries, or use device='cpu'"
_TELEMETRY = "ORT_DISABLE_TELEMETRY"
_CACHE_LINE = 64  # bytes


@dataclass(frozen=True)
class Memory:
    """A tensor on a device, to be bound by its address: whole, or some of its rows.

    `owner` keeps it alive: an array on the CPU, else a value of onnxruntime's.
    """

    device: str
    pointer: int
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    owner: Any

    def rows(self, start: int, stop: int) -> Memory:
        """The same memory, of these rows only."""
        row = math.prod(self.shape[1:]) * self.dtype.itemsize
        owner = self.owner[start:stop] if self.device == "cpu" else self.owner
        shape = (stop - start, *self.shape[1:])
        return Memory(self.device, self.pointer + start * row, shape, self.dtype, owner)

    @property
    def array(self) -> NDArray[Any]:
        """Its numbers, in place. Raises DeviceError where the processor cannot reach them."""
        if self.device != "cpu":
            raise DeviceError(
                "a cache in the processor's memory, to copy or save it",
                found=self.device,
                do="use device='cpu'",
            )
        array: NDArray[Any] = self.owner
        return array


class Engine:
    """A graph that onnxruntime has opened on one device.

    `inputs`, `optional_inputs` and `outputs` are onnxruntime's nodes: name, type, shape. `seconds`
    adds up the time spent in runs; with several threads it is only roughly right.

    "auto" is CUDA where onnxruntime has it and the cache is in float16, else the CPU. Raises
    DependencyError without onnxruntime, DeviceError if the device cannot run the graph, OptionError
    for an impossible number of threads, BundleError if the graph is damaged.
    """

    def __init__(
        self,
        graph: Path,
        *,
        device: Device = "auto",
        threads: int | None = None,
        cache_dtype: str | None = None,
    ) -> None:
        self.threads = _checked_threads(threads)
        self.seconds = 0.0
        self._ort = import_onnxruntime()
        self.device, self._session = self._open(graph, device, cache_dtype)
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
        value = self._ort.OrtValue.ortvalue_from_shape_and_type(
            shape, np.dtype(dtype), self.device, 0
        )
        return Memory(self.device, value.data_ptr(), shape, np.dtype(dtype), value)

    def value_of(self, array: NDArray[Any]) -> Any:
        """An OrtValue on the device with the numbers of an array."""
        return self._ort.OrtValue.ortvalue_from_numpy(array, self.device, 0)

    def run(self, binding: Any, interrupt: Interrupt | None = None) -> None:
        """Raises Interrupted if it was ended before its end."""
        began = time.perf_counter()
        options = None if interrupt is None else interrupt.handle(self._run_options)
        try:
            self._session.run_with_iobinding(binding, options)
        except Exception as e:  # its exceptions have no common base
            if interrupt is not None:
                interrupt.check()
            raise BundleError(
                "a graph that runs", found=first_line(e), do="export the bundle again"
            ) from e
        finally:
            self.seconds += time.perf_counter() - began

    def _run_options(self) -> Any:
        options = self._ort.RunOptions()
        # Each run looks for this entry; that it is not there costs 35 microseconds to find out.
        options.add_run_config_entry("gpu_graph_id", "0")
        return options

    def _open(
        self, path: Path, device: Device, cache_dtype: str | None
    ) -> tuple[Literal["cpu", "cuda"], Any]:
        """The device that it came to be and onnxruntime's session on it."""
        if device not in ("auto", "cpu", "cuda"):
            raise DeviceError("device auto, cpu or cuda", found=repr(device), do="choose one")
        if device == "cpu":
            return "cpu", self._open_on(path, "cpu")
        try:
            _check_cuda(self._ort, cache_dtype)
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
