"""The examples, as they are, on tables that take seconds."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from export.runs import Run

EXAMPLES = Path(__file__).parents[1] / "examples"
QUICK = ("--set", "max_steps=2", "--set", "eval_every=2", "--set", "batch_size=1")
WORDS = ("old", "young", "wise", "merry", "silent", "seven", "many")


def sentence(n: int) -> str:
    return f"The {WORDS[n % 7]} king number {n} saw the {WORDS[n * 3 % 5]} bird in the wood."


def tables(folder: Path) -> dict[str, tuple[Path, str]]:
    """For each example a table and what its last step shows."""
    rows = range(120)
    texts = {
        "sentiment": "text\tlabel\n" + "".join(f"{sentence(n)}\t{n % 2}\n" for n in rows),
        "translation": "".join(f"{sentence(n)}\t{sentence(n + 1)}\n" for n in rows),
        "style": "".join(f"{sentence(n)}\n" for n in rows),
        "summaries": "".join(
            json.dumps({"source": [sentence(n), sentence(2 * n)], "target": [sentence(n)]}) + "\n"
            for n in rows
        ),
    }
    ends = {"sentiment": ".tsv", "translation": ".tsv", "style": ".txt", "summaries": ".jsonl"}
    found = {}
    for name, text in texts.items():
        found[name] = folder / f"{name}{ends[name]}"
        found[name].write_text(text)
    return found


@pytest.mark.parametrize("name", sorted(path.stem for path in EXAMPLES.glob("*.sh")))
def test_an_example_goes_from_a_table_to_an_answer(name: str, run: Run, tmp_path: Path) -> None:
    pytest.importorskip("sacrebleu", reason="the metrics of the tasks are not installed")
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    command = ["bash", EXAMPLES / f"{name}.sh", tables(tmp_path)[name], tmp_path / "out", *QUICK]
    done = subprocess.run(
        list(map(str, command)),
        env=os.environ | {"PATH": path, "BASE": str(run.path), "CONVERT": "--allow-loss"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.strip(), done.stderr
    assert (tmp_path / "out" / "bundle" / "gptrt.json").is_file()
    for written in (tmp_path / "out").glob("*.jsonl"):
        rows = list(map(json.loads, written.read_text().splitlines()))
        assert rows and all("answer" in row or "label" in row for row in rows)
