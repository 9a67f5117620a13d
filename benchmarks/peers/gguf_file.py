"""A Hugging Face folder, GPT-2 or Llama, as a GGUF file for llama.cpp.

The tokenizer in the file has the right size and nothing else: ids are fed directly.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load_file

Config = dict[str, Any]
Tensor = tuple[str, NDArray[np.float32]]

_GPT2 = {
    "transformer.wte": "token_embd",
    "transformer.wpe": "position_embd",
    "transformer.ln_f": "output_norm",
    "lm_head": "output",
    "ln_1": "attn_norm",
    "attn.c_attn": "attn_qkv",
    "attn.c_proj": "attn_output",
    "ln_2": "ffn_norm",
    "mlp.c_fc": "ffn_up",
    "mlp.c_proj": "ffn_down",
}
_LLAMA = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
_IN_LAYER = re.compile(r"(?:transformer\.h|model\.layers)\.(\d+)\.(.+)")


def write_fp32(checkpoint: Path, target: Path) -> None:
    """Write the weights of `checkpoint` unquantized."""
    config = json.loads((checkpoint / "config.json").read_text())
    describe, tensors = {"gpt2": (_gpt2, _gpt2_tensors), "llama": (_llama, _llama_tensors)}[
        config["model_type"]
    ]
    writer = gguf.GGUFWriter(target, config["model_type"])
    writer.add_file_type(0)
    describe(writer, config)
    _add_vocabulary(writer, config["vocab_size"])
    for name, tensor in tensors(config, load_file(checkpoint / "model.safetensors")):
        writer.add_tensor(name, np.ascontiguousarray(tensor, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _gpt2(writer: gguf.GGUFWriter, config: Config) -> None:
    writer.add_context_length(config["n_positions"])
    writer.add_embedding_length(config["n_embd"])
    writer.add_block_count(config["n_layer"])
    writer.add_feed_forward_length(config.get("n_inner") or 4 * config["n_embd"])
    writer.add_head_count(config["n_head"])
    writer.add_layer_norm_eps(config["layer_norm_epsilon"])


def _llama(writer: gguf.GGUFWriter, config: Config) -> None:
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_key_length(config["head_dim"])
    writer.add_value_length(config["head_dim"])
    writer.add_rope_dimension_count(config["head_dim"])
    writer.add_rope_freq_base(config["rope_theta"])


def _add_vocabulary(writer: gguf.GGUFWriter, size: int) -> None:
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list([f"<{i}>" for i in range(size)])
    writer.add_token_types([1] * size)
    writer.add_token_merges(["a b"])
    writer.add_eos_token_id(0)


def _gpt2_tensors(config: Config, tensors: dict[str, Any]) -> Iterator[Tensor]:
    """Conv1D keeps matrices [in, out]; GGUF has all of them [out, in]."""
    del config
    for name, tensor in tensors.items():
        turned = re.search(r"(c_attn|c_proj|c_fc)\.weight$", name)
        yield _name(name, _GPT2), tensor.T if turned else tensor


def _llama_tensors(config: Config, tensors: dict[str, Any]) -> Iterator[Tensor]:
    """llama.cpp rotates neighbours, Hugging Face halves: rows of queries and keys change places."""
    heads = {"q_proj": config["num_attention_heads"], "k_proj": config["num_key_value_heads"]}
    for name, tensor in tensors.items():
        count = heads.get(name.split(".")[-2])
        if count:
            halves = tensor.reshape(count, 2, -1, tensor.shape[1])
            tensor = halves.swapaxes(1, 2).reshape(tensor.shape)
        yield _name(name, _LLAMA), tensor


def _name(name: str, names: dict[str, str]) -> str:
    layer = _IN_LAYER.fullmatch(name)
    module, kind = (layer[2] if layer else name).rsplit(".", 1)
    return f"blk.{layer[1]}.{names[module]}.{kind}" if layer else f"{names[module]}.{kind}"
