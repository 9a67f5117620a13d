"""The error tree: every message says what was wanted, what was found and what to do."""

from __future__ import annotations


class GptrtError(Exception):
    """Base of all errors that gptrt raises on purpose.

    `exit_status` is what the command line ends with: 2 for bad usage or bad
    input, 1 for a check that was carried out and failed.
    """

    exit_status = 2

    def __init__(self, wanted: str, *, found: str, do: str) -> None:
        # What a damaged file holds may be no text that can be printed.
        wanted, found, do = (_printable(part) for part in (wanted, found, do))
        super().__init__(f"wanted {wanted}; found {found}; {do}")
        self.wanted = wanted
        self.found = found
        self.do = do

    def __reduce__(self) -> tuple[object, ...]:
        # Keyword-only arguments need this to cross a process boundary.
        return (_rebuild, (type(self), self.wanted, self.found, self.do))


def _printable(text: str) -> str:
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def first_line(error: BaseException) -> str:
    """What another library's exception says, in one line; its name where it says nothing."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def _rebuild(kind: type[GptrtError], wanted: str, found: str, do: str) -> GptrtError:
    return kind(wanted, found=found, do=do)


class BundleError(GptrtError):
    """A bundle is missing, damaged, or not a bundle."""


class OptionError(GptrtError):
    """A generation option is unknown, out of range, or cannot be honoured."""


class PromptError(GptrtError):
    """A prompt is empty, or does not fit the context."""


class SessionError(GptrtError):
    """A session file is damaged, or of another model; or a session is used by two at once."""


class CancelledError(GptrtError):
    """A call was cancelled of which there is no part to give, a score for example."""


class MemoryLimitError(GptrtError):
    """More memory would be needed than the application allows."""


class DeviceError(GptrtError):
    """The device that was asked for cannot run this bundle."""


class DependencyError(GptrtError):
    """A package of an optional extra is missing."""


class CheckpointError(GptrtError):
    """A checkpoint is missing, incomplete, or of a kind that cannot be read."""


class DataError(GptrtError):
    """Training or evaluation text is missing, too short, or not text."""


class TargetError(GptrtError):
    """The place to write to is taken or cannot be written."""


class TrainingError(GptrtError):
    """Training cannot go on: the loss is not a number, for example."""

    exit_status = 1


class FidelityError(GptrtError):
    """A model does not compute what was promised."""

    exit_status = 1
