"""The results as Markdown: one table a model, ratios to peers, the settings of everyone."""

from __future__ import annotations

from collections.abc import Iterator
from statistics import median

from .peers import OURS
from .results import Entry, Results

_COLUMNS = (  # heading, measure, x, format
    ("decode tok/s", "decode", None, ".0f"),
    ("prefill 32", "prefill", 32, ".0f"),
    ("prefill 512", "prefill", 512, ".0f"),
    ("cold start s", "cold", None, ".2f"),
    ("load s", "load", None, ".2f"),
    ("peak MB", "memory", None, ".0f"),
)


README_MARKS = ("<!-- speeds -->", "<!-- /speeds -->")


def report(results: Results) -> str:
    """All of it."""
    parts = [_heading(results)]
    parts += [_table(results, shape) for shape in results.tables]
    parts += [_curve(results, measure) for measure in ("context", "batch")]
    parts += [_sizes(results), _perplexities(results), _settings(results)]
    parts += results.skipped
    return "\n\n".join(part for part in parts if part) + "\n"


def _heading(results: Results) -> str:
    named = (f"{name} {number}" for v in results.versions.values() for name, number in v.items())
    versions = ", ".join(dict.fromkeys(named))
    lines = [
        f"{results.machine}, {results.threads} threads; {results.date}; {versions}. Medians over "
        "interleaved rounds, lowest to highest in brackets. "
        "Cold start: a fresh process up to its first token, the files in the page cache."
    ]
    if results.shapes("bandwidth"):
        read = (f"{results.bandwidth(s):.1f} ({s})" for s in results.shapes("bandwidth"))
        lines.append(
            f"This machine read memory, in GB/s, at {', '.join(read)}; the share of that limit is "
            "tokens/s times the bytes that a step reads over it: those of the model, and of the "
            "cache at its mean length."
        )
    return "\n".join(lines)


def _table(results: Results, shape: str) -> str:
    # Runs drawn together need not have measured the same of everyone.
    found = (e for m in ("decode", "load") for e in results.entries_of(shape, m))
    entries = list({e.who: e for e in found}.values())
    columns = [
        c for c in _COLUMNS if any(results.values(shape, e.who, c[1], c[2]) for e in entries)
    ]
    headings = ["runtime", *(c[0] for c in columns), "disk MB", "share of limit"]
    rows = []
    for entry in entries:
        cells = [_cell(results.values(shape, entry.who, m, x), f) for _, m, x, f in columns]
        rows.append([entry.who, *cells, f"{entry.bytes / 1e6:.1f}", _share(results, entry)])
    parts = [
        f"### {shape}, random weights, batch 1",
        "",
        *_markdown(headings, rows),
        "",
        *_ratios(results, shape),
    ]
    return "\n".join(parts).rstrip()


def into_readme(results: Results, text: str) -> str:
    """The README with the medians of the first shape between its two marks."""
    shape = results.tables[0]
    columns = [c for c in _COLUMNS if c[0] not in ("prefill 32", "load s")]
    rows = []
    for entry in results.entries_of(shape, "decode"):
        found = (results.values(shape, entry.who, m, x) for _, m, x, _ in columns)
        cells = [f"{median(v):{c[3]}}" if v else "" for v, c in zip(found, columns, strict=True)]
        rows.append([entry.who, *cells, f"{entry.bytes / 1e6:.1f}"])
    found = (results.by_round(shape, e.who, "decode") for e in results.entries_of(shape, "decode"))
    rounds = max(map(len, found))
    versions = (f"{name} {number}" for v in results.versions.values() for name, number in v.items())
    lines = [
        f"{shape}, random weights, batch 1, {results.threads} threads of an {results.machine}; "
        f"medians of {rounds} interleaved rounds; {results.date}; "
        f"{', '.join(dict.fromkeys(versions))}.",
        "",
        *_markdown(["runtime", *(c[0] for c in columns), "disk MB"], rows),
    ]
    for name in results.tables:
        if ratios := [f"- {line.strip()}" for line in _ratios(results, name)]:
            lines += ["", f"On {name}:", "", *ratios]
    before, _, rest = text.partition(README_MARKS[0])
    _, _, after = rest.partition(README_MARKS[1])
    return "\n".join([before + README_MARKS[0], "", *lines, "", README_MARKS[1] + after])


def _cell(values: list[float], form: str) -> str:
    if not values:
        return ""
    return f"{median(values):{form}} ({min(values):{form}} to {max(values):{form}})"


def _share(results: Results, entry: Entry) -> str:
    speeds = results.values(entry.shape, entry.who, "decode")
    limit = results.bandwidth(entry.shape) * 1e9 / entry.read()
    return f"{median(speeds) / limit:.0%}" if speeds else ""


def _ratios(results: Results, shape: str) -> Iterator[str]:
    """Each of ours beside every peer of as many bits, by the rounds that both were in."""
    entries = list(results.entries_of(shape, "decode"))
    ours = [e for e in entries if e.who.startswith(f"{OURS.name} ")]
    for own in ours:
        pairs = []
        for other in (e for e in entries if e not in ours and e.bits == own.bits):
            mine, theirs = (results.by_round(shape, e.who, "decode") for e in (own, other))
            if ratios := [mine[n] / theirs[n] for n in mine.keys() & theirs.keys()]:
                pairs.append(f"{median(ratios):.2f} {other.who}")
        if pairs:
            yield f"Decode, {own.who} as a multiple of: {', '.join(pairs)}.\n"


def _curve(results: Results, measure: str) -> str:
    """Medians of tokens/s at every point of a curve."""
    parts = []
    for shape in results.shapes(measure):
        entries = list(results.entries_of(shape, measure))
        points = sorted({x for e in entries for x in results.points(shape, e.who, measure)})
        rows = [
            [e.who, *(_median(results.values(shape, e.who, measure, x)) for x in points)]
            for e in entries
        ]
        title = f"### {shape}, decode tok/s against {measure}"
        parts.append("\n".join([title, "", *_markdown(["runtime", *map(str, points)], rows)]))
    return "\n\n".join(parts)


def _median(values: list[float]) -> str:
    return f"{median(values):.0f}" if values else ""


def _sizes(results: Results) -> str:
    """Decode speed and the share of the limit on every shape that has a curve."""
    shapes = sorted(results.shapes("decode"), key=lambda s: results.parameters[s])
    if len(shapes) < 2:
        return ""
    everyone = dict.fromkeys(e.who for s in shapes for e in results.entries_of(s, "decode"))
    entries = {(e.shape, e.who): e for e in results.entries}
    rows = []
    for who in everyone:
        cells = []
        for shape in shapes:
            speeds = results.values(shape, who, "decode")
            share = _share(results, entries[shape, who]) if speeds else ""
            cells.append(f"{_median(speeds)} ({share})" if speeds else "")
        if all(cells) or sum(map(bool, cells)) > 2:
            rows.append([who, *cells])
    headings = ["runtime", *(f"{s} ({results.parameters[s] / 1e6:.0f} M)" for s in shapes)]
    title = "### Decode tok/s against size, share of the memory limit in brackets"
    return "\n".join([title, "", *_markdown(headings, rows)]) if rows else ""


def _perplexities(results: Results) -> str:
    parts = []
    for shape in results.shapes("perplexity"):
        entries = list(results.entries_of(shape, "perplexity"))
        found = {e.who: results.values(shape, e.who, "perplexity")[-1] for e in entries}
        reference = next((found[e.who] for e in entries if e.bits == 32), None)
        rows = [
            [
                e.who,
                f"{e.bytes / 1e6:.2f}",
                f"{found[e.who]:.3f}",
                f"{found[e.who] / reference:.4f}" if reference else "",
            ]
            for e in entries
        ]
        tokens = results.points(shape, entries[0].who, "perplexity")[0]
        title = f"### {shape}, perplexity on {tokens:,} tokens, the same ids in the same windows"
        heading = ["runtime", "disk MB", "perplexity", "of fp32"]
        parts.append("\n".join([title, "", *_markdown(heading, rows)]))
    return "\n\n".join(parts)


def _settings(results: Results) -> str:
    """What everyone was given; `threads` is the same for all."""
    lines: dict[str, None] = {}
    for e in results.entries:
        given = ", ".join(f"{key} {value}" for key, value in e.settings.items())
        lines.setdefault(f"- {e.who}: {given or 'its defaults'}", None)
    return "\n".join(["### Settings", "", *lines])


def _markdown(headings: list[str], rows: list[list[str]]) -> list[str]:
    lines = [headings, ["---"] * len(headings), *rows]
    return [f"| {' | '.join(cells)} |" for cells in lines]
