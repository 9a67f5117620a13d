"""What a training needs, in numbers and in words."""

from __future__ import annotations

from dataclasses import dataclass

from .scaling import FITTED_FROM, GOOD_EPOCHS, RULE_OF_THUMB, Serving


@dataclass(frozen=True)
class Data:
    """What a text has, in tokens; and how often `planned` or `target` tokens read it, what that is
    worth in new tokens beside it."""

    train_tokens: int
    valid_tokens: int
    planned_epochs: float
    planned_worth: float
    target_epochs: float
    target_worth: float


@dataclass(frozen=True)
class Speed:
    """What was measured on `device`: a step of `step_tokens` tokens in the median, one evaluation,
    the highest resident memory of the process, and of the device's own, the files of a checkpoint.

    `planned_s` and `target_s` are of whole trainings, evaluations included.
    """

    device: str
    steps: int
    step_tokens: int
    step_s: float
    tokens_s: float
    evaluation_s: float
    planned_s: float
    target_s: float
    peak_bytes: int | None  # where the system tells
    device_peak_bytes: int | None
    checkpoint_bytes: int


@dataclass(frozen=True)
class Estimate:
    """Counts are of parameters and tokens. `planned_steps` are those of the settings, fewer where
    `max_time` ends them. `target_tokens` are those that were asked for; else, from scratch, the
    compute-optimal ones, and in fine-tuning those that are planned."""

    parameters: int
    parameters_without_embedding: int
    fine_tuning: bool
    optimal_tokens: float
    rule_of_thumb_tokens: int
    planned_steps: int
    planned_tokens: int
    target_tokens: float
    serving: Serving | None
    data: Data | None
    speed: Speed | None


# --- in words ------------------------------------------------------------------------------------


def describe(found: Estimate) -> list[tuple[str, str]]:
    """For people: what each line is about, and what it says."""
    optimal, thumb = map(_count, (found.optimal_tokens, found.rule_of_thumb_tokens))
    ratio = found.optimal_tokens / found.parameters
    inner = _count(found.parameters_without_embedding)
    return [
        ("parameters", f"{_count(found.parameters)}, {inner} without embeddings"),
        (
            "compute-optimal",
            f"{optimal} tokens ({ratio:.0f} a parameter); {thumb} by the rule of "
            f"{RULE_OF_THUMB} a parameter",
        ),
        *_about_serving(found),
        *_about_data(found),
        *_about_speed(found),
        *_about_laws(found),
    ]


def _about_serving(found: Estimate) -> list[tuple[str, str]]:
    if (s := found.serving) is None:
        return []
    return [
        (
            f"to serve {_count(s.tokens)}",
            f"{_count(s.parameters)} parameters trained on {_count(s.training_tokens)} tokens "
            f"reach the same loss with {s.saved:.0%} less computing in all",
        )
    ]


def _about_data(found: Estimate) -> list[tuple[str, str]]:
    planned = f"{found.planned_steps:,} steps, {_count(found.planned_tokens)} tokens"
    if (data := found.data) is None:
        return [("planned", planned)]
    lines = [
        ("data", f"{_count(data.train_tokens)} tokens, and {_count(data.valid_tokens)} held out"),
        ("planned", f"{planned}: {_epochs(data.planned_epochs, data.planned_worth)}"),
    ]
    if found.target_tokens != found.planned_tokens:
        epochs = _epochs(data.target_epochs, data.target_worth)
        lines.append(("target", f"{_count(found.target_tokens)} tokens: {epochs}"))
    return lines


def _epochs(epochs: float, worth: float) -> str:
    if epochs <= 1:
        return f"{epochs:.0%} of the data, nothing read twice"
    advice = "nearly as good as new text"
    if epochs > GOOD_EPOCHS:
        advice = f"beyond {GOOD_EPOCHS} times find more text, or take a smaller shape"
    return f"the data {_count(epochs)} times, worth {_count(worth)} new tokens; {advice}"


def _about_speed(found: Estimate) -> list[tuple[str, str]]:
    if (speed := found.speed) is None:
        return []
    time = f"{_duration(speed.planned_s)} as planned"
    if found.target_tokens != found.planned_tokens:
        time += f", {_duration(speed.target_s)} for {_count(found.target_tokens)} tokens"
    peak = speed.peak_bytes
    memory = "unknown" if peak is None else f"{_count(peak, 'G')}B at the peak"
    if speed.device_peak_bytes:
        memory += f", {_count(speed.device_peak_bytes, 'G')}B on the device"
    return [
        (
            "speed",
            f"{speed.tokens_s:,.0f} tokens/s on {speed.device}, median of {speed.steps} steps of "
            f"{speed.step_tokens:,} tokens",
        ),
        ("time", time),
        ("memory", memory),
        ("disk", f"{_count(speed.checkpoint_bytes, 'G')}B a checkpoint, of which a run keeps two"),
    ]


def _about_laws(found: Estimate) -> list[tuple[str, str]]:
    whose = "Hoffmann et al. 2022 in the fit of Besiroglu et al. 2024"
    whose += ", Sardana et al. 2023" if found.serving else ""
    whose += ", Muennighoff et al. 2023" if found.data else ""
    limits = f"fitted on models of {_count(FITTED_FROM)} parameters and more"
    if found.parameters < FITTED_FROM:
        limits = f"fitted on much larger models, of {_count(FITTED_FROM)} parameters and more"
    limits += ", and on text of the web: a direction, no forecast"
    if found.fine_tuning:
        limits += "; for training from scratch, not for fine-tuning"
    return [("by", f"{whose}: {limits}")]


def _count(number: float, billion: str = "B") -> str:
    """Three digits and a unit: 6.91 M."""
    for unit, size in (("T", 1e12), (billion, 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= size:
            return f"{number / size:.3g} {unit}"
    return f"{number:.3g}"


def _duration(seconds: float) -> str:
    for unit, size in (("days", 86400), ("h", 3600), ("min", 60)):
        if seconds >= size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.0f} s"
