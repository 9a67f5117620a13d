"""`gptrt run`: every format in and out, every fault told, and nothing lost when it is killed."""

from __future__ import annotations

import csv
import io
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result

from gptrt.cli import main as gptrt
from gptrt.constraint import Regex
from gptrt.errors import DataError, OptionError, TargetError
from gptrt.generator import Generator
from gptrt.opening import embedded_bundle
from gptrt.run import Job, Report, carry_out, made_of, plan_for
from gptrt.tables import read_rows
from gptrt.target import Target
from gptrt.task import Task
from gptrt.testing import FakeDecoder, byte_tokenizer
from tests.conftest import SLOW_GPTRT, assert_refused, change_manifest, run_cli
from tests.fakes import character_tokenizer, noise

LABELS = ("king", "wood", "very old soup")
REVIEWS = Task("classification", "{text}\nThe", LABELS)
SUMMARIES = Task("summarization", "{document}\nIn short:", max_new_tokens=5)
PAIRS = Task("translation", "{text} in {language}:", max_new_tokens=5)

# With words of several bytes, and a second column that is only passed on.
ROWS = [{"text": f"Déjà vu, {n} times", "id": str(n)} for n in range(11)]


def written(path: Path, rows: list[dict[str, Any]] = ROWS) -> Path:
    """A table in the format of its suffix."""
    with path.open("w", encoding="utf-8", newline="") as stream:
        if path.suffix == ".jsonl":
            stream.writelines(json.dumps(row) + "\n" for row in rows)
        elif path.suffix == ".txt":
            stream.writelines(row["text"] + "\n" for row in rows)
        elif path.suffix == ".tsv":
            lines = [list(rows[0]), *(list(row.values()) for row in rows)]
            stream.writelines("\t".join(cells) + "\n" for cells in lines)
        else:
            writer = csv.DictWriter(stream, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    return path


def lines_of(path: Path) -> list[dict[str, Any]]:
    if path.suffix == ".jsonl":
        return [json.loads(line) for line in path.read_text("utf-8").splitlines()]
    with path.open(encoding="utf-8", newline="") as stream:
        return list(csv.DictReader(stream))


def fake(task: Task | None = SUMMARIES) -> Generator:
    return Generator.from_parts(FakeDecoder(noise, context=256), byte_tokenizer(), task=task)


def done(job: Job, generator: Generator | None = None, *, force: bool = False) -> Report:
    """A job with a fake model, from its beginning or from where it is."""
    generator = fake() if generator is None else generator
    plan = plan_for(job, generator.task)
    target = Target.open(job.output, made_of(plan, "fake"), rows=plan.rows, force=force)
    return carry_out(generator, plan, target)


def summaries(folder: Path, rows: int = 11, **options: Any) -> Job:
    source = written(folder / "in.jsonl", ROWS[:rows])
    return Job(source, folder / "out.jsonl", {"document": "text"}, batch_size=4, **options)


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


@pytest.fixture(scope="module")
def reviews(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The embedded bundle, as if it were fine-tuned."""
    path = tmp_path_factory.mktemp("bundle") / "reviews"
    shutil.copytree(embedded_bundle(), path)
    change_manifest(path, lambda manifest: manifest.update(task=asdict(REVIEWS)))
    return path


def asked(*arguments: object) -> Result:
    return run_cli(gptrt, "run", *arguments, "--threads", 1)


# --- in and out ---------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".jsonl", ".csv", ".tsv", ".txt"])
@pytest.mark.parametrize("out", [".jsonl", ".csv"])
def test_every_row_comes_out_with_its_columns_and_label(
    tmp_path: Path, reviews: Path, suffix: str, out: str
) -> None:
    source, output = written(tmp_path / f"in{suffix}"), tmp_path / f"out{out}"
    result = asked(reviews, "--input", source, "--output", output)
    assert (result.exit_code, result.stderr) == (0, "")
    assert result.stdout.startswith(f"11 rows in {output} after ")
    with Generator(reviews, threads=1) as generator:
        wanted = generator.classify_batch([row["text"] for row in ROWS])
    for row, found, labelled in zip(ROWS, lines_of(output), wanted, strict=True):
        columns = {"text": row["text"]} if suffix == ".txt" else row
        assert found.items() >= columns.items()
        assert list(found) == [*columns, "label", "probabilities"]
        assert found["label"] == labelled[0][0]
        shares = found["probabilities"]
        shares = json.loads(shares) if out == ".csv" else shares
        assert list(shares) == [label for label, _ in labelled]
        assert shares == pytest.approx(dict(labelled), rel=1e-5)
    assert names(tmp_path) == {source.name, output.name}


def test_a_bundle_without_a_task_goes_on_after_the_prompt(tmp_path: Path) -> None:
    rows = [{"prompt": "Once upon a time", "n": 1}, {"prompt": "The king", "n": [2]}]
    source, output = written(tmp_path / "in.jsonl", rows), tmp_path / "out.jsonl"
    result = asked("--input", source, "--output", output, "--max-new-tokens", 6, "--json")
    found = json.loads(result.stdout)
    assert (found["output"], found["rows"], found["rows_before"]) == (str(output), 2, 0)
    wanted = Generator(threads=1).complete_batch([r["prompt"] for r in rows], max_new_tokens=6)
    assert lines_of(output) == [
        row | {"answer": one.text, "finish_reason": one.finish_reason}
        for row, one in zip(rows, wanted, strict=True)
    ]


def test_drawn_texts_differ_from_row_to_row_and_not_from_run_to_run(tmp_path: Path) -> None:
    source = written(tmp_path / "in.jsonl", [{"prompt": "The old king"}] * 6)
    options = ("--temperature", 1, "--seed", 7, "--max-new-tokens", 8, "--stop", ".")
    for name, size in (("one.jsonl", 2), ("two.jsonl", 3)):
        asked(
            *("--input", source, "--output", tmp_path / name, "--batch-size", size),
            *options,
        )
    one, two = (lines_of(tmp_path / name) for name in ("one.jsonl", "two.jsonl"))
    assert one == two
    assert len({row["answer"] for row in one}) > 3
    assert not any("." in row["answer"] for row in one)


def test_answers_of_a_task_are_those_of_the_generator(tmp_path: Path) -> None:
    job = summaries(tmp_path)
    assert done(job).rows == 11
    wanted = [fake().answer(row["text"]) for row in ROWS]
    for row, found, one in zip(ROWS, lines_of(job.output), wanted, strict=True):
        assert found == row | {"answer": one.text, "finish_reason": one.finish_reason}


def test_a_prompt_that_a_language_model_was_taught_is_asked(tmp_path: Path) -> None:
    generator, job = fake(Task("lm", "Q: {document}\nA:", max_new_tokens=5)), summaries(tmp_path)
    assert done(job, generator).rows == 11
    wanted = [generator.answer(row["text"]).text for row in ROWS]
    assert [row["answer"] for row in lines_of(job.output)] == wanted


@pytest.mark.parametrize("options", [{"logit_bias": {999: 1.0}}, {"constraint": Regex("(yes|no")}])
def test_options_that_no_row_can_be_asked_with_are_told_before_the_output_is_begun(
    tmp_path: Path, options: dict[str, Any]
) -> None:
    with pytest.raises(OptionError):
        done(summaries(tmp_path, options=options))
    assert names(tmp_path) == {"in.jsonl"}
    assert done(summaries(tmp_path)).rows == 11


def test_fields_are_columns_by_name_or_by_number(tmp_path: Path) -> None:
    source = tmp_path / "in.tsv"
    source.write_text("no\tGerman\nyes\tFrench\n")
    job = Job(source, tmp_path / "out.jsonl", {"text": "1", "language": "2"}, prefix="made_")
    done(job, fake(PAIRS))
    first, second = lines_of(job.output)
    assert (first["1"], second["2"], len(first)) == ("no", "French", 4)
    wanted = fake(PAIRS).answer({"text": "no", "language": "German"}).text
    assert first["made_answer"] == wanted


def test_a_limit_takes_the_first_rows_and_looks_at_no_more(tmp_path: Path) -> None:
    job = summaries(tmp_path, limit=5)
    with job.input.open("a") as stream:
        stream.write("broken\n")
    assert done(job).rows == 5
    assert [row["id"] for row in lines_of(job.output)] == list("01234")


def test_columns_that_differ_from_row_to_row_all_have_a_place(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [{"document": "a", "x": 1}, {"y": [None], "document": "b,\n"}]
    source = written(tmp_path / "in.jsonl", rows)
    job = Job(source, tmp_path / "out.csv", options={"max_new_tokens": 2})
    done(job)
    first, second = lines_of(job.output)
    assert list(first) == ["document", "x", "y", "answer", "finish_reason"]
    assert (first["x"], first["y"], second["y"]) == ("1", "", "[null]")
    assert second["document"] == "b,\n"


def test_what_is_written_can_be_read_again(tmp_path: Path) -> None:
    """Also a carriage return in a cell, which the writer of CSV leaves unquoted by itself."""
    row = {"document": "a", "note": 'b\r"c", \n d\r'}
    job = Job(written(tmp_path / "in.jsonl", [row]), tmp_path / "out.csv")
    done(job)
    (again,) = read_rows(job.output)
    assert again.columns.items() >= row.items()
    assert b"\r\n" not in job.output.read_bytes()


# --- what is refused ----------------------------------------------------------------------------


def test_all_faults_are_told_before_anything_runs(tmp_path: Path, reviews: Path) -> None:
    source, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    broken = ["{", '{"id": 1}', '{"text": null}', "[]"]
    source.write_text("\n".join(['{"text": "fine"}', *broken, *["?"] * 20]))
    result = asked(reviews, "--input", source, "--output", output)
    assert_refused(result, "in.jsonl:2: no JSON", "in.jsonl:3: no 'text' in id", "and 4 more")
    assert "in.jsonl:4: text is null, wanted text; " in result.stderr
    assert names(tmp_path) == {"in.jsonl"}


def test_what_the_tokenizer_refuses_is_told_with_its_line(tmp_path: Path) -> None:
    generator = Generator.from_parts(
        FakeDecoder(noise, context=8), character_tokenizer("abc"), task=None
    )
    source = tmp_path / "in.txt"
    source.write_text("abc\n" + "abc" * 5 + "\nxyz\n")
    with pytest.raises(DataError) as caught:
        done(Job(source, tmp_path / "out.jsonl"), generator)
    assert "in.txt:2: 15 tokens, wanted a prompt of at most 7 tokens" in caught.value.found
    assert "in.txt:3: " in caught.value.found
    assert names(tmp_path) == {"in.txt"}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"fields": {"texts": "a"}}, "fields of the prompt: text; found texts"),
        ({"fields": {"text": "body"}}, "no 'body' in text, id"),
        ({"output": Path("out.parquet")}, "ends in .jsonl or .csv; found"),
        ({"output": Path("none/out.csv")}, "no folder"),
        ({"output": Path("in.csv")}, "an output beside the input"),
        ({"batch_size": 0}, "batch_size of 1 or more; found 0"),
        ({"options": {"heat": 1}}, "heat"),
        ({"options": {"num_return_sequences": 2, "temperature": 1}}, "labels are chosen"),
        ({"limit": -1}, "limit of 1 or more; found -1"),
        ({"options": {"max_new_tokens": 5}}, "no options of generation where labels are chosen"),
        ({"input": Path("none.csv")}, "No such file"),
        ({"input": Path("in.xlsx")}, "ends in .jsonl, .csv, .tsv, .txt; found"),
    ],
)
def test_what_cannot_be_done_is_refused(
    tmp_path: Path, changes: dict[str, Any], words: str
) -> None:
    changes = {k: tmp_path / v if isinstance(v, Path) else v for k, v in changes.items()}
    job = replace(Job(written(tmp_path / "in.csv"), tmp_path / "out.jsonl"), **changes)
    with pytest.raises((OptionError, DataError, TargetError), match=words.replace(".", r"\.")):
        plan_for(job, REVIEWS)
    assert names(tmp_path) == {"in.csv"}


def test_a_folder_is_no_output(tmp_path: Path) -> None:
    job = summaries(tmp_path)
    job.output.mkdir()
    for force in (False, True):
        with pytest.raises(TargetError):
            done(job, force=force)
    assert names(tmp_path) == {"in.jsonl", "out.jsonl"}


def test_columns_that_would_be_overwritten_are_refused(tmp_path: Path) -> None:
    source = written(tmp_path / "in.csv", [{"text": "x", "label": "king"}])
    job = Job(source, tmp_path / "out.jsonl")
    with pytest.raises(DataError, match=r"no column label in .* --prefix"):
        plan_for(job, REVIEWS)
    done(replace(job, prefix="found_"), fake(REVIEWS))
    (row,) = lines_of(job.output)
    assert list(row) == ["text", "label", "found_label", "found_probabilities"]


def test_a_field_without_a_column_is_bad_usage(tmp_path: Path, reviews: Path) -> None:
    source = written(tmp_path / "in.csv")
    result = asked(reviews, "--input", source, "--output", tmp_path / "o.csv", "--field", "text")
    assert result.exit_code == 2
    assert "wanted --field KEY=VALUE; found text" in result.stderr


def test_an_output_that_exists_is_kept_unless_forced(tmp_path: Path) -> None:
    job = summaries(tmp_path)
    job.output.write_text("precious")
    with pytest.raises(TargetError, match=r"nothing at .*out.jsonl yet; found a file; .*--force"):
        done(job)
    assert job.output.read_text() == "precious"
    done(job, force=True)
    assert len(lines_of(job.output)) == 11
    with pytest.raises(TargetError, match="nothing at"):
        done(job)
    assert names(tmp_path) == {"in.jsonl", "out.jsonl"}


# --- ended and gone on --------------------------------------------------------------------------


class Killed(BaseException):
    """As if the process were gone."""


class Steps:
    """Every step that reaches the disk; at one of them, before or after it, all ends."""

    def __init__(self, patch: pytest.MonkeyPatch, fatal: int, *, after: bool) -> None:
        self.count, self._fatal, self._after = 0, fatal, after
        for name in ("fsync", "replace", "unlink"):
            patch.setattr(os, name, self._watched(getattr(os, name)))

    def _watched(self, step: Callable[..., Any]) -> Callable[..., Any]:
        def watched(*args: Any, **kwargs: Any) -> Any:
            self.count += 1
            dies = self.count == self._fatal
            if dies and not self._after:
                raise Killed
            result = step(*args, **kwargs)
            if dies:
                raise Killed
            return result

        return watched


@pytest.mark.parametrize(("out", "after"), [("out.jsonl", False), ("out.csv", True)])
def test_ended_at_any_step_it_goes_on_to_the_same_file(
    tmp_path: Path, out: str, after: bool
) -> None:
    job = replace(summaries(tmp_path), output=tmp_path / out)
    done(job)
    wanted = job.output.read_bytes()
    job.output.unlink()
    for fatal in range(1, 1000):
        with pytest.MonkeyPatch.context() as patch:
            Steps(patch, fatal, after=after)
            try:
                done(job)
            except Killed:
                ended = True
            else:
                ended = False
        if ended and names(tmp_path) != {"in.jsonl", out}:
            assert job.output.exists() <= (fatal > 12)  # never before it is whole
            report = done(job)
            assert report.rows_before % 4 == 0 or report.rows_before == 11
        assert job.output.read_bytes() == wanted
        assert names(tmp_path) == {"in.jsonl", out}
        job.output.unlink()
        if not ended:
            assert fatal > 12
            return


def cut_off(job: Job, generator: Generator, after: int = 4) -> None:
    """A run that is interrupted after so many rows."""
    plan = plan_for(job, generator.task)
    target = Target.open(job.output, made_of(plan, "fake"), rows=plan.rows)

    def progress(rows: int, _: int) -> None:
        if rows >= after:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        carry_out(generator, plan, target, progress=progress)


def test_a_real_model_gives_the_same_bytes_when_it_goes_on(tmp_path: Path) -> None:
    embedded = Generator(threads=1)
    for task, field in ((REVIEWS, "text"), (SUMMARIES, "document")):
        job = replace(summaries(tmp_path), fields={field: "text"})
        parts = (embedded.decoder, embedded.tokenizer)
        done(job, Generator.from_parts(*parts, task=task))
        wanted = job.output.read_bytes()
        job.output.unlink()
        cut_off(job, Generator.from_parts(*parts, task=task), after=8)
        assert done(job, Generator.from_parts(*parts, task=task)).rows_before == 8
        assert job.output.read_bytes() == wanted
        job.output.unlink()


@pytest.mark.parametrize(
    ("changes", "found"),
    [
        ({"batch_size": 5}, "batch_size 4"),
        ({"options": {"max_new_tokens": 7}}, "max_new_tokens None"),
        ({"limit": 6}, "limit None"),
        ({"prefix": "x"}, "prefix "),
        ({"fields": {"document": "id"}}, "field document text"),
        ({}, "another input"),
        ({}, "another bundle"),
    ],
)
def test_with_other_arguments_it_does_not_go_on(
    tmp_path: Path, changes: dict[str, Any], found: str
) -> None:
    job = summaries(tmp_path)
    cut_off(job, fake())
    before = {path: path.read_bytes() for path in tmp_path.iterdir() if path != job.input}
    if found == "another input":
        job.input.write_text(job.input.read_text().replace("times", "tines"))
    other = replace(job, **changes)
    plan = plan_for(other, SUMMARIES)
    made = made_of(plan, "other" if found == "another bundle" else "fake")
    with pytest.raises(TargetError) as caught:
        Target.open(job.output, made, rows=plan.rows)
    assert caught.value.found == f"it was begun with {found}"
    assert "--force" in caught.value.do
    assert {path: path.read_bytes() for path in before} == before
    assert done(other, force=True).rows_before == 0


def test_what_was_begun_by_force_goes_on_without_it(tmp_path: Path) -> None:
    job = summaries(tmp_path)
    job.output.write_text("precious")
    plan = plan_for(job, SUMMARIES)
    target = Target.open(job.output, made_of(plan, "fake"), rows=plan.rows, force=True)
    with target.writing() as stream:
        target.add(stream, b"", 0)
    assert job.output.read_text() == "precious"
    done(job)
    assert len(lines_of(job.output)) == 11


def test_a_damaged_state_is_refused(tmp_path: Path) -> None:
    job = summaries(tmp_path)
    cut_off(job, fake(), after=8)
    partial, state = tmp_path / "out.jsonl.partial", tmp_path / "out.jsonl.partial.json"
    whole, kept = partial.read_bytes(), state.read_bytes()
    for damage in (
        lambda: partial.write_bytes(whole[:-1]),
        partial.unlink,
        lambda: job.output.write_text("came meanwhile"),
        lambda: state.write_bytes(kept[:-1]),
        lambda: state.write_bytes(kept.replace(b'"rows": 8', b'"rows": -8')),
        state.unlink,
    ):
        damage()
        with pytest.raises(TargetError):
            done(job)
        partial.write_bytes(whole)
        state.write_bytes(kept)
        job.output.unlink(missing_ok=True)
    assert done(job).rows_before == 8


def test_two_runs_never_write_one_output(tmp_path: Path) -> None:
    pytest.importorskip("fcntl")
    job = summaries(tmp_path)
    cut_off(job, fake())
    plan = plan_for(job, SUMMARIES)
    targets = [Target.open(job.output, made_of(plan, "fake"), rows=11) for _ in range(2)]
    with targets[0].writing() as stream:
        for force in (False, True):
            with pytest.raises(TargetError, match="another one that writes it"):
                done(job, force=force)
        targets[0].add(stream, b"x\n", 1)
    with pytest.raises(TargetError, match="went on with it"), targets[1].writing():
        pass


def test_a_table_that_shrinks_meanwhile_is_noticed(tmp_path: Path) -> None:
    job, long = summaries(tmp_path), {"note": "x" * 100_000}  # more than is read ahead
    lines = written(job.input, [row | long for row in ROWS]).read_bytes().splitlines(True)
    plan = plan_for(job, SUMMARIES)
    target = Target.open(job.output, made_of(plan, "fake"), rows=plan.rows)

    def progress(rows: int, _: int) -> None:
        if rows == 0:
            os.truncate(job.input, len(b"".join(lines[:6])))

    with pytest.raises(DataError, match=r"11 rows in .*found 6"):
        carry_out(fake(), plan, target, progress=progress)
    assert not job.output.exists()


# --- a process that is killed ---------------------------------------------------------------------

_CHILD = """
import sys, time
from pathlib import Path
import numpy as np
from gptrt.generator import Generator
from gptrt.run import Job, carry_out, made_of, plan_for
from gptrt.target import Target
from gptrt.task import Task
from gptrt.testing import FakeDecoder, byte_tokenizer

def noise(seen):
    time.sleep(0.0005)
    logits = np.random.default_rng(seen).standard_normal(257).astype(np.float32)
    logits[256] = -20
    return logits

task = Task("summarization", "{document}\\nIn short:", max_new_tokens=5)
generator = Generator.from_parts(FakeDecoder(noise, context=256), byte_tokenizer(), task=task)
job = Job(Path(sys.argv[1]), Path(sys.argv[2]), {"document": "text"}, batch_size=4)
plan = plan_for(job, task)
print("begins", flush=True)
target = Target.open(job.output, made_of(plan, "fake"), rows=plan.rows)
carry_out(generator, plan, target)
"""


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs kill -9")
def test_killed_at_random_moments_it_ends_with_the_same_file(tmp_path: Path) -> None:
    job = replace(summaries(tmp_path), input=written(tmp_path / "in.jsonl", ROWS * 8))
    done(job)
    wanted = job.output.read_bytes()
    job.output.unlink()
    chance, kills = random.Random(1), 0
    command = [sys.executable, "-c", _CHILD, str(job.input), str(job.output)]
    while not job.output.exists():
        with subprocess.Popen(command, stdout=subprocess.PIPE) as child:
            assert child.stdout is not None
            child.stdout.readline()
            time.sleep(chance.uniform(0.0, 0.12))
            if kills < 3:
                child.kill()
                kills += 1
            code = child.wait()
        assert code == 0 or not job.output.exists() or not names(tmp_path) - {"in.jsonl"}
    assert kills == 3
    assert job.output.read_bytes() == wanted
    assert names(tmp_path) == {"in.jsonl", "out.jsonl"}


def test_ctrl_c_says_how_to_go_on(tmp_path: Path, reviews: Path) -> None:
    source, output = written(tmp_path / "in.csv", ROWS * 12), tmp_path / "out.csv"
    words = ["run", str(reviews), "--input", str(source), "--output", str(output), "--threads", "1"]
    command = [sys.executable, "-W", "error", "-c", SLOW_GPTRT, *words]
    state = tmp_path / "out.csv.partial.json"
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as child:
        while not state.exists() or b'"rows": 0,' in state.read_bytes():
            assert child.poll() is None
            time.sleep(0.01)
        child.send_signal(signal.SIGINT)
        shown, complaint = (part.decode() for part in child.communicate())
    assert (child.returncode, shown) == (130, "")
    assert complaint.startswith("stopped after ")
    assert "of 132 rows: the same command, without --force, goes on from there" in complaint
    report = json.loads(asked(*words[1:6], "--json").stdout)
    assert report["rows"] == 132 and report["rows_before"] >= 8
    assert len(lines_of(output)) == 132


def test_progress_is_shown_to_a_terminal_and_to_nobody_else() -> None:
    from gptrt.console import RowProgress, duration

    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    with pytest.MonkeyPatch.context() as patch:
        for stream, shows in ((Terminal(), True), (io.StringIO(), False)):
            patch.setattr(sys, "stderr", stream)
            progress = RowProgress()
            for rows in (8, 16, 24):
                progress(rows, 1024)
            progress.clear()
            assert ("24 of 1,024 rows, " in stream.getvalue()) == shows
            assert (" left" in stream.getvalue()) == shows
    shown = [duration(seconds) for seconds in (0.04, 9.94, 59.6, 75, 3725)]
    assert shown == ["0.0 s", "9.9 s", "1:00", "1:15", "1:02:05"]
