"""gpt2: GPT-2, DistilGPT2 and what was trained with their code. Their matrices are stored
[in, out], ours are [out, in]."""

from __future__ import annotations

import re

from gptrt.architecture import ModelConfig

from .family import (
    ACTIVATION_NAMES,
    Family,
    Json,
    State,
    activation_named,
    checked,
    divide,
    refuse,
    with_tied_head,
    without_tied_head,
)

_CONV1D = re.compile(r"(c_attn|c_proj|c_fc)\.weight$")
_BUFFERS = re.compile(r"\.attn\.(masked_)?bias$")


def _to_json(config: ModelConfig) -> Json:
    return {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        "vocab_size": config.vocab_size,
        "n_positions": config.n_positions,
        "n_layer": config.n_layer,
        "n_head": config.n_head,
        "n_embd": config.n_embd,
        "n_inner": config.n_inner,
        "activation_function": ACTIVATION_NAMES.get(config.activation, config.activation),
        "layer_norm_epsilon": config.norm_eps,
        "tie_word_embeddings": config.tied,
    }


def _from_json(json: Json) -> ModelConfig:
    n_embd, n_head = json.get("n_embd", 768), json.get("n_head", 12)
    refuse(json, scale_attn_weights=True, scale_attn_by_inverse_layer_idx=False)
    return checked(
        vocab_size=json.get("vocab_size", 50257),
        n_positions=json.get("n_positions", 1024),
        n_layer=json.get("n_layer", 12),
        n_head=n_head,
        n_kv_head=n_head,
        n_embd=n_embd,
        head_dim=divide(n_embd, n_head),
        n_inner=json.get("n_inner") or 4 * n_embd,
        activation=activation_named(json.get("activation_function", "gelu_new")),
        norm_eps=json.get("layer_norm_epsilon", 1e-5),
        tied=json.get("tie_word_embeddings", True),
    )


def _to_tensors(config: ModelConfig, state: State) -> State:
    tensors = {
        name if name.startswith("lm_head") else f"transformer.{name}": (
            tensor.T.contiguous() if _CONV1D.search(name) else tensor
        )
        for name, tensor in state.items()
    }
    return without_tied_head(config, tensors)


def _from_tensors(config: ModelConfig, tensors: State) -> State:
    state = {
        name.removeprefix("transformer."): (
            tensor.T if tensor.ndim == 2 and _CONV1D.search(name) else tensor
        )
        for name, tensor in tensors.items()
        if not _BUFFERS.search(name)
    }
    return with_tied_head(config, state)


GPT2 = Family("gpt2", _to_json, _from_json, _to_tensors, _from_tensors)
