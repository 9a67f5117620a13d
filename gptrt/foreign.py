"""Decoders that other tools exported: folders of onnxruntime-genai, optimum and transformers.js.

Their graphs share most of our names, but the cache grows: each run takes the keys and values so far
and gives those and the new ones back. What a graph takes and gives is read from the graph itself;
of the folder's JSON only what it cannot say: the context, the ids that end a text, where it lies.
"""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gptrt.architecture import MAX_COUNT
from gptrt.cache import KVCache
from gptrt.decoder import (
    Hidden,
    Ids,
    Logits,
    check_capacity,
    check_ids,
    no_hidden_states,
)
from gptrt.engine import Device, Engine
from gptrt.errors import BundleError, PromptError
from gptrt.format import (
    ATTENTION_MASK,
    CONFIG_FILE,
    GENAI_CONFIG_FILE,
    GENERATION_CONFIG_FILE,
    GRAPH_FILE,
    INPUT_IDS,
    LOGITS,
    MANIFEST_FILE,
    NUM_LOGITS_TO_KEEP,
    POSITION_IDS,
    TOKENIZER_FILE,
    Bundle,
)
from gptrt.interrupt import Interrupt
from gptrt.schema import read_json
from gptrt.tokenizer import Tokenizer

# The first that is there is taken: whole decoders before those in fewer bits.
GRAPHS = tuple(
    f"{folder}{name}.onnx"
    for folder in ("", "onnx/")
    for name in (
        *("model", "decoder_model_merged", "model_q4", "decoder_model_merged_q4"),
        *("model_quantized", "decoder_model_merged_quantized", "model_int8", "model_fp16"),
    )
)
_USE_CACHE_BRANCH = "use_cache_branch"  # of optimum's merged decoders
_GENAI_KEYS = {"head_size": "head_dim", "num_key_value_heads": "num_key_value_heads"}
_CONTEXT_KEYS = ("max_position_embeddings", "n_positions", "n_ctx", "max_sequence_length")


# --- the folder ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class ForeignFolder:
    """Where the parts of a decoder lie, and what its graph cannot say of it."""

    path: Path
    graph: Path
    context: int
    eos_token_ids: tuple[int, ...]
    config: Mapping[str, Any]

    def tokenizer(self) -> Tokenizer:
        """Its tokenizer, or one that refuses text where it has none."""
        path = self.path / TOKENIZER_FILE
        found = Tokenizer.read(path, self.eos_token_ids) if path.is_file() else None
        return found or _NoTokenizer(self.path, self.eos_token_ids)


def is_foreign(path: str | os.PathLike[str]) -> bool:
    """Whether there is a graph at `path` that no manifest of ours speaks for."""
    path = Path(path)
    if path.is_file():
        return path.suffix == ".onnx"
    if not path.is_dir() or (path / MANIFEST_FILE).is_file():
        return False
    return (path / GENAI_CONFIG_FILE).is_file() or any((path / name).is_file() for name in GRAPHS)


def open_foreign(path: str | os.PathLike[str]) -> ForeignFolder:
    """A folder, or one graph in it. Raises BundleError for what is missing or out of bounds."""
    path = Path(path)
    folder, graph = (path, None) if path.is_dir() else (path.parent, path)
    if graph is not None and folder.name == "onnx":
        folder = folder.parent
    genai = _part(_read(folder / GENAI_CONFIG_FILE), "model")
    decoder = _part(genai, "decoder")
    known = {ours: decoder[theirs] for theirs, ours in _GENAI_KEYS.items() if theirs in decoder}
    config = known | _read(folder / CONFIG_FILE)
    generation = _read(folder / GENERATION_CONFIG_FILE)
    graph = graph or _graph(folder, decoder.get("filename"))
    context = genai.get("context_length")
    for key in _CONTEXT_KEYS:
        context = config.get(key) if context is None else context
    if type(context) is not int or not 1 <= context <= MAX_COUNT:
        raise BundleError(
            f"the context of {graph}, as context_length in {GENAI_CONFIG_FILE} or as "
            f"{_CONTEXT_KEYS[0]} in {CONFIG_FILE}",
            found=repr(context),
            do="write it there",
        )
    ends = (json.get("eos_token_id") for json in (genai, generation, config))
    found: Any = next((value for value in ends if value is not None), [])
    eos = found if isinstance(found, list) else [found]
    if any(type(token) is not int or token < 0 for token in eos):
        raise BundleError(f"ids as eos_token_id in {folder}", found=repr(eos), do="correct them")
    return ForeignFolder(folder, graph, context, tuple(eos), config)


def folder_of(bundle: Bundle) -> ForeignFolder:
    """The same for a bundle, whose files are checked: its graph is another library's."""
    listed = CONFIG_FILE in bundle.manifest.files
    config = _read(bundle.file(CONFIG_FILE)) if listed else {}
    context = bundle.manifest.model.n_positions
    return ForeignFolder(bundle.path, bundle.file(GRAPH_FILE), context, (), config)


def warn_of(folder: ForeignFolder) -> None:
    """Once for each place that opens one, as warnings are."""
    warnings.warn(
        f"{folder.graph} has no manifest of gptrt beside it: whether its files are whole is not "
        "checked, and nothing is promised of what it computes",
        UserWarning,
        stacklevel=5,  # where the application makes its Generator
    )


def _read(path: Path) -> dict[str, Any]:
    json = read_json(path, error=BundleError) if path.is_file() else {}
    if not isinstance(json, dict):
        raise BundleError(f"an object in {path}", found=type(json).__name__, do="restore it")
    return json


def _part(json: dict[str, Any], key: str) -> dict[str, Any]:
    part = json.get(key, {})
    return part if isinstance(part, dict) else {}


def _graph(folder: Path, named: Any) -> Path:
    names = [named] if isinstance(named, str) else list(GRAPHS)
    for name in names:
        if (folder / name).is_file():
            return folder / name
    raise BundleError(
        f"a decoder in {folder}: {', '.join(names)}",
        found="none of them",
        do="give the path of the .onnx file itself",
    )


class _NoTokenizer(Tokenizer):
    """Ids still go in and come out."""

    def __init__(self, folder: Path, eos_token_ids: Sequence[int]) -> None:
        self._folder, self.eos_token_ids = folder, tuple(eos_token_ids)
        self.chat_template = None

    def encode(self, text: str, *, whole: bool = True) -> list[int]:
        del text, whole
        raise self._missing()

    def decode(self, ids: Sequence[int]) -> str:
        del ids
        raise self._missing()

    def stream_decoder(self) -> Any:
        raise self._missing()

    def _missing(self) -> PromptError:
        return PromptError(
            f"{TOKENIZER_FILE} in {self._folder}, to read and write text",
            found="none",
            do="add it, or give ids and take them from Generator.tokens",
        )


# --- the graph ----------------------------------------------------------------------------------

_INTEGERS = {"tensor(int64)": np.int64, "tensor(int32)": np.int32, "tensor(bool)": np.bool_}
_FLOATS = {"tensor(float)": "float32", "tensor(float16)": "float16"}


@dataclass(frozen=True)
class _Slot:
    """One tensor of the cache: its names, and its shape [..., batch, heads, length, head_dim] with
    None where the batch and the length go."""

    past: str
    present: str
    shape: tuple[int | None, ...]
    dtype: str

    @property
    def itemsize(self) -> int:
        return np.dtype(self.dtype).itemsize

    def empty(self) -> NDArray[Any]:
        """Of one row."""
        *before, _, heads, _, width = self.shape
        return np.zeros((*before, 1, heads, 0, width), self.dtype)  # type: ignore[arg-type]


class ForeignDecoder:
    """A decoder that another tool exported: what `Decoder` is for a bundle of ours.

    Raises what `Engine` does, and BundleError with everything that such a graph should have and
    this one has not.
    """

    def __init__(
        self, folder: ForeignFolder, *, device: Device = "auto", threads: int | None = None
    ) -> None:
        self.context = folder.context
        self.engine = Engine(folder.graph, device=device, threads=threads)
        self._takes = {node.name: node for node in self.engine.inputs}
        gives = {node.name: node for node in self.engine.outputs}
        self._slots, faults = _slots(self._takes, gives, folder.config)
        known = {INPUT_IDS, ATTENTION_MASK, POSITION_IDS, NUM_LOGITS_TO_KEEP, _USE_CACHE_BRANCH}
        ours = self._takes.keys() - {slot.past for slot in self._slots}
        faults += [f"input {name} is unknown" for name in sorted(ours - known)]
        faults += [
            f"input {name} is {self._takes[name].type}"
            for name in sorted(ours & known)
            if self._takes[name].type not in _INTEGERS
        ]
        faults += [f"input {INPUT_IDS} is missing"] if INPUT_IDS not in self._takes else []
        logits = gives.get(LOGITS)
        size = logits.shape[-1] if logits is not None else None
        self.vocab_size = size if isinstance(size, int) else folder.config.get("vocab_size", 0)
        if logits is None or logits.type not in _FLOATS or not self.vocab_size:
            faults.append(f"output {LOGITS} is missing, or of no known type and size")
        if faults:
            raise BundleError(
                f"the inputs and outputs of a decoder with a cache in {folder.graph}",
                found="; ".join(faults),
                do="export it with its cache, as optimum, onnxruntime-genai or mobius do",
            )
        self._logits_dtype = _FLOATS[gives[LOGITS].type]

    copies = True  # its caches lie in arrays
    fingerprint = ""  # nobody has hashed its files

    def new_cache(self, capacity: int, batch: int = 1) -> KVCache:
        """An empty cache; its memory grows with what is read."""
        check_capacity(capacity, self.context)
        rows = [
            _GrownRow(self.engine, [slot.empty() for slot in self._slots]) for _ in range(batch)
        ]
        return KVCache.empty(batch, capacity, _Grown(rows))

    def cache_bytes(self, capacity: int, batch: int = 1) -> int:
        """What a cache takes that is full."""
        sizes = (math.prod(s for s in slot.shape if s) * slot.itemsize for slot in self._slots)
        return capacity * batch * sum(sizes)

    def run(
        self,
        ids: Ids | Sequence[Sequence[int]],
        cache: KVCache,
        *,
        keep: int = 1,
        interrupt: Interrupt | None = None,
    ) -> Logits:
        """As `Decoder.run`, one row after the other: each has keys and values of its own length."""
        _, new = check_ids(ids, cache)
        rows: list[_GrownRow] = cache.buffers.each  # type: ignore[attr-defined]
        kept = min(keep or new, new)
        logits = []
        for number, (row, row_ids) in enumerate(zip(rows, ids, strict=True)):
            start = cache.filled[number].length
            logits.append(self._run_row(np.asarray(row_ids), row, start, kept, interrupt))
        cache.advance(new)
        return np.stack(logits)

    def hidden_states(
        self, ids: Sequence[int], cache: KVCache, *, interrupt: Interrupt | None = None
    ) -> Hidden:
        """Raises BundleError: such graphs do not give them."""
        del ids, cache, interrupt
        raise no_hidden_states()

    def _run_row(
        self, ids: Ids, row: _GrownRow, start: int, kept: int, interrupt: Interrupt | None
    ) -> Logits:
        total = start + len(ids)
        row.go_back_to(start)
        values: dict[str, NDArray[Any]] = {
            INPUT_IDS: ids[None],
            ATTENTION_MASK: np.ones((1, total)),
            POSITION_IDS: np.arange(start, total)[None],
            NUM_LOGITS_TO_KEEP: np.full(len(self._shape(NUM_LOGITS_TO_KEEP)) * (1,), kept),
            _USE_CACHE_BRANCH: np.array([start > 0]),
        }
        binding = self.engine.new_binding()
        for name, value in values.items():
            if name in self._takes:
                array: NDArray[Any] = value.astype(_INTEGERS[self._takes[name].type])
                binding.bind_ortvalue_input(name, self.engine.value_of(array))
        for slot, past in zip(self._slots, row.values, strict=True):
            binding.bind_ortvalue_input(slot.past, past)
            binding.bind_output(slot.present, self.engine.device)
        binding.bind_output(LOGITS, "cpu")
        self.engine.run(binding, interrupt)
        *row.values, logits = binding.get_outputs()
        row.length = total
        return np.array(logits.numpy()[0, -kept:], np.float32)

    def _shape(self, name: str) -> Sequence[Any]:
        return self._takes[name].shape if name in self._takes else ()


class _GrownRow:
    """Keys and values of one row as the last run gave them."""

    def __init__(self, engine: Engine, arrays: Sequence[NDArray[Any]]) -> None:
        self._engine = engine
        self.arrays = arrays  # [..., 1, heads, length, head_dim]

    @property
    def arrays(self) -> list[NDArray[Any]]:
        return [value.numpy() for value in self.values]

    @arrays.setter
    def arrays(self, arrays: Sequence[NDArray[Any]]) -> None:
        self.values = [self._engine.value_of(np.ascontiguousarray(array)) for array in arrays]
        self.length = arrays[0].shape[-2]

    def go_back_to(self, length: int) -> None:
        """Forget what was read from position `length` on."""
        if length != self.length:
            self.arrays = [array[..., :length, :] for array in self.arrays]


@dataclass
class _Grown:
    """The rows of a cache, each as long as what it has read."""

    each: list[_GrownRow]

    def rows(self, start: int, stop: int) -> _Grown:
        return _Grown(self.each[start:stop])

    def copy_row(self, source: _Grown, start: int, stop: int) -> None:
        pairs = zip(self.each[0].arrays, source.each[0].arrays, strict=True)
        self.each[0].arrays = [
            np.concatenate((ours[..., :start, :], theirs[..., start:stop, :]), axis=-2)
            for ours, theirs in pairs
        ]

    def read(self, length: int) -> bytes:
        return b"".join(array[..., :length, :].tobytes() for array in self.each[0].arrays)

    def write(self, data: bytes, length: int) -> None:
        at, arrays = 0, []
        for old in self.each[0].arrays:
            shape = (*old.shape[:-2], length, old.shape[-1])
            arrays.append(np.frombuffer(data, old.dtype, math.prod(shape), at).reshape(shape))
            at += arrays[-1].nbytes
        if at != len(data):
            raise ValueError(f"{len(data)} bytes instead of {at}")
        self.each[0].arrays = arrays


def open_parts(
    path: str | os.PathLike[str], *, device: Device = "auto", threads: int | None = None
) -> tuple[ForeignDecoder, Tokenizer]:
    """What a generator needs, with a warning that none of it is checked."""
    folder = open_foreign(path)
    warn_of(folder)
    return ForeignDecoder(folder, device=device, threads=threads), folder.tokenizer()


def _slots(
    takes: Mapping[str, Any], gives: Mapping[str, Any], config: Mapping[str, Any]
) -> tuple[list[_Slot], list[str]]:
    """The cache of a graph, and what is wrong with it. A cache may be a tensor for each key and
    each value of a layer, or one for both of them, [2, batch, heads, length, head_dim]."""
    slots, faults = [], []
    for past in (name for name in takes if name.startswith("past")):
        rest = past.removeprefix("past_key_values").removeprefix("past")
        names = (f"present{rest}", f"present_key_values{rest}")
        present = next((name for name in names if name in gives), None)
        node = takes[past]
        if present is None:
            faults.append(f"output {names[0]} is missing")
        elif node.type not in _FLOATS or len(node.shape) not in (4, 5):
            faults.append(f"input {past} is {node.type} {node.shape}")
        else:
            *before, _, heads, _, width = node.shape
            heads, width = _heads(heads, config), _width(width, config)
            if not all(isinstance(size, int) for size in (*before, heads, width)):
                faults.append(f"input {past} has the shape {node.shape}, and no config says more")
            shape = (*before, None, heads, None, width)
            slots.append(_Slot(past, present, shape, _FLOATS[node.type]))
    if not slots and not faults:
        faults.append("inputs past_key_values.*.key and .value, or past_*, are missing")
    return slots, faults


def _heads(size: Any, config: Mapping[str, Any]) -> Any:
    keys = ("num_key_value_heads", "num_attention_heads", "n_head")
    return size if isinstance(size, int) else next((config[k] for k in keys if k in config), None)


def _width(size: Any, config: Mapping[str, Any]) -> Any:
    if isinstance(size, int) or "head_dim" in config:
        return size if isinstance(size, int) else config["head_dim"]
    width = config.get("hidden_size", config.get("n_embd"))
    heads = config.get("num_attention_heads", config.get("n_head"))
    divides = isinstance(width, int) and isinstance(heads, int) and heads > 0
    return width // heads if divides and width % heads == 0 else None
