"""Is all well? What a bundle holds, whether it computes its promise, what the machine has."""

from __future__ import annotations

import ctypes
import os
import platform
from dataclasses import dataclass
from importlib import metadata
from itertools import zip_longest
from pathlib import Path
from typing import Any, Literal

from gptrt.engine import Device, import_onnxruntime
from gptrt.errors import BundleError, DependencyError, DeviceError, FidelityError, GptrtError
from gptrt.format import Golden, open_bundle, read_manifest
from gptrt.generator import Generator
from gptrt.machine import cpu_quota, free_memory, memory_limit, physical_memory, usable_cores
from gptrt.opening import StrPath, bundle_path, embedded_bundle, open_decoder
from gptrt.schema import encode
from gptrt.tokenizer import Tokenizer

# --- bundles ------------------------------------------------------------------------------------


def verify(
    path: StrPath | None = None, *, device: Device = "auto", threads: int | None = None
) -> dict[str, Any]:
    """Check hashes, then that this machine computes the golden ids that the exporter wrote down.

    Gives {"bundle", "files", "prompts", "ids"}: what was checked, as counts. Raises BundleError,
    and FidelityError with the prompt and the position of the first id that differs.
    """
    bundle = open_bundle(bundle_path(path))
    decoder = open_decoder(bundle, device=device, threads=threads)
    generator = Generator.from_parts(decoder, Tokenizer.open(bundle).endless())
    golden = bundle.manifest.golden
    for number, promised in enumerate(golden):
        _check_golden(generator, number, promised)
    return {
        "bundle": str(bundle.path),
        "files": len(bundle.manifest.files),
        "prompts": len(golden),
        "ids": sum(len(promised.ids) for promised in golden),
    }


def _check_golden(generator: Generator, number: int, golden: Golden) -> None:
    if not golden.ids:
        return
    found = generator.tokens(golden.prompt_ids, max_new_tokens=len(golden.ids))
    for position, (wanted, got) in enumerate(zip_longest(golden.ids, found)):
        if wanted != got:
            raise FidelityError(
                f"id {wanted} at position {position} after golden prompt {number}",
                found=f"id {got}",
                do="update onnxruntime, or export the bundle on a machine like this one",
            )


def info(path: StrPath | None = None) -> dict[str, Any]:
    """What the manifest says, files not looked at. Raises BundleError."""
    folder = bundle_path(path)
    manifest = read_manifest(folder)
    known: dict[str, Any] = encode(manifest)
    for part in ("files", "golden", "cache"):
        del known[part]
    return {
        "bundle": str(folder),
        "weights_bytes": manifest.weights_bytes,
        **known,
        "golden_prompts": len(manifest.golden),
    }


# --- the machine --------------------------------------------------------------------------------

# What the kernels of onnxruntime for quantized matrices can use, from /proc/cpuinfo.
_CPU_FLAGS = ("avx2", "avx_vnni", "avx512f", "avx512_vnni", "amx_int8", "asimddp", "i8mm")


@dataclass(frozen=True)
class Finding:
    """One line of a diagnosis; "missing" means that gptrt, or the bundle, cannot run."""

    level: Literal["ok", "note", "missing"]
    what: str
    found: str


def diagnose(path: StrPath | None = None) -> list[Finding]:
    """Everything about this machine that matters to gptrt, and to the bundle at `path`."""
    return [
        Finding("ok", "python", platform.python_version()),
        *(_package(name) for name in ("numpy", "tokenizers", "click")),
        *_onnxruntime(),
        *_processor(),
        _memory(),
        *(_extra(name, purpose) for name, purpose in _EXTRAS.items()),
        _embedded(),
        *([] if path is None else _placement(path)),
    ]


def _placement(path: StrPath) -> list[Finding]:
    """The device that a bundle runs on, what of it does not, and why it is not CUDA; or why it does
    not run."""
    try:
        bundle, findings = open_bundle(path), []
        engine = open_decoder(bundle).engine
    except GptrtError as e:
        return [Finding("missing", "bundle", str(e))]
    if engine.device == "cpu" and "CUDAExecutionProvider" in _providers():
        try:
            open_decoder(bundle, device="cuda")
        except DeviceError as e:
            findings.append(Finding("note", "bundle on cuda", str(e)))
    kinds = ", ".join(f"{count} {name}" for name, count in sorted(engine.elsewhere.items()))
    rest = f", on the CPU {kinds} for shapes" if kinds else ""
    return [Finding("ok", "bundle", f"runs on {engine.device}{rest}"), *findings]


def _providers() -> list[str]:
    names: list[str] = import_onnxruntime().get_available_providers()
    return names


_EXTRAS = {"llguidance": "structured output: gptrt[structured]", "jinja2": "chat: gptrt[chat]"}


def _extra(name: str, purpose: str) -> Finding:
    version = _version(name)
    return Finding("ok" if version else "note", name, version or f"not installed; for {purpose}")


def _package(name: str) -> Finding:
    version = _version(name)
    return Finding("ok" if version else "missing", name, version or f"pip install {name}")


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _onnxruntime() -> list[Finding]:
    try:
        ort = import_onnxruntime()
    except DependencyError as e:
        return [Finding("missing", "onnxruntime", str(e))]
    findings = [
        Finding("ok", "onnxruntime", ort.__version__),
        Finding("ok", "providers", ", ".join(ort.get_available_providers())),
    ]
    if _version("onnxruntime") and _version("onnxruntime-gpu"):
        both = "onnxruntime and onnxruntime-gpu overwrite each other: uninstall both, install one"
        findings.append(Finding("note", "packages", both))
    return [*findings, *_cuda(ort)]


# The beginning of a library's name, and the package that brings it.
_CUDA_PACKAGES = {
    "libcublas": "nvidia-cublas",
    "libcudart": "nvidia-cuda-runtime",
    "libcudnn": "nvidia-cudnn",
    "libcufft": "nvidia-cufft",
    "libcurand": "nvidia-curand",
    "libnvrtc": "nvidia-cuda-nvrtc",
    "libcuda.": "the driver of the card",
}


def _cuda(ort: Any) -> list[Finding]:
    """Whether a card is used, and what keeps it from being used."""
    card = Path("/proc/driver/nvidia/version").exists() or Path("/dev/nvidia0").exists()
    if "CUDAExecutionProvider" not in ort.get_available_providers():
        unused = "a card is here, and no CUDA in onnxruntime: pip install 'gptrt[cuda]'"
        return [Finding("note", "cuda", unused)] if card else []
    try:
        if hasattr(ort, "preload_dlls"):
            ort.preload_dlls()
        folder = Path(ort.__file__).parent / "capi"
        for name in ("shared", "cuda"):
            ctypes.CDLL(str(folder / f"libonnxruntime_providers_{name}.so"), ctypes.RTLD_GLOBAL)
    except OSError as e:
        return [Finding("note", "cuda", _missing_library(str(e)))]
    return [Finding("ok" if card else "note", "cuda", "loads" if card else "loads; no card found")]


def _missing_library(message: str) -> str:
    """What the dynamic loader says, and the package to install."""
    package = next((p for name, p in _CUDA_PACKAGES.items() if name in message), None)
    return message if package is None else f"{message}: install {package}"


def _processor() -> list[Finding]:
    flags = _cpu_flags()
    quota = cpu_quota()
    limit = "none" if quota is None else f"{quota:g} cores"
    return [
        Finding("ok", "processor", f"{platform.machine()}: {' '.join(flags) or 'flags unknown'}"),
        Finding("ok", "cores", f"{os.cpu_count()}, limit of the container: {limit}"),
        Finding("ok", "threads", f"{usable_cores()} by default"),
    ]


def _cpu_flags() -> list[str]:
    try:
        words = set(Path("/proc/cpuinfo").read_text().split())
    except OSError:  # not Linux
        return []
    return [flag for flag in _CPU_FLAGS if flag in words]


def _memory() -> Finding:
    total, free, limit = physical_memory(), free_memory(), memory_limit()
    if total is None or free is None:
        return Finding("note", "memory", "unknown")
    bound = "" if limit is None else f", limit of the container: {limit / 1e9:.1f} GB"
    return Finding("ok", "memory", f"{free / 1e9:.1f} of {total / 1e9:.1f} GB free{bound}")


def _embedded() -> Finding:
    try:
        return Finding("ok", "embedded bundle", str(embedded_bundle()))
    except BundleError:
        return Finding("note", "embedded bundle", "none: give every command a BUNDLE")
