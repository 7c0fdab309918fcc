"""Ablations of several plans beside each other: what each rung recovers by what was removed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from matplotlib.figure import Figure

from depthprune.evaluation.domains import Interval
from depthprune.plotting import errors, legend, new_figure, plain, tidy
from depthprune.recovery.ablations import BARE, UNPRUNED
from depthprune.report.ablation import LOWEST, NOTHING, Row, rows, share_text, whole_samples
from depthprune.report.markdown import escaped
from depthprune.report.markdown import table as markdown_table
from depthprune.report.sweeps import STYLES

Contents = Mapping[str, Mapping[str, Any]]
"""The results of an ablation by the name of its plan."""


def plans_report(contents: Contents) -> str:
    """A table for each domain, with a row for each plan and a column for each rung, as Markdown.

    Args:
        contents: the results; each plan's own report lies in a folder of its name.
    """
    first = next(iter(contents.values()))
    parts = [
        f"# Ways to recover, by plan: {escaped(first['config']['model'])}",
        "Damage is the loss that removing costs, in nats per token. The other columns are the share of it that came "
        "back, % with a 95% interval by bootstrap over documents. Concentration says how constant the direction of the "
        "removed update is over tokens (mean resultant length, 1 for a constant; mean over sites).",
        "![Damage, and the share recovered](plans.png)",
    ]
    for domain, by_plan in _by_domain(contents).items():
        labels = _labels(by_plan)
        body = []
        for name, here in by_plan.items():
            concentration = _concentration(contents[name])
            body.append(
                [
                    f"[{escaped(name)}]({name}/ablation.md)",
                    f"{_damage(here):.3f}",
                    NOTHING if concentration is None else f"{concentration:.2f}",
                    *(share_text(here[label].recovered) for label in labels),
                ]
            )
        header = ["plan", "damage", "concentration", *map(escaped, labels)]
        parts += [f"## {escaped(domain)}", markdown_table(header, body)]
    return "\n\n".join(parts) + "\n"


def plans_figure(contents: Contents) -> Figure:
    """Damage by plan above, the share recovered by each rung below; a column of panels for each domain."""
    found = _by_domain(contents)
    figure = new_figure(6.2)
    panels = figure.subplots(2, len(found), sharex=True, sharey="row", squeeze=False, height_ratios=(1, 2))
    for column, (domain, by_plan) in enumerate(found.items()):
        above, below = panels[:, column]
        places = range(len(by_plan))
        above.bar(places, [_damage(here) for here in by_plan.values()], color="#BBBBBB", width=0.6)
        tidy(above, domain, "damage\n(nats/token)" if column == 0 else "")
        for place, label in enumerate(_labels(by_plan)):
            shares = [
                Interval(*(100 * end for end in vars(here[label].recovered).values())) for here in by_plan.values()
            ]
            colour, marker = STYLES[place % len(STYLES)]
            below.errorbar(
                places,
                [share.value for share in shares],
                yerr=errors(shares),
                **{"color": colour, "marker": marker, "ms": 4.5, "lw": 1.2, "capsize": 2},
                ls="-" if place < len(STYLES) else ":",
                label=label,
            )
        below.axhline(0, color="black", lw=0.8)
        if below.get_ylim()[0] < LOWEST:
            below.set_ylim(bottom=LOWEST)
        below.set_xticks(places, [plain(name) for name in by_plan], rotation=60, ha="right", fontsize=8.5)
        tidy(below, "", "recovered, % of the damage" if column == 0 else "")
    legend(figure, panels[1, :1])
    return figure


def _by_domain(contents: Contents) -> dict[str, dict[str, dict[str, Row]]]:
    """All rows by domain, plan and rung."""
    found: dict[str, dict[str, dict[str, Row]]] = {}
    for name, content in contents.items():
        for row in rows(content):
            found.setdefault(row.domain, {}).setdefault(name, {})[row.label] = row
    return found


def _labels(by_plan: Mapping[str, Mapping[str, Row]]) -> list[str]:
    return [label for label in next(iter(by_plan.values())) if label not in (UNPRUNED, BARE)]


def _damage(here: Mapping[str, Row]) -> float:
    return here[BARE].loss - here[UNPRUNED].loss


def _concentration(content: Mapping[str, Any]) -> float | None:
    """How constant the removed updates are: the mean over samples and the sites of the rung that says so of most."""
    samples = whole_samples(content)
    found = [
        [site["concentration_removed"] for part in samples for site in part[label].get("updates", {}).values()]
        for label in samples[0]
    ]
    most = max(found, key=len)
    return sum(most) / len(most) if most else None
