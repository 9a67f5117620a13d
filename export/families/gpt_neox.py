"""gpt_neox: GPT-NeoX-20B and Pythia. Attention and feed-forward of a block read the same input, and
of a head only the first values are turned."""

from __future__ import annotations

import torch
from torch import Tensor

from gptrt.architecture import ModelConfig

from .family import (
    ACTIVATION_NAMES,
    Family,
    Json,
    State,
    activation_named,
    checked,
    divide,
    renamed,
    with_tied_head,
    without_tied_head,
)
from .llama import rope_fields, rope_json

_NAMES = {
    "wte": "gpt_neox.embed_in",
    "ln_f": "gpt_neox.final_layer_norm",
    "lm_head": "embed_out",
}
_LAYER = {
    "ln_1": "input_layernorm",
    "attn.c_attn": "attention.query_key_value",
    "attn.c_proj": "attention.dense",
    "ln_2": "post_attention_layernorm",
    "mlp.c_fc": "mlp.dense_h_to_4h",
    "mlp.c_proj": "mlp.dense_4h_to_h",
}
_BUFFERS = (".attention.bias", ".attention.masked_bias", ".rotary_emb.inv_freq")


def _to_json(config: ModelConfig) -> Json:
    rope = rope_json(config)
    share = (config.rotary_dim or config.head_dim) / config.head_dim
    rope["rope_parameters"]["partial_rotary_factor"] = share
    return {
        "architectures": ["GPTNeoXForCausalLM"],
        "model_type": "gpt_neox",
        "vocab_size": config.vocab_size,
        "max_position_embeddings": config.n_positions,
        "num_hidden_layers": config.n_layer,
        "num_attention_heads": config.n_head,
        "hidden_size": config.n_embd,
        "intermediate_size": config.n_inner,
        "hidden_act": ACTIVATION_NAMES.get(config.activation, config.activation),
        "layer_norm_eps": config.norm_eps,
        "use_parallel_residual": config.parallel,
        "attention_bias": config.qkv_bias is not False,
        "tie_word_embeddings": config.tied,
        "rotary_pct": share,
        "rotary_emb_base": config.rope_theta,
        **rope,
    }


def _from_json(json: Json) -> ModelConfig:
    n_embd, n_head = json.get("hidden_size", 6144), json.get("num_attention_heads", 64)
    head_dim, context = divide(n_embd, n_head), json.get("max_position_embeddings", 2048)
    theta, scaling = rope_fields(
        {"rope_theta": json.get("rotary_emb_base", 10000.0), **json}, context
    )
    rope = json.get("rope_parameters") or {}
    share = rope.get("partial_rotary_factor", json.get("rotary_pct", 0.25))
    turned = int(head_dim * share)
    biased = json.get("attention_bias", True)
    return checked(
        vocab_size=json.get("vocab_size", 50432),
        n_positions=context,
        n_layer=json.get("num_hidden_layers", 44),
        n_head=n_head,
        n_kv_head=n_head,
        n_embd=n_embd,
        head_dim=head_dim,
        n_inner=json.get("intermediate_size", 24576),
        positions="rotary",
        activation=activation_named(json.get("hidden_act", "gelu")),
        qkv_bias=None if biased else False,
        out_bias=None if biased else False,
        parallel=json.get("use_parallel_residual", True),
        norm_eps=json.get("layer_norm_eps", 1e-5),
        rope_theta=theta,
        rope_scaling=scaling,
        rotary_dim=0 if turned == head_dim else turned,
        tied=json.get("tie_word_embeddings", False),
    )


def _order(config: ModelConfig) -> Tensor:
    """Which of their rows of query_key_value each of ours is.

    They keep query, key and value of a head together; we keep all queries together. They turn the
    pairs (i, i + rotary_dim/2); we turn (i, i + head_dim/2), those beyond by nothing.
    """
    size, half = config.head_dim, (config.rotary_dim or config.head_dim) // 2
    rest = torch.arange(2 * half, size)
    left, right = rest.chunk(2) if len(rest) else (rest, rest)
    pairs = torch.cat((torch.arange(half), left, torch.arange(half, 2 * half), right))
    rows = torch.arange(3 * config.n_head * size).view(config.n_head, 3, size)
    query, key, value = rows.unbind(dim=1)  # each [n_head, head_dim]
    return torch.cat((query[:, pairs], key[:, pairs], value)).flatten()


def _to_tensors(config: ModelConfig, state: State) -> State:
    back = _order(config).argsort()
    tensors = {
        theirs: state[ours][back] if ".c_attn." in ours else state[ours]
        for ours, theirs in renamed(_NAMES, _LAYER, config.n_layer, "gpt_neox.layers.").items()
        if ours in state
    }
    return without_tied_head(config, tensors, "embed_out.weight")


def _from_tensors(config: ModelConfig, tensors: State) -> State:
    rest = {k: v for k, v in tensors.items() if not k.endswith(_BUFFERS)}
    if "lm_head.weight" in rest:  # newer files call it so
        rest["embed_out.weight"] = rest.pop("lm_head.weight")
    order, state = _order(config), {}
    for ours, theirs in renamed(_NAMES, _LAYER, config.n_layer, "gpt_neox.layers.").items():
        if theirs in rest:
            tensor = rest.pop(theirs)
            fits = ".c_attn." in ours and len(tensor) == len(order)
            state[ours] = tensor[order] if fits else tensor
    return with_tied_head(config, state | rest)


GPT_NEOX = Family("gpt_neox", _to_json, _from_json, _to_tensors, _from_tensors)
