"""Held-out loss by how many sites go, for the orders of several influence metrics and what stands in their place."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import islice

from transformers import PreTrainedModel

from depthprune.anatomy import Anatomy
from depthprune.data.answers import AnswerBatches
from depthprune.data.batches import Batches
from depthprune.evaluation.domains import DocumentLoss, DomainLoss
from depthprune.head import Batch, evaluating, input_device, on_device, token_losses
from depthprune.influence.table import InfluenceTable
from depthprune.moments import mean_updates
from depthprune.replacements.constants import EmulatedUpdate
from depthprune.saved_sums import SavedSums
from depthprune.sites import Site, check_kinds
from depthprune.variants import Absent, Standing, record, run_variants, switchable

UNPRUNED: Absent = frozenset()
NONE = "none"
EMULATED = "emulated_update"
PASS = "held-out loss"

Variant = tuple[str, Absent]
"""What stands in the absent sites, by name, and which these are."""


def first_sites(
    table: InfluenceTable, metrics: Sequence[str], kinds: Mapping[str, Sequence[int]]
) -> dict[tuple[str, str, int], Absent]:
    """The sites that go first, by metric, kind of site and number of them.

    Args:
        table: the influence.
        metrics: which of its metrics; those that do not score a kind are passed over for it.
        kinds: kind of site to the numbers of sites that go.

    Raises:
        ValueError: an unknown metric or kind, no number or metric at all, or more sites than there are.
    """
    check_kinds(kinds)
    if not metrics or not any(kinds.values()):
        raise ValueError("There is nothing to remove: name a metric and a number of sites, such as {block: [3, 6]}.")
    found: dict[tuple[str, str, int], Absent] = {}
    for metric in metrics:
        for kind, counts in kinds.items():
            if any(site.kind == kind for site in table.of_metric(metric)):
                for count in counts:
                    found[metric, kind, count] = frozenset(table.plan(metric, [kind], count).sites)
    return found


def emulated_updates(
    model: PreTrainedModel, batches: Iterable[Batch], sites: Iterable[Site], scales: Iterable[float]
) -> dict[float, Standing]:
    """The mean update of each site in the unpruned model's stream, as what stands there, by its scale.

    Args:
        model: the unpruned model.
        batches: the text that the mean is over.
        sites: which.
        scales: factors on the mean.
    """
    anatomy = Anatomy.of(model)
    means = mean_updates(model, batches, sorted(set(sites)))

    def standing(scale: float) -> Standing:
        found: dict[Site, EmulatedUpdate] = {}
        for site, mean in means.items():
            found[site] = EmulatedUpdate(anatomy.hidden_size, scale=scale)
            found[site].calibrate(mean)
            found[site].to(input_device(model))
        return found

    return {scale: standing(scale) for scale in scales}


def variant_losses(
    model: PreTrainedModel,
    batches: Batches | AnswerBatches,
    variants: Iterable[Absent],
    standing: Mapping[str, Standing] | None = None,
    watch: Callable[[Iterable[Batch], int], Iterator[Batch]] = lambda items, _: iter(items),
    saved: SavedSums | None = None,
    name: str = PASS,
) -> dict[Variant, DomainLoss]:
    """The loss of variants by document, with shared prefixes.

    Args:
        model: the model.
        batches: a domain's text, or answers, which count as its documents.
        variants: the absent sites of each; the unpruned model is added, as the variant ``("none", frozenset())``.
        standing: what stands in them, by names of its own; every variant is run with nothing (``"none"``) and with each
            of these.
        watch: goes through the batches, of which so many are left, and shows how far it is.
        saved: keeps the sums on the way, and takes up those of a run before.
        name: of the pass in ``saved``.
    """
    pruned = [variant for variant in dict.fromkeys(variants) if variant]
    wanted = {NONE: [UNPRUNED, *pruned], **dict.fromkeys(standing or {}, pruned)}
    device = input_device(model)
    metrics = {
        (label, absent): DocumentLoss(batches.document_count).to(device)
        for label, group in wanted.items()
        for absent in group
    }
    states = {f"{label} {' '.join(map(str, sorted(absent)))}": metric for (label, absent), metric in metrics.items()}
    start = saved.restore(name, states) if saved is not None else 0
    rest: Iterable[Batch] = islice(batches, start, None)
    if saved is not None:
        rest = saved.saving(name, states, rest, start, len(batches))
    with evaluating(model), switchable(model):
        for batch in on_device(watch(rest, len(batches) - start), model):
            recording = record(model, batch)
            for label, group in wanted.items():
                for place, hidden in run_variants(recording.again(), group, (standing or {}).get(label)):
                    metrics[label, group[place]].update(token_losses(model, batch, hidden), batch)
    return {variant: metric.domain_loss() for variant, metric in metrics.items()}
