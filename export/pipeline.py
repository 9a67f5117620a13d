"""Conversion as a story: refuse, load, trace, quantize, write, measure, promise, rename."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import Literal

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from gptrt.errors import (
    CheckpointError,
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
from .data import spread_windows
from .graph import build_graph, check_exportable
from .kv_cache import calibrate_cache, quantize_cache
from .model import GPT
from .nbits import store_matrices
from .plots import plot_sensitivity
from .progress import ProgressBar
from .quantize import Matrices, Recipe, describe, mode_of, quantize_model
from .rounding import Method
from .runs import TEACHER_FOLDER
from .sensitivity import (
    Options,
    explain,
    formats_of,
    measure_damage,
    plan_for_bits,
    plan_for_damage,
    table_of,
)
from .texts import DEFAULT_TOKENS, TextFiles, Texts, calibration_tokens, choose_texts
from .verify import golden_prompts, measure

# Perplexity ratios above which a conversion fails.
LIMITS = {"none": 1.001, "fp16": 1.002, "int8": 1.002, "int4": 1.01, "int2": 1.10}
_SAMPLE_PROMPTS = ("Once upon a time", "The king said", "In the morning")
_LONGEST_WINDOW = 512  # of calibration text, if not told: attention takes the square of it
_DAMAGE_TOKENS = 4096  # of calibration text, to measure the damage of each matrix on

PICTURE_FILE = "sensitivity.png"

Step = Callable[[str], None]
Ids = NDArray[np.uint32]
Windows = NDArray[np.int64]  # [count, length]


def _silent(line: str) -> None:
    del line


@dataclass(frozen=True)
class ConvertOptions:
    """None leaves a choice to the exporter: method, head and blocks to what loses least in a mode,
    `max_perplexity_ratio` to `LIMITS`.

    `bits_per_weight` or `target_ratio` is a budget, in bits over all parameters or in perplexity:
    with one of them every matrix gets bits and block of its own, by measured damage.
    """

    mode: Literal["none", "fp16", "int8", "int4", "int2"] = "int4"
    method: Method | None = None
    block_size: int | None = None
    head_bits: int | None = None
    symmetric: bool | None = None
    bits_per_weight: float | None = None
    target_ratio: float | None = None
    kv_cache: Literal["float", "int8"] = "float"  # float: as the activations
    verify_text: Path | None = None
    calibration_text: Path | None = None
    verify_tokens: int = DEFAULT_TOKENS
    window: int | None = None  # tokens in a row, of either text: the context, if not given
    against: Path | None = None
    max_perplexity_ratio: float | None = None
    allow_loss: bool = False
    force: bool = False
    notes: dict[str, str] = field(default_factory=dict)  # for the lineage: a licence, for example

    @property
    def recipe(self) -> Recipe | None:
        """Raises OptionError for a combination that there is not."""
        if self.mode == "none" or self.mode == "fp16":
            return None
        return Recipe(self.mode, self.method, self.block_size, self.head_bits, self.symmetric)

    @property
    def mixed(self) -> bool:
        return self.bits_per_weight is not None or self.target_ratio is not None

    @property
    def text_files(self) -> TextFiles:
        return TextFiles(self.verify_text, self.calibration_text, self.verify_tokens)

    def check(self) -> None:
        """Raises OptionError for options that do not go together, before any work is done."""
        if self.kv_cache == "int8" and self.mode == "fp16":
            raise OptionError(
                "--kv-cache int8 with --quantize none, int8 or int4",
                found="fp16",
                do="leave one of them out",
            )
        chosen = ("method", "block_size", "head_bits", "symmetric")
        given = [name for name in chosen if getattr(self, name) is not None]
        if self.recipe is None and (given or self.mixed):
            raise OptionError(
                f"--quantize int8, int4 or int2 with {', '.join(given) or 'a budget'}",
                found=self.mode,
                do="leave one of them out",
            )
        if self.mixed and (given or self.mode != "int4"):
            raise OptionError(
                "a budget alone: it chooses bits, blocks and method by itself",
                found=", ".join(given) or f"--quantize {self.mode}",
                do="leave one of them out",
            )
        if self.bits_per_weight is not None and self.target_ratio is not None:
            raise OptionError("one budget", found="two", do="leave one of them out")


def convert(source: Path, out: Path, options: ConvertOptions, step: Step = _silent) -> Manifest:
    """Turn the checkpoint at `source` into a bundle at `out`; either all of it or nothing.

    Raises TargetError if `out` is taken, FidelityError if the bundle is not the model any more.
    """
    refuse_taken(out, force=options.force)
    options.check()
    checkpoint = load_checkpoint(source)
    check_exportable(checkpoint.config)
    _check_window(checkpoint.config, options.window)
    check_trained_for(checkpoint, options)
    calibrate = checkpoint.rounding is None and _needs_calibration(options)
    texts = choose_texts(source, checkpoint, options.text_files, calibrate=calibrate)
    reference = _reference(source, checkpoint, options)
    model = checkpoint.rounded().model().eval()
    with written_whole(out) as folder:
        stored = store(checkpoint, model, texts, options, step)
        step("tracing the graph")
        graph = build_graph(copy.deepcopy(model).half() if options.mode == "fp16" else model)
        store_matrices(graph, stored.matrices)
        if options.kv_cache == "int8":
            seen = texts.verify if texts.calibration is None else texts.calibration
            quantize_cache(graph.graph, calibrate_cache(model, seen))
        save_graph(graph, folder)
        if stored.options:
            plot_sensitivity(stored.options, stored.quantization.matrices, folder / PICTURE_FILE)
        assert checkpoint.tokenizer is not None
        write_companions(folder, checkpoint.config, checkpoint.tokenizer)
        checkpoint = replace(checkpoint, lineage=checkpoint.lineage | options.notes)
        cache = _cache_layout(checkpoint.config, options)
        draft = _manifest(out.name, checkpoint, cache, stored.quantization, folder)
        write_json(folder / MANIFEST_FILE, asdict(draft))
        step("verifying against PyTorch")
        manifest = _promise(draft, open_bundle(folder), reference, texts, options)
        write_json(folder / MANIFEST_FILE, asdict(manifest))
    return manifest


def _check_window(config: ModelConfig, window: int | None) -> None:
    if window is not None and not 2 <= window <= config.n_positions:
        raise OptionError(
            f"--window from 2 to {config.n_positions}", found=str(window), do="correct it"
        )


def check_trained_for(checkpoint: Checkpoint, options: ConvertOptions) -> None:
    """Raises OptionError if a model was trained for another rounding than is asked for."""
    if checkpoint.rounding is None:
        return
    trained = mode_of(checkpoint.rounding.formats)
    chosen = ("method", "block_size", "head_bits", "symmetric")
    if options.mode != trained or options.mixed or any(getattr(options, c) for c in chosen):
        raise OptionError(
            f"--quantize {trained} and nothing else, which the model was trained to be rounded to",
            found=f"--quantize {options.mode} or a recipe of its own",
            do="leave the recipe to the checkpoint, or convert what it was trained from",
        )


def _needs_calibration(options: ConvertOptions) -> bool:
    return options.mixed or (options.recipe is not None and options.recipe.needs_text)


def _reference(source: Path, checkpoint: Checkpoint, options: ConvertOptions) -> GPT:
    """What the bundle is to be: the checkpoint in fp32. One that was trained for its rounding is
    compared with the model that it learned from, if the run has kept it."""
    against = options.against
    if against is None and checkpoint.rounding and (source / TEACHER_FOLDER).is_dir():
        against = source / TEACHER_FOLDER
    other = checkpoint if against is None else load_checkpoint(against)
    _check_same_shape(other, checkpoint.config)
    return other.rounded().model().eval()


def _check_same_shape(checkpoint: Checkpoint, config: ModelConfig) -> None:
    if checkpoint.config != config:
        raise CheckpointError(
            "the checkpoint that the bundle was made from",
            found="another shape",
            do="check --against",
        )


@dataclass(frozen=True)
class Stored:
    """The matrices as the bundle will hold them; `options` is what a mixed one was chosen from."""

    matrices: Matrices
    quantization: Quantization
    options: Options = field(default_factory=dict)


def store(
    checkpoint: Checkpoint, model: GPT, texts: Texts, options: ConvertOptions, step: Step = _silent
) -> Stored:
    """Round the matrices of a model as the options ask."""
    config, recipe = checkpoint.config, options.recipe
    if recipe is None:
        return Stored({}, _UNQUANTIZED[options.mode])
    if checkpoint.rounding is not None:
        formats = checkpoint.rounding.formats
        matrices = checkpoint.rounding.matrices(checkpoint.state)
        return Stored(matrices, describe(recipe.mode, "trained rounding", config, formats))
    windows = None
    if texts.calibration is not None:
        length = options.window or min(config.n_positions, _LONGEST_WINDOW)
        tokens = calibration_tokens(config)
        windows = spread_windows(texts.calibration, length, tokens)
    with ProgressBar("rounding", quiet=step is _silent) as bar:
        if options.mixed:
            assert windows is not None
            return _store_mixed(model, windows, options, bar, step)
        formats = recipe.formats(config)
        step(f"rounding to {recipe.mode}: {recipe.chosen_method}")
        matrices = quantize_model(model, formats, recipe.chosen_method, windows, bar.update)
    return Stored(matrices, describe(recipe.mode, recipe.chosen_method, config, formats))


def _store_mixed(
    model: GPT, windows: Windows, options: ConvertOptions, bar: ProgressBar, step: Step
) -> Stored:
    step("measuring what each matrix loses in each format")
    judged = windows[: max(1, _DAMAGE_TOKENS // windows.shape[1])]
    found = measure_damage(model, windows, judged, bar.update)
    if options.bits_per_weight is not None:
        plan = plan_for_bits(model.config, found, options.bits_per_weight)
    else:
        assert options.target_ratio is not None
        plan = plan_for_damage(found, math.log(options.target_ratio))
    step(explain(plan))
    formats = formats_of(plan)
    matrices = quantize_model(model, formats, "gptq", windows, bar.update)
    table = table_of(plan)
    return Stored(matrices, describe("int4", "gptq, mixed", model.config, formats, table), found)


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
    _check_same_shape(checkpoint, bundle.manifest.model)
    texts = choose_texts(against, checkpoint, TextFiles(text), calibrate=False)
    step("verifying against PyTorch")
    session = Session(bundle, device="cpu")
    model = checkpoint.rounded().model().eval()
    ids = texts.verify
    return bundle.manifest, measure(session, model, ids, text=texts.name, tokens=DEFAULT_TOKENS)


def summary(
    path: Path, manifest: Manifest, fidelity: Fidelity | None
) -> dict[str, str | float | None]:
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
        "greedy": fidelity.greedy,
        "bits_per_weight": manifest.quantization.bits_per_weight,
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
    draft: Manifest, bundle: Bundle, model: GPT, texts: Texts, options: ConvertOptions
) -> Manifest:
    """The final manifest: fidelity and golden ids measured on the draft, the card written."""
    session = Session(bundle, device="cpu")
    fidelity = measure(
        session,
        model,
        texts.verify,
        text=texts.name,
        tokens=options.verify_tokens,
        window=options.window,
    )
    if not options.allow_loss:
        check_fidelity(fidelity, options.mode, options.max_perplexity_ratio)
    golden = golden_prompts(session, texts.verify, model.config.n_positions)
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
