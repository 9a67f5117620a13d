"""What a user asks of a conversion, and what of it does not go together."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from gptrt.architecture import ModelConfig
from gptrt.errors import OptionError
from gptrt.format import CacheLayout

from .checkpoint import Checkpoint
from .quantize import BY_TEXT, Recipe, mode_of
from .sensitivity import check_budget
from .settings import Method, Mode, Via
from .texts import DEFAULT_TOKENS, TextFiles
from .via import check_recipe

_RECIPE = ("method", "block_size", "head_bits", "symmetric", "projection")


@dataclass(frozen=True)
class ConvertOptions:
    """None leaves a choice to the exporter: `mode` to what the model was trained for, int4 if
    nothing, method, head and blocks to what loses least in a mode, `max_perplexity_ratio` to
    `target_ratio` or `LIMITS`.

    `bits_per_weight` or `target_ratio` is a budget, in bits over all parameters or in perplexity:
    with one of them every matrix gets bits and block of its own, by measured damage, and is rounded
    by `method`, one that takes text.
    """

    mode: Literal["none", "fp16"] | Mode | None = None
    method: Method | None = None
    block_size: int | None = None
    head_bits: int | None = None
    symmetric: bool | None = None
    projection: bool | None = None
    bits_per_weight: float | None = None
    target_ratio: float | None = None
    activations: Literal["fp32", "fp16"] | None = None  # fp32, where the mode is not fp16
    kv_cache: Literal["float", "int8"] = "float"  # float: as the activations
    hidden_states: bool = False  # as an output of the graph: for embeddings of texts
    verify_text: Path | None = None
    calibration_text: Path | None = None
    verify_tokens: int = DEFAULT_TOKENS
    window: int | None = None  # tokens in a row, of either text: as many as fit, if not given
    against: Path | None = None
    via: Via | None = None  # the library that builds the graph of what is not native
    max_perplexity_ratio: float | None = None
    allow_loss: bool = False
    force: bool = False
    notes: dict[str, str] = field(default_factory=dict)  # for the lineage: a licence, for example

    @property
    def recipe(self) -> Recipe | None:
        """Raises OptionError for a combination that there is not."""
        if self.mode == "none" or self.mode == "fp16":
            return None
        asked = {name: getattr(self, name) for name in _RECIPE}
        return Recipe(self.mode or "int4", **asked, half=self.half)

    @property
    def half(self) -> bool:
        """Whether what flows between the matrices, and the cache, is in fp16."""
        return self.mode == "fp16" or self.activations == "fp16"

    @property
    def mixed(self) -> bool:
        return self.bits_per_weight is not None or self.target_ratio is not None

    @property
    def limit(self) -> float | None:
        """The perplexity ratio above which a bundle is refused, if that is asked for."""
        asked = self.max_perplexity_ratio
        return self.target_ratio if asked is None else asked

    @property
    def text_files(self) -> TextFiles:
        return TextFiles(self.verify_text, self.calibration_text, self.verify_tokens)

    @property
    def own_recipe(self) -> list[str]:
        """What of a recipe was chosen, not left to the exporter."""
        return [name for name in _RECIPE if getattr(self, name) is not None]

    def needs_calibration(self, checkpoint: Checkpoint) -> bool:
        """Whether text is to be read that the bundle is then not judged by."""
        if self.kv_cache == "int8":
            return True  # for the scales of the cache
        rounds = self.mixed or (self.recipe is not None and self.recipe.needs_text)
        return rounds and checkpoint.rounding is None

    def projects(self, checkpoint: Checkpoint) -> bool:
        """Whether the vocabulary is to be put in a basis of its own before it is rounded."""
        if self.recipe is None or checkpoint.rounding is not None:
            return False
        return self.recipe.projects(checkpoint.config)

    def cache_layout(self, model: ModelConfig) -> CacheLayout:
        floats: Literal["float16", "float32"] = "float16" if self.half else "float32"
        return CacheLayout(
            layers=model.n_layer,
            kv_heads=model.n_kv_head,
            head_dim=model.head_dim,
            max_length=model.n_positions,
            dtype="int8" if self.kv_cache == "int8" else floats,
        )

    def check(self) -> None:
        """Raises OptionError for options that do not go together, before any work is done."""
        if self.via is not None:
            self._check_via()
        check_above("--bits-per-weight", self.bits_per_weight, 0)
        check_above("--target-ratio", self.target_ratio, 1)
        check_above("--max-perplexity-ratio", self.max_perplexity_ratio, 0)
        check_above("--verify-tokens", self.verify_tokens, 1)
        if self.kv_cache == "int8" and self.half:
            raise OptionError(
                "--kv-cache int8 with activations in fp32",
                found="fp16",
                do="leave one of them out",
            )
        if self.activations == "fp32" and self.mode == "fp16":
            raise OptionError(
                "--quantize none for activations in fp32",
                found="--quantize fp16",
                do="leave one of them out",
            )
        given = self.own_recipe
        if self.recipe is None and (given or self.mixed):
            raise OptionError(
                f"--quantize int8, int4 or int2 with {', '.join(given) or 'a budget'}",
                found=f"{self.mode}",
                do="leave one of them out",
            )
        chosen = [name for name in given if name not in ("method", "projection")]
        if self.method is not None and self.method not in BY_TEXT:
            chosen.append("method")
        if self.mixed and (chosen or self.mode not in (None, "int4")):
            raise OptionError(
                f"a budget alone, or with --method {' or '.join(BY_TEXT)}: it chooses the formats",
                found=", ".join(chosen) or f"--quantize {self.mode}",
                do="leave one of them out",
            )
        if self.bits_per_weight is not None and self.target_ratio is not None:
            raise OptionError("one budget", found="two", do="leave one of them out")

    def _check_via(self) -> None:
        check_recipe(self.recipe)
        ours = {
            "--quantize fp16": self.mode == "fp16",
            "--activations fp16": self.activations == "fp16",
            "--kv-cache int8": self.kv_cache == "int8",
            "--hidden-states": self.hidden_states,
            "--calibration-text": self.calibration_text is not None,
            "--against": self.against is not None,
            "--projection": self.projection is not None,
            "a budget": self.mixed,
        }
        if given := [name for name, used in ours.items() if used]:
            raise OptionError(
                "--via with --quantize none, int8, int4 or int2 and --verify-text",
                found=", ".join(given),
                do="leave it out: that is for models of ours",
            )

    def check_for(self, checkpoint: Checkpoint) -> None:
        """Raises OptionError for what the model cannot be, likewise before any work: a model whose
        heads are those that the bundle will have."""
        check_window(self.window, checkpoint.config.n_positions)
        if self.bits_per_weight is not None:
            projected = checkpoint.config.projected or self.projects(checkpoint)
            check_budget(replace(checkpoint.config, projected=projected), self.bits_per_weight)
        if checkpoint.rounding is not None:
            self._check_trained_for(mode_of(checkpoint.rounding.formats))

    def _check_trained_for(self, trained: str) -> None:
        if self.mode not in (None, trained) or self.mixed or self.own_recipe:
            raise OptionError(
                f"--quantize {trained} and nothing else, which the model was trained for",
                found=f"--quantize {self.mode}" if self.mode else "a recipe of its own",
                do="leave all of that out, or convert what it was trained from",
            )


def check_window(window: int | None, context: int) -> None:
    """Raises OptionError."""
    if window is not None and not 2 <= window <= context:
        raise OptionError(f"--window from 2 to {context}", found=f"{window}", do="correct it")


def check_above(option: str, value: float | None, least: float) -> None:
    """Raises OptionError for what is not above `least`, or no number to compare with."""
    if value is not None and not least < value < math.inf:
        raise OptionError(f"{option} above {least}", found=f"{value}", do="correct it")
