"""The model card: README.md of a bundle, written from its manifest, nothing by hand."""

from __future__ import annotations

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
        f"A decoder-only GPT: {model.n_layer} layers, {model.n_embd} wide, {model.n_head} heads, "
        f"vocabulary {model.vocab_size:,}, context {model.n_positions:,} tokens, "
        f"{model.positions} positions.\nMatrices: {stored}. KV cache: {manifest.cache.dtype}. "
        f"The folder holds {size:.1f} MB."
    )


def _fidelity(fidelity: Fidelity) -> str:
    return (
        f"Against the PyTorch model in fp32, on {fidelity.tokens:,} tokens of {fidelity.text}:\n\n"
        "| perplexity | of PyTorch fp32 | ratio | mean KL (nats) | top-1 agreement |\n"
        "|---|---|---|---|---|\n"
        f"| {fidelity.perplexity:.3f} | {fidelity.perplexity_reference:.3f} "
        f"| {fidelity.perplexity_ratio:.4f} | {fidelity.kl:.5f} | {fidelity.top1:.2%} |"
    )


def _samples(samples: list[tuple[str, str]]) -> str:
    quoted = (f"> **{prompt}**{text}".replace("\n", "\n> ") for prompt, text in samples)
    return "Seeds 1, 2, 3; temperature 0.8, top-k 40; the first attempt of each.\n\n" + "\n\n".join(
        quoted
    )


def _words(key: str) -> str:
    return key.replace("_", " ")
