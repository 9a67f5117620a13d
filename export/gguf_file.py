"""Checkpoints in llama.cpp's GGUF files, whatever their quantization, as Hugging Face has them.

The `gguf` package reads the file, dequantizes it and knows llama.cpp's name of every tensor; here
is what llama.cpp's converter changed: names of numbers, and the order of rows where its kernels
turn neighbours instead of halves (https://github.com/ggml-org/ggml/blob/master/docs/gguf.md).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gptrt.architecture import ModelConfig
from gptrt.errors import CheckpointError, DependencyError, first_line

from .families import Family, Json, State, family_named
from .model import GPT

SUFFIX = ".gguf"
_FACTORS = "rope_freqs.weight"  # what llama 3's scaling makes of the frequencies, pair by pair


@dataclass(frozen=True)
class _Architecture:
    """One of llama.cpp's: the family that it came from, and what its converter did to a tensor.

    `restored` is given the config, the name in Hugging Face's folder and the tensor [out, in];
    `names` are those of `_NUMBERS` that the family calls differently, `epsilon` that of its norms.
    """

    model_type: str
    restored: Callable[[ModelConfig, str, Tensor], Tensor]
    names: dict[str, str]
    epsilon: str = "attention.layer_norm_rms_epsilon"


def _as_it_is(_config: ModelConfig, _name: str, tensor: Tensor) -> Tensor:
    return tensor


def _halves_for_neighbours(config: ModelConfig, name: str, tensor: Tensor) -> Tensor:
    heads = {"q_proj": config.n_head, "k_proj": config.n_kv_head}.get(name.split(".")[-2])
    if heads is None:
        return tensor
    pairs = tensor.view(heads, -1, 2, *tensor.shape[1:])
    return pairs.transpose(1, 2).reshape(tensor.shape)


def _conv1d(_config: ModelConfig, name: str, tensor: Tensor) -> Tensor:
    inside = name.startswith("transformer.h.")
    return tensor.T if inside and tensor.ndim == 2 else tensor


def _head_by_head(config: ModelConfig, name: str, tensor: Tensor) -> Tensor:
    if "query_key_value" not in name:
        return tensor
    parts = tensor.view(3, config.n_head, -1, *tensor.shape[1:])
    return parts.transpose(0, 1).reshape(tensor.shape)


_GPT2_NAMES = {
    "max_position_embeddings": "n_positions",
    "hidden_size": "n_embd",
    "num_hidden_layers": "n_layer",
    "intermediate_size": "n_inner",
    "num_attention_heads": "n_head",
    "layer_norm_eps": "layer_norm_epsilon",
}
_NEOX_NAMES = {"rope_theta": "rotary_emb_base"}
_LAYER_NORM = "attention.layer_norm_epsilon"
_ARCHITECTURES = {
    "gpt2": _Architecture("gpt2", _conv1d, _GPT2_NAMES, _LAYER_NORM),
    "gptneox": _Architecture("gpt_neox", _head_by_head, _NEOX_NAMES, _LAYER_NORM),
    "llama": _Architecture("llama", _halves_for_neighbours, {}),
    "qwen2": _Architecture("qwen2", _as_it_is, {}),
    "qwen3": _Architecture("qwen3", _as_it_is, {}),
    "smollm3": _Architecture("smollm3", _halves_for_neighbours, {}),
}
_NUMBERS = {
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
    "block_count": "num_hidden_layers",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.key_length": "head_dim",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    _LAYER_NORM: "layer_norm_eps",
    "attention.sliding_window": "sliding_window",
    "rope.freq_base": "rope_theta",
    "use_parallel_residual": "use_parallel_residual",
}
_NEEDED = (
    *("context_length", "embedding_length", "block_count", "feed_forward_length"),
    "attention.head_count",
)
_DEFAULTS = {"rope.freq_base": 10000.0}  # of llama.cpp; those of a family differ

# Of `rope.scaling`: what Hugging Face says as well, and what means nothing with this value.
_SCALING = {
    "type": "rope_type",
    "factor": "factor",
    "original_context_length": "original_max_position_embeddings",
    "yarn_beta_fast": "beta_fast",
    "yarn_beta_slow": "beta_slow",
}
_WITHOUT_EFFECT = {
    "attn_factor": (1.0,),
    "yarn_attn_factor": (1.0,),
    "yarn_ext_factor": (1.0,),
    "yarn_log_multiplier": (0.0,),
    "finetuned": (True, False),
}


@dataclass(frozen=True)
class GgufFile:
    """What a file says: `values` by llama.cpp's keys, and its tensors, still quantized."""

    path: Path
    values: dict[str, Any]
    tensors: dict[str, Any]

    @classmethod
    def open(cls, path: Path) -> GgufFile:
        """Raises CheckpointError for a file that is none, DependencyError without `gguf`."""
        try:
            import gguf
        except ImportError as e:
            raise DependencyError(
                f"the gguf package, to read {path}",
                found="it is not installed",
                do="pip install 'gptrt[gguf]'",
            ) from e
        try:
            reader = gguf.GGUFReader(path)
            values = {name: field.contents() for name, field in reader.fields.items()}
        except Exception as e:  # what a damaged file raises depends on where it is damaged
            raise CheckpointError(
                f"a GGUF file in {path}", found=first_line(e), do="fetch it again"
            ) from e
        return cls(path, values, {tensor.name: tensor for tensor in reader.tensors})

    def model(self) -> tuple[ModelConfig, State]:
        """Shape and parameters, by the names of `GPT`, in fp32. Raises CheckpointError."""
        name = self.values.get("general.architecture")
        architecture = _ARCHITECTURES.get(str(name))
        if architecture is None:
            raise CheckpointError(
                f"an architecture of {', '.join(_ARCHITECTURES)} in {self.path}",
                found=repr(name),
                do="convert the Hugging Face folder that the file was made from",
            )
        family = family_named(architecture.model_type)
        config = family.from_json(self._json(str(name), architecture))
        turned, wanted = f"{name}.rope.dimension_count", config.rotary_dim or config.head_dim
        if config.positions == "rotary" and self.values.get(turned, wanted) != wanted:
            raise self._unsupported(f"{turned} {wanted}", self.values[turned])
        return config, family.from_tensors(config, self._state(str(name), family, config))

    def _json(self, name: str, architecture: _Architecture) -> Json:
        """The `config.json` that says the same."""
        prefix = f"{name}."
        if self.values.get(f"{prefix}expert_count"):
            raise CheckpointError(
                f"a dense model in {self.path}", found="a mixture of experts", do="choose another"
            )
        needed = (prefix + key for key in (*_NEEDED, architecture.epsilon))
        if missing := [key for key in needed if key not in self.values]:
            raise CheckpointError(
                f"{', '.join(missing)} in {self.path}", found="no such keys", do="fetch it again"
            )
        found = {
            theirs: self.values.get(prefix + key, _DEFAULTS.get(key))
            for key, theirs in _NUMBERS.items()
        }
        json: Json = {architecture.names.get(key, key): value for key, value in found.items()}
        json["vocab_size"] = self._rows("token_embd.weight")
        json["tie_word_embeddings"] = "output.weight" not in self.tensors
        biased = {"blk.0.attn_q.bias", "blk.0.attn_qkv.bias"}
        json["attention_bias"] = not biased.isdisjoint(self.tensors)
        json["mlp_bias"] = "blk.0.ffn_up.bias" in self.tensors
        turned = self.values.get(f"{prefix}rope.dimension_count")
        heads, width = found["num_attention_heads"], found["hidden_size"]
        json["rotary_pct"] = 1.0 if turned is None else turned * heads / width
        if scaling := self._rope_scaling(prefix):
            json["rope_scaling"] = scaling
        return json

    def _rope_scaling(self, prefix: str) -> Json | None:
        scaling = self._scaling_by_keys(f"{prefix}rope.")
        if _FACTORS not in self.tensors:
            return scaling
        if scaling is not None:
            raise self._unsupported(f"{_FACTORS} alone", f"{scaling} as well")
        factors = self._tensor(_FACTORS).flatten().tolist()
        return {
            "rope_type": "longrope",
            "short_factor": factors,
            "long_factor": factors,
            "attention_factor": 1.0,
            "original_max_position_embeddings": self.values[f"{prefix}context_length"],
        }

    def _scaling_by_keys(self, prefix: str) -> Json | None:
        start = f"{prefix}scaling."
        given = {k.removeprefix(start): v for k, v in self.values.items() if k.startswith(start)}
        for key, value in given.items():
            if key not in _SCALING and value not in _WITHOUT_EFFECT.get(key, ()):
                raise self._unsupported(f"no {start}{key}, or one without effect,", value)
        # What llama.cpp takes where nothing is said; the factor had another name once.
        found = {"rope_type": "linear", "factor": self.values.get(f"{prefix}scale_linear", 1.0)}
        found |= {theirs: given[key] for key, theirs in _SCALING.items() if key in given}
        plain = found["rope_type"] == "linear" and found["factor"] in (0.0, 1.0)
        return None if plain or found["rope_type"] == "none" else found

    def _unsupported(self, wanted: str, found: Any) -> CheckpointError:
        return CheckpointError(
            f"{wanted} in {self.path}",
            found=repr(found),
            do="this variant is not supported natively",
        )

    def _state(self, name: str, family: Family, config: ModelConfig) -> State:
        """Every tensor under the name that Hugging Face's folder has for it; those that the model
        does not need keep llama.cpp's, so that the caller can name them."""
        import gguf

        kind = next(kind for kind, own in gguf.MODEL_ARCH_NAMES.items() if own == name)
        names = gguf.get_tensor_name_map(kind, config.n_layer)
        wanted = family.to_tensors(config, dict(GPT.outline(config).state_dict()))
        rest = dict.fromkeys(self.tensors.keys() - {_FACTORS})
        state: State = {}
        for theirs in wanted:
            own = names.get_name(theirs, try_suffixes=(".weight", ".bias"))
            if own in rest:
                rest.pop(own)
                restored = _ARCHITECTURES[name].restored
                state[theirs] = restored(config, theirs, self._tensor(own))
        return state | {own: self._tensor(own) for own in rest}

    def _tensor(self, name: str) -> Tensor:
        from gguf.quants import dequantize

        found = self.tensors[name]
        try:
            values = dequantize(found.data, found.tensor_type)
        except NotImplementedError as e:
            raise CheckpointError(
                f"tensors that the gguf package can dequantize in {self.path}",
                found=f"{name} as {found.tensor_type.name}",
                do="take the file in another quantization",
            ) from e
        return torch.from_numpy(np.array(values, np.float32))  # no view of the file

    def _rows(self, name: str) -> int:
        if name not in self.tensors:
            raise CheckpointError(f"{name} in {self.path}", found="no such tensor", do="restore it")
        return int(self.tensors[name].shape[-1])  # the file counts from the innermost


def gguf_file(path: Path) -> Path | None:
    """The GGUF file that `path` is, or the only one in the folder `path`."""
    if path.is_file():
        return path if path.suffix == SUFFIX else None
    found = sorted(path.glob(f"*{SUFFIX}"))
    if len(found) > 1:
        raise CheckpointError(
            f"one GGUF file in {path}",
            found=", ".join(file.name for file in found),
            do="give the one that you mean",
        )
    return found[0] if found else None
