"""gptrt: GPT models on devices, offline, without PyTorch.

    from gptrt import Generator

    with Generator() as gen:
        print(gen.generate("Once upon a time", max_new_tokens=60, temperature=0.8, seed=7))

Names are loaded when they are first used, so that importing the package costs next to nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from gptrt.config import GenerationConfig
    from gptrt.constraint import Grammar, JsonSchema, Regex
    from gptrt.decoder import Decoder
    from gptrt.errors import (
        BundleError,
        CancelledError,
        CheckpointError,
        DataError,
        DependencyError,
        DeviceError,
        FidelityError,
        GptrtError,
        MemoryLimitError,
        OptionError,
        PromptError,
        SessionError,
        TargetError,
        TrainingError,
    )
    from gptrt.format import Bundle, open_bundle
    from gptrt.generator import Generator
    from gptrt.interrupt import Cancellation
    from gptrt.memory import MemoryEstimate
    from gptrt.opening import embedded_bundle
    from gptrt.results import Generation, Timings
    from gptrt.scoring import Perplexity, Score, perplexity
    from gptrt.session import Session
    from gptrt.stream import Stream
    from gptrt.task import Task

_HOMES = {
    "gptrt.config": ("GenerationConfig",),
    "gptrt.errors": (
        "BundleError",
        "CancelledError",
        "CheckpointError",
        "DataError",
        "DependencyError",
        "DeviceError",
        "FidelityError",
        "GptrtError",
        "MemoryLimitError",
        "SessionError",
        "OptionError",
        "PromptError",
        "TargetError",
        "TrainingError",
    ),
    "gptrt.format": ("Bundle", "open_bundle"),
    "gptrt.generator": ("Generator",),
    "gptrt.opening": ("embedded_bundle",),
    "gptrt.constraint": ("Grammar", "JsonSchema", "Regex"),
    "gptrt.interrupt": ("Cancellation",),
    "gptrt.memory": ("MemoryEstimate",),
    "gptrt.results": ("Generation", "Timings"),
    "gptrt.scoring": ("Perplexity", "Score", "perplexity"),
    "gptrt.session": ("Session",),
    "gptrt.stream": ("Stream",),
    "gptrt.task": ("Task",),
    "gptrt.decoder": ("Decoder",),
}
_HOME_OF = {name: module for module, names in _HOMES.items() for name in names}

__all__ = [
    "Bundle",
    "BundleError",
    "Cancellation",
    "CancelledError",
    "CheckpointError",
    "DataError",
    "Decoder",
    "DependencyError",
    "DeviceError",
    "FidelityError",
    "Generation",
    "GenerationConfig",
    "Generator",
    "GptrtError",
    "Grammar",
    "JsonSchema",
    "MemoryEstimate",
    "MemoryLimitError",
    "OptionError",
    "Perplexity",
    "PromptError",
    "Regex",
    "Score",
    "Session",
    "SessionError",
    "Stream",
    "TargetError",
    "Task",
    "Timings",
    "TrainingError",
    "__version__",
    "embedded_bundle",
    "open_bundle",
    "perplexity",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module 'gptrt' has no attribute {name!r}")
    return getattr(import_module(_HOME_OF[name]), name)


def __dir__() -> list[str]:
    return list(__all__)
