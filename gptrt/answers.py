"""What a task is asked: labels with their probabilities, the prompt of an answer, and the sentence
of a text that is likeliest as its summary."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

from gptrt.calls import Calls, check_prompt
from gptrt.errors import FidelityError, OptionError, PromptError
from gptrt.interrupt import Interrupt
from gptrt.scoring import score, score_choices
from gptrt.sentences import sentences
from gptrt.task import Kind, Task, Text, answer_text, label_ids

Labelled = list[tuple[str, float]]  # labels with their probabilities, the most probable first
Encode = Callable[..., list[int]]  # (text, *, whole=True) -> ids

ZERO_SHOT = "Text: {text}\nLabel:"  # the prompt for labels that no bundle was taught
# What is asked about nothing: https://arxiv.org/abs/2102.09690, 4.1.
NEUTRAL = "N/A"

_METHODS: dict[Kind, str] = {
    "classification": "classify",
    "translation": "translate",
    "summarization": "summarize",
    "lm": "generate",
}


def required(task: Task | None, kind: Kind | None = None) -> Task:
    """The task of a bundle, which must have one, of this kind. Raises OptionError."""
    asks = task is not None and (task.kind != "lm" or task.prompt)
    if task is not None and asks and kind in (None, task.kind):
        return task
    found = "lm" if task is None else task.kind
    method = "answer" if asks and found == "lm" else _METHODS[found]
    raise OptionError(
        f"a bundle fine-tuned for {kind or 'a task'}",
        found="one that only continues text" if found == "lm" else found,
        do=f"use {method}, or open one that was fine-tuned for it",
    )


# --- labels -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Choice:
    """One of `labels` is to be chosen. A `taught` task is the bundle's, and these are some or all
    of its labels; any other is made for labels that the caller has thought of."""

    task: Task
    labels: tuple[str, ...]
    taught: bool


def choice(task: Task | None, labels: Sequence[str] | None, prompt: str | None) -> Choice:
    """What `classify` asks of a bundle with this task. Raises OptionError."""
    if isinstance(labels, str):
        raise OptionError("a list of labels", found=repr(labels)[:60], do="put them into one")
    texts = [*(labels or ()), *([] if prompt is None else [prompt])]
    if other := [text for text in texts if not isinstance(text, str)]:
        raise OptionError(
            "labels and a prompt that are texts", found=repr(other[0])[:60], do="write them out"
        )
    if prompt is None and task is not None and task.kind == "classification":
        chosen = tuple(task.labels if labels is None else labels)
        unknown = [label for label in chosen if label not in task.labels]
        if unknown or not chosen or len(set(chosen)) < len(chosen):
            raise OptionError(
                f"some of the labels {', '.join(task.labels)}",
                found=", ".join(map(repr, chosen))[:200] or "none",
                do="leave the others out, or give a prompt for labels of your own",
            )
        return Choice(task, chosen, taught=True)
    if labels is None:
        required(task, "classification")
        raise OptionError("labels for this prompt", found="none", do="give labels=[...]")
    made = Task("classification", ZERO_SHOT if prompt is None else prompt, tuple(labels))
    if faults := made.faults():
        raise OptionError(
            'different labels, and a prompt like "{text}\\nTopic:"',
            found="; ".join(faults),
            do="correct them",
        )
    return Choice(made, made.labels, taught=False)


def classify(
    calls: Calls, encode: Encode, asked: Choice, texts: Sequence[Text], *, calibrate: bool
) -> list[Labelled]:
    """The labels of each text, with probabilities that sum to 1.

    Calibrated are the scores of a task that was taught by its temperature and bias; other scores by
    taking off those after a neutral text, which is what a model has against or for a label anyway,
    for its length too (https://arxiv.org/abs/2102.09690, https://arxiv.org/abs/2104.08315).
    """
    named = [asked.task.named(text) for text in texts]  # refused before anything runs
    ids, task = _ids(calls, encode, asked), asked.task.narrowed(asked.labels)
    with calls.whole() as interrupt:
        scores = partial(_scores, calls, encode, task, ids, interrupt)
        if not calibrate:
            task = replace(task, temperature=1.0, bias=())
        elif not asked.taught:
            neutral = scores(dict.fromkeys(task.fields, NEUTRAL))
            task = replace(task, bias=tuple(-score for score in neutral))
        found = [zip(task.labels, task.probabilities(scores(each)), strict=True) for each in named]
    return [sorted(each, key=lambda pair: -pair[1]) for each in found]


def _ids(calls: Calls, encode: Encode, asked: Choice) -> list[list[int]]:
    """Of the labels that are asked for; the others say whether the end counts."""
    every = label_ids(asked.task.labels, partial(encode, whole=False), calls.tokenizer.end)
    found = dict(zip(asked.task.labels, every, strict=True))
    for ids in every:
        check_prompt(ids, calls.decoder.vocab_size)
    return [found[label] for label in asked.labels]


def _scores(
    calls: Calls,
    encode: Encode,
    task: Task,
    ids: list[list[int]],
    interrupt: Interrupt,
    fields: dict[str, str],
) -> list[float]:
    """How likely each label is as the answer."""
    longest = max(map(len, ids))
    prompt = _prompt(calls, encode, task, fields, room=calls.decoder.context - longest)
    with calls.row_for(prompt, len(prompt) + longest, interrupt) as (reading, row):
        found = score_choices(reading, row, prompt, ids)
    if not all(map(math.isfinite, found)):
        raise FidelityError(
            "log probabilities that are numbers",
            found=str(found)[:60],
            do="check the bundle with `gptrt verify`",
        )
    return found


# --- answers ------------------------------------------------------------------------------------


def question(
    calls: Calls, encode: Encode, task: Task, text: Text, max_new_tokens: int
) -> list[int]:
    """The ids of a prompt that leaves room for its answer. Raises PromptError."""
    room = calls.decoder.context - max_new_tokens
    return _prompt(calls, encode, task, task.named(text), room=room)


def likeliest_sentence(calls: Calls, encode: Encode, task: Task, text: Text) -> str:
    """Of the sentences of a text, of the longest field if there are several, the one whose ids as
    an answer, its end among them, have the largest mean log probability.

    Of a sentence that is longer than an answer only its beginning counts. Raises PromptError.
    """
    fields = task.named(text)
    found = sentences(max(fields.values(), key=len))
    if not found:
        raise PromptError("a text of a sentence or more", found="none", do="give some text")
    end = calls.tokenizer.end
    length = min(task.max_new_tokens, calls.decoder.context // 2)
    ends = [] if end is None else [end]
    answers = [[*encode(answer_text(each), whole=False), *ends][:length] for each in found]
    for ids in answers:
        check_prompt(ids, calls.decoder.vocab_size)
    longest = max(map(len, answers))
    prompt = _prompt(calls, encode, task, fields, room=calls.decoder.context - longest)
    capacity = len(prompt) + longest
    with calls.whole() as stop, calls.row_for(prompt, capacity, stop) as (reading, row):
        means = [score(reading, row, prompt, ids).mean for ids in answers]
    return found[means.index(max(means))]


def _prompt(
    calls: Calls, encode: Encode, task: Task, fields: dict[str, str], *, room: int
) -> list[int]:
    ids = task.prompt_ids(fields, encode, max(0, room))
    check_prompt(ids, calls.decoder.vocab_size)
    return ids
