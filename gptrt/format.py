"""The bundle: the treaty between the exporter, which writes it, and the runtime, which reads it.

Everything that both sides must agree on stands here once: file names, tensor names, the
configuration of the model, the manifest and its bounds. Standard library only.

A bundle is read in this order: manifest schema and bounds, then file sizes, then hashes, and only
then does a native parser see a byte. Most single bit flips in an ONNX file load and run without
a complaint and give wrong numbers, so nothing is used before its hash is known.
"""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from gptrt.architecture import MAX_COUNT, ForeignModel, ModelConfig
from gptrt.errors import BundleError
from gptrt.schema import bounded, decode, read_json
from gptrt.task import Task

FORMAT_VERSION = 1

# Where `config.json` says how long the context is: by the name that its family gives it.
CONTEXT_KEYS = (
    *("max_position_embeddings", "n_positions", "n_ctx"),
    *("seq_length", "max_seq_len", "max_sequence_length"),
)

# --- file names -----------------------------------------------------------------------------

MANIFEST_FILE = "gptrt.json"
GRAPH_FILE = "model.onnx"
GRAPH_DATA_FILE = "model.onnx.data"
CONFIG_FILE = "config.json"
GENERATION_CONFIG_FILE = "generation_config.json"
TOKENIZER_FILE = "tokenizer.json"
TOKENIZER_CONFIG_FILE = "tokenizer_config.json"
GENAI_CONFIG_FILE = "genai_config.json"
CARD_FILE = "README.md"

# --- tensor names: those that optimum, transformers.js and onnxruntime-genai share ------------

INPUT_IDS = "input_ids"  # int64 [batch, new]
ATTENTION_MASK = "attention_mask"  # int64 [batch, past + new]
POSITION_IDS = "position_ids"  # int64 [batch, new]
NUM_LOGITS_TO_KEEP = "num_logits_to_keep"  # int64 [1], optional: 0, its default, keeps all
LOGITS = "logits"  # float32 [batch, kept, vocab]
HIDDEN_STATES = "hidden_states"  # float32 [batch, new, n_embd], optional: of the last norm


CachePart = Literal["key", "value"]
CACHE_PARTS: tuple[CachePart, ...] = ("key", "value")  # of every layer, in this order


def past_name(layer: int, part: CachePart) -> str:
    """The cache of one layer as a graph input: [batch, kv_heads, max_length, head_dim]."""
    return f"past_key_values.{layer}.{part}"


def present_name(layer: int, part: CachePart) -> str:
    """The same buffer as a graph output; bound to the same memory, it is updated in place."""
    return f"present.{layer}.{part}"


# --- the data: frozen, validated where it enters ----------------------------------------------

_MAX_FILE = 1 << 40
_LONGEST_NAME = 255  # bytes, of a file on any system
_CHUNK = 1 << 22  # bytes hashed at a time: other threads run meanwhile


@dataclass(frozen=True)
class CacheLayout:
    """The KV cache: per layer a key and a value buffer [batch, kv_heads, length, head_dim].

    `max_length` bounds `length`; a runtime may allocate less. The scales of an int8 cache are in
    the graph. In a foreign graph the cache grows from run to run, and may differ between layers.
    """

    layers: int = bounded(1, 1024)
    kv_heads: int = bounded(1, 1024)
    head_dim: int = bounded(1, 4096)
    max_length: int = bounded(1, MAX_COUNT)
    dtype: Literal["float32", "float16", "int8"] = "float32"


@dataclass(frozen=True)
class StoredMatrix:
    """One matrix of a mixed bundle; `damage` is what rounding it alone costs, in nats of KL."""

    name: str
    bits: int = bounded(2, 32)
    block_size: int = bounded(1, 1 << 16)
    weights: int = bounded(1, 1 << 40)
    damage: float = bounded(-1e6, 1e6)


@dataclass(frozen=True)
class Quantization:
    """How the matrices are stored. `head_bits` is the (tied) vocabulary matrix; `matrices` is the
    table of a bundle whose matrices were chosen one by one, else empty."""

    mode: Literal["none", "fp16", "int8", "int4", "int2"]
    method: str
    bits: int = bounded(2, 32)
    head_bits: int = bounded(2, 32)
    block_size: int = bounded(0, 1 << 16)  # 0 where nothing is quantized
    bits_per_weight: float = bounded(0.0, 64.0)  # over all parameters, scales included
    matrices: tuple[StoredMatrix, ...] = ()


@dataclass(frozen=True)
class Fidelity:
    """What verification measured, on `tokens` predicted tokens of `text`.

    `kl` is the mean over positions of KL(reference || bundle) in nats; `top1` the share of
    positions where both have the same most likely token; `greedy` the share of tokens before both
    differ, when both continue the same prompts greedily; `ratio_error` the standard error of the
    perplexity ratio, over positions; `window` how many tokens were read in a row, None where
    answers of examples were judged. None: an older bundle did not measure it.
    """

    text: str
    tokens: int = bounded(1, 1 << 40)
    perplexity: float = bounded(0.0, 1e30)
    perplexity_reference: float = bounded(0.0, 1e30)
    perplexity_ratio: float = bounded(0.0, 1e30)
    kl: float = bounded(-1.0, 1e6)
    top1: float = bounded(0.0, 1.0)
    greedy: float | None = bounded(0.0, 1.0, default=None)
    ratio_error: float | None = bounded(0.0, 1e30, default=None)
    window: int | None = bounded(1, MAX_COUNT, default=None)

    @property
    def ratio(self) -> str:
        """The perplexity ratio for people to read, with its error."""
        error = "" if self.ratio_error is None else f" ± {self.ratio_error:.4f}"
        return f"{self.perplexity_ratio:.4f}{error}"


@dataclass(frozen=True)
class Golden:
    """Greedy ids that the bundle must give for a prompt, on every machine."""

    prompt_ids: tuple[int, ...]
    ids: tuple[int, ...]


@dataclass(frozen=True)
class FileEntry:
    size: int = bounded(0, _MAX_FILE)
    sha256: str = ""


@dataclass(frozen=True)
class Manifest:
    """`gptrt.json`. Unknown keys are errors; every fault is listed, not only the first."""

    format_version: int
    name: str
    model: ModelConfig | ForeignModel
    cache: CacheLayout
    quantization: Quantization
    fidelity: Fidelity | None
    golden: tuple[Golden, ...]
    files: dict[str, FileEntry]
    lineage: dict[str, str]  # where the weights come from: data, steps, versions
    hidden_states: bool = False  # whether the graph gives them
    task: Task | None = None  # what it was fine-tuned for

    @property
    def weights_bytes(self) -> int:
        """Of the graph and its external data."""
        return sum(self.files[n].size for n in (GRAPH_FILE, GRAPH_DATA_FILE) if n in self.files)

    def faults(self) -> list[str]:
        found = []
        if self.format_version != FORMAT_VERSION:
            found.append(f"format_version {self.format_version}, this gptrt reads {FORMAT_VERSION}")
        for name in self.files:
            if not _is_plain_name(name):
                found.append(f"files[{name!r}] is not a plain file name")
        for name in (GRAPH_FILE, TOKENIZER_FILE):
            if name not in self.files:
                found.append(f"files lacks {name}")
        for name, entry in self.files.items():
            if len(entry.sha256) != 64 or not set(entry.sha256) <= set("0123456789abcdef"):
                found.append(f"files[{name!r}].sha256 is not 64 hexadecimal digits")
        model, cache = self.model, self.cache
        wanted = (cache.layers, cache.kv_heads, cache.head_dim, model.n_positions)
        if isinstance(model, ModelConfig):
            wanted = (model.n_layer, model.n_kv_head, model.head_dim, model.n_positions)
        if wanted != (cache.layers, cache.kv_heads, cache.head_dim, cache.max_length):
            found.append("cache does not match model")
        ids = [i for golden in self.golden for i in (*golden.prompt_ids, *golden.ids)]
        if any(not 0 <= i < model.vocab_size for i in ids):
            found.append("golden ids lie outside the vocabulary")
        return found


def _is_plain_name(name: str) -> bool:
    if not 0 < len(name.encode("utf-8", "surrogatepass")) <= _LONGEST_NAME or name in (".", ".."):
        return False
    return name.isprintable() and not any(c in name for c in "/\\:")


# --- reading and describing a bundle on disk ----------------------------------------------------


@dataclass(frozen=True)
class Bundle:
    """A folder whose manifest was read, and whose files were compared with it: by `open_bundle`
    all of every file, by `open_structure` all but the weights, for `check_weights` to do."""

    path: Path
    manifest: Manifest

    def file(self, name: str) -> Path:
        return self.path / name


def read_manifest(path: Path) -> Manifest:
    """The manifest of the bundle at `path`, schema and bounds checked. Raises BundleError."""
    if not path.is_dir():
        found = "a file" if path.exists() else "nothing"
        raise BundleError(
            f"a bundle folder at {path}",
            found=found,
            do="give the folder that `gptrt-export convert` wrote",
        )
    manifest = path / MANIFEST_FILE
    if not manifest.is_file():
        raise BundleError(
            f"{MANIFEST_FILE} in {path}",
            found="no such file, so this is not a gptrt bundle",
            do="make one with `gptrt-export convert`",
        )
    value = read_json(manifest, error=BundleError)
    return decode(Manifest, value, error=BundleError, source=str(manifest))


def open_bundle(path: str | os.PathLike[str]) -> Bundle:
    """Read the manifest, then check the size and sha256 of every file. Raises BundleError."""
    bundle = open_structure(path)
    check_weights(bundle)
    return bundle


def open_structure(path: str | os.PathLike[str]) -> Bundle:
    """`open_bundle`, but for the hash of the weights beside the graph: raw numbers that no parser
    reads, and nearly all bytes. `check_weights` must follow before anyone computes with them."""
    folder = Path(path)
    manifest = read_manifest(folder)
    for name, entry in manifest.files.items():
        _check_size(folder / name, entry)
    for name, entry in manifest.files.items():
        if name != GRAPH_DATA_FILE:
            _check_hash(folder / name, entry)
    return Bundle(folder, manifest)


def check_weights(bundle: Bundle) -> None:
    """The hash that `open_structure` left out. Raises BundleError."""
    if entry := bundle.manifest.files.get(GRAPH_DATA_FILE):
        _check_hash(bundle.file(GRAPH_DATA_FILE), entry)


_RESTORE = "the file was changed or cut off: copy the bundle again"


def _check_size(path: Path, entry: FileEntry) -> None:
    if path.is_symlink() or not path.is_file():
        found = "a link" if path.is_symlink() else "no such file"
        raise BundleError(f"the plain file {path}", found=found, do="copy the bundle again")
    size = path.stat().st_size
    if size != entry.size:
        raise BundleError(f"{path} of {entry.size} bytes", found=f"{size} bytes", do=_RESTORE)


def _check_hash(path: Path, entry: FileEntry) -> None:
    found = describe_file(path).sha256
    if found != entry.sha256:
        raise BundleError(
            f"{path} with sha256 {entry.sha256[:16]}…", found=f"{found[:16]}…", do=_RESTORE
        )


def describe_file(path: Path) -> FileEntry:
    """Size in bytes and sha256 of a file. Raises BundleError if it cannot be read."""
    try:
        digest, buffer = hashlib.sha256(), memoryview(bytearray(_CHUNK))
        with path.open("rb", buffering=0) as stream:
            while size := stream.readinto(buffer):
                digest.update(buffer[:size])
        return FileEntry(path.stat().st_size, digest.hexdigest())
    except OSError as e:
        raise BundleError(f"to read {path}", found=e.strerror or str(e), do="check the file") from e
