"""The report of pruning curves: Markdown with what they show, a table for the terminal, and CSV."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rich.table import Table
from rich.text import Text

from depthprune.evaluation.curve import EMULATED, NONE
from depthprune.evaluation.domains import DomainLoss, Interval, is_quick
from depthprune.evaluation.figures import MARKS
from depthprune.report.markdown import escaped, gap_text, starred
from depthprune.report.markdown import table as markdown_table
from depthprune.report.points import Row, point_csv, point_table
from depthprune.report.task_curve import task_sections
from depthprune.sites import PLURALS

COLUMNS = ("domain", "metric", "kind", "replacement", "removed", "of", "loss")
INTERVALS = ("above_unpruned", "above_none", "above_best")
SHORT = {"block": "blocks", "attention": "attn.", "mlp": "MLPs"}
CHEAP = 0.1  # nats/token, about 10% of perplexity
NOISE_NOTE = "Intervals are 95%, by bootstrap over documents, paired"


def curve_csv(content: Mapping[str, Any]) -> str:
    """One line for each point on a text, with intervals and the removed sites."""
    return point_csv(content["rows"], COLUMNS, INTERVALS)


def curve_report(content: Mapping[str, Any]) -> str:
    """The results as Markdown."""
    domains = content["domains"]
    parts = [f"# Held-out loss by sites removed: {escaped(content['model'])}"]
    texts = [
        f"{about['unpruned_loss']:.3f} nats/token on {about['token_count']} predicted tokens of "
        f"{about['documents']} documents of {escaped(name)}"
        for name, about in domains.items()
    ]
    parts.append(f"Loss of the unpruned model: {'; '.join(texts)} (test role). {NOISE_NOTE}.")
    if any(is_quick(about["documents"], about["token_count"]) for about in domains.values()):
        parts.append("This is a quick run: fewer than 200 documents or 50k tokens of a domain.")
    parts.append("![Held-out loss by number of sites removed](curve.png)")
    parts += ["## Findings of arXiv 2407.16286", "\n".join(f"- {verdict}" for verdict in verdicts(content))]
    parts += ["## What the curves show", "\n".join(f"- {finding}" for finding in findings(content))]
    for domain in domains:
        for kind in dict.fromkeys(row["kind"] for row in content["rows"]):
            parts.append(f"## {escaped(domain)}: loss above the unpruned model by {PLURALS[kind]} removed")
            mine = [row for row in content["rows"] if (row["domain"], row["kind"]) == (domain, kind)]
            parts.append(point_table(mine, _cell))
    parts.append("Bold: the lowest of the metrics with the same in the removed places; * worse than that beyond noise.")
    parts += task_sections(content)
    parts += ["## Which sites go", "![The sites by depth, with the order in which they go](removed.png)"]
    orders = [
        [PLURALS[order["kind"]], escaped(order["metric"]), ", ".join(site.split(".")[1] for site in order["sites"])]
        for order in content["orders"]
    ]
    parts.append(markdown_table(["kind", "metric", "sites, the first one first"], orders, words=3))
    also = " and tasks.csv" if content.get("tasks") else ""
    parts.append(f"Every point with its intervals stands in curve.csv{also}.")
    return "\n\n".join(parts) + "\n"


def verdicts(content: Mapping[str, Any]) -> Iterator[str]:
    """Which of the paper's findings the curves show, on all domains, in part, or not at all."""
    bare = [row for row in content["rows"] if row["replacement"] == NONE]
    tenth = [row for row in bare if row["kind"] == "block" and row["removed"] == round(MARKS[0] * row["of"])]
    if tenth:
        best = [min((r for r in tenth if r["domain"] == name), key=lambda r: r["loss"]) for name in content["domains"]]
        cheap = [row["above_unpruned"]["value"] < CHEAP for row in best]
        yield f"About 10% of the blocks go cheaply, for under {CHEAP} nats/token: {_verdict(cheap)}."
    for other in ("block", "mlp"):
        gaps = [gap for name in content["domains"] if (gap := _against(bare, name, other, content)) is not None]
        if gaps:
            further = [gap.excludes_zero and gap.value < 0 for _, gap in gaps]
            yield f"Attentions go further than {PLURALS[other]}: {_verdict(further)}."
    for kind in dict.fromkeys(row["kind"] for row in content["rows"]):
        gains = [
            Interval.from_dict(row["above_none"])
            for row in content["rows"]
            if row["kind"] == kind and row["replacement"] == EMULATED
        ]
        if gains:
            better = [gap.excludes_zero and gap.value < 0 for gap in gains]
            text = f"The emulated update is better than nothing in {PLURALS[kind]}: {_verdict(better)}"
            yield f"{text}, beyond noise at {sum(better)} of {len(better)} points."


def _verdict(holds: Sequence[bool]) -> str:
    return "**reproduced**" if all(holds) else "**reproduced in part**" if any(holds) else "**not reproduced**"


def findings(content: Mapping[str, Any]) -> list[str]:
    """What the curves show, in sentences with figures, by domain; also where the paper's findings do not show."""
    found: list[str] = []
    for domain in content["domains"]:
        mine = [row for row in content["rows"] if row["domain"] == domain]
        found += [f"{escaped(domain)}: {text}." for text in (*_prices(mine), *_kinds(mine, content), *_gains(mine))]
    return found


def _prices(rows: Sequence[Row]) -> Iterator[str]:
    """What the best order costs at the marks of the paper's figures."""
    for kind in dict.fromkeys(row["kind"] for row in rows):
        bare = [row for row in rows if row["kind"] == kind and row["replacement"] == NONE]
        for share in MARKS:
            near = [row for row in bare if row["removed"] == round(share * row["of"])]
            if near:
                best = min(near, key=lambda row: row["loss"])
                yield (
                    f"{best['removed']} of {best['of']} {PLURALS[kind]} ({share:.0%}) cost "
                    f"{gap_text(Interval.from_dict(best['above_unpruned']))} nats/token in the best order, that of "
                    f"`{best['metric']}`"
                )


def _kinds(rows: Sequence[Row], content: Mapping[str, Any]) -> Iterator[str]:
    """Whether attentions go further than blocks and MLPs, at the largest number that was measured of both."""
    bare = [row for row in rows if row["replacement"] == NONE]
    for other in ("block", "mlp"):
        found = _against(bare, rows[0]["domain"], other, content)
        if found is not None:
            number, gap = found
            words = ("cost less than", "cost more than") if gap.excludes_zero else ("within noise of",) * 2
            yield f"{number} attentions {words[gap.value > 0]} {number} {PLURALS[other]}: {starred(gap)} nats/token"


def _against(bare: Sequence[Row], domain: str, other: str, content: Mapping[str, Any]) -> tuple[int, Interval] | None:
    """What attentions cost above another kind of site on a text, at the largest number measured of both, and that."""
    mine = [row for row in bare if row["domain"] == domain]
    numbers = {kind: {row["removed"] for row in mine if row["kind"] == kind} for kind in PLURALS}
    shared = numbers["attention"] & numbers[other]
    if not shared:
        return None
    ours, theirs = (
        min((row for row in mine if (row["kind"], row["removed"]) == (kind, max(shared))), key=lambda r: r["loss"])
        for kind in ("attention", other)
    )
    return max(shared), _loss(ours, content).minus(_loss(theirs, content))


def _gains(rows: Sequence[Row]) -> Iterator[str]:
    """Where what stands in the removed places helps, and where it does harm."""
    replacements = [name for name in dict.fromkeys(row["replacement"] for row in rows) if name != NONE]
    for replacement in replacements:
        for kind in dict.fromkeys(row["kind"] for row in rows):
            mine = [row for row in rows if (row["replacement"], row["kind"]) == (replacement, kind)]
            gaps = [(row, Interval.from_dict(row["above_none"])) for row in mine]
            better, worse = (
                [row for row, gap in gaps if gap.excludes_zero and gap.value * sign > 0] for sign in (-1, 1)
            )
            text = f"{replacement.replace('_', ' ')} in {PLURALS[kind]} is better than nothing at {len(better)} of "
            text += f"{len(mine)} points beyond noise, worse at {len(worse)}"
            if worse:
                named: dict[str, list[str]] = {}
                for row in worse:
                    named.setdefault(row["metric"], []).append(str(row["removed"]))
                text += f" ({'; '.join(f'`{metric}` at {_list(at)}' for metric, at in named.items())})"
            yield text


def _list(words: Sequence[str]) -> str:
    return " and ".join(filter(None, (", ".join(words[:-1]), words[-1])))


def _loss(row: Row, content: Mapping[str, Any]) -> DomainLoss:
    about = content["domains"][row["domain"]]
    return DomainLoss.from_dict({"nats": row["nats"], "tokens": about["tokens"], "bytes": about["bytes"]})


def _cell(row: Row) -> str:
    value = f"{row['above_unpruned']['value']:+.3f}"
    if row["metric"] == row["best"]:
        return f"**{value}**"
    return value + (" *" if Interval.from_dict(row["above_best"]).excludes_zero else "")


def console_table(content: Mapping[str, Any]) -> Table:
    """The same for a terminal, on the first domain: at most three numbers of each kind, spread over those measured."""
    domain = next(iter(content["domains"]))
    rows = [row for row in content["rows"] if row["domain"] == domain]
    columns: list[tuple[str, int]] = []
    for kind in dict.fromkeys(row["kind"] for row in rows):
        numbers = sorted({row["removed"] for row in rows if row["kind"] == kind})
        wanted = min(3, len(numbers))
        places = {round(place * (len(numbers) - 1) / max(1, wanted - 1)) for place in range(wanted)}
        columns += [(kind, numbers[place]) for place in sorted(places)]
    title = f"Loss above the unpruned model, {domain} (nats/token); ◂ the lowest"
    table = Table(title=title, title_justify="left", box=None)
    table.add_column("metric", no_wrap=True)
    for kind, number in columns:
        table.add_column(f"{number}\n{SHORT[kind]}", justify="right", no_wrap=True)
    for metric in dict.fromkeys(row["metric"] for row in rows):
        for replacement in dict.fromkeys(row["replacement"] for row in rows):
            label = metric if replacement == NONE else f"  {replacement.replace('_', ' ')}"
            table.add_row(Text(label), *(_shown(rows, metric, replacement, *column) for column in columns))
    return table


def _shown(rows: Sequence[Row], metric: str, replacement: str, kind: str, number: int) -> str:
    wanted = (metric, replacement, kind, number)
    for row in rows:
        if (row["metric"], row["replacement"], row["kind"], row["removed"]) == wanted:
            value = row["above_unpruned"]["value"]
            return f"{value:.3f}{' ◂' if row['best'] == metric else ''}" if math.isfinite(value) else "–"
    return "–"
