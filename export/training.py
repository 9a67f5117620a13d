"""What `train` and `finetune` share: a run that goes on, and a run trained to its end."""

from __future__ import annotations

import sys
from pathlib import Path

import click
from click.core import ParameterSource

from gptrt.console import INTERRUPTED
from gptrt.errors import OptionError

from .console import interruptible, say
from .examples import TEST_TABLE
from .metrics import perplexity
from .progress import ProgressBar
from .runs import DATA_FOLDER, PLOT_FILE, Run, open_run
from .start import check_compiler, choose_device
from .task_metric import finish, task_metric
from .train import TrainResult, train

_TAKEN = {"out", "resume", "device", "max_steps", "max_time"}
_KEPT = {"preset", "kind", "start", "data"}  # what a run is of: the whole command may be repeated


def resumed(
    out: Path, device: str, max_steps: int | None = None, max_time: float | None = None
) -> Run:
    """The run in `out`, to go on as the command that is being carried out says: that its own limits
    and device are others from now on. Raises OptionError for an option that would change what it
    computes."""
    given = _given_options()
    if refused := [option for name, option in given.items() if name not in _TAKEN | _KEPT]:
        raise OptionError(
            "--resume with --device and limits alone, as a run keeps its settings",
            found=", ".join(refused),
            do="leave that out, or start another run",
        )
    run = open_run(out)
    if kept := [option for name, option in given.items() if name in _KEPT]:
        say(f"resuming {out}: {', '.join(kept)} are those that it was started with")
    on = choose_device(device if "device" in given else run.config.device)
    if run.config.train.compile:
        check_compiler(on)
    return run.continued(max_steps=max_steps, max_time=max_time, device=on)


def _given_options() -> dict[str, str]:
    """By the names of their parameters, the options that stand in the command."""
    context = click.get_current_context()
    return {
        parameter.name: parameter.opts[0]
        for parameter in context.command.params
        if parameter.name
        and context.get_parameter_source(parameter.name) is ParameterSource.COMMANDLINE
    }


def train_to_end(run: Run) -> None:
    """Train a run until a limit or Ctrl-C, by the metric of its task if it has one, and say how it
    ended."""
    with interruptible() as interrupted, ProgressBar("training") as bar:
        result = train(run, bar, interrupted, task_metric(run))
    if result.reason == "interrupted":
        command = "train" if run.config.task is None else "finetune"
        line = f"gptrt-export {command} --resume --out {run.path}"
        say(f"stopped at step {result.steps}; go on with: {line}")
        sys.exit(INTERRUPTED)
    if run.config.task is not None:
        finish(run)
    say(_ending(run, result))


def _ending(run: Run, result: TrainResult) -> str:
    parts = [f"{result.steps} steps in {result.seconds:.0f} s, ended by {result.reason}"]
    if (loss := result.best_loss) is None:
        parts.append("nothing validated")
    else:
        parts.append(f"best validation loss {loss:.4f}, perplexity {perplexity(loss):.2f}")
    if result.best_metric is not None:
        parts[-1] += f", {result.best_metric:.2f} by its own metric"
    parts.append(f"curves in {run.path / PLOT_FILE}")
    if run.config.task is not None:
        table = run.path / DATA_FOLDER / TEST_TABLE
        parts.append(f"examples that nothing was learnt from are in {table}")
    return "; ".join(parts)
