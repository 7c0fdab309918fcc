"""``depthprune compare``: how the choice of text, task or sample changes the order of the sites."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from depthprune.figures import write_figure
from depthprune.files import make_folder, write_json
from depthprune.influence.agreement import COEFFICIENTS, correlation, overlap
from depthprune.influence.dependence import METRIC, levels_of, variance_shares
from depthprune.influence.figures import matrix_figure
from depthprune.influence.table import InfluenceTable
from depthprune.origin import origin
from depthprune.report.comparison import comparison_report
from depthprune.report.html import write_page
from depthprune.sites import KINDS, PLURALS, Site

FIRST = (3, 6, 10)


def compare(tables: Sequence[str], output: str | None = None, first: Sequence[int] = FIRST) -> None:
    """Compare influence tables of one model: rank correlations, and how many of the first sites they share.

    Where the tables are a full grid of texts, numbers of tokens, sequence lengths or seeds, also how much of the
    variance of the sites' ranks goes with each of them, and with the metric.

    Args:
        tables: two or more influence.json, also without the flag: depthprune compare a.json b.json.
        output: folder for compare.html, .md, .json and .png; nothing is written if not given.
        first: numbers of sites that go first.
    """
    if len(tables) < 2:
        raise ValueError("Name two tables or more: depthprune compare a.json b.json.")
    if any(count < 1 for count in first):
        raise ValueError(f"first is {list(first)}: give numbers of sites from 1.")
    if len({Path(name).resolve() for name in tables}) < len(tables):
        raise ValueError(f"One of {', '.join(tables)} is named twice: name different tables.")
    loaded = {name: InfluenceTable.load(name) for name in tables}
    for table in loaded.values():
        table.check_finite()
    one, *others = loaded.values()
    for other in others:
        other.fingerprint.check(one.fingerprint)
    titles = _titles(loaded)
    rows = list(_rows(dict(zip(titles, loaded.values(), strict=True)), first))
    if not rows:
        held = "; ".join(f"{name} holds {', '.join(table.metrics)}" for name, table in loaded.items())
        raise ValueError(f"The tables share no metric of the same sites ({held}): score the same metrics.")
    for title, (name, table) in zip(titles, loaded.items(), strict=True):
        print(f"{title}: {name}, {_material(table, 'unknown text')}, {table.provenance.get('tokens', '?')} tokens")
    Console().print(_shown(rows, first))
    shares = _dependence(list(loaded.values()))
    for kind, found in shares.items():
        parts = ", ".join(f"{factor} {share:.0%}" for factor, share in found.items())
        print(f"Of the variance of the {PLURALS[kind]}' ranks goes with: {parts}.")
    if output is not None:
        folder = make_folder(output)
        names = dict(zip(titles, map(str, loaded), strict=True))
        content = {"tables": names, "rows": rows, "variance_shares": shares, **origin()}
        write_json(folder / "compare.json", content)
        write_figure(matrix_figure(_matrices(rows, titles), "Spearman's rank correlation"), folder / "compare.png")
        write_page(folder / "compare.md", comparison_report(content), content)
        print(f"Wrote compare.html, .md, .json and .png to {folder}.")


def _dependence(tables: Sequence[InfluenceTable]) -> dict[str, dict[str, float]]:
    """By kind of site, how much its order depends on each thing that differs between tables, and on the metric.

    Only metrics that all tables have enter, and kinds for which the tables are a full grid of what differs.
    """
    metrics = [name for name in tables[0].metrics if all(name in table.metrics for table in tables)]
    found = {}
    for kind in KINDS:
        levels, columns = [], []
        for table in tables:
            for metric in metrics:
                column = {site: value for site, value in table.of_metric(metric).items() if site.kind == kind}
                if column:
                    levels.append({**levels_of(table), METRIC: metric})
                    columns.append(column)
        if columns and all(set(column) == set(columns[0]) for column in columns):
            shares = variance_shares(levels, columns)
            if shares:
                found[kind] = shares
    return found


def _titles(tables: dict[str, InfluenceTable]) -> list[str]:
    """A short name for each table: its text or task, numbered where several have the same."""
    texts = [Path(_material(table, name)).stem for name, table in tables.items()]
    return [
        text if texts.count(text) == 1 else f"{text} #{texts[: place + 1].count(text)}"
        for place, text in enumerate(texts)
    ]


def _material(table: InfluenceTable, otherwise: str) -> str:
    """The text or the task that a table was made on."""
    return str(table.provenance.get("text") or table.provenance.get("task") or otherwise)


def _rows(tables: dict[str, InfluenceTable], first: Sequence[int]) -> Iterator[dict[str, Any]]:
    """Of every metric, kind of site and pair of tables that have them: how far they agree."""
    metrics = [name for name in next(iter(tables.values())).metrics if all(name in t.metrics for t in tables.values())]
    for metric in metrics:
        for kind in KINDS:
            columns: dict[str, dict[Site, float]] = {
                title: {site: value for site, value in table.of_metric(metric).items() if site.kind == kind}
                for title, table in tables.items()
            }
            for one, other in combinations(columns, 2):
                if columns[one] and set(columns[one]) == set(columns[other]):
                    a, b = columns[one], columns[other]
                    yield {
                        "metric": metric,
                        "kind": kind,
                        "tables": [one, other],
                        **{name: _number(correlation(a, b, name)) for name in COEFFICIENTS},
                        "shared": {str(count): overlap(a, b, count) for count in first if count <= len(a) // 2},
                    }


def _number(value: float) -> float | None:
    return None if value != value else value


def _shown(rows: Sequence[dict[str, Any]], first: Sequence[int]) -> Table:
    table = Table(title="Agreement of the orders", title_justify="left")
    for column in ("metric", "sites", "tables", *COEFFICIENTS):
        table.add_column(column, justify="right" if column in COEFFICIENTS else "left")
    for count in first:
        table.add_column(f"of first {count}", justify="right")
    for row in rows:
        figures = ["–" if row[name] is None else f"{row[name]:.3f}" for name in COEFFICIENTS]
        shared = [row["shared"].get(str(count)) for count in first]
        table.add_row(
            row["metric"],
            PLURALS[row["kind"]],
            " – ".join(row["tables"]),
            *figures,
            *("–" if share is None else f"{round(share * count)}" for share, count in zip(shared, first, strict=True)),
        )
    return table


def _matrices(rows: Sequence[dict[str, Any]], titles: Sequence[str]) -> dict[str, dict[str, dict[str, float]]]:
    """Spearman's correlation between every two tables, for each metric and kind of site."""
    found: dict[str, dict[str, dict[str, float]]] = {}
    for row in rows:
        name = f"{row['metric']}, {PLURALS[row['kind']]}"
        empty = {one: {other: 1.0 if one == other else float("nan") for other in titles} for one in titles}
        matrix = found.setdefault(name, empty)
        one, other = row["tables"]
        value = float("nan") if row["spearman"] is None else row["spearman"]
        matrix[one][other] = matrix[other][one] = value
    return found
