"""What a call gives back: data that nothing changes any more."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

FinishReason = Literal["stop", "length", "time", "cancelled"]


@dataclass(frozen=True)
class Timings:
    """Of one call, in seconds from its beginning: to the first id, and to the end.

    Of the prompt's `prompt_tokens` ids `reused_tokens` had been read by an earlier call; of
    `guessed_tokens` that a draft proposed `accepted_tokens` came true.
    """

    first_token: float | None
    total: float
    prompt_tokens: int
    new_tokens: int
    reused_tokens: int = 0
    guessed_tokens: int = 0
    accepted_tokens: int = 0

    @property
    def tokens_per_second(self) -> float | None:
        """Of the ids after the first."""
        if self.first_token is None or self.new_tokens < 2 or self.total <= self.first_token:
            return None
        return (self.new_tokens - 1) / (self.total - self.first_token)


@dataclass(frozen=True)
class Generation:
    """What a prompt was continued with. `ids` are without the one that ends a text.

    `finish_reason`: "stop" at the end of the text, at `stop_string` or where a constraint is
    fulfilled, "length" at `max_new_tokens` or where the context is full, "time" at `max_time` or
    `timeout`, "cancelled". `text` ends before the stop string; `ids` end with the id that completed
    it, whatever else that spells.

    With `logprobs` each id has its log probability in nats; with `top_logprobs` also the likeliest
    ids with theirs, the likeliest first. `score` is that of a beam: the sum of log probabilities
    over length ** length_penalty.
    """

    text: str
    prompt_ids: tuple[int, ...]
    ids: tuple[int, ...]
    finish_reason: FinishReason
    stop_string: str | None = None
    logprobs: tuple[float, ...] | None = None
    top_logprobs: tuple[tuple[tuple[int, float], ...], ...] | None = None
    score: float | None = None
    timings: Timings | None = field(default=None, compare=False)
