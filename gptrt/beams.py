"""Beam search: several continuations side by side, of which the likeliest stay.

The rules, and with them the results, are those of transformers
(https://github.com/huggingface/transformers/blob/main/src/transformers/generation/utils.py).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from gptrt.config import GenerationConfig
from gptrt.results import FinishReason
from gptrt.sampler import Filters
from gptrt.sampling import Logits, greedy, most_likely

_NEVER = -math.inf  # the score of what is not there


@dataclass(frozen=True)
class Beam:
    """A continuation, its ids without the one that ends it. While it grows `score` is the sum of
    its log probabilities; once it has ended, that over length ** length_penalty."""

    ids: tuple[int, ...]
    score: float
    finish_reason: FinishReason | None = None


@dataclass(frozen=True)
class _Candidate:
    parent: int
    token: int
    score: float


class BeamSearch:
    """The search for one prompt. `running[row]` is what row `row` of the cache has read, but for
    its last id; `finished` the best that ended, the best first.
    """

    def __init__(
        self,
        config: GenerationConfig,
        prompt: Sequence[int],
        eos_token_ids: Sequence[int],
        *,
        room: int,
    ) -> None:
        self.config, self._eos, self._room = config, frozenset(eos_token_ids), room
        self._prompt = np.array(prompt, np.int64)
        self._filters = Filters(config, eos_token_ids)
        self._count = max(2, 1 + len(self._eos)) * config.num_beams
        # One row has been read; the others are copies of it that must not win.
        self.running = [Beam((), 0.0), *[Beam((), _NEVER)] * (config.num_beams - 1)]
        self.finished: list[Beam] = []

    def advance(self, logits: Logits) -> list[int]:
        """Choose by the logits [num_beams, vocab] after each running beam. Gives the row that each
        row of the cache must become a copy of; an empty list if the search is over."""
        candidates = self._best(logits)
        ended = [self._ends(c) for c in candidates]
        self._finish(candidates, ended)
        going = [c for c, reason in zip(candidates, ended, strict=True) if reason is None]
        going = going[: self.config.num_beams]
        if len(going) < self.config.num_beams or going[0].score == _NEVER:
            self.running = list(map(self._longer, going))
            return []
        if self._is_over(going[0]):
            return []
        return self._place(going)

    def result(self, count: int, reason: FinishReason = "length") -> list[Beam]:
        """The best `count` beams; where too few ended those that `reason` cut off, and where there
        are fewer still, empty ones of the score -inf."""
        there = [(b, max(1, len(b.ids))) for b in self.running if b.score > _NEVER]
        cut = [Beam(b.ids, self._normal(b.score, length), reason) for b, length in there]
        found = self.finished + sorted(cut, key=lambda b: -b.score)
        return (found + [Beam((), _NEVER, reason)] * count)[:count]

    def _best(self, logits: Logits) -> list[_Candidate]:
        """The best continuations of all beams by one id, the best first. Raises FidelityError if
        there is none."""
        scores = np.stack([self._scores(*pair) for pair in zip(self.running, logits, strict=True)])
        vocab = scores.shape[1]
        flat = scores.reshape(-1)
        greedy(flat)  # refuses what has no best
        order = most_likely(flat, min(self._count, len(flat)))
        return [_Candidate(int(i) // vocab, int(i) % vocab, float(flat[i])) for i in order]

    def _scores(self, beam: Beam, logits: Logits) -> NDArray[np.float32]:
        shifted = logits - logits[greedy(logits)]  # refuses what has no distribution
        log_probs = shifted - np.log(np.exp(shifted).sum())
        history = np.concatenate((self._prompt, np.array(beam.ids, np.int64)))
        new = len(beam.ids)
        filtered = self._filters(log_probs, history, new, self._room - new)
        scores: NDArray[np.float32] = filtered + np.float32(beam.score)
        return scores

    def _ends(self, candidate: _Candidate) -> FinishReason | None:
        if candidate.token in self._eos:
            return "stop"
        full = len(self.running[candidate.parent].ids) + 1 >= self._room
        return "length" if full else None

    def _finish(self, candidates: list[_Candidate], ended: list[FinishReason | None]) -> None:
        """Keep what ended among the best `num_beams`: the others never were in a beam."""
        n, length = self.config.num_beams, len(self.running[0].ids) + 1
        if self.config.early_stopping is True and len(self.finished) == n:
            return
        for candidate, reason in list(zip(candidates, ended, strict=True))[:n]:
            if reason is not None and candidate.score > _NEVER:
                ids = self.running[candidate.parent].ids
                ids = ids if reason == "stop" else (*ids, candidate.token)
                score = self._normal(candidate.score, length)
                self.finished.append(Beam(ids, score, reason))
        self.finished = sorted(self.finished, key=lambda beam: -beam.score)[:n]

    def _is_over(self, best: _Candidate) -> bool:
        """Whether no running beam can, or is likely to, become better than what has ended."""
        config, n = self.config, self.config.num_beams
        if len(self.finished) < n:
            return False
        if config.early_stopping is True:
            return True
        hopeful = config.early_stopping == "never" and config.length_penalty > 0
        length = self._room if hopeful else len(self.running[0].ids) + 1
        return self._normal(best.score, length) <= self.finished[-1].score

    def _normal(self, score: float, length: int) -> float:
        return float(score / length**self.config.length_penalty)

    def _place(self, going: list[_Candidate]) -> list[int]:
        """Give every new beam a row: one child stays in its parent's, so that little is copied."""
        rows: list[_Candidate | None] = [None] * len(going)
        homeless = []
        for candidate in going:
            if rows[candidate.parent] is None:
                rows[candidate.parent] = candidate
            else:
                homeless.append(candidate)
        placed = [row if row is not None else homeless.pop(0) for row in rows]
        self.running = list(map(self._longer, placed))
        return [c.parent for c in placed]

    def _longer(self, candidate: _Candidate) -> Beam:
        return Beam((*self.running[candidate.parent].ids, candidate.token), candidate.score)
