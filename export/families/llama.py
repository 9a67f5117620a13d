"""llama and those that are built like it: mistral, qwen2, qwen3, smollm3.

Query, key and value, and gate and up, are matrices of their own there and one matrix here. What a
family adds to llama is a function from its `config.json` to fields of `ModelConfig`, and back.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import torch

from gptrt.architecture import ModelConfig, RopeScaling
from gptrt.errors import CheckpointError
from gptrt.schema import decode

from .family import (
    Family,
    Json,
    State,
    checked,
    divide,
    joined,
    refuse,
    with_tied_head,
    without_tied_head,
)

# --- config.json -------------------------------------------------------------------------------

_Fields = dict[str, Any]


def _shared_fields(json: Json) -> _Fields:
    """What all of them have."""
    refuse(json, hidden_act="silu")
    n_head, n_embd = json.get("num_attention_heads", 32), json.get("hidden_size", 4096)
    context = json.get("max_position_embeddings", 2048)
    theta, scaling = rope_fields(json, context)
    if scaling and scaling["rope_type"] == "longrope":  # beyond, other factors would hold
        context = min(context, scaling["original_max_position_embeddings"])
    return {
        "vocab_size": json.get("vocab_size", 32000),
        "n_positions": context,
        "n_layer": json.get("num_hidden_layers", 32),
        "n_head": n_head,
        "n_kv_head": json.get("num_key_value_heads") or n_head,
        "n_embd": n_embd,
        "head_dim": json.get("head_dim") or divide(n_embd, n_head),
        "n_inner": json.get("intermediate_size", 11008),
        "positions": "rotary",
        "norm": "rmsnorm",
        "activation": "swiglu",
        "bias": False,
        "norm_eps": json.get("rms_norm_eps", 1e-6),
        "rope_theta": theta,
        "rope_scaling": scaling,
        "tied": json.get("tie_word_embeddings", False),
    }


def _shared_json(config: ModelConfig) -> Json:
    return {
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
        "tie_word_embeddings": config.tied,
        **rope_json(config),
    }


def rope_fields(json: Json, context: Any) -> tuple[float, _Fields | None]:
    """theta and the scaling, from `rope_parameters` or from the older pair of keys."""
    rope = {**(json.get("rope_scaling") or {}), **(json.get("rope_parameters") or {})}
    kind = rope.pop("rope_type", None) or rope.pop("type", None) or "default"
    rope.pop("type", None)
    theta = rope.pop("rope_theta", None) or json.get("rope_theta", 10000.0)
    rope.pop("partial_rotary_factor", None)
    if kind in ("default", "dynamic"):  # dynamic: the same within the trained context
        return theta, None
    trained = rope.get("original_max_position_embeddings")
    trained = trained or json.get("original_max_position_embeddings") or context
    rope["original_max_position_embeddings"] = trained
    if rope.get("factor") is None and isinstance(trained, int) and trained > 0:
        rope["factor"] = context / trained
    rope.pop("long_factor", None)
    if kind != "longrope":
        rope.pop("short_factor", None)
    known = {key: value for key, value in rope.items() if value is not None}
    scaling = decode(
        RopeScaling, {"rope_type": kind} | known, error=CheckpointError, source="rope_parameters"
    )
    return theta, asdict(scaling) | {"short_factor": list(scaling.short_factor)}


def rope_json(config: ModelConfig) -> Json:
    """Both ways to say it: older readers know only the second."""
    theta = {"rope_theta": config.rope_theta}
    if config.rope_scaling is None:
        return {"rope_parameters": {"rope_type": "default", **theta}, **theta}
    scaling = asdict(config.rope_scaling)
    wanted = _ROPE_KEYS[config.rope_scaling.rope_type]
    found = {key: scaling[key] for key in ("rope_type", "factor", *wanted)}
    if "short_factor" in found:
        found["short_factor"] = found["long_factor"] = list(found["short_factor"])
    found = {key: value for key, value in found.items() if value is not None}
    return {"rope_parameters": found | theta, "rope_scaling": found | theta, **theta}


_TRAINED = "original_max_position_embeddings"
_ROPE_KEYS = {
    "linear": (_TRAINED,),
    "llama3": (_TRAINED, "low_freq_factor", "high_freq_factor"),
    "yarn": (
        *(_TRAINED, "beta_fast", "beta_slow", "mscale", "mscale_all_dim"),
        *("truncate", "attention_factor"),
    ),
    "longrope": (_TRAINED, "short_factor", "attention_factor"),
}


def _biases(json: Json) -> _Fields:
    found: _Fields = {}
    if json.get("attention_bias"):
        found |= {"qkv_bias": True, "out_bias": True}
    if json.get("mlp_bias"):
        found["mlp_bias"] = True
    return found


def _bias_json(config: ModelConfig) -> Json:
    return {"attention_bias": bool(config.out_bias), "mlp_bias": bool(config.mlp_bias)}


def _window(json: Json, types: list[str]) -> _Fields:
    """From `layer_types`, or from what the family makes of them where they are left out."""
    types = json.get("layer_types") or types
    window = json.get("sliding_window")
    if not window or "sliding_attention" not in types:
        return {}
    wide = [layer for layer, kind in enumerate(types) if kind == "full_attention"]
    return {"window": window, "unwindowed": wide}


def _window_json(config: ModelConfig) -> Json:
    sliding = [bool(config.window) and n not in config.unwindowed for n in range(config.n_layer)]
    return {
        "use_sliding_window": any(sliding),
        "sliding_window": config.window or None,
        "max_window_layers": sliding.index(True) if any(sliding) else config.n_layer,
        "layer_types": ["sliding_attention" if one else "full_attention" for one in sliding],
    }


def _of_qwen(json: Json) -> _Fields:
    used = json.get("use_sliding_window", False)
    first, layers = json.get("max_window_layers", 28), json.get("num_hidden_layers", 32)
    types = ["sliding_attention" if n >= first else "full_attention" for n in range(layers)]
    return _window(json, types) if used else {}


def _of_smollm3(json: Json) -> _Fields:
    layers, every = json.get("num_hidden_layers", 36), json.get("no_rope_layer_interval", 4)
    rotated = json.get("no_rope_layers") or [int((n + 1) % every != 0) for n in range(layers)]
    unrotated = [layer for layer, turned in enumerate(rotated) if not turned]
    types = ["full_attention" if turned else "sliding_attention" for turned in rotated]
    used = json.get("use_sliding_window", False)
    return {"unrotated": unrotated} | (_window(json, types) if used else {})


def _smollm3_json(config: ModelConfig) -> Json:
    rotated = [int(layer not in config.unrotated) for layer in range(config.n_layer)]
    own = {"no_rope_layers": rotated, "pad_token_id": None}
    return _bias_json(config) | _window_json(config) | own


# --- tensors -----------------------------------------------------------------------------------

_WHOLE = {"wte": "model.embed_tokens", "ln_f": "model.norm", "lm_head": "lm_head"}
_LAYER = {
    "ln_1": "input_layernorm",
    "attn.c_proj": "self_attn.o_proj",
    "attn.q_norm": "self_attn.q_norm",
    "attn.k_norm": "self_attn.k_norm",
    "ln_2": "post_attention_layernorm",
    "mlp.c_proj": "mlp.down_proj",
}
_JOINED = {
    "attn.c_attn": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "mlp.c_fc": ("mlp.gate_proj", "mlp.up_proj"),
}
_ENDS = (".weight", ".bias")


def _to_tensors(config: ModelConfig, state: State) -> State:
    kv_width = config.n_kv_head * config.head_dim
    sizes = {
        "attn.c_attn": [config.n_head * config.head_dim, kv_width, kv_width],
        "mlp.c_fc": [config.n_inner, config.n_inner],
    }
    tensors: State = {}
    for name, tensor in state.items():
        module, end = name.rsplit(".", 1)
        if module in _WHOLE:
            tensors[f"{_WHOLE[module]}.{end}"] = tensor
            continue
        _, layer, own = module.split(".", 2)
        prefix = f"model.layers.{layer}."
        if own in _LAYER:
            tensors[f"{prefix}{_LAYER[own]}.{end}"] = tensor
        else:
            parts = torch.split(tensor, sizes[own])
            tensors |= {
                f"{prefix}{part}.{end}": rows.clone()
                for part, rows in zip(_JOINED[own], parts, strict=True)
            }
    return without_tied_head(config, tensors)


def _from_tensors(config: ModelConfig, tensors: State) -> State:
    rest = {k: v for k, v in tensors.items() if not k.endswith("rotary_emb.inv_freq")}
    names = dict(_WHOLE)
    for layer in range(config.n_layer):
        names |= {f"h.{layer}.{own}": f"model.layers.{layer}.{n}" for own, n in _LAYER.items()}
    state = {
        ours + end: rest.pop(theirs + end)
        for ours, theirs in names.items()
        for end in _ENDS
        if theirs + end in rest
    }
    for layer in range(config.n_layer):
        for own, parts in _JOINED.items():
            for end in _ENDS:
                whole = [f"model.layers.{layer}.{part}{end}" for part in parts]
                if (rows := joined(rest, whole)) is not None:
                    state[f"h.{layer}.{own}{end}"] = rows
    return with_tied_head(config, state | rest)  # what is left over is reported by the caller


# --- one row each ------------------------------------------------------------------------------


def _family(
    model_type: str,
    architecture: str,
    fields: Callable[[Json], _Fields],
    json: Callable[[ModelConfig], Json],
    **defaults: Any,
) -> Family:
    def from_json(found: Json) -> ModelConfig:
        found = defaults | found
        return checked(**_shared_fields(found) | fields(found))

    def to_json(config: ModelConfig) -> Json:
        names = {"architectures": [architecture], "model_type": model_type}
        return names | _shared_json(config) | json(config)

    return Family(model_type, to_json, from_json, _to_tensors, _from_tensors)


LLAMA = _family("llama", "LlamaForCausalLM", _biases, _bias_json)
MISTRAL = _family(
    "mistral",
    "MistralForCausalLM",
    lambda json: {"window": json.get("sliding_window") or 0},
    lambda config: {"sliding_window": config.window or None},
    sliding_window=4096,
    num_key_value_heads=8,
    max_position_embeddings=4096 * 32,
)
QWEN2 = _family(
    "qwen2",
    "Qwen2ForCausalLM",
    lambda json: {"qkv_bias": True} | _of_qwen(json),
    _window_json,
    sliding_window=4096,
    max_position_embeddings=32768,
)
QWEN3 = _family(
    "qwen3",
    "Qwen3ForCausalLM",
    lambda json: {"qk_norm": True} | _biases(json) | _of_qwen(json),
    lambda config: {"attention_bias": bool(config.out_bias)} | _window_json(config),
    sliding_window=4096,
    head_dim=128,
    max_position_embeddings=32768,
)
SMOLLM3 = _family(
    "smollm3",
    "SmolLM3ForCausalLM",
    lambda json: _biases(json) | _of_smollm3(json),
    _smollm3_json,
    num_key_value_heads=4,
    max_position_embeddings=32768,
    tie_word_embeddings=True,
    rope_theta=2e6,
)
LLAMA_LIKE = (LLAMA, MISTRAL, QWEN2, QWEN3, SMOLLM3)
