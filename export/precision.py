"""In which numbers products are computed: what the hardware gains by."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from functools import cache
from pathlib import Path
from typing import Any

import torch

# bfloat16 halves the time of a wide product and costs two casts, which eat the gain below this.
_BF16_MIN_WIDTH = 192


def product_dtype(width: int, device: torch.device) -> torch.dtype:
    """bfloat16 for the products of a model of this width where the hardware gains by it."""
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float32
    fast = bool(torch.ops.mkldnn._is_mkldnn_bf16_supported()) and _has_native_bf16()
    return torch.bfloat16 if fast and width >= _BF16_MIN_WIDTH else torch.float32


@cache
def _has_native_bf16() -> bool:
    """mkldnn emulates bf16 where the processor lacks the instructions, at a loss."""
    cpuinfo = Path("/proc/cpuinfo")
    flags = cpuinfo.read_text() if cpuinfo.is_file() else ""
    return "avx512_bf16" in flags or "amx_bf16" in flags


def autocast(dtype: torch.dtype, device: torch.device) -> AbstractContextManager[Any]:
    """Products in `dtype` while it lasts."""
    if dtype == torch.float32:
        return nullcontext()
    return torch.autocast(device.type, dtype=dtype)
