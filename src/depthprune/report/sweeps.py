"""Figures of an ablation's sweeps: recovery against each setting, and what learning costs elsewhere."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from matplotlib.figure import Figure

from depthprune.evaluation.domains import Interval
from depthprune.plotting import (
    BLUE,
    GREEN,
    GREY,
    ORANGE,
    PURPLE,
    RED,
    errors,
    legend,
    new_figure,
    tidy,
)
from depthprune.report.ablation import Row, rows, whole_samples

LOG_SPREAD = 8.0  # a log axis where the largest value is at least so many times the smallest
STYLES = ((BLUE, "o"), (ORANGE, "^"), (GREEN, "s"), (RED, "D"), (PURPLE, "v"), (GREY, "P"))
AXES = {
    "rank": "rank of the map",
    "scale": "factor on the mean update",
    "before": "layers refit before the cut",
    "after": "layers refit behind the cut",
    "steps": "optimizer steps",
    "calibration_sequences": "sequences of the closed form's text",
    "documents": "documents trained on",
    "learning_rate": "learning rate",
    "interpolation": "from the closed form (0) to the trained weights (1)",
}


@dataclass(frozen=True)
class Run:
    """One training on one sample: how far each validation was from the start, on the tune text.

    Attributes:
        label: the rung.
        learned: fall of the in-domain loss since the start at each validation, nats per token.
        forgotten: of the other domains, the most that any loss is above its lowest so far.
        distance: of the trained weights from their start at the end, over the norm of the start.
    """

    label: str
    learned: tuple[float, ...]
    forgotten: tuple[float, ...]
    distance: float


def sweep_figures(content: Mapping[str, Any]) -> dict[str, Figure]:
    """Recovery against each number that is swept, by the setting's name; a panel for each domain."""
    found = rows(content)
    figures = {}
    for setting, lines in _lines(content).items():
        domains = list(dict.fromkeys(row.domain for row in found))
        figure = new_figure(3.6)
        panels = figure.subplots(1, len(domains), sharey=True, squeeze=False)[0]
        for axes, domain in zip(panels, domains, strict=True):
            here = {row.label: row for row in found if row.domain == domain}
            for place, (name, points) in enumerate(lines.items()):
                _draw_line(axes, name, points, here, STYLES[place % len(STYLES)])
            values = [value for points in lines.values() for value in points]
            if min(values) > 0 and max(values) >= LOG_SPREAD * min(values):
                axes.set_xscale("log")
                axes.minorticks_off()
            axes.set_xticks(sorted(set(values)), [f"{value:g}" for value in sorted(set(values))])
            axes.set_xlabel(AXES.get(setting, setting), fontsize=9.5)
            tidy(axes, domain, "recovered, % of the damage" if axes is panels[0] else "")
        legend(figure, panels[:1])
        figures[setting] = figure
    return figures


def _draw_line(
    axes: Any, name: str, points: Mapping[float, str], here: Mapping[str, Row], style: tuple[str, str]
) -> None:
    ordered = [(value, here[label]) for value, label in sorted(points.items())]
    shares = [Interval(*(100 * end for end in vars(row.recovered).values())) for _, row in ordered]
    colour, marker = style
    axes.errorbar(
        [value for value, _ in ordered],
        [share.value for share in shares],
        yerr=errors(shares),
        **{"color": colour, "marker": marker, "ms": 5, "lw": 1.3, "capsize": 2},
        label=name,
    )


def _lines(content: Mapping[str, Any]) -> dict[str, dict[str, dict[float, str]]]:
    """Of each number that is swept: by line, the rung at each value."""
    found: dict[str, dict[str, dict[float, str]]] = {}
    for name, labels in content["settings"].items():
        for label, settings in labels.items():
            for setting, value in settings.items():
                if isinstance(value, int | float) and not isinstance(value, bool):
                    others = [f"{other} {its}" for other, its in settings.items() if other != setting]
                    line = found.setdefault(setting, {}).setdefault(" ".join([name, *others]), {})
                    line[float(value)] = label
    kept = {setting: {line: at for line, at in lines.items() if len(at) > 1} for setting, lines in found.items()}
    return {setting: lines for setting, lines in kept.items() if lines}


def trainings(content: Mapping[str, Any]) -> Iterator[Run]:
    """Every training of an ablation."""
    for found in whole_samples(content):
        for label, about in found.items():
            if len(about.get("curve", ())) > 1:
                yield _run(label, about)


def _run(label: str, about: Mapping[str, Any]) -> Run:
    curve = about["curve"]
    in_domain, *others = [name for name in curve[0] if name not in ("step", "train")]
    learned, forgotten = [], []
    lowest = {name: curve[0][name] for name in others}
    for point in curve[1:]:
        learned.append(curve[0][in_domain] - point[in_domain])
        lowest = {name: min(loss, point[name]) for name, loss in lowest.items()}
        forgotten.append(max((point[name] - lowest[name] for name in others), default=0.0))
    return Run(label, tuple(learned), tuple(forgotten), about["distance"])


def front(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """The points (learned, forgotten) that no other learns more than without forgetting more, by what they learned."""
    ordered = sorted(points, key=lambda point: (-point[0], point[1]))
    best: list[tuple[float, float]] = []
    for point in ordered:
        if not best or point[1] < best[-1][1]:
            best.append(point)
    return best[::-1]


def forgetting_figure(content: Mapping[str, Any]) -> Figure | None:
    """Forgetting against learning with the Pareto front, and against the distance from the start; None without both."""
    runs = list(trainings(content))
    others = len(rows(content)) and len(next(iter(content["losses"].values()))["unpruned"]["losses"]) > 1
    if not runs or not others:
        return None
    labels = list(dict.fromkeys(run.label for run in runs))
    figure = new_figure(3.8)
    left, right = figure.subplots(1, 2, sharey=True)
    for place, label in enumerate(labels):
        colour, marker = STYLES[place % len(STYLES)]
        mine = [run for run in runs if run.label == label]
        for run in mine:
            left.plot(run.learned, run.forgotten, "-", color=colour, lw=0.7, alpha=0.5)
        ends = [(run.learned[-1], run.forgotten[-1], run.distance) for run in mine]
        learned, forgotten, distances = zip(*ends, strict=True)
        left.plot(learned, forgotten, marker, color=colour, ms=5, label=label)
        right.plot(distances, forgotten, marker, color=colour, ms=5)
    edge = front([point for run in runs for point in zip(run.learned, run.forgotten, strict=True)])
    left.plot(*zip(*edge, strict=True), ":", color="black", lw=1.2, label="Pareto front, all validations")
    left.set_xlabel("in-domain loss, fall since the start (nats/token)", fontsize=9.5)
    right.set_xlabel("distance of the weights from their start (relative)", fontsize=9.5)
    for axes in (left, right):
        axes.locator_params(axis="x", nbins=5)
    tidy(left, "learning", "most that another domain\nis above its lowest (nats/token)")
    tidy(right, "distance", "")
    legend(figure, [left])
    return figure
