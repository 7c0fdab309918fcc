"""The report of a search under a budget."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.figure import Figure
from rich.table import Table

from depthprune.plotting import BLUE, GREY, new_figure, tidy
from depthprune.report.markdown import escaped
from depthprune.report.markdown import table as markdown_table
from depthprune.search.budget import RESOURCES
from depthprune.sites import PLURALS, Site


def search_figure(content: Mapping[str, Any]) -> Figure:
    """The loss of the best plan within the budget so far, by how many passes over a batch were asked for.

    Args:
        content: of search.json.
    """
    figure = new_figure(3.2)
    axes = figure.subplots()
    passes = [entry["passes"] for entry in content["history"]]
    losses = [entry["loss"] for entry in content["history"]]
    axes.step([*passes, content["passes"]], [*losses, losses[-1]], where="post", color=BLUE, lw=1.5)
    axes.plot(passes, losses, "o", color=BLUE, ms=4)
    axes.axhline(content["unpruned_loss"], color=GREY, lw=1, ls="--")
    axes.annotate(
        "unpruned",
        (1, content["unpruned_loss"]),
        xycoords=("axes fraction", "data"),
        xytext=(0, 3),
        textcoords="offset points",
        ha="right",
        fontsize=9,
        color=GREY,
    )
    axes.set_xlim(0, None)
    axes.set_xlabel("passes of a plan over a batch", fontsize=9.5)
    title = f"Best plan within {' '.join(f'{name}≤{limit:g}' for name, limit in content['limits'].items())}"
    tidy(axes, title, ylabel="nats per token")
    return figure


def counts_text(sites: list[str]) -> str:
    """How many sites of each kind go, such as ``3 blocks, 7 attentions``."""
    kinds = [Site.parse(site).kind for site in sites]
    return ", ".join(
        f"{kinds.count(kind)} {plural if kinds.count(kind) > 1 else plural.removesuffix('s')}"
        for kind, plural in PLURALS.items()
        if kind in kinds
    )


def _in_words(replacement: str) -> str:
    return "nothing" if replacement == "none" else replacement.replace("_", " ")


def _rows(content: Mapping[str, Any]) -> list[list[str]]:
    limits = {name: f"{limit:g}" for name, limit in content["limits"].items()}
    return [
        [f"{name} ({RESOURCES[name]})", f"{share:.3f}", limits.get(name, "–")]
        for name, share in content["shares"].items()
    ]


def search_report(content: Mapping[str, Any]) -> str:
    """The results as Markdown.

    Args:
        content: of search.json.
    """
    config = content["config"]
    standing, replacement = (_in_words(name) for name in (content["standing"], config["replacement"]))
    finals = content["finals"]
    parts = [
        f"# A plan for {escaped(config['model'])} within {escaped(config['budget'])}",
        f"Without {counts_text(content['sites'])}, and with {escaped(standing)} in their place, the loss on the "
        f"{content['tokens']:,} tokens that were searched on is {content['loss']:.3f} nats per token; the unpruned "
        f"model's is {content['unpruned_loss']:.3f}. "
        + (f"After {escaped(replacement)} it is {_loss_text(finals[0])}. " if finals else "")
        + "The text was searched on, so what the plan is worth has to be measured on another.",
        "![The best plan's loss by passes](search.png)",
        "![What the plan removes](removed.png)",
        markdown_table(["resource", "share of the unpruned model's", "limit"], _rows(content)),
        f"Sites: {', '.join(content['sites'])}.",
        f"Method: {config['method']}, {content['passes']:,} passes of a plan over a batch in "
        f"{content['seconds'] / 60:.1f} minutes" + ("." if content["is_finished"] else ", and not finished."),
        *(_last_round(finals, escaped(replacement)) if finals else ()),
    ]
    return "\n\n".join(parts) + "\n"


def _loss_text(final: Mapping[str, Any]) -> str:
    return f"{final['recovered']:.3f}, and that of the unpruned model at the same positions {final['unpruned']:.3f}"


def _last_round(finals: Sequence[Mapping[str, Any]], replacement: str) -> tuple[str, str, str]:
    """The plans that were recovered."""
    rows = [
        [counts_text(final["plan"]), f"{final['recovered']:.3f}", f"{final['loss']:.3f}", ", ".join(final["plan"])]
        for final in finals
    ]
    columns = ["removed", f"loss after {replacement}", "loss when compared", "sites"]
    return (
        "## The last round",
        f"The best plans were recovered with {replacement}, each as a whole, and the best recovered one is taken.",
        markdown_table(columns, rows),
    )


def console_table(content: Mapping[str, Any]) -> Table:
    """What the plan takes, for the terminal."""
    losses = f"{content['loss']:.3f} nats per token, unpruned {content['unpruned_loss']:.3f}"
    if content["finals"]:
        final = content["finals"][0]
        losses = f"{final['recovered']:.3f} nats per token after the recovery, unpruned {final['unpruned']:.3f}"
    table = Table(title=f"Without {counts_text(content['sites'])}: {losses}", title_justify="left")
    for column, justify in (("resource", "left"), ("share", "right"), ("limit", "right")):
        table.add_column(column, justify=justify)  # type: ignore[arg-type]
    for row in _rows(content):
        table.add_row(*row)
    return table
