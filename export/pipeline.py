"""Conversion as a story: refuse, load, trace, quantize, write, measure, promise, rename."""

from __future__ import annotations

import copy
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path

from gptrt.architecture import ForeignModel, ModelConfig
from gptrt.engine import Device
from gptrt.errors import CheckpointError, FidelityError, PromptError, TargetError
from gptrt.format import (
    CARD_FILE,
    FORMAT_VERSION,
    MANIFEST_FILE,
    TOKENIZER_FILE,
    Bundle,
    CacheLayout,
    Fidelity,
    Manifest,
    Quantization,
    describe_file,
    open_bundle,
)
from gptrt.generator import Generator, open_decoder
from gptrt.task import Task

from . import via
from .card import model_card
from .checkpoint import Checkpoint, load_checkpoint, write_json, written_whole
from .companions import write_companions
from .graph import build_graph
from .heads import with_padded_heads
from .hub import name_of
from .kv_cache import calibrate_cache, quantize_cache
from .model import GPT
from .nbits import save_graph, store_matrices
from .options import ConvertOptions
from .plots import plot_sensitivity
from .runs import TEACHER_FOLDER
from .storing import Step, silent_step, store
from .texts import DEFAULT_TOKENS, TextFiles, Texts, choose_texts
from .tokenization import ids_without_rows, load_tokenizer
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
    checkpoint = load_checkpoint(source)
    options.check_for(checkpoint)
    calibrate = options.needs_calibration(checkpoint)
    texts = choose_texts(
        source,
        checkpoint.tokenizer,
        options.text_files,
        calibrate=checkpoint.config if calibrate else None,
    )
    reference = _reference(source, checkpoint, options)
    checkpoint = with_padded_heads(checkpoint)
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
        quantize_cache(graph.graph, calibrate_cache(model, texts.calibration))
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
    config = via.read_config(source)
    vocabulary = source / TOKENIZER_FILE
    tokenizer = load_tokenizer(vocabulary) if vocabulary.is_file() else None
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


def _reference(source: Path, checkpoint: Checkpoint, options: ConvertOptions) -> GPT:
    """What the bundle is to be: the checkpoint in fp32. One that was trained for its rounding is
    compared with the model that it learned from, if the run has kept it."""
    against = options.against
    if against is None and checkpoint.rounding and (source / TEACHER_FOLDER).is_dir():
        against = source / TEACHER_FOLDER
    other = checkpoint if against is None else load_checkpoint(against)
    _check_same_shape(other, checkpoint.config)
    return other.alone().frozen()


def _check_same_shape(checkpoint: Checkpoint, config: ModelConfig | ForeignModel) -> None:
    known = config if isinstance(config, ForeignModel) else replace(config, projected=False)
    if replace(checkpoint.config, projected=False) != known:
        raise CheckpointError(
            "the checkpoint that the bundle was made from",
            found="another shape",
            do="check --against",
        )


def verify(
    path: Path,
    against: Path,
    text: Path,
    step: Step = silent_step,
    *,
    tokens: int | None = None,
    device: Device = "cpu",
) -> tuple[Manifest, Fidelity]:
    """Measure an existing bundle on a device against the checkpoint `against`, on the first
    `tokens` of a text file."""
    bundle, tokens = open_bundle(path), tokens or DEFAULT_TOKENS
    checkpoint = with_padded_heads(load_checkpoint(against))
    _check_same_shape(checkpoint, bundle.manifest.model)
    texts = choose_texts(against, checkpoint.tokenizer, TextFiles(text, None, tokens))
    step("verifying against PyTorch")
    decoder = open_decoder(bundle, device=device)
    model = checkpoint.alone().frozen()
    ids = texts.verify
    return bundle.manifest, measure(decoder, model, ids, text=texts.name, tokens=tokens)


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
        check_fidelity(fidelity, manifest.quantization.mode, options.max_perplexity_ratio)
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


def check_fidelity(fidelity: Fidelity, mode: str, limit: float | None = None) -> None:
    """Raises FidelityError if the perplexity ratio is above the limit."""
    limit = limit or LIMITS[mode]
    if not fidelity.perplexity_ratio <= limit:  # NaN is above every limit
        raise FidelityError(
            f"a perplexity ratio of at most {limit} for {mode}",
            found=f"{fidelity.ratio} on {fidelity.tokens:,} tokens of {fidelity.text}",
            do="use a smaller --block-size or more bits, or accept it with --allow-loss",
        )
