"""Held-out loss by how many sites go, for the orders of several influence metrics."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import islice

from transformers import PreTrainedModel

from depthprune.data.batches import Batches
from depthprune.evaluation.domains import DocumentLoss, DomainLoss
from depthprune.head import Batch, evaluating, input_device, on_device, token_losses
from depthprune.influence.table import InfluenceTable
from depthprune.names import unknown_name
from depthprune.saved_sums import SavedSums
from depthprune.sites import KINDS
from depthprune.variants import Absent, record, run_variants, switchable

UNPRUNED: Absent = frozenset()
PASS = "held-out loss"


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
    for kind in kinds:
        if kind not in KINDS:
            raise unknown_name("kind of site", kind, KINDS)
    if not metrics or not any(kinds.values()):
        raise ValueError("There is nothing to remove: name a metric and a number of sites, such as {block: [3, 6]}.")
    found: dict[tuple[str, str, int], Absent] = {}
    for metric in metrics:
        for kind, counts in kinds.items():
            if any(site.kind == kind for site in table.of_metric(metric)):
                for count in counts:
                    found[metric, kind, count] = frozenset(table.plan(metric, [kind], count).sites)
    return found


def variant_losses(
    model: PreTrainedModel,
    batches: Batches,
    variants: Iterable[Absent],
    watch: Callable[[Iterable[Batch], int], Iterator[Batch]] = lambda items, _: iter(items),
    saved: SavedSums | None = None,
) -> dict[Absent, DomainLoss]:
    """The loss of variants with nothing in the removed places, by document, with shared prefixes.

    Args:
        model: the model.
        batches: a domain's text.
        variants: the absent sites of each; the unpruned model is added.
        watch: goes through the batches, of which so many are left, and shows how far it is.
        saved: keeps the sums on the way, and takes up those of a run before.
    """
    wanted = list(dict.fromkeys([UNPRUNED, *variants]))
    metrics = {variant: DocumentLoss(batches.document_count).to(input_device(model)) for variant in wanted}
    states = {" ".join(map(str, sorted(variant))) or "unpruned": metric for variant, metric in metrics.items()}
    start = saved.restore(PASS, states) if saved is not None else 0
    rest: Iterable[Batch] = islice(batches, start, None)
    if saved is not None:
        rest = saved.saving(PASS, states, rest, start, len(batches))
    with evaluating(model), switchable(model):
        for batch in on_device(watch(rest, len(batches) - start), model):
            for place, hidden in run_variants(record(model, batch), wanted):
                metrics[wanted[place]].update(token_losses(model, batch, hidden), batch)
    return {variant: metric.domain_loss() for variant, metric in metrics.items()}
