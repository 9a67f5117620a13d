"""A GPT-2 checkpoint as a GGUF file, quantized by llama.cpp's own tool."""

from __future__ import annotations

from pathlib import Path

import gguf
import llama_cpp
import numpy as np
from gptrt_export.checkpoint import load_checkpoint

_LAYER = {
    "ln_1": "attn_norm",
    "attn.c_attn": "attn_qkv",
    "attn.c_proj": "attn_output",
    "ln_2": "ffn_norm",
    "mlp.c_fc": "ffn_up",
    "mlp.c_proj": "ffn_down",
}
_GLOBAL = {
    "wte.weight": "token_embd.weight",
    "wpe.weight": "position_embd.weight",
    "ln_f.weight": "output_norm.weight",
    "ln_f.bias": "output_norm.bias",
}


def write(checkpoint: Path, target: Path, kind: str) -> None:
    """Write `target` in the format `kind` (F32, Q8_0, Q4_0, Q4_K_M ...)."""
    full = target.with_suffix(".f32.gguf")
    _write_fp32(checkpoint, full)
    parameters = llama_cpp.llama_model_quantize_default_params()
    parameters.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{kind}")
    failed = llama_cpp.llama_model_quantize(str(full).encode(), str(target).encode(), parameters)
    full.unlink()
    if failed:
        raise SystemExit(f"llama.cpp could not quantize to {kind}")


def _write_fp32(checkpoint: Path, target: Path) -> None:
    source = load_checkpoint(checkpoint)
    config, tokenizer = source.config, source.tokenizer
    assert tokenizer is not None
    writer = gguf.GGUFWriter(target, "gpt2")
    writer.add_context_length(config.n_positions)
    writer.add_embedding_length(config.n_embd)
    writer.add_block_count(config.n_layer)
    writer.add_feed_forward_length(config.n_inner)
    writer.add_head_count(config.n_head)
    writer.add_layer_norm_eps(config.norm_eps)
    writer.add_file_type(0)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list([tokenizer.id_to_token(i) for i in range(config.vocab_size)])
    writer.add_token_types([1] * config.vocab_size)
    writer.add_token_merges(["a b"])
    writer.add_eos_token_id(0)
    for name, tensor in source.state.items():
        if theirs := _gguf_name(name):
            writer.add_tensor(theirs, np.ascontiguousarray(tensor.numpy()))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _gguf_name(name: str) -> str | None:
    if name in _GLOBAL or name == "lm_head.weight":  # the head is tied
        return _GLOBAL.get(name)
    _, layer, rest = name.split(".", 2)
    module, kind = rest.rsplit(".", 1)
    return f"blk.{layer}.{_LAYER[module]}.{kind}"
