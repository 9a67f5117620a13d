"""The files beside the graph, so that other runtimes open the same folder."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from gptrt.architecture import ModelConfig
from gptrt.chat import ChatTemplate
from gptrt.format import (
    ATTENTION_MASK,
    CONFIG_FILE,
    GENAI_CONFIG_FILE,
    GENERATION_CONFIG_FILE,
    GRAPH_FILE,
    INPUT_IDS,
    LOGITS,
    POSITION_IDS,
)

from .families import family_for
from .files import write_json
from .tokenization import SpecialIds, save_tokenizer


def write_companions(
    folder: Path,
    config: ModelConfig,
    tokenizer: Tokenizer,
    special: SpecialIds,
    chat_template: ChatTemplate | None = None,
) -> None:
    """The configurations of model, generation, tokenizer and onnxruntime-genai. A vocabulary in a
    basis of its own is a matter of the graph: to others the model is what it is without."""
    plain = replace(config, projected=False)
    write_json(folder / CONFIG_FILE, family_for(plain).to_json(plain) | special.json())
    write_json(folder / GENERATION_CONFIG_FILE, special.json())
    write_json(folder / GENAI_CONFIG_FILE, genai_config(config, special))
    save_tokenizer(tokenizer, folder, config.n_positions, special, chat_template)


def genai_config(config: ModelConfig, special: SpecialIds) -> dict[str, Any]:
    """What onnxruntime-genai reads: a model of type `decoder` with a shared cache buffer.

    `%d` is its placeholder for the layer, a convention of that file.
    """
    names = {
        f"{when}_{part}_names": f"{stem}.%d.{part}"
        for when, stem in (("past", "past_key_values"), ("present", "present"))
        for part in ("key", "value")
    }
    end = list(special.eos) if len(special.eos) > 1 else special.end or 0
    return {
        "model": {
            "type": "decoder",
            "bos_token_id": special.bos or 0,
            "eos_token_id": end,
            "pad_token_id": special.end or 0,
            "context_length": config.n_positions,
            "vocab_size": config.vocab_size,
            "decoder": {
                "session_options": {"provider_options": []},
                "filename": GRAPH_FILE,
                "head_size": config.head_dim,
                "hidden_size": config.n_embd,
                "num_attention_heads": config.n_head,
                "num_key_value_heads": config.n_kv_head,
                "num_hidden_layers": config.n_layer,
                "inputs": {
                    "input_ids": INPUT_IDS,
                    "attention_mask": ATTENTION_MASK,
                    "position_ids": POSITION_IDS,
                    **{k: v for k, v in names.items() if k.startswith("past")},
                },
                "outputs": {
                    "logits": LOGITS,
                    **{k: v for k, v in names.items() if k.startswith("present")},
                },
            },
        },
        "search": {"max_length": config.n_positions, "past_present_share_buffer": True},
    }
