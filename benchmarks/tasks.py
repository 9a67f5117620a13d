"""Fine-tuning for real tasks, from a table to int8 and int4 bundles, beside a baseline.

    python -m benchmarks.tasks sentiment  RT_POLARITY.tsv --out results
    python -m benchmarks.tasks summaries  SCITLDR         --out results
    python -m benchmarks.tasks translation EN_XX.tsv      --out results
    python -m benchmarks.tasks style       PLAYS.txt      --out results

Every step is a command that a user would type, and is printed. A run that exists already is taken
up where it is, so the whole can be interrupted. The baselines are those that people reach for
first: words counted and weighed (TF-IDF) under a logistic regression, the first sentence of a text,
the translation of the sentence that is most alike, and the model as it was before.
"""

from __future__ import annotations

import argparse
import json
import shlex
import statistics
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gptrt_export import metrics
from gptrt_export.example_tables import split
from gptrt_export.examples import Example, write_table
from gptrt_export.metrics import Scored

from gptrt.tables import read_rows

_ROOT = Path(__file__).parents[1]
_DEFAULT = _ROOT / "models" / "tales"
_QUANTIZED = ("int8", "int4")
_STORED = ", ".join(("fp32", *_QUANTIZED))


@dataclass(frozen=True)
class Recipe:
    """What is trained: options of `finetune`, and of `convert` for each bundle."""

    name: str
    options: tuple[str, ...]
    start: Path = _DEFAULT


Rows = list[dict[str, Any]]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("task", choices=list(_TASKS))
    parser.add_argument("data", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--max-time", type=float, help="Seconds of training, for each model.")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    _TASKS[args.task](args)


# --- sentiment ----------------------------------------------------------------------------------

_READING = (
    *("--task", "lm", "--epochs", "3", "--test-share", "0", "--column", "answer=text"),
    *("--set", "optimizer.lr=0.001", "--set", "optimizer.matrix_lr=0.006"),
)
_JUDGING = ("--task", "classification", "--prompt", "Review: {text}\nSentiment:")
_WHOLE = ("--epochs", "3", "--set", "prompt_share=0.3", "--set", "eval_every=60")
# An adapter moves in few directions, and finds them by many small steps rather than by few large.
# These are noisy, and their mean is not.
_ADAPTER = (
    *("--lora-rank", "5", "--lora-alpha", "20", "--epochs", "6", "--set", "prompt_share=0.3"),
    *("--set", "eval_every=240", "--set", "patience=8", "--set", "batch_size=2"),
    *("--set", "average=0.99", "--set", "optimizer.lr=0.0015", "--set", "optimizer.beta2=0.99"),
)
_LABELS = {"1": "good", "0": "bad"}
_SEEDS = range(3)


def sentiment(args: argparse.Namespace) -> None:
    """First to read reviews, as text, then to judge them: with all weights, and with an adapter.
    Beside it a logistic regression on the same split.

    On a thousand sentences one run and another differ by a point or two, so each is done with
    several seeds; what an adapter reaches is a ratio of means.
    """
    train, test = split_reviews(args.data, args.out)
    reader = finetune(Recipe("reader", _READING), [train], args)
    judging = (*_JUDGING, "--test", str(test))
    means: dict[str, list[float]] = {}
    for name, more in (("sentiment", _WHOLE), ("sentiment-lora", _ADAPTER)):
        found = []
        for seed in _SEEDS:
            own = f"{name}-{seed}" if seed else name
            options = (*judging, *more, "--set", f"seed={seed}")
            run = finetune(Recipe(own, options, reader), [train], args)
            found.append(compare(own, [run, *bundles(run)], run, args.out))
        means[name] = [statistics.mean(of_model) for of_model in zip(*found, strict=True)]
        shown = ", ".join(f"{mean:.2f}" for mean in means[name])
        print(f"{name}: accuracy as {_STORED}, mean of {len(_SEEDS)} seeds: {shown}", flush=True)
    shares = [100 * a / b for a, b in zip(means["sentiment-lora"], means["sentiment"], strict=True)]
    shown = ", ".join(f"{share:.1f} %" for share in shares)
    print(f"adapter, of all weights: {shown} as {_STORED}", flush=True)
    wanted = [row["answer"] for row in table(test)]
    for name, answers in logistic_regressions(table(train), table(test)).items():
        scores = [metrics.accuracy(answers, wanted), metrics.macro_f1(answers, wanted)]
        show(f"baseline: {name}", scores)


def split_reviews(path: Path, out: Path) -> tuple[Path, Path]:
    """Tables to learn from and to test on: a tenth, by hash of the text, of each label."""
    rows = read_rows(path, {"text": "text", "label": "label"})
    found = [Example({"text": row.values["text"]}, (_LABELS[row.values["label"]],)) for row in rows]
    test, train = split(found, 0.1)
    for name, part in (("reviews-train.jsonl", train), ("reviews-test.jsonl", test)):
        write_table(out / name, part)
    return out / "reviews-train.jsonl", out / "reviews-test.jsonl"


def logistic_regressions(train: Rows, test: Rows) -> dict[str, list[str]]:
    """What scikit-learn's defaults answer, with words and with pairs of them too."""
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline

    found = {}
    for name, longest in (("words", 1), ("words and pairs", 2)):
        model = make_pipeline(
            TfidfVectorizer(ngram_range=(1, longest)), LogisticRegression(max_iter=1000)
        )
        model.fit([row["text"] for row in train], [row["answer"] for row in train])
        found[f"TF-IDF of {name}, logistic regression"] = list(
            model.predict([row["text"] for row in test])
        )
    return found


# --- summaries ----------------------------------------------------------------------------------


def summaries(args: argparse.Namespace) -> None:
    """Written, and chosen among the sentences of the text, beside its first sentence."""
    recipe = Recipe(
        "summaries",
        (
            *("--task", "summarization", "--column", "text=source", "--column", "answer=target"),
            *("--test", str(args.data / "dev.jsonl"), "--epochs", "3"),
        ),
    )
    run = finetune(recipe, [args.data / "train.jsonl"], args)
    models = [run, *bundles(run)]
    compare("summaries, written", models, run, args.out)
    compare("summaries, extracted", models, run, args.out, "--extract")
    dev = [json.loads(line) for line in (args.data / "dev.jsonl").read_text().splitlines()]
    first, references = [row["source"][0] for row in dev], [row["target"] for row in dev]
    show("baseline: the first sentence", metrics.rouge(first, references))


# --- translation --------------------------------------------------------------------------------


def translation(args: argparse.Namespace) -> None:
    """A model of its own, whose tokenizer knows both languages, beside the nearest neighbour."""
    text = args.out / "pairs.txt"
    pairs = [line.split("\t")[:2] for line in args.data.read_text("utf-8").splitlines()]
    text.write_text("\n".join(f"{a}\n{b}" for a, b in pairs), encoding="utf-8")
    base = args.out / "base"
    if not (base / "checkpoints.json").is_file():
        new = ("--preset", "translation", "--data", str(text), "--out", str(base))
        call("train", *new, "--max-steps", "0")
    recipe = Recipe(
        "translation",
        (
            *("--task", "translation", "--prompt", "{text} ="),
            *("--column", "text=1", "--column", "answer=2"),
            *("--set", "optimizer.lr=0.003", "--set", "optimizer.matrix_lr=0.02"),
            *("--epochs", "20", "--set", "batch_size=8", "--set", "eval_every=200"),
        ),
        start=base,
    )
    run = finetune(recipe, [args.data], args)
    compare("translation", [run, *bundles(run)], run, args.out)
    train, test = (table(run / "data" / f"{name}.jsonl") for name in ("train", "test"))
    found = nearest_translations(train, test)
    references = [as_list(row["answer"]) for row in test]
    scores = [metrics.bleu(found, references), metrics.chrf(found, references)]
    show("baseline: the translation of the nearest sentence", scores)


def nearest_translations(train: Rows, test: Rows) -> list[str]:
    """By the cosine of TF-IDF vectors of words."""
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.neighbors import NearestNeighbors

    vectorizer = TfidfVectorizer(token_pattern=r"\S+")
    known = vectorizer.fit_transform([row["text"] for row in train])
    nearest = NearestNeighbors(n_neighbors=1, metric="cosine").fit(known)
    found = nearest.kneighbors(
        vectorizer.transform([row["text"] for row in test]), return_distance=False
    )
    return [as_list(train[int(n)]["answer"])[0] for n in found[:, 0]]


# --- style --------------------------------------------------------------------------------------


def style(args: argparse.Namespace) -> None:
    """To write like the texts of a file between which lines are empty."""
    texts = [part.strip() for part in args.data.read_text("utf-8").split("\n\n")]
    read = args.out / "texts.jsonl"
    write_table(read, [Example({}, (text,)) for text in texts if text])
    recipe = Recipe(
        "style",
        (
            *("--task", "lm", "--column", "answer=text", "--epochs", "3"),
            *("--set", "optimizer.lr=0.001", "--set", "optimizer.matrix_lr=0.006"),
        ),
    )
    run = finetune(recipe, [read], args)
    compare("style", [_DEFAULT, run, *bundles(run)], run, args.out)


# --- steps --------------------------------------------------------------------------------------


def finetune(recipe: Recipe, data: Sequence[Path], args: argparse.Namespace) -> Path:
    run: Path = args.out / recipe.name
    limit = () if args.max_time is None else ("--max-time", str(args.max_time))
    if (run / "checkpoints.json").is_file():
        call("finetune", "--resume", "--out", str(run), *limit)
        return run
    tables = [word for path in data for word in ("--data", str(path))]
    call(
        *("finetune", "--from", str(recipe.start), *tables, *recipe.options),
        *("--out", str(run), *limit),
    )
    return run


def bundles(run: Path) -> list[Path]:
    """The quantized bundles of a run."""
    found = []
    for mode in _QUANTIZED:
        out = run.with_name(f"{run.name}-{mode}")
        found.append(out)
        if not out.exists():
            call("convert", str(run), "--out", str(out), "--quantize", mode)
    return found


def compare(title: str, models: Sequence[Path], run: Path, out: Path, *options: str) -> list[float]:
    """Evaluate them and print the table; what its first line says of each."""
    target = out / f"{title.replace(', ', '-')}.md"
    test = run / "data" / "test.jsonl"
    call("evaluate", *map(str, models), "--data", str(test), "--out", str(target), *options)
    written = target.read_text()
    print(f"\n## {title}\n\n{written}", flush=True)
    first = written.splitlines()[2].split("|")[2:-1]
    return [float(cell.split()[0]) for cell in first]


def call(*arguments: str) -> None:
    print(f"$ gptrt-export {shlex.join(arguments)}", flush=True)
    program = [sys.executable, "-c", "from gptrt_export.cli import main; main()"]
    subprocess.run([*program, *arguments], check=True, stdout=subprocess.DEVNULL)


def show(name: str, scores: Sequence[Scored]) -> None:
    each = ", ".join(f"{s.name} {s.value:.2f} [{s.low:.2f}, {s.high:.2f}]" for s in scores)
    print(f"{name}: {each}", flush=True)


def table(path: Path) -> Rows:
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def as_list(value: Any) -> list[str]:
    return value if isinstance(value, list) else [value]


_TASKS: dict[str, Callable[[argparse.Namespace], None]] = {
    "sentiment": sentiment,
    "summaries": summaries,
    "translation": translation,
    "style": style,
}

if __name__ == "__main__":
    main()
