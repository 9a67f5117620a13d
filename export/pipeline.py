"""Conversion as a story: refuse, load, trace, quantize, write, measure, promise, rename."""

from __future__ import annotations

import copy
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from gptrt.architecture import ForeignModel, ModelConfig
from gptrt.engine import Device
from gptrt.errors import CheckpointError, FidelityError, PromptError, TargetError
from gptrt.format import (
    CARD_FILE,
    FORMAT_VERSION,
    MANIFEST_FILE,
    Bundle,
    CacheLayout,
    Fidelity,
    Manifest,
    Quantization,
    describe_file,
    open_bundle,
)
from gptrt.generator import Generator
from gptrt.opening import open_decoder
from gptrt.task import Task

from . import via
from .card import model_card
from .checkpoint import Checkpoint, load_checkpoint
from .companions import write_companions
from .files import write_json, written_whole
from .graph import build_graph
from .heads import with_padded_heads
from .hub import name_of
from .kv_cache import calibrate_cache, quantize_cache
from .nbits import save_graph, store_matrices
from .options import ConvertOptions, check_window
from .plots import plot_sensitivity
from .runs import TEACHER_FOLDER
from .storing import Step, silent_step, store
from .texts import DEFAULT_TOKENS, TextFiles, Texts, choose_texts
from .tokenization import ids_without_rows
from .verify import Reference, golden_prompts, measure

# Perplexity ratios above which a conversion fails.
LIMITS = {"none": 1.001, "fp16": 1.002, "int8": 1.002, "int4": 1.01, "int2": 1.10}
_SAMPLE_PROMPTS = ("Once upon a time", "The king said", "In the morning")
_PICTURE_FILE = "sensitivity.png"


@dataclass(frozen=True)
class _Draft:
    """What a way of converting leaves in the folder of a bundle, and what it is to be judged by."""

    model: ModelConfig | ForeignModel
    cache: CacheLayout
    quantization: Quantization
    lineage: dict[str, str]
    texts: Texts
    reference: Reference
    task: Task | None = None


def convert(source: Path, out: Path, options: ConvertOptions, step: Step = silent_step) -> Manifest:
    """Turn the checkpoint at `source` into a bundle at `out`; either all of it or nothing.

    Raises TargetError if `out` is taken, FidelityError if the bundle is not the model any more.
    """
    refuse_taken(out, force=options.force)
    options.check()
    with written_whole(out, force=options.force) as folder:
        draft = (_fill if options.via is None else _fill_via)(source, folder, options, step)
        manifest = _manifest(out.name, draft, options, folder)
        write_json(folder / MANIFEST_FILE, asdict(manifest))
        step("verifying against PyTorch")
        manifest = _promise(manifest, open_bundle(folder), draft, options)
        write_json(folder / MANIFEST_FILE, asdict(manifest))
        refuse_taken(out, force=options.force)  # it may have taken hours
    return manifest


def _fill(source: Path, folder: Path, options: ConvertOptions, step: Step) -> _Draft:
    """A model of ours: everything is refused before the first matrix is rounded."""
    original = load_checkpoint(source)
    checkpoint = with_padded_heads(original)
    options.check_for(checkpoint)
    calibrate = options.needs_calibration(checkpoint)
    if options.calibration_text is not None and not calibrate:
        step(f"{options.calibration_text} is not read: nothing here is calibrated")
    texts = choose_texts(
        source,
        checkpoint.tokenizer,
        options.text_files,
        calibrate=checkpoint.config if calibrate else None,
    )
    if options.kv_cache != "int8":
        _name_unread(options.window, texts, step)
    other = _reference(source, original, options.against)
    _refuse_other_shape(_shape_of(other.config), _shape_of(original.config))
    reference = other.frozen()
    if options.projects(checkpoint):
        checkpoint = checkpoint.projected()
    model = checkpoint.alone().frozen()
    stored = store(checkpoint, model, texts, options, step)
    step("tracing the graph")
    traced = copy.deepcopy(model).half() if options.half else model
    graph = build_graph(traced, hidden_states=options.hidden_states)
    store_matrices(graph, stored.matrices)
    if options.kv_cache == "int8":
        assert texts.calibration is not None, "choose_texts has seen to it"
        scales = calibrate_cache(model, texts.calibration, options.window)
        quantize_cache(graph.graph, scales)
    save_graph(graph, folder)
    if stored.options:
        plot_sensitivity(stored.options, stored.quantization.matrices, folder / _PICTURE_FILE)
    assert checkpoint.tokenizer is not None
    write_companions(
        *(folder, checkpoint.config, checkpoint.tokenizer),
        *(checkpoint.special, checkpoint.chat_template),
    )
    cache = options.cache_layout(checkpoint.config)
    lineage, config = checkpoint.lineage, checkpoint.config
    return _Draft(*(config, cache, stored.quantization, lineage, texts, reference), checkpoint.task)


def _fill_via(source: Path, folder: Path, options: ConvertOptions, step: Step) -> _Draft:
    """A model that another library builds."""
    assert options.via is not None
    recipe = options.recipe
    config, tokenizer = via.read_config(source), via.tokenizer_of(source)
    check_window(options.window, via.context_of(config))
    texts = choose_texts(source, tokenizer, options.text_files)
    step(f"building the graph with {options.via}")
    graph = via.build(options.via, source)
    model = via.describe_model(config, graph.graph, options.via)
    if faults := ids_without_rows(tokenizer, model.vocab_size):
        raise CheckpointError(
            f"a tokenizer in {source} that fits the model",
            found=faults[0],
            do="restore both from the same model",
        )
    matrices = {} if recipe is None else via.round_matrices(graph.graph, recipe)
    quantization = via.describe_rounding(graph.graph, matrices, recipe)
    cache = via.describe_cache(model, graph.graph)
    store_matrices(graph, matrices)
    save_graph(graph, folder)
    via.write_companions(source, folder, model.vocab_size)
    lineage = {"source": name_of(source), "graph": model.made_with}
    return _Draft(model, cache, quantization, lineage, texts, via.reference_of(source))


def _reference(source: Path, checkpoint: Checkpoint, against: Path | None = None) -> Checkpoint:
    """What a bundle is to be: the checkpoint at `source` in fp32, or that at `against`. One that
    was trained for its rounding is compared with the model that it learned from, if the run has
    kept it."""
    if against is None and checkpoint.rounding and (source / TEACHER_FOLDER).is_dir():
        against = source / TEACHER_FOLDER
    other = checkpoint if against is None else load_checkpoint(against)
    return other.alone()


def _foreign_reference(source: Path, model: ForeignModel) -> Reference:
    config = via.read_config(source)
    shape = {
        "architecture": config["model_type"],
        "vocab_size": config.get("vocab_size", model.vocab_size),
        "n_positions": via.context_of(config),
    }
    _refuse_other_shape(shape, asdict(model))
    return via.reference_of(source)


def _shape_of(config: ModelConfig) -> dict[str, Any]:
    """In whichever basis the vocabulary is."""
    return asdict(replace(config, projected=False))


def _refuse_other_shape(found: dict[str, Any], wanted: dict[str, Any]) -> None:
    others = [
        f"{key} {found[key]}, not {wanted[key]}" for key in found if found[key] != wanted[key]
    ]
    if others:
        raise CheckpointError(
            "the checkpoint that the bundle was made from",
            found=f"another shape: {'; '.join(others)}",
            do="check --against",
        )


def verify(
    path: Path,
    against: Path,
    text: Path | None = None,
    step: Step = silent_step,
    *,
    tokens: int | None = None,
    window: int | None = None,
    device: Device = "cpu",
) -> tuple[Manifest, Fidelity]:
    """Measure an existing bundle on a device as a conversion of the checkpoint `against` would: on
    the first `tokens` of a text file, or on what the run has held out, in windows as long as those
    that the bundle was judged by, if not told."""
    bundle, tokens = open_bundle(path), DEFAULT_TOKENS if tokens is None else tokens
    model, promised = bundle.manifest.model, bundle.manifest.fidelity
    check_window(window, model.n_positions)
    reference: Reference
    if isinstance(model, ForeignModel):
        tokenizer, reference = via.tokenizer_of(against), _foreign_reference(against, model)
    else:
        checkpoint = load_checkpoint(against)
        other = with_padded_heads(_reference(against, checkpoint))
        _refuse_other_shape(_shape_of(other.config), _shape_of(model))
        tokenizer, reference = checkpoint.tokenizer, other.frozen()
    texts = choose_texts(against, tokenizer, TextFiles(text, None, tokens))
    _name_unread(window, texts, step)
    if window is None and promised is not None:
        window = promised.window
    step("verifying against PyTorch")
    fidelity = measure(
        open_decoder(bundle, device=device),
        reference,
        texts.verify,
        text=texts.name,
        tokens=tokens,
        window=window,
        examples=texts.examples,
    )
    return bundle.manifest, fidelity


def _name_unread(window: int | None, texts: Texts, step: Step) -> None:
    if window is not None and texts.examples is not None:
        step("--window has no effect: examples are read one by one")


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
        "ratio_error": fidelity.ratio_error,
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


def _manifest(name: str, draft: _Draft, options: ConvertOptions, folder: Path) -> Manifest:
    return Manifest(
        format_version=FORMAT_VERSION,
        name=name,
        model=draft.model,
        cache=draft.cache,
        quantization=draft.quantization,
        fidelity=None,
        golden=(),
        files={p.name: describe_file(p) for p in sorted(folder.iterdir())},
        lineage=draft.lineage | options.notes | {"exported_with": _versions()},
        hidden_states=options.hidden_states,
        task=draft.task,
    )


def _versions() -> str:
    return ", ".join(f"{name} {version(name)}" for name in ("gptrt", "torch", "onnxruntime"))


def _promise(
    manifest: Manifest, bundle: Bundle, draft: _Draft, options: ConvertOptions
) -> Manifest:
    """The final manifest: fidelity and golden ids measured on the draft, the card written."""
    decoder, texts = open_decoder(bundle, device="cpu"), draft.texts
    fidelity = measure(
        decoder,
        draft.reference,
        texts.verify,
        text=texts.name,
        tokens=options.verify_tokens,
        window=options.window,
        examples=texts.examples,
    )
    if not options.allow_loss:
        check_fidelity(fidelity, manifest.quantization, options.limit)
    promised = replace(manifest, fidelity=fidelity, golden=golden_prompts(decoder, texts.verify))
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


def check_fidelity(
    fidelity: Fidelity, quantization: Quantization, limit: float | None = None
) -> None:
    """Raises FidelityError if the perplexity ratio is above the limit: if none is given, that of
    the mode, or of int4, which is among what a mixed bundle was chosen from."""
    if limit is None:
        limit = LIMITS["int4" if quantization.matrices else quantization.mode]
    if not fidelity.perplexity_ratio <= limit:  # NaN is above every limit
        raise FidelityError(
            f"a perplexity ratio of at most {limit}",
            found=f"{fidelity.ratio} on {fidelity.tokens:,} tokens of {fidelity.text}",
            do="store more bits, by smaller blocks or another budget, or convert with --allow-loss",
        )
