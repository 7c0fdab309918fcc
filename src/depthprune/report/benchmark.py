"""The report of a benchmark: a pruned model beside the one that it came from, load by load."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.figure import Figure
from rich.table import Table

from depthprune.plotting import BLUE, GREY, legend, new_figure, tidy
from depthprune.report.markdown import escaped
from depthprune.report.markdown import table as markdown_table

PAIR = ("against", "model")
COLUMNS = (
    ("first token, ms", "first_token"),
    ("prefill, tokens/s", "prefill"),
    ("decode, tokens/s", "decode"),
)
"""What is timed, with its unit."""

SIDE_BY_SIDE = 4  # loads; of more the panels stand one above the other


def spread(values: Sequence[float]) -> tuple[float, float, float]:
    """Lower quartile, median and upper quartile."""
    if len(values) == 1:
        return values[0], values[0], values[0]
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, middle, high


def rates(row: Mapping[str, Any], side: str, name: str) -> list[float]:
    """One figure of each repeat: milliseconds to the first token, or tokens per second.

    Args:
        row: a load and what it took.
        side: ``"model"`` or ``"against"``.
        name: of :data:`COLUMNS`.
    """
    found, load = row[side], row["load"]
    if name == "first_token":
        return [1000 * seconds for seconds in found["first_token"]]
    seconds = found["first_token"] if name == "prefill" else found["writing"]
    tokens = load["batch_size"] * load["prompt_tokens" if name == "prefill" else "new_tokens"]
    return [tokens / each for each in seconds]


def ratios(row: Mapping[str, Any], name: str) -> list[float]:
    """How many times as fast the model is, turn by turn."""
    pairs = zip(rates(row, "model", name), rates(row, "against", name), strict=True)
    return [one / other for one, other in pairs]


def benchmark_figure(content: Mapping[str, Any]) -> Figure:
    """Tokens per second of both models by load: medians with quartiles, and the median of the paired ratios."""
    rows = content["rows"]
    is_wide = len(rows) > SIDE_BY_SIDE
    figure = new_figure(6.4 if is_wide else 3.6)
    panels = figure.subplots(*((2, 1) if is_wide else (1, 2)))
    for axes, (title, name) in zip(panels, COLUMNS[1:], strict=True):
        for shift, side, colour in ((-0.2, "against", GREY), (0.2, "model", BLUE)):
            found = [spread(rates(row, side, name)) for row in rows]
            bars = [[middle - low for low, middle, _ in found], [high - middle for _, middle, high in found]]
            places = [place + shift for place in range(len(rows))]
            label = "pruned" if side == "model" else "unpruned"
            axes.bar(places, [middle for _, middle, _ in found], 0.38, color=colour, label=label)
            axes.errorbar(places, [middle for _, middle, _ in found], bars, fmt="none", ecolor="black", capsize=3, lw=1)
        for place, row in enumerate(rows):
            top = max(spread(rates(row, side, name))[2] for side in PAIR)
            axes.annotate(
                f"{statistics.median(ratios(row, name)):.2f}×",
                (place, top),
                xytext=(0, 3),
                textcoords="offset points",
                ha="center",
                fontsize=7.5 if is_wide else 9,
            )
        names = [f"{row['load']['batch_size']} × {row['load']['prompt_tokens']}" for row in rows]
        axes.set_xticks(range(len(rows)), names, rotation=90 if is_wide else 0)
        axes.set_xlabel("sequences × tokens of the prompt", fontsize=9.5)
        axes.margins(y=0.14)
        tidy(axes, title.split(",")[0], ylabel="tokens per second")
    legend(figure, panels[:1])
    return figure


def benchmark_report(content: Mapping[str, Any]) -> str:
    """The results as Markdown.

    Args:
        content: of benchmark.json.
    """
    config, repeats = content["config"], content["config"]["repeats"]
    header = ["batch", "prompt", "written"]
    for title, _ in COLUMNS:
        header += [title, "unpruned", "ratio"]
    timed = [[*_load(row), *(cell for _, name in COLUMNS for cell in _timed(row, name))] for row in content["rows"]]
    memory = [
        [*_load(row), *(_bytes(row[side][name]) for name in ("cache_bytes", "working_bytes") for side in PAIR[::-1])]
        for row in content["rows"]
    ]
    sizes = content["weights"]
    return (
        "\n\n".join(
            [
                f"# {escaped(config['model'])} beside {escaped(config['against'])}",
                f"Parameters: {sizes['model']['parameters']:,} of {sizes['against']['parameters']:,}; bytes of "
                f"weights: {sizes['model']['bytes']:,} of {sizes['against']['bytes']:,}. Both models did the same by "
                f"turns, {repeats} times after one that does not count ({escaped(content['machine'])}).",
                "![Tokens per second by load](benchmark.png)",
                "Medians, with quartiles in brackets; the ratio is that of each turn's pair.",
                markdown_table(header, timed, words=0),
                "Memory: keys and values for a token of a sequence, and the most that was allocated at once beside the "
                "weights (the cache among it).",
                markdown_table(
                    ["batch", "prompt", "written", "cache, B/token", "unpruned", "working, B", "unpruned"],
                    memory,
                    words=0,
                ),
            ]
        )
        + "\n"
    )


def _load(row: Mapping[str, Any]) -> list[str]:
    return [str(row["load"][name]) for name in ("batch_size", "prompt_tokens", "new_tokens")]


def _timed(row: Mapping[str, Any], name: str) -> list[str]:
    cells = []
    for side in PAIR[::-1]:
        below, median, above = map(_shown, spread(rates(row, side, name)))
        cells.append(f"{median} [{below}, {above}]")
    low, middle, high = spread(ratios(row, name))
    return [*cells, f"{middle:.2f} [{low:.2f}, {high:.2f}]"]


def _shown(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}"


def _bytes(value: float | None) -> str:
    return "–" if value is None else f"{value:,.0f}"


def console_table(content: Mapping[str, Any]) -> Table:
    """The ratios, and what they come from, for the terminal."""
    table = Table(title="Pruned / unpruned, medians", title_justify="left")
    for column in ("batch", "prompt", "written", *(title for title, _ in COLUMNS), "cache, B/token"):
        table.add_column(column, justify="right")
    for row in content["rows"]:
        cells = []
        for _, name in COLUMNS:
            one, other = (statistics.median(rates(row, side, name)) for side in PAIR[::-1])
            cells.append(f"{_shown(one)} / {_shown(other)} ({statistics.median(ratios(row, name)):.2f}×)")
        cache = f"{row['model']['cache_bytes']:,.0f} / {row['against']['cache_bytes']:,.0f}"
        table.add_row(*_load(row), *cells, cache)
    return table
