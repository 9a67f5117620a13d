"""Checkpoint families: how a Hugging Face folder names and shapes what `GPT` holds.

One `Family` row each: when it fits, its `config.json`, and its tensors, in both directions.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from gptrt.errors import CheckpointError
from gptrt.format import ModelConfig
from gptrt.schema import decode

State = dict[str, Tensor]
Json = dict[str, Any]


@dataclass(frozen=True)
class Family:
    model_type: str
    expresses: Callable[[ModelConfig], bool]
    to_json: Callable[[ModelConfig], Json]
    from_json: Callable[[Json], ModelConfig]
    to_tensors: Callable[[ModelConfig, State], State]
    from_tensors: Callable[[ModelConfig, State], State]


def family_for(config: ModelConfig) -> Family:
    """The first family that can hold the model; our own can hold every one."""
    return next(family for family in FAMILIES if family.expresses(config))


def family_named(model_type: str) -> Family:
    for family in FAMILIES:
        if family.model_type == model_type:
            return family
    known = ", ".join(family.model_type for family in FAMILIES)
    raise CheckpointError(
        f"a model_type of {known}", found=repr(model_type), do="convert it to one of these first"
    )


# --- gpt2: Conv1D matrices are stored [in, out], ours are [out, in] --------------------

_GPT2_ACTIVATIONS = {"gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "gelu": "gelu_erf"}
_CONV1D = re.compile(r"(c_attn|c_proj|c_fc)\.weight$")
_GPT2_BUFFERS = re.compile(r"\.attn\.(masked_)?bias$")


def _gpt2_expresses(config: ModelConfig) -> bool:
    shape = (config.positions, config.norm, config.bias)
    return (
        shape == ("learned", "layernorm", True)
        and config.activation != "swiglu"
        and config.n_kv_head == config.n_head
        and config.head_dim * config.n_head == config.n_embd
    )


def _gpt2_to_json(config: ModelConfig) -> Json:
    return {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        "vocab_size": config.vocab_size,
        "n_positions": config.n_positions,
        "n_layer": config.n_layer,
        "n_head": config.n_head,
        "n_embd": config.n_embd,
        "n_inner": config.n_inner,
        "activation_function": "gelu_new" if config.activation == "gelu_tanh" else "gelu",
        "layer_norm_epsilon": config.norm_eps,
        "tie_word_embeddings": config.tied,
    }


def _gpt2_from_json(json: Json) -> ModelConfig:
    activation = json.get("activation_function", "gelu_new")
    n_embd, n_head = json.get("n_embd", 768), json.get("n_head", 12)
    _refuse(json, scale_attn_weights=True, scale_attn_by_inverse_layer_idx=False)
    return _checked(
        vocab_size=json.get("vocab_size", 50257),
        n_positions=json.get("n_positions", 1024),
        n_layer=json.get("n_layer", 12),
        n_head=n_head,
        n_kv_head=n_head,
        n_embd=n_embd,
        head_dim=_divide(n_embd, n_head),
        n_inner=json.get("n_inner") or 4 * n_embd,
        activation=_GPT2_ACTIVATIONS.get(activation, activation),
        norm_eps=json.get("layer_norm_epsilon", 1e-5),
        tied=json.get("tie_word_embeddings", True),
    )


def _gpt2_to_tensors(config: ModelConfig, state: State) -> State:
    tensors = {
        name if name.startswith("lm_head") else f"transformer.{name}": (
            tensor.T.contiguous() if _CONV1D.search(name) else tensor
        )
        for name, tensor in state.items()
    }
    return _without_tied_head(config, tensors)


def _gpt2_from_tensors(config: ModelConfig, tensors: State) -> State:
    state = {
        name.removeprefix("transformer."): tensor.T if _CONV1D.search(name) else tensor
        for name, tensor in tensors.items()
        if not _GPT2_BUFFERS.search(name)
    }
    return _with_tied_head(config, state)


# --- llama: q, k, v and gate, up are apart there, one matrix here --------------------

_LLAMA_NAMES = {
    "model.embed_tokens.weight": "wte.weight",
    "model.norm.weight": "ln_f.weight",
    "lm_head.weight": "lm_head.weight",
}
_LLAMA_LAYER = {
    "input_layernorm.weight": "ln_1.weight",
    "self_attn.o_proj.weight": "attn.c_proj.weight",
    "post_attention_layernorm.weight": "ln_2.weight",
    "mlp.down_proj.weight": "mlp.c_proj.weight",
}
_LLAMA_JOINED = {
    "attn.c_attn.weight": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "mlp.c_fc.weight": ("mlp.gate_proj", "mlp.up_proj"),
}


def _llama_expresses(config: ModelConfig) -> bool:
    shape = (config.positions, config.norm, config.activation, config.bias)
    return shape == ("rotary", "rmsnorm", "swiglu", False)


def _llama_to_json(config: ModelConfig) -> Json:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": config.vocab_size,
        "max_position_embeddings": config.n_positions,
        "num_hidden_layers": config.n_layer,
        "num_attention_heads": config.n_head,
        "num_key_value_heads": config.n_kv_head,
        "hidden_size": config.n_embd,
        "head_dim": config.head_dim,
        "intermediate_size": config.n_inner,
        "hidden_act": "silu",
        "rms_norm_eps": config.norm_eps,
        "rope_theta": config.rope_theta,
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta},
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": config.tied,
    }


def _llama_from_json(json: Json) -> ModelConfig:
    rope = json.get("rope_parameters") or {}
    _refuse(json, hidden_act="silu", attention_bias=False, mlp_bias=False, rope_scaling=None)
    _refuse(rope, rope_type="default")
    n_head, n_embd = json.get("num_attention_heads", 32), json.get("hidden_size", 4096)
    return _checked(
        vocab_size=json.get("vocab_size", 32000),
        n_positions=json.get("max_position_embeddings", 2048),
        n_layer=json.get("num_hidden_layers", 32),
        n_head=n_head,
        n_kv_head=json.get("num_key_value_heads") or n_head,
        n_embd=n_embd,
        head_dim=json.get("head_dim") or _divide(n_embd, n_head),
        n_inner=json.get("intermediate_size", 11008),
        positions="rotary",
        norm="rmsnorm",
        activation="swiglu",
        bias=False,
        norm_eps=json.get("rms_norm_eps", 1e-6),
        rope_theta=rope.get("rope_theta", json.get("rope_theta", 10000.0)),
        tied=json.get("tie_word_embeddings", False),
    )


def _llama_to_tensors(config: ModelConfig, state: State) -> State:
    kv_width = config.n_kv_head * config.head_dim
    sizes = {
        "attn.c_attn.weight": [config.n_head * config.head_dim, kv_width, kv_width],
        "mlp.c_fc.weight": [config.n_inner, config.n_inner],
    }
    tensors = {theirs: state[ours] for theirs, ours in _LLAMA_NAMES.items() if ours in state}
    for layer in range(config.n_layer):
        theirs, ours = f"model.layers.{layer}.", f"h.{layer}."
        for name, own in _LLAMA_LAYER.items():
            tensors[theirs + name] = state[ours + own]
        for own, parts in _LLAMA_JOINED.items():
            split = torch.split(state[ours + own], sizes[own])
            tensors |= {f"{theirs}{p}.weight": t.clone() for p, t in zip(parts, split, strict=True)}
    return _without_tied_head(config, tensors)


def _llama_from_tensors(config: ModelConfig, tensors: State) -> State:
    rest = {k: v for k, v in tensors.items() if not k.endswith("rotary_emb.inv_freq")}
    state = {ours: rest.pop(theirs) for theirs, ours in _LLAMA_NAMES.items() if theirs in rest}
    for layer in range(config.n_layer):
        theirs, ours = f"model.layers.{layer}.", f"h.{layer}."
        for name, own in _LLAMA_LAYER.items():
            if theirs + name in rest:
                state[ours + own] = rest.pop(theirs + name)
        for own, parts in _LLAMA_JOINED.items():
            names = [f"{theirs}{part}.weight" for part in parts]
            if all(name in rest for name in names):
                state[ours + own] = torch.cat([rest.pop(name) for name in names])
    return _with_tied_head(config, state | rest)  # what is left over is reported by the caller


# --- our own: every combination that ModelConfig can say --------------------


def _own_to_json(config: ModelConfig) -> Json:
    return {"model_type": "gptrt", "model": asdict(config)}


def _own_from_json(json: Json) -> ModelConfig:
    return decode(ModelConfig, json.get("model"), error=CheckpointError, source="config.json")


# --- shared --------------------


def _checked(**values: Any) -> ModelConfig:
    return decode(ModelConfig, values, error=CheckpointError, source="config.json")


def _divide(width: Any, heads: Any) -> Any:
    if isinstance(width, int) and isinstance(heads, int) and heads > 0 and width % heads == 0:
        return width // heads
    raise CheckpointError(
        "a width that is a multiple of the number of heads",
        found=f"width {width!r}, heads {heads!r}",
        do="correct config.json",
    )


def _refuse(json: Json, **only: Any) -> None:
    """What would change the computation and is not expressed here is refused, never ignored."""
    for key, supported in only.items():
        if json.get(key, supported) not in (supported, None):
            raise CheckpointError(
                f"{key}={supported!r} in config.json",
                found=repr(json[key]),
                do="this variant is not supported natively",
            )


def _without_tied_head(config: ModelConfig, tensors: State) -> State:
    return {k: v for k, v in tensors.items() if not (config.tied and k == "lm_head.weight")}


def _with_tied_head(config: ModelConfig, state: State) -> State:
    return state | {"lm_head.weight": state["wte.weight"]} if config.tied else state


FAMILIES = (
    Family(
        "gpt2",
        _gpt2_expresses,
        _gpt2_to_json,
        _gpt2_from_json,
        _gpt2_to_tensors,
        _gpt2_from_tensors,
    ),
    Family(
        "llama",
        _llama_expresses,
        _llama_to_json,
        _llama_from_json,
        _llama_to_tensors,
        _llama_from_tensors,
    ),
    Family(
        "gptrt",
        lambda _: True,
        _own_to_json,
        _own_from_json,
        _without_tied_head,
        _with_tied_head,
    ),
)
