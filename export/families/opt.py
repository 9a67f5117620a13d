"""opt: Meta's OPT. Its table of positions begins with two rows that no position reads."""

from __future__ import annotations

import torch

from gptrt.architecture import ModelConfig

from .family import (
    ACTIVATION_NAMES,
    Family,
    Json,
    State,
    activation_named,
    checked,
    divide,
    joined,
    refuse,
    renamed,
    with_tied_head,
    without_tied_head,
)

_NAMES = {
    "wte": "model.decoder.embed_tokens",
    "wpe": "model.decoder.embed_positions",
    "ln_f": "model.decoder.final_layer_norm",
    "lm_head": "lm_head",
}
_LAYER = {
    "ln_1": "self_attn_layer_norm",
    "attn.c_proj": "self_attn.out_proj",
    "ln_2": "final_layer_norm",
    "mlp.c_fc": "fc1",
    "mlp.c_proj": "fc2",
}
_PARTS = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
_UNREAD = 2  # rows


def _to_json(config: ModelConfig) -> Json:
    return {
        "architectures": ["OPTForCausalLM"],
        "model_type": "opt",
        "vocab_size": config.vocab_size,
        "max_position_embeddings": config.n_positions,
        "num_hidden_layers": config.n_layer,
        "num_attention_heads": config.n_head,
        "hidden_size": config.n_embd,
        "word_embed_proj_dim": config.n_embd,
        "ffn_dim": config.n_inner,
        "activation_function": ACTIVATION_NAMES.get(config.activation, config.activation),
        "do_layer_norm_before": True,
        "tie_word_embeddings": config.tied,
    }


def _from_json(json: Json) -> ModelConfig:
    n_embd, n_head = json.get("hidden_size", 768), json.get("num_attention_heads", 12)
    refuse(
        json,
        do_layer_norm_before=True,
        enable_bias=True,
        layer_norm_elementwise_affine=True,
        word_embed_proj_dim=n_embd,
        _remove_final_layer_norm=False,
    )
    return checked(
        vocab_size=json.get("vocab_size", 50272),
        n_positions=json.get("max_position_embeddings", 2048),
        n_layer=json.get("num_hidden_layers", 12),
        n_head=n_head,
        n_kv_head=n_head,
        n_embd=n_embd,
        head_dim=divide(n_embd, n_head),
        n_inner=json.get("ffn_dim", 3072),
        activation=activation_named(json.get("activation_function", "relu")),
        tied=json.get("tie_word_embeddings", True),
    )


def _to_tensors(config: ModelConfig, state: State) -> State:
    names = renamed(_NAMES, _LAYER, config.n_layer, "model.decoder.layers.")
    tensors = {theirs: state[ours] for ours, theirs in names.items() if ours in state}
    table = "model.decoder.embed_positions.weight"
    unread = torch.zeros(_UNREAD, config.n_embd, dtype=tensors[table].dtype)
    tensors[table] = torch.cat((unread, tensors[table]))
    for layer in range(config.n_layer):
        for end in ("weight", "bias"):
            rows = state[f"h.{layer}.attn.c_attn.{end}"].chunk(3)
            tensors |= {
                f"model.decoder.layers.{layer}.{part}.{end}": own.clone()
                for part, own in zip(_PARTS, rows, strict=True)
            }
    return without_tied_head(config, tensors)


def _from_tensors(config: ModelConfig, tensors: State) -> State:
    rest = {
        k if k.startswith(("model.", "lm_head")) else f"model.{k}": v for k, v in tensors.items()
    }
    names = renamed(_NAMES, _LAYER, config.n_layer, "model.decoder.layers.")
    state = {ours: rest.pop(theirs) for ours, theirs in names.items() if theirs in rest}
    if "wpe.weight" in state:
        state["wpe.weight"] = state["wpe.weight"][_UNREAD:]
    for layer in range(config.n_layer):
        for end in ("weight", "bias"):
            whole = [f"model.decoder.layers.{layer}.{part}.{end}" for part in _PARTS]
            if (rows := joined(rest, whole)) is not None:
                state[f"h.{layer}.attn.c_attn.{end}"] = rows
    return with_tied_head(config, state | rest)


OPT = Family("opt", _to_json, _from_json, _to_tensors, _from_tensors)
