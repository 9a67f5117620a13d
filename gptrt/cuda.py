"""CUDA's runtime library: the copies that onnxruntime's Python face cannot make.

That fills and reads whole tensors only, while rows and positions of a cache lie between others.
The library is the one that onnxruntime has loaded already; its addresses say what lies where.
"""

from __future__ import annotations

import ctypes
import os
import sys
import threading
import time
import weakref
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gptrt.errors import DeviceError

_BY_ADDRESS = 4  # cudaMemcpyDefault
_VERSIONS = (13, 12)
_POINTER, _SIZE = ctypes.c_void_p, ctypes.c_size_t
_REPEATS = 10


class Cuda:
    """Copies between any two places, the card's memory or the processor's, whole when they return.

    `lock`, one for the process, is held meanwhile: a CUDA graph that is being captured bears
    nothing beside it. Raises DeviceError.
    """

    lock = threading.RLock()

    def __init__(self) -> None:
        self._library = _loaded_library()
        functions = {
            "cudaMemcpy2D": [_POINTER, _SIZE, _POINTER, _SIZE, _SIZE, _SIZE, ctypes.c_int],
            "cudaStreamSynchronize": [_POINTER],
            "cudaHostAlloc": [ctypes.POINTER(_POINTER), _SIZE, ctypes.c_uint],
            "cudaFreeHost": [_POINTER],
        }
        for name, arguments in functions.items():
            getattr(self._library, name).argtypes = arguments

    def copy(self, target: int, source: int, size: int) -> None:
        """So many bytes."""
        self.copy_rows((target, size), (source, size), size, 1)

    def copy_rows(
        self, target: tuple[int, int], source: tuple[int, int], width: int, count: int
    ) -> None:
        """`count` times `width` bytes; each place is an address and how far apart its rows lie."""
        with self.lock:
            self._call("cudaMemcpy2D", *target, *source, width, count, _BY_ADDRESS)
            # Within the card, and from memory that is not pinned, it returns before its end.
            self._call("cudaStreamSynchronize", None)

    def pinned(self, shape: tuple[int, ...], dtype: Any) -> NDArray[Any]:
        """Zeros in memory that the card reaches by itself: a copy takes no detour."""
        size = max(1, int(np.prod(shape)) * np.dtype(dtype).itemsize)
        pointer = _POINTER()
        with self.lock:
            self._call("cudaHostAlloc", ctypes.byref(pointer), size, 0)
        assert pointer.value is not None
        raw = (ctypes.c_uint8 * size).from_address(pointer.value)
        weakref.finalize(raw, self._library.cudaFreeHost, pointer)
        array = np.frombuffer(raw, dtype).reshape(shape)
        array[...] = 0
        return array

    def bandwidth(self, target: int, source: int, size: int) -> float:
        """Bytes a second between two places in the card's memory, what is read and what is written
        counted."""
        best = 0.0
        for _ in range(_REPEATS):
            began = time.perf_counter()
            self.copy(target, source, size)
            best = max(best, 2 * size / (time.perf_counter() - began))
        return best

    def _call(self, name: str, *arguments: Any) -> None:
        code = getattr(self._library, name)(*arguments)
        if code:
            self._library.cudaGetErrorString.restype = ctypes.c_char_p
            found = self._library.cudaGetErrorString(code).decode()
            raise DeviceError(
                f"{name} to succeed", found=found, do="make less use of the card, or use the CPU"
            )


def _loaded_library() -> Any:
    names = [
        f"cudart64_{v}.dll" if sys.platform == "win32" else f"libcudart.so.{v}" for v in _VERSIONS
    ]
    for name in names:
        try:
            return ctypes.CDLL(name, mode=getattr(os, "RTLD_NOLOAD", 0))
        except OSError:
            continue
    raise DeviceError(
        "CUDA's runtime library, which onnxruntime loads",
        found=f"none of {', '.join(names)}",
        do="pip install 'gptrt[cuda]' and its CUDA libraries, or use device='cpu'",
    )
