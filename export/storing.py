"""The matrices of a model as a bundle will hold them: rounded as the options ask."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

from gptrt.format import Quantization

from .calibration import Ids
from .checkpoint import Checkpoint
from .data import spread_windows
from .learned_rounding import MORE_TEXT
from .model import GPT
from .options import ConvertOptions
from .progress import ProgressBar
from .quantize import Matrices, describe, quantize_model
from .sensitivity import (
    Options,
    explain,
    formats_of,
    measure_damage,
    plan_for_bits,
    plan_for_damage,
    table_of,
)
from .settings import Method
from .texts import Texts, calibration_tokens

_LONGEST_WINDOW = 512  # of calibration text, if not told: attention takes the square of it
_DAMAGE_TOKENS = 4096  # of calibration text, to measure the damage of each matrix on

Step = Callable[[str], None]


def silent_step(line: str) -> None:
    """Steps that nobody looks at."""
    del line


_UNQUANTIZED = {
    "none": Quantization("none", "none", 32, 32, 0, 32.0),
    "fp16": Quantization("fp16", "none", 16, 16, 0, 16.0),
}


@dataclass(frozen=True)
class Stored:
    """The matrices as the bundle will hold them; `options` is what a mixed one was chosen from."""

    matrices: Matrices
    quantization: Quantization
    options: Options = field(default_factory=dict)


def store(
    checkpoint: Checkpoint,
    model: GPT,
    texts: Texts,
    options: ConvertOptions,
    step: Step = silent_step,
) -> Stored:
    """Round the matrices of a model as the options ask."""
    config, recipe = checkpoint.config, options.recipe
    if checkpoint.rounding is not None:
        formats = checkpoint.rounding.formats
        matrices = checkpoint.rounding.matrices()
        return Stored(matrices, describe("trained rounding", config, formats))
    if recipe is None:
        return Stored({}, _UNQUANTIZED[f"{options.mode}"])
    windows = None
    if texts.calibration is not None:
        length = options.window or min(config.n_positions, _LONGEST_WINDOW)
        tokens = calibration_tokens(config)
        if recipe.chosen_method == "learned":
            tokens *= MORE_TEXT
        windows = spread_windows(texts.calibration, length, tokens)
    with ProgressBar("rounding", quiet=step is silent_step) as bar:
        if options.mixed:
            assert windows is not None
            return _store_mixed(model, windows, recipe.chosen_method, options, bar, step)
        formats = recipe.formats(config)
        step(f"rounding to {recipe.mode}: {recipe.chosen_method}")
        matrices = quantize_model(model, formats, recipe.chosen_method, windows, bar.update)
    return Stored(matrices, describe(recipe.chosen_method, config, formats))


def _store_mixed(
    model: GPT,
    windows: Ids,
    method: Method,
    options: ConvertOptions,
    bar: ProgressBar,
    step: Step,
) -> Stored:
    step("measuring what each matrix loses in each format")
    corrected = windows[::MORE_TEXT] if method == "learned" else windows
    judged = corrected[: max(1, _DAMAGE_TOKENS // windows.shape[1])]
    found = measure_damage(model, corrected, judged, bar.update)
    if options.bits_per_weight is not None:
        plan = plan_for_bits(model.config, found, options.bits_per_weight)
    else:
        assert options.target_ratio is not None
        plan = plan_for_damage(found, math.log(options.target_ratio))
    step(explain(plan))
    formats = formats_of(plan)
    step(f"rounding as planned: {method}")
    matrices = quantize_model(model, formats, method, windows, bar.update)
    table = table_of(plan)
    return Stored(matrices, describe(f"{method}, mixed", model.config, formats, table), found)
