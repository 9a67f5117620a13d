"""What a call asks for: a config for each prompt, given whole or as keywords. What a call cannot
honour is refused here, before anything is read."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from gptrt.config import GenerationConfig
from gptrt.errors import OptionError, PromptError
from gptrt.interrupt import Cancellation

Configs = GenerationConfig | Sequence[GenerationConfig]

_CONTROLS = ("cancellation", "progress")  # of a call, not of what is generated


def config_of(config: GenerationConfig | None, options: dict[str, Any]) -> GenerationConfig:
    """That of one prompt. Raises OptionError."""
    given = {name: value for name, value in options.items() if name not in _CONTROLS}
    if not isinstance(config, GenerationConfig | None):
        raise OptionError(
            "config= a GenerationConfig, or one for each prompt",
            found=repr(config)[:60],
            do="make it with GenerationConfig(...)",
        )
    if config is None:
        return GenerationConfig.from_options(**given)
    if given:
        raise OptionError("config= or options", found="both", do="put all into the config")
    return config


def check_controls(cancellation: Any, progress: Any) -> None:
    """Raises OptionError for what cannot control a call."""
    if not isinstance(cancellation, Cancellation | None):
        raise OptionError(
            "cancellation= a Cancellation", found=repr(cancellation)[:60], do="make one"
        )
    if progress is not None and not callable(progress):
        raise OptionError("progress= a function", found=repr(progress)[:60], do="give one")


def check_several(what: str, values: Any) -> None:
    """Raises PromptError for a text where several were asked for: its characters are not meant."""
    if isinstance(values, str | bytes):
        raise PromptError(
            f"a list of {what}", found=repr(values)[:60], do="put the text into a list"
        )


def for_one(config: GenerationConfig | None, options: dict[str, Any]) -> GenerationConfig | None:
    """The config as it was given. Raises OptionError where there would be several results."""
    _refuse_several(config_of(config, options))
    return config


def for_stream(
    config: GenerationConfig | None, options: dict[str, Any]
) -> Sequence[GenerationConfig]:
    """That of a stream's one prompt. Raises OptionError for what is only known at the end."""
    found = config_of(config, options)
    refuse_many(found)
    return [found]


def refuse_many(config: GenerationConfig, *, whose: str = "") -> None:
    """Raises OptionError for a config that gives more than one result, or seeks among several;
    `whose` methods do neither, where they are not those of the generator."""
    _refuse_several(config, whose)
    if config.num_beams > 1:
        raise OptionError(
            "options that a stream can honour",
            found="num_beams: what a search finds is known at its end",
            do=f"use {whose}complete",
        )


def _refuse_several(config: GenerationConfig, whose: str = "") -> None:
    if config.num_return_sequences > 1:
        raise OptionError(
            "one sequence",
            found=f"num_return_sequences={config.num_return_sequences}",
            do=f"use {whose}complete_batch",
        )


def for_each(
    config: Configs | None, options: dict[str, Any], count: int
) -> Sequence[GenerationConfig]:
    """One for each prompt."""
    if not isinstance(config, Sequence):
        return [config_of(config, options)] * count
    configs = [config_of(each, options) for each in config]
    if len(configs) != count:
        raise OptionError(
            f"a config for each of {count} prompts", found=f"{len(configs)}", do="give as many"
        )
    return configs
