"""The model card: README.md of a bundle, written from its manifest, nothing by hand."""

from __future__ import annotations

from gptrt.architecture import ForeignModel, ModelConfig
from gptrt.format import Fidelity, Manifest


def model_card(manifest: Manifest, samples: list[tuple[str, str]]) -> str:
    """Markdown. `samples` are prompts with what the bundle wrote."""
    sections = [
        f"# {manifest.name}",
        _summary(manifest),
        "```python\nfrom gptrt import Generator\n\n"
        f'with Generator("{manifest.name}") as gen:\n'
        '    print(gen.generate("Once upon a time", max_new_tokens=60))\n```',
        "## Fidelity",
        _fidelity(manifest.fidelity) if manifest.fidelity else "Not measured.",
        *_matrices(manifest),
        "## Where it comes from",
        "\n".join(f"- {_words(key)}: {value}" for key, value in manifest.lineage.items()),
        *(["## Samples", _samples(samples)] if samples else []),
    ]
    return "\n\n".join(sections) + "\n"


def _summary(manifest: Manifest) -> str:
    model, quantization = manifest.model, manifest.quantization
    size = sum(entry.size for entry in manifest.files.values()) / 1e6
    stored = (
        f"{quantization.mode}, block {quantization.block_size}, "
        f"{quantization.bits_per_weight:.2f} bits a weight ({quantization.method})"
        if quantization.block_size
        else quantization.mode
    )
    return (
        f"{_shape(model)}, vocabulary {model.vocab_size:,}, context {model.n_positions:,} tokens."
        f"\nMatrices: {stored}. KV cache: {manifest.cache.dtype}. "
        f"The folder holds {size:.1f} MB."
    )


def _shape(model: ModelConfig | ForeignModel) -> str:
    if isinstance(model, ForeignModel):
        return f"A {model.architecture}, its graph built by {model.made_with}"
    return (
        f"A decoder-only GPT: {model.n_layer} layers, {model.n_embd} wide, {model.n_head} heads, "
        f"{model.positions} positions"
    )


def _matrices(manifest: Manifest) -> list[str]:
    """Of a mixed bundle what was chosen for each matrix, and why."""
    stored = manifest.quantization.matrices
    if not stored:
        return []
    lines = [
        f"| {m.name} | {m.bits} | {m.block_size} | {m.weights:,} | {m.damage:.6f} |" for m in stored
    ]
    head = "| matrix | bits | block | weights | damage alone (nats) |\n|---|---|---|---|---|\n"
    picture = "![sensitivity by layer](sensitivity.png)"
    return ["## What is stored how", picture, head + "\n".join(lines)]


def _fidelity(fidelity: Fidelity) -> str:
    greedy = "not measured" if fidelity.greedy is None else f"{fidelity.greedy:.1%}"
    windows = "" if fidelity.window is None else f", in windows of {fidelity.window:,}"
    return (
        f"Against the PyTorch model in fp32, on {fidelity.tokens:,} tokens of {fidelity.text}"
        f"{windows}:\n\n"
        "| perplexity | of PyTorch fp32 | ratio | mean KL (nats) | top-1 agreement "
        "| greedy agreement |\n"
        "|---|---|---|---|---|---|\n"
        f"| {fidelity.perplexity:.3f} | {fidelity.perplexity_reference:.3f} "
        f"| {fidelity.ratio} | {fidelity.kl:.5f} | {fidelity.top1:.2%} "
        f"| {greedy} |\n\n"
        "Greedy agreement: of 32 tokens that both add to a prompt, the share before they differ."
    )


def _samples(samples: list[tuple[str, str]]) -> str:
    quoted = (f"> **{prompt}**{text}".replace("\n", "\n> ") for prompt, text in samples)
    return "Seeds 1, 2, 3; temperature 0.8, top-k 40; the first attempt of each.\n\n" + "\n\n".join(
        quoted
    )


def _words(key: str) -> str:
    return key.replace("_", " ")
