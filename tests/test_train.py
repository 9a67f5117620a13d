"""Training: exact resumption, checkpoints that survive, errors that say what to do."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

from export.averaging import Average
from export.checkpoint import load_checkpoint, run_pointer
from export.cli import main as gptrt_export
from export.data import Windows, open_ids, read_pieces, tokenize
from export.new_run import create_run
from export.progress import ProgressBar
from export.runs import Run, open_run
from export.start import plan_run
from export.tokenization import TokenizerConfig, train_tokenizer
from export.train import train
from gptrt.errors import TargetError, TrainingError

from .conftest import assert_refused, make_plan, run_cli, story
from .processes import start, wait_until

QUIET = ProgressBar("training", quiet=True)
ROOT = Path(__file__).parents[1]


def losses(run: Run) -> list[dict[str, float]]:
    """The log without what the clock decides."""
    lines = [json.loads(line) for line in run.log.read_text().splitlines()]
    return [{k: v for k, v in line.items() if k != "tok_s"} for line in lines]


@pytest.mark.parametrize(("optimizer", "average"), [("muon", 0.0), ("adamw", 0.8)])
def test_a_run_interrupted_and_resumed_gives_the_same_losses_bit_for_bit(
    text_file: Path, tmp_path: Path, optimizer: str, average: float
) -> None:
    plan = make_plan(text_file, grad_accum=2, average=average)
    kind = replace(plan.train.optimizer, kind=optimizer)
    plan = replace(plan, train=replace(plan.train, optimizer=kind))
    whole = create_run(tmp_path / "whole", plan)
    train(whole, QUIET)

    broken = create_run(tmp_path / "broken", plan)
    for steps, best, last in ((3, 3, 3), (4, 6, 7)):  # evaluated every 6: what has learnt is best
        countdown = iter([False] * (steps - 1) + [True])
        ended = train(open_run(broken.path), QUIET, partial(next, countdown))
        assert (ended.reason, ended.steps) == ("interrupted", last)
        pointer = {"best": f"step-{best:08}", "last": f"step-{last:08}"}
        assert run_pointer(broken.path) == pointer
    train(open_run(broken.path), QUIET)

    assert losses(broken) == losses(whole)  # nothing is evaluated out of turn
    for a, b in zip(whole.last()[0].state.values(), broken.last()[0].state.values(), strict=True):
        assert torch.equal(a, b)
    assert whole.last()[2].best_loss == broken.last()[2].best_loss
    steps = [line for line in losses(whole) if "loss" in line]
    rates = [line["lr"] for line in steps]
    assert 0 < rates[-1] < max(rates) <= kind.lr
    assert all(line["grad_norm"] > 0 for line in steps)


def test_a_mean_is_of_the_last_steps_and_leaves_what_learns_alone() -> None:
    learning = {"x": torch.zeros(2)}
    average = Average(learning, 0.5)
    for step in range(1, 101):
        learning["x"].fill_(step)
        average.update(step)
    with average.in_place():  # sum of n / 2 ** (101 - n)
        torch.testing.assert_close(learning["x"], torch.full((2,), 99.0))
    assert learning["x"].tolist() == [100, 100]


def test_what_a_run_saves_is_the_mean_where_one_is_kept(text_file: Path, tmp_path: Path) -> None:
    plan = make_plan(text_file, average=0.8)
    run = create_run(tmp_path / "run", plan)
    train(run, QUIET)
    checkpoint, moments, _ = run.last()
    latest = moments["latest/wte.weight"]
    assert not torch.equal(checkpoint.state["wte.weight"], latest)
    torch.testing.assert_close(checkpoint.state["wte.weight"], latest, atol=0.1, rtol=0.1)


def test_training_learns_and_leaves_a_log_a_picture_and_checkpoints(run: Run) -> None:
    valid = [line["valid_loss"] for line in losses(run) if "valid_loss" in line]
    assert valid[-1] < valid[0] < math.log(300)
    assert (run.path / "loss.png").read_bytes()[:4] == b"\x89PNG"
    assert set(run_pointer(run.path)) == {"best", "last"}
    assert load_checkpoint(run.path).lineage["steps"] == "60"


def test_a_loss_that_is_not_a_number_stops_and_keeps_the_last_checkpoint(
    text_file: Path, tmp_path: Path
) -> None:
    run = create_run(tmp_path / "run", make_plan(text_file, eval_every=3))
    train(run.continued(max_steps=3), QUIET)
    before = run_pointer(run.path)
    ids = np.fromfile(run.train_ids, "<u4")
    checkpoint, moments, state = run.last()
    checkpoint.state["wte.weight"][ids[0]] = math.nan
    from export import runs

    class Poisoned(runs.Run):
        def last(self):  # type: ignore[no-untyped-def]
            return checkpoint, moments, state

    with pytest.raises(TrainingError, match=r"finite loss.*nan at step"):
        train(Poisoned(run.path, run.config), QUIET)
    assert run_pointer(run.path) == before
    assert all(t.isfinite().all() for t in load_checkpoint(run.path).state.values())


def test_a_loss_whose_perplexity_no_float_holds_is_told(text_file: Path, tmp_path: Path) -> None:
    plan = make_plan(text_file, max_steps=1, warmup_steps=0)
    wild = replace(plan.train.optimizer, lr=10.0)
    run = create_run(tmp_path / "run", replace(plan, train=replace(plan.train, optimizer=wild)))
    loss = train(run, QUIET).best_loss
    assert loss is not None and 710 < loss < math.inf
    assert load_checkpoint(run.path).lineage["validation_perplexity"] == "inf"


def test_a_disk_without_room_is_told_and_keeps_the_last_checkpoint(
    run: Run, tmp_path: Path
) -> None:
    resource = pytest.importorskip("resource")
    out = Path(shutil.copytree(run.path, tmp_path / "run"))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, hard))  # bytes of any file
        ended = run_cli(gptrt_export, "train", "--resume", "--out", out, "--max-steps", 61)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert ended.exit_code == 2
    assert "model.safetensors" in ended.stderr and "has room" in ended.stderr.splitlines()[-1]
    assert run_pointer(out) == run_pointer(run.path)
    assert not list(out.glob(".step-*"))


def test_moments_that_are_damaged_or_gone_are_refused(run: Run, tmp_path: Path) -> None:
    out = Path(shutil.copytree(run.path, tmp_path / "run"))
    moments = open_run(out).last_folder / "optimizer.safetensors"
    for damage in (lambda: moments.write_bytes(moments.read_bytes()[:999]), moments.unlink):
        damage()
        ended = run_cli(gptrt_export, "train", "--resume", "--out", out, "--max-steps", 61)
        assert_refused(ended, "optimizer.safetensors")


def test_a_compiled_model_learns_the_same(
    text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Traced as for a compiler, which need not be there: PyTorch's own kernels run what was traced.
    asked = []
    traced = partial(torch.compile, backend="aot_eager")
    monkeypatch.setattr(torch, "compile", lambda f, **how: asked.append(f) or traced(f, **how))
    plan = make_plan(text_file, dropout=0.0, max_steps=6)
    found = []
    for compiled in (False, True):
        made = replace(plan, train=replace(plan.train, compile=compiled))
        trained = create_run(tmp_path / str(compiled), made)
        train(trained, QUIET)
        found.append([line["loss"] for line in losses(trained) if "loss" in line])
    assert found[1] == pytest.approx(found[0], rel=1e-4)
    assert [f.__name__ for f in asked] == ["hidden"]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of PyTorch, about itself
def test_what_cannot_be_compiled_is_refused(
    run: Run, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CXX", str(tmp_path / "none"))
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))
    out = tmp_path / "run"
    asked = ("train", "--data", text_file, "--set", "compile=true", "--out", out)
    none = run_cli(gptrt_export, *asked, "--preset", "nano-char")
    assert_refused(none, "compiler", "compile=true")
    rounding = run_cli(gptrt_export, *asked, "--from", run.path, "--quantize", "int4")
    assert_refused(rounding, "compile=true", "--quantize")
    assert not out.exists()
    create_run(out, make_plan(text_file, compile=True))
    elsewhere = run_cli(gptrt_export, "train", "--resume", "--out", out)
    assert_refused(elsewhere, "compiler", "compile=true")


def test_a_run_is_judged_by_all_of_its_held_out_texts(
    run: Run, text_file: Path, tmp_path: Path
) -> None:
    strange = tmp_path / "strange.txt"
    strange.write_text("Zq 7x! " * 2000)
    settings = {"eval_tokens": "512", "batch_size": "2", "max_steps": "0"}
    found = []
    for name, held_out in (("one", [text_file]), ("two", [text_file, strange])):
        plan = plan_run(None, run.path, [text_file], held_out, "cpu", settings)
        found.append(train(create_run(tmp_path / name, plan), QUIET).best_loss)
    assert found[1] > 2 * found[0]


def test_validation_that_no_longer_gains_ends_the_run(text_file: Path, tmp_path: Path) -> None:
    plan = make_plan(text_file, eval_every=1, patience=2, max_steps=50, warmup_steps=0)
    frozen = replace(plan.train.optimizer, lr=0.0, matrix_lr=0.0)
    run = create_run(tmp_path / "run", replace(plan, train=replace(plan.train, optimizer=frozen)))
    result = train(run, QUIET)
    assert (result.reason, result.steps) == ("patience", 3)


def test_kill_9_at_any_moment_leaves_a_checkpoint_that_resumes(
    text_file: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    create_run(out, make_plan(text_file, eval_every=1, max_steps=100_000))
    for delay in (0.05, 0.3, 0.7):
        before = run_pointer(out)
        steps = open_run(out).last()[2].step
        process = start("train", "--resume", "--out", out, errors=tmp_path / "errors")
        wait_until(process, lambda before=before: run_pointer(out) != before)
        time.sleep(delay)
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL
        checkpoint, _, state = open_run(out).last()
        assert state.step > steps
        assert all(tensor.isfinite().all() for tensor in checkpoint.state.values())
    result = train(open_run(out).continued(max_steps=state.step + 2), QUIET)
    assert result.steps == state.step + 2


def test_a_resumed_run_keeps_its_settings_and_takes_other_limits_for_good(
    text_file: Path, tmp_path: Path
) -> None:
    run = create_run(tmp_path / "run", make_plan(text_file))
    go_on = ("train", "--out", run.path, "--resume")
    done = run_cli(gptrt_export, *go_on, "--max-steps", 0)
    assert "0 steps" in done.stderr and "nothing validated" in done.stderr
    repeated = ("--preset", "nano-char", "--data", text_file)
    done = run_cli(gptrt_export, *go_on, *repeated, "--max-steps", 2)
    assert done.exit_code == 0, done.output
    assert "--preset, --data are those that it was started with" in done.stderr
    assert open_run(run.path).last()[0].config == run.config.model
    assert run_cli(gptrt_export, *go_on, "--max-time", 1e5).exit_code == 0
    kept = open_run(run.path).config
    assert kept == replace(run.config, train=replace(run.config.train, max_steps=2, max_time=1e5))
    recipe = ("--block-size", 64, "--head-bits", 2, "--no-projection")
    for words, *options in (
        ("--block-size, --head-bits, --projection", *recipe),
        ("--set", "--set", "dropout=0"),
        ("--tokenizer", "--tokenizer", tmp_path),
    ):
        assert_refused(run_cli(gptrt_export, *go_on, *options), f"found {words};")
    tuning = ("finetune", "--out", run.path, "--resume", "--class-weights", "none", "--epochs", 2)
    assert_refused(run_cli(gptrt_export, *tuning), "--class-weights, --epochs")
    assert_refused(run_cli(gptrt_export, *go_on, "--max-time", "nan"), "max_time", "correct")
    assert open_run(run.path).config == kept


@pytest.mark.skipif(torch.cuda.is_available(), reason="a machine without a card is asked for")
def test_a_run_that_was_begun_on_a_card_goes_on_without_one(
    text_file: Path, tmp_path: Path
) -> None:
    run = create_run(tmp_path / "run", replace(make_plan(text_file, max_steps=1), device="cuda"))
    go_on = ("train", "--out", run.path, "--resume")
    for options in ((), ("--device", "cuda")):
        assert_refused(run_cli(gptrt_export, *go_on, *options), "CUDA", "--device cpu")
    for options in (("--device", "cpu"), ()):
        done = run_cli(gptrt_export, *go_on, *options)
        assert done.exit_code == 0, done.output
    assert open_run(run.path).last()[2].step == 1


def test_a_run_is_trained_by_one_process_and_rid_of_what_a_killed_one_left(
    text_file: Path, tmp_path: Path
) -> None:
    run = create_run(tmp_path / "run", make_plan(text_file, max_steps=1))
    half = run.path / ".step-00000009.1234abcd.partial"
    half.mkdir()
    with run.alone():
        busy = run_cli(gptrt_export, "train", "--resume", "--out", run.path)
    assert_refused(busy, f"{run.path} for this run alone")
    assert half.exists() and not run.log.exists()
    train(run, QUIET)
    assert not half.exists()


def test_ctrl_c_saves_and_says_how_to_go_on(text_file: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    create_run(out, make_plan(text_file, eval_every=10_000, max_steps=100_000))
    process = start("train", "--resume", "--out", out, errors=tmp_path / "errors")
    wait_until(process, (out / "log.jsonl").exists)
    time.sleep(0.5)
    assert process.pid is not None
    os.kill(process.pid, signal.SIGINT)
    process.join(60)
    errors = (tmp_path / "errors").read_text()
    assert process.exitcode == 130
    assert f"gptrt-export train --resume --out {out}" in errors
    assert open_run(out).last()[2].step > 0
    # It takes as long as the rest of PyTorch, and nothing here needs it.
    assert "compiler imported: False" in errors


# --- data -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    [
        story(60) + "\n\n  “Curly” and naïve — 漢字!\r\n" + story(20),
        story(20).replace(" ", "\n") + "one  word\n  a line\r\n\r\n" + "漢字かな" * 20 + story(2),
    ],
)
def test_ids_of_a_file_read_in_pieces_are_those_of_the_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str
) -> None:
    path = tmp_path / "text.txt"
    path.write_bytes(text.encode())
    tokenizer = train_tokenizer(TokenizerConfig("bpe", 300), [text])
    monkeypatch.setattr("export.data._PIECE", 97)
    pieces = list(read_pieces(path))
    assert "".join(pieces) == text
    assert max(map(len, pieces)) <= 3 * 97
    end = tokenizer.token_to_id("<|endoftext|>")
    count, _ = tokenize([path], tokenizer, tmp_path / "ids.bin", end=end)
    ids = open_ids(tmp_path / "ids.bin").tolist()
    assert ids == [*tokenizer.encode(text).ids, end]
    assert count == len(ids)


def test_text_in_which_nothing_parts_words_is_never_held_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = "漢字かな" * 200
    path = tmp_path / "text.txt"
    path.write_text(text, encoding="utf-8")
    monkeypatch.setattr("export.data._PIECE", 97)
    pieces = list(read_pieces(path))
    assert "".join(pieces) == text
    assert max(map(len, pieces)) <= 2 * 97


def test_held_out_ids_are_not_trained_on(tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_text(story(50))
    tokenizer = train_tokenizer(TokenizerConfig("char"), [story(50)])
    count, held = tokenize([path], tokenizer, tmp_path / "ids.bin", end=None, held_out=0.1)
    train_ids = open_ids(tmp_path / "ids.bin")
    assert len(train_ids) == count
    assert [*train_ids.tolist(), *held.tolist()] == tokenizer.encode(story(50)).ids
    assert len(held) == len(story(50)) // 10


def test_an_epoch_shows_every_window_once_and_the_next_in_another_order() -> None:
    windows = Windows(np.arange(1000, dtype=np.uint32), 10, seed=1)
    epochs = [windows.batch(step, windows.per_epoch) for step in (0, 1)]
    for epoch in epochs:
        starts = sorted(epoch[:, 0].tolist())
        assert np.diff(starts).tolist() == [10] * (windows.per_epoch - 1)
        assert (np.diff(epoch, axis=1) == 1).all()
    assert epochs[0][:, 0].tolist() != epochs[1][:, 0].tolist()


def test_a_tokenizer_that_cuts_texts_and_fills_them_up_reads_them_whole(
    run: Run, text_file: Path, tmp_path: Path
) -> None:
    source, counts = tmp_path / "model", []
    shutil.copytree(run.last_folder, source)
    written = json.loads((source / "tokenizer.json").read_text())
    cut = {"direction": "Right", "max_length": 16, "strategy": "LongestFirst", "stride": 0}
    filled = {"strategy": {"Fixed": 9999}, "direction": "Right", "pad_to_multiple_of": None}
    filled |= {"pad_id": 0, "pad_type_id": 0, "pad_token": "<|endoftext|>"}
    for name, setting in (
        ("plain", {}),
        ("cut", {"truncation": cut}),
        ("filled", {"padding": filled}),
    ):
        (source / "tokenizer.json").write_text(json.dumps(written | setting))
        plan = plan_run(None, source, [text_file], [], "cpu", {"seq_len": "32"})
        made = create_run(tmp_path / name, plan)
        counts.append((len(open_ids(made.train_ids)), len(open_ids(made.valid_ids))))
    assert counts[0] == counts[1] == counts[2]
    assert sum(counts[0]) > 1000


def test_a_vocabulary_has_a_row_for_every_id_also_where_ids_have_gaps(
    text_file: Path, tmp_path: Path
) -> None:
    words = sorted({*story(50).split(), "<|endoftext|>"})
    written = {"version": "1.0", "added_tokens": [], "pre_tokenizer": {"type": "WhitespaceSplit"}}
    vocabulary = {word: 3 * n for n, word in enumerate(words)}
    written["model"] = {"type": "WordLevel", "vocab": vocabulary, "unk_token": words[0]}
    (tmp_path / "tokenizer.json").write_text(json.dumps(written))
    result = run_cli(
        *(gptrt_export, "train", "--preset", "nano-char", "--data", text_file),
        *("--tokenizer", tmp_path / "tokenizer.json", "--out", tmp_path / "run"),
        *("--set", "seq_len=32", "--max-steps", 1, "--device", "cpu"),
    )
    assert result.exit_code == 0, result.output
    assert load_checkpoint(tmp_path / "run").config.vocab_size == 3 * len(words) - 2


def test_gpt2_style_merges_and_vocabulary_make_a_tokenizer(tmp_path: Path) -> None:
    from export.tokenization import open_tokenizer

    trained = train_tokenizer(TokenizerConfig("bpe", 320), [story()])
    trained.model.save(str(tmp_path))  # vocab.json and merges.txt
    rebuilt = open_tokenizer(tmp_path)
    text = "The wise king – naïve, 7 birds!\n"
    assert rebuilt.encode(text).ids == trained.encode(text).ids
    assert rebuilt.decode(rebuilt.encode(text).ids) == text


def test_a_trained_vocabulary_is_in_the_order_of_how_often_the_texts_have_its_tokens() -> None:
    """Of a text as a whole, which is too long to be looked at whole."""
    texts = [story(4)] * 100 + [story(2) + " zebra" * 40] * 100
    tokenizer = train_tokenizer(TokenizerConfig("bpe", 320), texts)
    ids = tokenizer.encode("".join(texts)).ids
    counts = np.bincount(ids, minlength=320)
    assert tokenizer.id_to_token(0) == "<|endoftext|>"
    assert counts.argmax() == 1 == tokenizer.token_to_id("Ġzebra")
    seen = np.flatnonzero(counts)
    assert seen.tolist() == list(range(1, len(seen) + 1))
    assert np.all(counts[seen[1:]] <= 2 * counts[seen[:-1]])  # a sample decides between equals
    assert tokenizer.decode(tokenizer.encode("naïve — 漢字!\n").ids) == "naïve — 漢字!\n"


# --- wrong input --------------------------------------------------------------------------------


def test_wrong_input_to_train_is_refused_and_writes_nothing(
    run: Run, text_file: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    binary = tmp_path / "binary.txt"
    binary.write_bytes(b"abc \xff\xfe def")
    empty = tmp_path / "empty.txt"
    empty.write_text("")
    odd = tmp_path / "odd.json"
    odd.write_text(
        run_cli(gptrt_export, "presets", "nano-char").stdout.replace("n_layer", "n_layers")
    )
    short = tmp_path / "short.txt"  # long enough to train on, not to hold a tenth out
    short.write_text(story(5)[:350])
    taken = tmp_path / "taken"
    taken.mkdir()
    (taken / "mine.txt").write_text("mine")
    base = ("train", "--out", out)
    nano = ("--preset", "nano-char")
    refusals = [
        ((*base, *nano, "--data", tmp_path / "nothing"), "no file or folder"),
        ((*base, "--preset", "huge", "--data", text_file), "nano-char"),
        ((*base, "--preset", tmp_path / "none.json", "--data", text_file), "none.json"),
        ((*base, "--preset", odd, "--data", text_file), "model.n_layers"),
        ((*base, "--data", text_file), "--preset"),
        ((*base, *nano), "--data"),
        ((*base, *nano, "--data", binary), "UTF-8"),
        ((*base, *nano, "--data", empty), "text"),
        ((*base, *nano, "--data", short), "more than 64 tokens"),
        ((*base, *nano, "--data", text_file, "--device", "cuda"), "CUDA")
        if not torch.cuda.is_available()
        else ((*base, *nano), "--data"),
        ((*base, *nano, "--data", text_file, "--set", "dropout=7"), "dropout"),
        ((*base, *nano, "--data", text_file, "--set", "speed=7"), "speed"),
        ((*base, *nano, "--data", text_file, "--set", "seq_len=128"), "at most 64"),
        ((*base, "--from", run.path, "--data", text_file, "--set", "seq_len=65"), "at most 64"),
        ((*base, *nano, "--data", text_file, "--set", "prompt_share=0.5"), "prompt_share"),
        ((*base, *nano, "--data", text_file, "--set", "optimizer.beta1=1"), "beta1"),
        ((*base, "--from", tmp_path / "nothing", "--data", text_file), "checkpoint"),
        ((*base, *nano, "--data", text_file, "--tokenizer", tmp_path), "tokenizer.json"),
        (("train", "--out", taken, *nano, "--data", text_file), "there already"),
        (("train", "--resume", "--out", out), "nothing to resume"),
    ]
    for arguments, word in refusals:
        assert_refused(run_cli(gptrt_export, *arguments), word)
        assert not out.exists(), arguments
        assert not list(tmp_path.glob(".*")), arguments
    assert (taken / "mine.txt").read_text() == "mine"


def test_a_preset_of_ones_own_is_trained(text_file: Path, tmp_path: Path) -> None:
    preset = json.loads(run_cli(gptrt_export, "presets", "nano-char").stdout)
    preset["model"] |= {"n_layer": 1, "n_embd": 32, "n_inner": 48}
    preset["train"] |= {"seq_len": 32, "max_steps": 2, "eval_tokens": 64}
    (tmp_path / "mine.json").write_text(json.dumps(preset))
    given = ("--preset", tmp_path / "mine.json", "--data", text_file)
    result = run_cli(gptrt_export, "train", *given, "--out", tmp_path / "run")
    assert result.exit_code == 0, result.output
    shape = open_run(tmp_path / "run").config.model
    assert (shape.n_layer, shape.n_embd, shape.n_inner) == (1, 32, 48)


def test_what_comes_to_stand_in_the_way_of_a_run_is_kept(text_file: Path, tmp_path: Path) -> None:
    mine = tmp_path / "run" / "thesis.txt"

    def progress(_share: float, _note: str) -> None:
        mine.parent.mkdir(exist_ok=True)
        mine.write_text("mine")

    with pytest.raises(TargetError, match="run"):
        create_run(mine.parent, make_plan(text_file), progress)
    assert mine.read_text() == "mine"
    assert list(tmp_path.iterdir()) == [mine.parent]
