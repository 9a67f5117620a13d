"""Pictures of what people would rather see than read."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gptrt.format import StoredMatrix

if TYPE_CHECKING:
    from .sensitivity import Option


# What a log calls the loss of a step: the text's own, or with a share of something else.
LOSS, OBJECTIVE = "loss", "objective"


def plot_losses(log: Path, target: Path) -> None:
    """Training and validation loss of a run's log against steps, as a PNG; with a teacher, what is
    trained for in their place. Where prompts are part of that, it has an axis of its own; the
    metric of a task has a panel above. The first steps, where a loss falls from far above, do not
    set the scale."""
    lines = [json.loads(line) for line in log.read_text().splitlines() if line.endswith("}")]
    taught = any("valid_objective" in line for line in lines)
    judged = "valid_objective" if taught else "valid_loss"
    valid = [(line["step"], line[judged]) for line in lines if judged in line]
    metrics = [(line["step"], line["metric"]) for line in lines if "metric" in line]
    figure, axes = new_figure()
    if metrics:
        figure.clear()
        above, axes = figure.subplots(2, 1, sharex=True, height_ratios=(2, 3))
        _plot_metric(above, metrics)
    shown = "training (smoothed)" if taught else "objective (right, smoothed)"
    for what, name in ((LOSS, "training (smoothed)"), (OBJECTIVE, shown)):
        if steps := [(line["step"], line[what]) for line in lines if what in line]:
            x, y = zip(*steps, strict=True)
            own = axes if taught or what == LOSS else axes.twinx()
            own.plot(x, y, color="0.8", linewidth=0.8)
            own.plot(x, _smooth(y), color="tab:blue")
            _scale(own, steps)
            axes.plot([], [], color="tab:blue", label=name)
            if own is not axes:
                own.set_ylabel("objective")
                axes.set_zorder(own.get_zorder() + 1)
                axes.patch.set_visible(False)
    if valid:
        x, y = zip(*valid, strict=True)
        axes.plot(x, y, "o-", color="tab:orange", markersize=3, label="validation")
        best = (x[y.index(min(y))], min(y))
        axes.annotate(f"{min(y):.3f}", best, (0, -14), textcoords="offset points", ha="right")
        seen = OBJECTIVE if taught else LOSS
        train = [(line["step"], line[seen]) for line in lines if seen in line]
        _scale(axes, [*valid, *train])
    axes.ticklabel_format(axis="y", useOffset=False)
    axes.set_xlabel("step")
    axes.set_ylabel("objective (nats, divergences included)" if taught else "loss (nats a token)")
    if axes.get_legend_handles_labels()[0]:
        axes.legend()
    axes.grid(alpha=0.3)
    figure.savefig(target, dpi=120)


def _plot_metric(axes: Any, points: Sequence[tuple[int, float]]) -> None:
    x, y = zip(*points, strict=True)
    axes.plot(x, y, "o-", color="tab:green", markersize=3)
    axes.set_title(f"best metric {max(y):.2f} %, at step {x[y.index(max(y))]}", fontsize=10)
    axes.set_ylabel("metric (%)")
    axes.grid(alpha=0.3)


_EARLY = 0.05  # of the steps


def _scale(axes: Any, points: Sequence[tuple[int, float]]) -> None:
    """For the points behind the early ones, with room below for a number."""
    last = max(step for step, _ in points)
    late = [y for step, y in points if step >= _EARLY * last] or [y for _, y in points]
    room = max(late) - min(late) or 1.0
    axes.set_ylim(min(late) - 0.2 * room, max(late) + 0.1 * room)


def plot_sensitivity(
    options: Mapping[str, Sequence[Option]], chosen: Sequence[StoredMatrix], target: Path
) -> None:
    """What each matrix costs in each format, as dots on a logarithmic axis; a ring for the format
    that was chosen."""
    figure, axes = new_figure()
    figure.set_size_inches(7, 1.2 + 0.19 * len(options))
    rows = {name: -number for number, name in enumerate(options)}
    formats = dict.fromkeys(option.format for found in options.values() for option in found)
    floor = 1e-6
    for fmt in sorted(formats, key=lambda f: (f.bits, -f.block_size)):
        dots = [o for found in options.values() for o in found if o.format == fmt]
        x, y = [max(o.damage, floor) for o in dots], [rows[o.name] for o in dots]
        axes.plot(x, y, "o", markersize=4, label=f"{fmt.bits} bits, block {fmt.block_size}")
    x, y = [max(m.damage, floor) for m in chosen], [rows[m.name] for m in chosen]
    axes.plot(x, y, "o", color="black", fillstyle="none", markersize=8, label="chosen")
    axes.set_xscale("log")
    axes.set_yticks(list(rows.values()), list(rows), fontsize=6)
    axes.set_xlabel("damage of this matrix alone (KL, nats a token)")
    axes.legend(fontsize=7, loc="lower right")
    axes.grid(axis="x", alpha=0.3)
    figure.savefig(target, dpi=120)


def new_figure() -> tuple[Any, Any]:
    """A figure that needs no display and touches no global state of pyplot."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.add_subplot()


def _smooth(values: tuple[float, ...], weight: float = 0.95) -> list[float]:
    """Exponential moving average, started without bias."""
    smoothed, total, mass = [], 0.0, 0.0
    for value in values:
        total = weight * total + (1 - weight) * value
        mass = weight * mass + (1 - weight)
        smoothed.append(total / mass)
    return smoothed
