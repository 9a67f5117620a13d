"""Conversion as a story: refuse, load, trace, quantize, write, measure, promise, rename."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from importlib.metadata import version
from itertools import chain, islice
from pathlib import Path
from typing import Literal

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from gptrt.errors import (
    CheckpointError,
    DataError,
    FidelityError,
    OptionError,
    PromptError,
    TargetError,
)
from gptrt.format import (
    CARD_FILE,
    FORMAT_VERSION,
    GRAPH_DATA_FILE,
    GRAPH_FILE,
    MANIFEST_FILE,
    Bundle,
    CacheLayout,
    Fidelity,
    Manifest,
    ModelConfig,
    Quantization,
    describe_file,
    open_bundle,
)
from gptrt.generator import Generator
from gptrt.session import Session

from .card import model_card
from .checkpoint import Checkpoint, load_checkpoint, write_json, written_whole
from .companions import write_companions
from .data import TRAIN_IDS, VALID_IDS, open_ids, read_pieces
from .graph import build_graph, check_exportable
from .kv_cache import calibrate_cache, quantize_cache
from .model import GPT
from .quantize import DEFAULT_BLOCK, Recipe, quantize_graph
from .runs import DATA_FOLDER
from .verify import DEFAULT_TOKENS, golden_prompts, measure

# Perplexity ratios above which a conversion fails. Plain rounding to 4 bits costs a few percent.
LIMITS = {"none": 1.001, "fp16": 1.002, "int8": 1.005, "int4": 1.10}
_SAMPLE_PROMPTS = ("Once upon a time", "The king said", "In the morning")

Step = Callable[[str], None]
Ids = NDArray[np.uint32]


def _silent(line: str) -> None:
    del line


@dataclass(frozen=True)
class ConvertOptions:
    """`max_perplexity_ratio` None takes the limit of the mode from `LIMITS`."""

    mode: Literal["none", "fp16", "int8", "int4"] = "int4"
    block_size: int = DEFAULT_BLOCK
    head_bits: int = 8
    kv_cache: Literal["float", "int8"] = "float"  # float: as the activations
    verify_text: Path | None = None
    verify_tokens: int = DEFAULT_TOKENS
    max_perplexity_ratio: float | None = None
    allow_loss: bool = False
    force: bool = False
    notes: dict[str, str] = field(default_factory=dict)  # for the lineage: a licence, for example

    @property
    def recipe(self) -> Recipe | None:
        """Raises OptionError for a block size that there is not."""
        if self.mode == "int8" or self.mode == "int4":
            return Recipe(self.mode, self.block_size, self.head_bits)
        return None

    def check_kv_cache(self) -> None:
        """Raises OptionError where there is no attention for the cache."""
        if self.kv_cache == "int8" and self.mode == "fp16":
            raise OptionError(
                "--kv-cache int8 with --quantize none, int8 or int4",
                found="fp16",
                do="leave one of them out",
            )


def convert(source: Path, out: Path, options: ConvertOptions, step: Step = _silent) -> Manifest:
    """Turn the checkpoint at `source` into a bundle at `out`; either all of it or nothing.

    Raises TargetError if `out` is taken, FidelityError if the bundle is not the model any more.
    """
    refuse_taken(out, force=options.force)
    recipe = options.recipe
    options.check_kv_cache()
    checkpoint = load_checkpoint(source)
    check_exportable(checkpoint.config)
    ids, text = verification_ids(source, checkpoint, options.verify_text, options.verify_tokens)
    model = checkpoint.model().eval()
    with written_whole(out) as folder:
        step("tracing the graph")
        graph = build_graph(copy.deepcopy(model).half() if options.mode == "fp16" else model)
        step(f"storing the weights: {options.mode}")
        quantization = quantize_graph(graph, recipe) if recipe else _UNQUANTIZED[options.mode]
        if options.kv_cache == "int8":
            quantize_cache(graph.graph, calibrate_cache(model, _calibration_ids(source, ids)))
        save_graph(graph, folder)
        assert checkpoint.tokenizer is not None
        write_companions(folder, checkpoint.config, checkpoint.tokenizer)
        checkpoint = replace(checkpoint, lineage=checkpoint.lineage | options.notes)
        cache = _cache_layout(checkpoint.config, options)
        draft = _manifest(out.name, checkpoint, cache, quantization, folder)
        write_json(folder / MANIFEST_FILE, asdict(draft))
        step("verifying against PyTorch")
        manifest = _promise(draft, open_bundle(folder), model, ids, text, options)
        write_json(folder / MANIFEST_FILE, asdict(manifest))
    return manifest


_UNQUANTIZED = {
    "none": Quantization("none", "none", 32, 32, 0, 32.0),
    "fp16": Quantization("fp16", "none", 16, 16, 0, 16.0),
}


def verify(
    path: Path, against: Path, text: Path, step: Step = _silent
) -> tuple[Manifest, Fidelity]:
    """Measure an existing bundle against the checkpoint `against` on a text file."""
    bundle = open_bundle(path)
    checkpoint = load_checkpoint(against)
    if checkpoint.config != bundle.manifest.model:
        raise CheckpointError(
            "the checkpoint that the bundle was made from",
            found="another shape",
            do="check --against",
        )
    ids, name = verification_ids(against, checkpoint, text)
    step("verifying against PyTorch")
    session = Session(bundle, device="cpu")
    return bundle.manifest, measure(session, checkpoint.model().eval(), ids, text=name)


def summary(path: Path, manifest: Manifest, fidelity: Fidelity | None) -> dict[str, str | float]:
    """What `--json` prints."""
    assert fidelity is not None
    return {
        "bundle": str(path),
        "quantize": manifest.quantization.mode,
        "bytes": sum(entry.size for entry in manifest.files.values()),
        "perplexity": fidelity.perplexity,
        "perplexity_reference": fidelity.perplexity_reference,
        "perplexity_ratio": fidelity.perplexity_ratio,
        "kl": fidelity.kl,
        "top1": fidelity.top1,
    }


def refuse_taken(out: Path, *, force: bool) -> None:
    if out.exists() and not force:
        raise TargetError(
            f"a free name for {out}", found="something there already", do="use --force"
        )
    if out.exists() and not (out / MANIFEST_FILE).is_file():
        raise TargetError(
            f"a bundle to replace at {out}", found="something else", do="choose another --out"
        )


def verification_ids(
    source: Path, checkpoint: Checkpoint, text: Path | None, tokens: int = DEFAULT_TOKENS
) -> tuple[Ids, str]:
    """Ids that training has not seen, and what to call them: of a file the first `tokens` and one
    more, or all that the run has held out."""
    if checkpoint.tokenizer is None:
        raise CheckpointError(f"tokenizer.json in {source}", found="none", do="add the file")
    if text is not None:
        pieces = (checkpoint.tokenizer.encode(p).ids for p in read_pieces(text))
        first = islice(chain.from_iterable(pieces), tokens + 1)
        return np.fromiter(first, np.uint32), text.name
    held_out = source / DATA_FOLDER / VALID_IDS
    if not held_out.is_file():
        raise DataError(
            "text to verify on (a run folder brings its own)",
            found=f"a checkpoint without it, {source}",
            do="give --verify-text FILE, text of the kind that the model is for",
        )
    return open_ids(held_out), "the run's held-out text"


def save_graph(graph: ir.Model, folder: Path) -> None:
    """The graph, and beside it its weights, which onnxruntime maps into memory instead of
    copying them (and protobuf stops at 2 GiB)."""
    path = folder / GRAPH_FILE
    ir.save(graph, path, external_data=GRAPH_DATA_FILE)
    saved = ir.load(path)
    for node in saved.graph:
        if node.op_type == "GatherBlockQuantized":
            _name_rows(saved.graph, node)
    ir.save(saved, path)


def _name_rows(graph: ir.Graph, gather: ir.Node) -> None:
    """Give the matrix that rows are gathered from a second name for the same bytes on disk.

    onnxruntime repacks the matrix of a product and then lets the original go, unless somebody else
    uses it by that name. Of the rows only those that are read ever come into memory.
    """
    matrix = gather.inputs[0]
    assert matrix is not None
    stored = matrix.const_value
    if len(matrix.uses()) < 2 or not isinstance(stored, ir.ExternalTensor):
        return
    name = f"{matrix.name}_rows"
    place = (stored.location, stored.offset, stored.length, stored.dtype)
    twin = ir.ExternalTensor(*place, name=name, shape=stored.shape, base_dir=stored.base_dir)
    value = ir.Value(name=name, shape=stored.shape, type=matrix.type, const_value=twin)
    graph.initializers.add(value)
    gather.replace_input_with(0, value)


def _calibration_ids(source: Path, held_out: Ids) -> Ids:
    """What a run was trained on, or else the text that fidelity is measured on."""
    trained_on = source / DATA_FOLDER / TRAIN_IDS
    return open_ids(trained_on) if trained_on.is_file() else held_out


def _cache_layout(model: ModelConfig, options: ConvertOptions) -> CacheLayout:
    floats: Literal["float16", "float32"] = "float16" if options.mode == "fp16" else "float32"
    return CacheLayout(
        layers=model.n_layer,
        kv_heads=model.n_kv_head,
        head_dim=model.head_dim,
        max_length=model.n_positions,
        dtype="int8" if options.kv_cache == "int8" else floats,
    )


def _manifest(
    name: str,
    checkpoint: Checkpoint,
    cache: CacheLayout,
    quantization: Quantization,
    folder: Path,
) -> Manifest:
    return Manifest(
        format_version=FORMAT_VERSION,
        name=name,
        model=checkpoint.config,
        cache=cache,
        quantization=quantization,
        fidelity=None,
        golden=(),
        files={p.name: describe_file(p) for p in sorted(folder.iterdir())},
        lineage=checkpoint.lineage | {"exported_with": _versions()},
    )


def _versions() -> str:
    return ", ".join(f"{name} {version(name)}" for name in ("gptrt", "torch", "onnxruntime"))


def _promise(
    draft: Manifest, bundle: Bundle, model: GPT, ids: Ids, text: str, options: ConvertOptions
) -> Manifest:
    """The final manifest: fidelity and golden ids measured on the draft, the card written."""
    session = Session(bundle, device="cpu")
    fidelity = measure(session, model, ids, text=text, tokens=options.verify_tokens)
    if not options.allow_loss:
        check_fidelity(fidelity, options.mode, options.max_perplexity_ratio)
    golden = golden_prompts(session, ids, model.config.n_positions)
    promised = replace(draft, fidelity=fidelity, golden=golden)
    card = bundle.path / CARD_FILE
    card.write_text(model_card(promised, _samples(bundle)), encoding="utf-8")
    return replace(promised, files=promised.files | {CARD_FILE: describe_file(card)})


def _samples(bundle: Bundle) -> list[tuple[str, str]]:
    """The first attempts at a few prompts; none where the tokenizer cannot say them."""
    with Generator(bundle.path, device="cpu") as generator:
        try:
            return [
                (p, generator.generate(p, max_new_tokens=80, temperature=0.8, top_k=40, seed=seed))
                for seed, p in enumerate(_SAMPLE_PROMPTS, start=1)
            ]
        except PromptError:
            return []


def check_fidelity(fidelity: Fidelity, mode: str, limit: float | None = None) -> None:
    """Raises FidelityError if the perplexity ratio is above the limit."""
    limit = limit or LIMITS[mode]
    if not fidelity.perplexity_ratio <= limit:  # NaN is above every limit
        raise FidelityError(
            f"a perplexity ratio of at most {limit} for {mode}",
            found=f"{fidelity.perplexity_ratio:.4f} on {fidelity.text}",
            do="use a smaller --block-size or more bits, or accept it with --allow-loss",
        )
