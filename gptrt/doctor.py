"""What this machine can run, and whether it computes what the exporter promised."""

from __future__ import annotations

import platform
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from itertools import islice
from pathlib import Path

from gptrt.errors import FidelityError, GptrtError
from gptrt.format import Golden, Manifest, open_bundle
from gptrt.generator import Generator, default_bundle
from gptrt.session import Device, import_onnxruntime, usable_cores


@dataclass(frozen=True)
class Finding:
    """One line of the doctor's report; `fatal` means that nothing runs until it is mended."""

    what: str
    says: str
    fatal: bool = False


def verify(path: Path, *, device: Device = "auto", threads: int | None = None) -> Manifest:
    """Check the hashes and the golden greedy ids of a bundle on this machine.

    Raises BundleError for a damaged file, FidelityError where other ids come out than promised.
    """
    with Generator(path, device=device, threads=threads) as generator:
        for number, golden in enumerate(generator.manifest.golden):
            _check(generator, golden, number)
        return generator.manifest


def _check(generator: Generator, golden: Golden, number: int) -> None:
    if not golden.ids:
        return
    found = generator.tokens(golden.prompt_ids, max_new_tokens=len(golden.ids))
    ids = tuple(islice(found, len(golden.ids)))
    if ids != golden.ids:
        pairs = zip(ids, golden.ids, strict=False)
        at = next((i for i, (a, b) in enumerate(pairs) if a != b), len(ids))
        raise FidelityError(
            f"golden prompt {number} to go on with {list(golden.ids)}",
            found=f"{list(ids)}, different from new token {at} on",
            do="do not use this bundle on this machine; report it with the output of `gptrt doctor`",
        )


def examine() -> list[Finding]:
    """Everything that decides whether and how fast a bundle runs here."""
    return [
        Finding(
            "python", f"{platform.python_version()} on {platform.system()} {platform.machine()}"
        ),
        Finding("numpy", version("numpy")),
        *_onnxruntime(),
        Finding("cores", f"{usable_cores()} usable (the default number of threads)"),
        Finding("processor", _processor()),
        _default(),
    ]


def _onnxruntime() -> list[Finding]:
    packages = [
        f"{name} {found}"
        for name in ("onnxruntime", "onnxruntime-gpu")
        if (found := _version(name))
    ]
    try:
        ort = import_onnxruntime()
    except GptrtError as e:
        return [Finding("onnxruntime", str(e), fatal=True)]
    findings = [Finding("onnxruntime", f"{ort.__version__} ({', '.join(packages) or 'own build'})")]
    if len(packages) > 1:
        says = "onnxruntime and onnxruntime-gpu overwrite each other: uninstall both, install one"
        findings.append(Finding("conflict", says, fatal=True))
    return [*findings, Finding("providers", ", ".join(ort.get_available_providers()))]


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _processor() -> str:
    """The instruction sets that the integer kernels use, fastest last."""
    info = Path("/proc/cpuinfo")
    flags = set(info.read_text().split()) if info.is_file() else set()
    known = ("avx2", "avx_vnni", "avx512_vnni", "amx_int8", "asimddp", "i8mm")
    return ", ".join(flag for flag in known if flag in flags) or "no known integer extensions"


def _default() -> Finding:
    path = default_bundle()
    try:
        manifest = open_bundle(path).manifest
    except GptrtError as e:
        return Finding("default", str(e))
    return Finding("default", f"{manifest.name}, {manifest.quantization.mode}, unharmed")


def describe(manifest: Manifest) -> dict[str, str]:
    """What `gptrt info` prints."""
    model, quantization, fidelity = manifest.model, manifest.quantization, manifest.fidelity
    size = sum(entry.size for entry in manifest.files.values())
    lines: dict[str, str] = {
        "name": manifest.name,
        "shape": f"{model.n_layer} layers, {model.n_embd} wide, {model.n_head} heads "
        f"({model.n_kv_head} for keys and values), vocabulary {model.vocab_size}",
        "context": f"{model.n_positions} tokens, {model.positions} positions",
        "weights": f"{quantization.mode}, block {quantization.block_size}, "
        f"{quantization.bits_per_weight:.2f} bits a weight",
        "files": f"{size / 1e6:.1f} MB",
    }
    if fidelity:
        lines["fidelity"] = (
            f"perplexity {fidelity.perplexity:.2f}, {fidelity.perplexity_ratio:.4f} times PyTorch's"
        )
    return lines | dict(manifest.lineage)
