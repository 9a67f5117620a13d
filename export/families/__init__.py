"""Checkpoint families: how Hugging Face folders name and shape what `GPT` holds.

One row of `FAMILIES` each, with functions for its `config.json` and for its tensors, both ways. To
add one: a file beside these, a row below, and its shape in `tests/test_families.py`, which compares
it with transformers.
"""

from __future__ import annotations

from dataclasses import asdict

from gptrt.architecture import ModelConfig
from gptrt.errors import CheckpointError
from gptrt.schema import decode

from .family import Family, Json, State, with_tied_head, without_tied_head
from .gpt2 import GPT2
from .gpt_neox import GPT_NEOX
from .llama import LLAMA_LIKE
from .opt import OPT

__all__ = ["FAMILIES", "Family", "Json", "State", "family_for", "family_named"]


def _own_to_json(config: ModelConfig) -> Json:
    return {"model_type": "gptrt", "model": asdict(config)}


def _own_from_json(json: Json) -> ModelConfig:
    return decode(ModelConfig, json.get("model"), error=CheckpointError, source="config.json")


# The last one is our own: every combination that ModelConfig can say.
_OWN = Family("gptrt", _own_to_json, _own_from_json, without_tied_head, with_tied_head)
FAMILIES = (GPT2, OPT, GPT_NEOX, *LLAMA_LIKE, _OWN)


def family_for(config: ModelConfig) -> Family:
    """The first family that can hold the model: whose `config.json` gives the same model back."""
    return next((family for family in FAMILIES if _expresses(family, config)), _OWN)


def _expresses(family: Family, config: ModelConfig) -> bool:
    try:
        return family.from_json(family.to_json(config)) == config
    except CheckpointError:
        return False


def family_named(model_type: str) -> Family:
    for family in FAMILIES:
        if family.model_type == model_type:
            return family
    known = ", ".join(family.model_type for family in FAMILIES)
    raise CheckpointError(
        f"a model_type of {known}",
        found=repr(model_type),
        do="for a bundle another library may build it: gptrt-export convert --via mobius (pip "
        "install 'gptrt[mobius]') or --via optimum (pip install 'gptrt[optimum]')",
    )
