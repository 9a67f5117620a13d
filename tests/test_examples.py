"""The examples, as they are, on tables that take seconds."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import chdir
from multiprocessing.connection import Client, Listener
from pathlib import Path

import pytest

from export.runs import Run

from .conftest import gptrt_export, run_cli

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


# To import PyTorch takes longer than all that a command does here. So what an example calls
# `gptrt-export` hands its words to this process, which has it.
STAND_IN = """#!{python} -I
import os, sys
from multiprocessing.connection import Client
with Client({address}) as process:
    process.send((os.getcwd(), sys.argv[1:]))
    status, out, errors = process.recv()
sys.stdout.write(out)
sys.stderr.write(errors)
sys.exit(status)
"""


def run_example(
    words: list[object], folder: Path, **environment: str
) -> subprocess.CompletedProcess[str]:
    """A script of bash, its commands those of this environment."""
    with Listener(("127.0.0.1", 0)) as listener, ThreadPoolExecutor(1) as beside:
        stand_in = folder / "bin" / "gptrt-export"
        stand_in.parent.mkdir()
        stand_in.write_text(STAND_IN.format(python=sys.executable, address=listener.address))
        stand_in.chmod(0o755)
        folders = (stand_in.parent, Path(sys.executable).parent, os.environ["PATH"])
        path = {"PATH": os.pathsep.join(map(str, folders))}

        def script() -> subprocess.CompletedProcess[str]:
            command = ["bash", *map(str, words)]
            try:
                return subprocess.run(
                    command, env=os.environ | path | environment, capture_output=True, text=True
                )
            finally:
                Client(listener.address).send(None)

        done = beside.submit(script)
        while True:
            with listener.accept() as asking:
                if (asked := asking.recv()) is None:
                    return done.result()
                where, arguments = asked
                with chdir(where):
                    result = run_cli(gptrt_export, *arguments)
                asking.send((result.exit_code, result.stdout, result.stderr))


@pytest.mark.parametrize("name", sorted(path.stem for path in EXAMPLES.glob("*.sh")))
def test_an_example_goes_from_a_table_to_an_answer(name: str, run: Run, tmp_path: Path) -> None:
    pytest.importorskip("sacrebleu", reason="the metrics of the tasks are not installed")
    script = [EXAMPLES / f"{name}.sh", tables(tmp_path)[name], tmp_path / "out", *QUICK]
    done = run_example(script, tmp_path, BASE=str(run.path), CONVERT="--allow-loss")
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.strip(), done.stderr
    assert (tmp_path / "out" / "bundle" / "gptrt.json").is_file()
    for written in (tmp_path / "out").glob("*.jsonl"):
        rows = list(map(json.loads, written.read_text().splitlines()))
        assert rows and all("answer" in row or "label" in row for row in rows)
