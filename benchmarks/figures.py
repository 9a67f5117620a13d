"""The results as pictures: bars for the table, panels for the curves, the memory limit drawn in."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

from .peers import OURS
from .results import CURVE_NEW, DECODE_CONTEXT, DECODE_PROMPT, Results

_BITS_COLORS = {2: "navy", 4: "tab:blue", 8: "tab:cyan"}  # of ours; the others are grey
_LIMIT: dict[str, Any] = {"ls": "--", "color": "0.5", "label": "memory limit of gptrt int4"}
_OTHERS = ("tab:orange", "tab:red", "tab:green", "tab:brown", "tab:purple")


def draw_bars(results: Results, target: Path) -> None:
    """Decode speed of everyone, a panel a shape, with the lowest and the highest round."""
    shapes = results.tables
    counts = [len(list(results.entries_of(shape, "decode"))) for shape in shapes]
    figure, panels = canvas(7.5, 0.6 * len(shapes) + 0.27 * sum(counts), len(shapes), 1, counts)
    for shape, axes in zip(shapes, panels, strict=True):
        entries = list(results.entries_of(shape, "decode"))[::-1]
        values = [results.values(shape, e.who, "decode") for e in entries]
        middles = [median(v) for v in values]
        spread = [
            [m - min(v) for m, v in zip(middles, values, strict=True)],
            [max(v) - m for m, v in zip(middles, values, strict=True)],
        ]
        colors = [_BITS_COLORS.get(e.bits) if _is_ours(e.who) else "0.75" for e in entries]
        names = [e.who for e in entries]
        bars = axes.barh(names, middles, xerr=spread, color=colors, error_kw={"ecolor": "0.4"})
        axes.bar_label(bars, [f" {m:.0f}" for m in middles], label_type="edge", fontsize=8)
        axes.set_title(f"{shape}, random weights, {results.threads} threads", fontsize=9)
        axes.tick_params(labelsize=8)
        axes.spines[["top", "right"]].set_visible(False)
    panels[-1].set_xlabel("decode, tokens/s")
    figure.savefig(target, dpi=110)


def draw_curves(results: Results, target: Path) -> None:
    """Decode speed against context, batch and size."""
    drawn: list[tuple[str, Callable[[Any, Results], None]]] = [
        ("context", _draw_context),
        ("batch", _draw_batch),
        ("decode", _draw_sizes),
    ]
    drawn = [d for d in drawn if results.shapes(d[0]) and (d[0] != "decode" or _sized(results))]
    if not drawn:
        return
    figure, panels = canvas(4.2 * len(drawn), 3.6, 1, len(drawn))
    for axes, (_, draw) in zip(panels, drawn, strict=True):
        draw(axes, results)
        if axes.get_yscale() == "linear":
            axes.set_ylim(bottom=0)
        axes.set_ylabel("decode, tokens/s")
        axes.grid(alpha=0.3)
        axes.tick_params(labelsize=8)
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=6)
    figure.savefig(target, dpi=110)


def _draw_context(axes: Any, results: Results) -> None:
    _draw_lines(axes, results, "context")
    axes.set_xlabel("context, tokens (batch 1)")


def _draw_batch(axes: Any, results: Results) -> None:
    _draw_lines(axes, results, "batch")
    axes.set_xlabel("batch, rows")


def _draw_lines(axes: Any, results: Results, measure: str) -> None:
    """One line a runtime on the first shape, and the limit that ours at 4 bits has."""
    shape = results.shapes(measure)[0]
    points: list[int] = []
    entries = list(results.entries_of(shape, measure))
    for entry in entries:
        points = results.points(shape, entry.who, measure)
        values = [results.values(shape, entry.who, measure, x) for x in points]
        _line(axes, results, entry.who, points, values)
    if measure == "batch":
        limits = [_limit(results, shape, DECODE_PROMPT + CURVE_NEW / 2, n) for n in points]
    else:
        limits = [_limit(results, shape, n - CURVE_NEW / 2) for n in points]
    axes.plot(points, limits, **_LIMIT)
    axes.set_xscale("log", base=2)
    if measure == "batch":  # the limit soon leaves the picture: products take over
        everything = [v for e in entries for v in results.values(shape, e.who, measure)]
        _plain_log(axes)
        axes.set_ylim(0.7 * min(everything), 2 * max(everything))
    axes.set_xticks(points, [str(x) for x in points])
    axes.set_title(shape, fontsize=9)


def _draw_sizes(axes: Any, results: Results) -> None:
    shapes = _sized(results)
    sizes = [results.parameters[s] / 1e6 for s in shapes]
    everyone = [e.who for e in results.entries_of(shapes[0], "decode")]
    for who in everyone:
        values = [results.values(s, who, "decode") for s in shapes]
        if all(values):
            _line(axes, results, who, sizes, values)
    axes.plot(sizes, [_limit(results, s) for s in shapes], **_LIMIT)
    axes.set_xscale("log")
    _plain_log(axes)
    axes.set_xticks(sizes, [f"{size:.0f}" for size in sizes])
    axes.minorticks_off()
    axes.set_xlabel("size, millions of parameters (batch 1)")
    axes.set_title("model size", fontsize=9)


def _plain_log(axes: Any) -> None:
    """A logarithmic scale of speeds with numbers that people read."""
    axes.set_yscale("log", base=2)
    axes.yaxis.set_major_formatter("{x:.0f}")


def _sized(results: Results) -> list[str]:
    """Shapes of one family from small to large; none if there are fewer than two."""
    shapes = [s for s in results.shapes("decode") if s.startswith("gpt2")]
    shapes.sort(key=lambda s: results.parameters[s])
    return shapes if len(shapes) > 1 else []


def _limit(results: Results, shape: str, context: float = DECODE_CONTEXT, rows: int = 1) -> float:
    """Tokens/s if nothing cost time but reading weights and caches, of ours at 4 bits, once a
    step."""
    wanted = (shape, f"{OURS.name} int4")
    read = [e.read(context, rows) for e in results.entries if (e.shape, e.who) == wanted]
    return rows * results.bandwidth(shape) * 1e9 / read[0] if read else float("nan")


def _line(axes: Any, results: Results, who: str, x: list[Any], values: list[list[float]]) -> None:
    """Medians, with a band from the lowest to the highest round."""
    names = list(dict.fromkeys(e.who for e in results.entries if not _is_ours(e.who)))
    bits = next(e.bits for e in results.entries if e.who == who)
    color = _BITS_COLORS[bits] if _is_ours(who) else _OTHERS[names.index(who) % len(_OTHERS)]
    style = "o-" if _is_ours(who) else "s-"
    axes.plot(x, [median(v) for v in values], style, color=color, markersize=3, label=who)
    axes.fill_between(x, list(map(min, values)), list(map(max, values)), color=color, alpha=0.15)


def _is_ours(who: str) -> bool:
    return who.startswith(f"{OURS.name} ")


def canvas(
    width: float, height: float, rows: int, columns: int, heights: list[int] | None = None
) -> tuple[Any, list[Any]]:
    """A figure that needs no display, and its panels in a row or a column."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(rows, columns, squeeze=False, height_ratios=heights)
    return figure, list(panels.flat)
