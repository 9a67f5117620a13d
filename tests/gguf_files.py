"""GGUF files as llama.cpp's converter makes them, from transformers' models."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from gguf.quants import quantize
from numpy.typing import NDArray
from tokenizers import Tokenizer

Array = NDArray[np.float32]
Kind = gguf.GGMLQuantizationType

ARCHITECTURES = {"gpt_neox": "gptneox"}  # the others have the same name there


def write_gguf(
    model: Any,
    file: Path,
    vocabulary: Mapping[str, Any],
    kind: Kind = Kind.F32,
    factors: Array | None = None,
    **changes: Any,
) -> Path:
    """Matrices whose rows are whole blocks in `kind`, everything else in fp32; `factors` divide
    the frequencies of rotary positions. `changes` are values by keys, None for one that is left
    out."""
    config = model.config
    name = ARCHITECTURES.get(config.model_type, config.model_type)
    writer = gguf.GGUFWriter(file, name)
    _describe(writer, config)
    _add_values(writer, {f"tokenizer.ggml.{key}": value for key, value in vocabulary.items()})
    for key in changes:
        writer.kv_data[0].pop(key, None)
    _add_values(writer, {key: value for key, value in changes.items() if value is not None})
    number = next(key for key, own in gguf.MODEL_ARCH_NAMES.items() if own == name)
    names = gguf.get_tensor_name_map(number, config.num_hidden_layers)
    for theirs, tensor in model.state_dict().items():
        if theirs.startswith(("lm_head", "embed_out")) and config.tie_word_embeddings:
            continue
        own = names.get_name(theirs, try_suffixes=(".weight", ".bias"))
        array = np.ascontiguousarray(_changed(config, theirs, tensor.numpy()))
        if array.ndim == 2 and array.shape[1] % gguf.GGML_QUANT_SIZES[kind][0] == 0:
            writer.add_tensor(own, _quantized(array, kind), raw_dtype=kind)
        else:
            writer.add_tensor(own, array)
    if factors is not None:
        writer.add_tensor("rope_freqs.weight", factors)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def _quantized(array: Array, kind: Kind) -> NDArray[Any]:
    """K-quants, for which there is no quantizer in Python, hold noise of a small scale."""
    if kind not in (Kind.Q4_K, Kind.Q6_K):
        return quantize(array, kind)
    values, size = gguf.GGML_QUANT_SIZES[kind]
    blocks = np.random.default_rng(0).integers(0, 256, (array.size // values, size), np.uint8)
    scale = np.frombuffer(np.float16({Kind.Q4_K: 1e-4, Kind.Q6_K: 4e-5}[kind]).tobytes(), np.uint8)
    for at in (0, 2) if kind == Kind.Q4_K else (208,):
        blocks[:, at : at + 2] = scale
    return blocks.reshape(len(array), -1)


def _describe(writer: gguf.GGUFWriter, config: Any) -> None:
    inner = getattr(config, "n_inner", 0) or getattr(config, "intermediate_size", 0)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(inner or 4 * config.hidden_size)
    writer.add_head_count(config.num_attention_heads)
    if hasattr(config, "rms_norm_eps"):
        writer.add_layer_norm_rms_eps(config.rms_norm_eps)
        writer.add_head_count_kv(config.num_key_value_heads)
        writer.add_key_length(_head_dim(config))
        writer.add_value_length(_head_dim(config))
    else:
        eps = getattr(config, "layer_norm_eps", None) or config.layer_norm_epsilon
        writer.add_layer_norm_eps(eps)
    if config.model_type == "gpt_neox":
        writer.add_parallel_residual(config.use_parallel_residual)
    rope = getattr(config, "rope_parameters", None)
    if rope:
        share = rope.get("partial_rotary_factor", 1.0)
        writer.add_rope_freq_base(rope["rope_theta"])
        writer.add_rope_dimension_count(int(share * _head_dim(config)))
        if rope["rope_type"] != "default":
            writer.add_rope_scaling_type(gguf.RopeScalingType(rope["rope_type"]))
            writer.add_rope_scaling_factor(rope["factor"])
            if trained := rope.get("original_max_position_embeddings"):
                writer.add_rope_scaling_orig_ctx_len(trained)


def _head_dim(config: Any) -> int:
    own = getattr(config, "head_dim", None)
    return int(own or config.hidden_size // config.num_attention_heads)


def _add_values(writer: gguf.GGUFWriter, values: Mapping[str, Any]) -> None:
    add: dict[type, Any] = {
        bool: writer.add_bool,
        int: writer.add_uint32,
        float: writer.add_float32,
        str: writer.add_string,
    }
    for key, value in values.items():
        add.get(type(value), writer.add_array)(key, value)


def byte_level_vocabulary(tokenizer: Tokenizer, **values: Any) -> dict[str, Any]:
    """What a file says of a byte-level BPE whose token 0 ends a text."""
    merges = [" ".join(pair) for pair in json.loads(tokenizer.to_str())["model"]["merges"]]
    tokens = [tokenizer.id_to_token(i) for i in range(tokenizer.get_vocab_size())]
    types = [3] + [1] * (len(tokens) - 1)
    return {
        "model": "gpt2",
        "pre": "gpt-2",
        "tokens": tokens,
        "token_type": types,
        "merges": merges,
        "eos_token_id": 0,
    } | values


def sentencepiece_vocabulary(tokenizer: Tokenizer, **values: Any) -> dict[str, Any]:
    """What a file says of SentencePiece's BPE: three tokens that are no text, 256 bytes, and the
    pieces of a BPE without merges, scored by their order."""
    special, single = ["<unk>", "<s>", "</s>"], [f"<0x{byte:02X}>" for byte in range(256)]
    pieces = [tokenizer.id_to_token(i) for i in range(tokenizer.get_vocab_size())]
    return {
        "model": "llama",
        "tokens": [*special, *single, *pieces],
        "token_type": [2, 3, 3, *[6] * 256, *[1] * len(pieces)],
        "scores": [0.0] * 259 + [-float(i) for i in range(len(pieces))],
        "unknown_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    } | values


def _changed(config: Any, name: str, tensor: Array) -> Array:
    """What llama.cpp's kernels want: [out, in], neighbours to turn, whole Q, K and V."""
    if config.model_type in ("llama", "smollm3"):
        part = name.split(".")[-2]
        heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
        if part in heads:
            halves = tensor.reshape(heads[part], 2, -1, *tensor.shape[1:])
            return halves.swapaxes(1, 2).reshape(tensor.shape)
    if config.model_type == "gpt2" and tensor.ndim == 2 and ".h." in name:
        return tensor.T
    if "query_key_value" in name:
        by_head = tensor.reshape(config.num_attention_heads, 3, -1, *tensor.shape[1:])
        return by_head.swapaxes(0, 1).reshape(tensor.shape)
    return tensor
