"""The run: the same questions to every runtime, in rounds, one runtime at a time.

All processes live at the same time and wait while another one measures, so that what else the
machine does falls on all alike; every round asks in an order of its own.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from random import Random
from typing import Any

from .models import Candidate, Checkpoint, Workshop
from .processes import Worker, WorkerError, first_token, started
from .results import BANDWIDTH, CURVE_NEW, DECODE_NEW, DECODE_PROMPT, Entry, Sample

_PREFILLS = (32, 512)
_CONTEXTS = (64, 128, 256, 512, 1024)
_BATCHES = (1, 2, 4, 8, 16)
_TRIALS = 2

TABLE = ("decode", "prefill", "cold")
CURVES = ("context", "batch")
CURVE_ROUNDS = 3  # at most


@dataclass(frozen=True)
class Question:
    """Continue `batch` prompts by `new` ids; the answer becomes the value of `measure` at `x`."""

    measure: str
    x: int
    prompt: int
    new: int
    batch: int = 1

    @property
    def request(self) -> dict[str, int]:
        return {"prompt": self.prompt, "new": self.new, "batch": self.batch}

    def value(self, answer: dict[str, float]) -> float:
        if self.measure == "prefill":
            return self.prompt / answer["first_s"]
        return self.batch * (self.new - 1) / answer["rest_s"]


def questions(measure: str, context: int) -> Iterator[Question]:
    """Those of a measure that fit into a context."""
    prompt = min(DECODE_PROMPT, context // 4)
    if measure == "decode":
        new = min(DECODE_NEW, context - prompt - 1)
        yield Question(measure, new, prompt, new + 1)
    elif measure == "prefill":
        yield from (Question(measure, n, n, 1) for n in _PREFILLS if n < context)
    elif measure == "context":
        yield from (
            Question(measure, n, n - CURVE_NEW, CURVE_NEW) for n in _CONTEXTS if n <= context
        )
    elif measure == "batch":
        new = min(CURVE_NEW, context - prompt)
        yield from (Question(measure, n, prompt, new, n) for n in _BATCHES)


Workers = dict[str, tuple[Candidate, Worker]]  # by name


@dataclass
class Run:
    """What is common to all stages of a run, and what they have found so far."""

    workshop: Workshop
    rounds: int
    samples: list[Sample] = field(default_factory=list)
    entries: list[Entry] = field(default_factory=list)
    chosen: dict[str, dict[str, Any]] = field(default_factory=dict)  # settings, by candidate

    def stage(
        self, checkpoint: Checkpoint, candidates: list[Candidate], measures: list[str]
    ) -> None:
        """Measure the candidates on one model. One that fails is left out from there on."""
        asked = [q for m in measures for q in questions(m, checkpoint.context)]
        rounds = min(self.rounds, CURVE_ROUNDS) if set(measures) <= set(CURVES) else self.rounds
        with ExitStack() as stack:
            workers: Workers = {}
            for candidate in candidates:
                with self._leaving_out(workers, candidate):
                    self._begin(stack, workers, self.tuned(checkpoint, candidate), asked)
            memory = stack.enter_context(started(*self._bandwidth()))
            for turn in range(rounds):
                self._say(f"{checkpoint.name}: round {turn + 1} of {rounds}")
                self._sample(checkpoint, "machine", BANDWIDTH, 0, turn, memory.ask()["gb_s"])
                for question in asked:
                    self._ask(checkpoint, workers, question, turn)
                if "cold" in measures:
                    self._cold(checkpoint, workers, turn)
            for candidate, _ in workers.values():
                self._note(checkpoint, candidate)

    def _ask(
        self,
        checkpoint: Checkpoint,
        workers: Workers,
        question: Question,
        turn: int,
    ) -> None:
        for candidate, worker in _in_turn(workers, turn):
            if question.batch == 1 or candidate.peer.batches:
                with self._leaving_out(workers, candidate):
                    value = question.value(worker.ask(**question.request))
                    measure, x = question.measure, question.x
                    self._sample(checkpoint, candidate.name, measure, x, turn, value)

    def _cold(self, checkpoint: Checkpoint, workers: Workers, turn: int) -> None:
        """A fresh process of everyone, with room for the question; the workers wait."""
        question = next(questions("decode", checkpoint.context))
        request, room = question.request, {"context": question.prompt + question.new}
        for candidate, _ in _in_turn(workers, turn):
            with self._leaving_out(workers, candidate):
                sized = replace(candidate, settings=candidate.settings | room)
                command, threads, log = self._serving(sized)
                found = first_token(command, request, threads, log.with_suffix(".cold.log"))
                for measure, value in found.items():
                    self._sample(checkpoint, candidate.name, measure, 0, turn, value)

    @contextmanager
    def _leaving_out(self, workers: Workers, candidate: Candidate) -> Iterator[None]:
        """Whoever fails is named, with the reason, and asked no more."""
        try:
            yield
        except WorkerError as e:
            workers.pop(candidate.name, None)
            self._say(f"{candidate.name} is left out: {e}")

    def perplexity(
        self, candidates: list[Candidate], checkpoint: Checkpoint, windows: Path
    ) -> None:
        """The same ids in the same windows to everyone that gives logits for all positions."""
        from math import exp

        for candidate in candidates:
            with started(*self._serving(candidate)) as worker:
                answer = worker.ask(windows=str(windows))
            self._note(checkpoint, candidate)
            value = exp(answer["nll"] / answer["tokens"])
            self._sample(checkpoint, candidate.name, "perplexity", answer["tokens"], 0, value)
            self._say(f"{candidate.name}: perplexity {value:.4f}")

    def tuned(self, checkpoint: Checkpoint, candidate: Candidate) -> Candidate:
        """With the faster one of its choices: those made on the first model hold for all."""
        if candidate.name not in self.chosen:
            choices = candidate.kind.choices
            options = [replace(candidate, settings=candidate.settings | c) for c in choices]
            times = [self._trial(checkpoint, o) for o in options] if len(options) > 1 else [0.0]
            self.chosen[candidate.name] = choices[times.index(min(times))]
        return replace(candidate, settings=candidate.settings | self.chosen[candidate.name])

    def _trial(self, checkpoint: Checkpoint, candidate: Candidate) -> float:
        """Seconds for a long prompt and a short answer, the best of a few; infinite if it fails."""
        question = {"prompt": min(512, checkpoint.context // 2), "new": 48, "batch": 1}
        question["new"] = min(question["new"], checkpoint.context // 4)
        try:
            with started(*self._serving(candidate)) as worker:
                answers = [worker.ask(**question) for _ in range(1 + _TRIALS)]
        except WorkerError as e:
            self._say(f"{candidate.name} with {candidate.settings} fails: {e}")
            return float("inf")
        return float(min(a["first_s"] + a["rest_s"] for a in answers))

    def _begin(
        self,
        stack: ExitStack,
        workers: Workers,
        candidate: Candidate,
        asked: list[Question],
    ) -> None:
        """Start a worker and let it answer one question, to warm up."""
        worker = stack.enter_context(started(*self._serving(candidate)))
        if asked:
            worker.ask(**asked[0].request)
        workers[candidate.name] = candidate, worker

    def _serving(self, candidate: Candidate) -> tuple[list[str], int, Path]:
        shop = self.workshop
        return shop.command(candidate), shop.threads, shop.log(candidate)

    def _bandwidth(self) -> tuple[list[str], int, Path]:
        shop = self.workshop
        command = [sys.executable, "-m", "benchmarks.bandwidth", str(shop.threads)]
        return command, 1, shop.work / "bandwidth.log"

    def _note(self, checkpoint: Checkpoint, candidate: Candidate) -> None:
        settings = (
            candidate.kind.build | candidate.kind.options | self.chosen.get(candidate.name, {})
        )
        kind = candidate.kind
        cache = checkpoint.cache_values * kind.cache_bits // 8
        entry = Entry(checkpoint.name, candidate.name, kind.bits, candidate.bytes, settings, cache)
        if entry not in self.entries:
            self.entries.append(entry)

    def _sample(self, at: Checkpoint, who: str, measure: str, x: int, turn: int, v: float) -> None:
        self.samples.append(Sample(at.name, who, measure, x, turn, v))

    @property
    def _say(self) -> Callable[[str], None]:
        return self.workshop.say


def _in_turn(workers: Workers, turn: int) -> list[tuple[Candidate, Worker]]:
    """Everyone, in an order that the number of the round makes: whoever follows a heavy neighbour,
    or is the first after a pause, is a little slower."""
    everyone = list(workers.values())
    Random(turn).shuffle(everyone)
    return everyone
