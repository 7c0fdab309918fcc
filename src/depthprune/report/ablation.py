"""The results of an ablation as a table, a figure and Markdown."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from matplotlib.figure import Figure
from rich.table import Table

from depthprune.evaluation.domains import DomainLoss, Interval, is_quick
from depthprune.plotting import BLUE, GREY, errors, legend, new_figure, plain, tidy
from depthprune.recovery.ablations import BARE, UNPRUNED, lowest
from depthprune.recovery.updates import FIGURES
from depthprune.report.markdown import escaped, starred
from depthprune.report.markdown import table as markdown_table

NOTHING = "–"
LOWEST = -50.0  # percent that figures show


@dataclass(frozen=True)
class Row:
    """What one rung does on one domain, over all samples.

    Attributes:
        label: the rung.
        domain: the domain.
        loss: mean nats per token.
        recovered: the share of the damage that came back.
        by_sample: the same for each sample.
        beyond_control: the same share counted against the control: what training on the text does to the unpruned model
            is taken off; None without a control.
        above_baseline: loss minus the baseline's.
        above_start: loss minus that of the same rung without training; None where that is no rung of the ablation.
        parameters: that stand in the removed sites.
        seconds: to find them, the mean over samples.
    """

    label: str
    domain: str
    loss: float
    recovered: Interval
    by_sample: tuple[float, ...]
    beyond_control: Interval | None
    above_baseline: Interval
    above_start: Interval | None
    parameters: int
    seconds: float


def whole_samples(content: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """What is put down about each sample, by rung; samples that lack a rung are left out."""
    samples = [part for _, part in sorted(content["losses"].items(), key=lambda item: int(item[0]))]
    return [part for part in samples if set(samples[0]) <= set(part)]


def rows(content: Mapping[str, Any]) -> list[Row]:
    """All rungs on all domains, in the order of the configuration."""
    samples = whole_samples(content)
    labels = list(samples[0])
    baseline, starts = content["config"]["baseline"], content["starts"]
    found = []
    for domain in samples[0][UNPRUNED]["losses"]:
        by_label = {
            label: [DomainLoss.from_dict(part[label]["losses"][domain]) for part in samples] for label in labels
        }
        pooled = {label: DomainLoss.pooled(parts) for label, parts in by_label.items()}
        for label in labels:
            beyond = None
            if all("control" in part[label] for part in samples):
                controls = [DomainLoss.from_dict(part[label]["control"][domain]) for part in samples]
                counted = pooled[label].without_gain(DomainLoss.pooled(controls), pooled[UNPRUNED])
                beyond = counted.recovered(pooled[BARE], pooled[UNPRUNED])
            start = starts.get(label)
            bounds = zip(by_label[label], by_label[BARE], by_label[UNPRUNED], strict=True)
            found.append(
                Row(
                    label,
                    domain,
                    pooled[label].loss,
                    pooled[label].recovered(pooled[BARE], pooled[UNPRUNED]),
                    tuple((bare.loss - own.loss) / (bare.loss - unpruned.loss) for own, bare, unpruned in bounds),
                    beyond,
                    pooled[label].minus(pooled[baseline]),
                    None if start is None else pooled[label].minus(pooled[start]),
                    samples[0][label]["parameters"],
                    sum(part[label]["seconds"] for part in samples) / len(samples),
                )
            )
    return found


def _own_text(content: Mapping[str, Any]) -> str:
    """Which rungs are fitted to another number of sequences, in brackets."""
    numbers = {
        label: pairs.get("calibration_sequences", rung.get("calibration_sequences"))
        for name, rung in content["config"]["rungs"].items()
        for label, pairs in content["settings"][name].items()
    }
    own = "; ".join(f"{escaped(label)} to {number}" for label, number in numbers.items() if number is not None)
    return f" ({own})" if own else ""


def _samples(measured: int, wanted: int) -> str:
    """How many samples the figures are of."""
    if wanted == 1:
        return "One sample"
    return f"{wanted} disjoint samples" if measured == wanted else f"{measured} of {wanted} disjoint samples so far"


def report(content: Mapping[str, Any], figures: Sequence[str]) -> str:
    """The results as Markdown, a table for each domain.

    Args:
        content: the results.
        figures: file names of the figures to show, the first one on top.
    """
    config, found = content["config"], rows(content)
    first = found[0].domain
    tokens = {domain: _size(content, domain) for domain in dict.fromkeys(row.domain for row in found)}
    parts = [
        f"# Ways to recover: {escaped(config['model'])}",
        f"{_samples(len(found[0].by_sample), config['samples'])} of the texts; fitted to "
        f"{config['calibration_sequences']} sequences of {config['sequence_length']} tokens of {first} "
        f"each{_own_text(content)}. Recovered is the share of the loss "
        "that came back, (none - rung) / (none - unpruned), pooled over samples, with a 95% interval by bootstrap over "
        "documents, paired; behind it the share on each sample. * where the interval of the difference to "
        f"{escaped(config['baseline'])} excludes 0.",
        f"![Share recovered]({figures[0]})",
    ]
    for domain, (count, documents) in tokens.items():
        here = [row for row in found if row.domain == domain]
        columns = _columns(here, config["baseline"])
        body = [[cell(row) for cell in columns.values()] for row in here]
        parts += [
            f"## {escaped(domain)}",
            f"{count} predicted tokens of {documents} documents"
            + ("; a quick run." if is_quick(documents, count) else "."),
            markdown_table(list(columns), body),
        ]
    parts += _standing(content)
    parts += _tuned(content)
    parts += [f"![{name.removesuffix('.png')}]({name})" for name in figures[1:]]
    return "\n\n".join(parts) + "\n"


def _standing(content: Mapping[str, Any]) -> list[str]:
    """What stands in the removed sites beside what was removed: means over sites and samples."""
    found: dict[str, list[Mapping[str, float]]] = {}
    for part in whole_samples(content):
        for label, about in part.items():
            found.setdefault(label, []).extend(about.get("updates", {}).values())
    body = []
    for label, sites in found.items():
        if sites:
            means = {name: sum(site[name] for site in sites) / len(sites) for name in FIGURES}
            body.append([escaped(label), *(f"{means[name]:.3f}" for name in FIGURES)])
    if not body:
        return []
    text = (
        "The update of what stands there, in the pruned model's stream, beside the update that was removed, in the "
        "unpruned model's; in-domain tune text, means over sites and samples. Concentration: how constant the "
        "direction is over tokens (mean resultant length, 1 for a constant); mean cosine: between the two mean "
        "directions."
    )
    header = ["rung", *(name.replace("_", " ") for name in FIGURES)]
    return ["## What stands there", text, markdown_table(header, body)]


def _tuned(content: Mapping[str, Any]) -> list[str]:
    """What the tune text chose, if it chose anything."""
    if not content["tuned"]:
        return []
    body = []
    for label, losses in content["tuned"].items():
        words = {name: f"{name}: {'diverged' if loss is None else f'{loss:.4f}'}" for name, loss in losses.items()}
        best = lowest(losses)
        others = ", ".join(word for name, word in words.items() if name != best)
        body.append([escaped(label), words[best] if best else NOTHING, others])
    text = "Settings with the lowest in-domain loss on the first sample's tune text (nats/token), and the others."
    return ["## Tuned settings", text, markdown_table(["rung", "taken", "others"], body)]


def _columns(here: Sequence[Row], baseline: str) -> dict[str, Callable[[Row], str]]:
    """The cells of a table by header; columns that no row fills are left out."""

    def share(row: Row, of: Interval | None) -> str:
        return NOTHING if of is None or row.label in (UNPRUNED, BARE) else share_text(of)

    columns: dict[str, Callable[[Row], str]] = {
        "rung": lambda row: escaped(row.label),
        "loss": lambda row: f"{row.loss:.3f}",
        "recovered, %": lambda row: share(row, row.recovered),
        "by sample": lambda row: (
            NOTHING if row.label in (UNPRUNED, BARE) else ", ".join(f"{100 * each:.0f}" for each in row.by_sample)
        ),
        "beyond the control, %": lambda row: share(row, row.beyond_control),
        f"minus {baseline}": lambda row: NOTHING if row.label == baseline else starred(row.above_baseline),
        "minus its closed form": lambda row: NOTHING if row.above_start is None else starred(row.above_start),
        "parameters": lambda row: f"{row.parameters:,}",
        "seconds": lambda row: f"{row.seconds:.0f}",
    }
    return {name: cell for name, cell in columns.items() if any(cell(row) != NOTHING for row in here)}


def console_table(content: Mapping[str, Any]) -> Table:
    """Share recovered by rung and domain."""
    found = rows(content)
    domains = list(dict.fromkeys(row.domain for row in found))
    table = Table(title="Recovered share of the loss, % [95%]", title_justify="left", box=None)
    for column in ("rung", *domains):
        table.add_column(column, justify="left" if column == "rung" else "right", no_wrap=column == "rung")
    for label in dict.fromkeys(row.label for row in found):
        if label not in (UNPRUNED, BARE):
            table.add_row(label, *(share_text(row.recovered) for row in found if row.label == label))
    return table


def ablation_figure(content: Mapping[str, Any]) -> Figure:
    """Share recovered by rung, with intervals and a small dot for each sample; a panel for each domain.

    Rungs that lose far more than nothing in the place does are named at the edge, so that the others can be told apart.
    """
    found = [row for row in rows(content) if row.label not in (UNPRUNED, BARE)]
    domains = list(dict.fromkeys(row.domain for row in found))
    labels = list(dict.fromkeys(row.label for row in found))
    figure = new_figure(1.2 + 0.32 * max(len(labels), 3))
    panels = figure.subplots(1, len(domains), sharey=True, squeeze=False)[0]
    for axes, domain in zip(panels, domains, strict=True):
        here = [row for row in found if row.domain == domain]
        places = range(len(here))
        samples = len(here[0].by_sample) if here else 0
        for sample in range(samples if samples > 1 else 0):  # a single one is the whole
            shares = [100 * row.by_sample[sample] for row in here]
            axes.plot(shares, places, ".", color=GREY, ms=5, label="one sample" if sample == 0 else None)
        spans = errors([Interval(*(100 * end for end in vars(row.recovered).values())) for row in here])
        values = [100 * row.recovered.value for row in here]
        together = "all samples" if samples > 1 else "one sample"
        axes.errorbar(values, places, xerr=spans, fmt="o", color=BLUE, ms=6, capsize=3, label=f"{together}, 95%")
        axes.axvline(0, color="black", lw=0.8)
        if min(values) < LOWEST:
            axes.set_xlim(LOWEST, max([*values, 0.0]) + 10)
            for place, value in zip(places, values, strict=True):
                if value < LOWEST:
                    axes.text(LOWEST, place, f" \N{LEFTWARDS ARROW} {value:.0f}", va="center", fontsize=9, color=BLUE)
        axes.set_yticks(places, [plain(label) for label in labels])
        axes.set_ylim(len(labels) - 0.5, -0.5)
        tidy(axes, domain, "", grid="x")
    figure.supxlabel("recovered, % of the damage", fontsize=9.5)
    legend(figure, panels[:1])
    return figure


def share_text(share: Interval) -> str:
    """A share with its interval, in percent."""
    return f"{100 * share.value:.1f} [{100 * share.low:.1f}, {100 * share.high:.1f}]"


def _size(content: Mapping[str, Any], domain: str) -> tuple[int, int]:
    """Predicted tokens and documents of a domain in all samples."""
    parts = [DomainLoss.from_dict(part[UNPRUNED]["losses"][domain]) for part in whole_samples(content)]
    whole = DomainLoss.pooled(parts)
    return int(whole.tokens.sum()), whole.documents
