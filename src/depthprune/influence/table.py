"""The one result table of all influence metrics: higher means keep."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from depthprune.files import read_json, write_json, write_text
from depthprune.names import unknown_name
from depthprune.sites import Fingerprint, PruningPlan, Removal, Site, check_kinds

if TYPE_CHECKING:
    from matplotlib.figure import Figure

TABLE_VERSION = 1


@dataclass(frozen=True)
class InfluenceTable:
    """The influence of sites under one or more metrics.

    Attributes:
        values: metric name to site to influence; higher means keep.
        fingerprint: the unpruned model that was scored.
        provenance: text, tokens, seed, denominator and the like.
        mean_updates: the mean update ``(D,)`` of each site from the same pass, if it was taken; not saved.
        errors: metric name to site to standard error, over sequences or over batches that share what was drawn; a
            metric that has none (one sequence only, or nothing random) is left out.
        stability: metric name to kind of site to, for n from 1, the share of its n lowest sites that stays among the
            n lowest when the text is resampled.
    """

    values: Mapping[str, Mapping[Site, float]]
    fingerprint: Fingerprint
    provenance: Mapping[str, Any]
    mean_updates: Mapping[Site, Tensor] = field(default_factory=dict, repr=False, compare=False)
    errors: Mapping[str, Mapping[Site, float]] = field(default_factory=dict)
    stability: Mapping[str, Mapping[str, Sequence[float]]] = field(default_factory=dict)

    def __getitem__(self, metric: str) -> dict[str, float]:
        """One metric's influence by site name, such as ``table["cosine"]["attention.12"]``.

        Raises:
            ValueError: the table does not have the metric.
        """
        return {str(site): value for site, value in self.of_metric(metric).items()}

    def of_metric(self, metric: str) -> Mapping[Site, float]:
        """One metric's influence by site.

        Raises:
            ValueError: the table does not have the metric.
        """
        if metric not in self.values:
            raise unknown_name("metric (of this table)", metric, self.values)
        return self.values[metric]

    @property
    def metrics(self) -> tuple[str, ...]:
        """The metrics' names."""
        return tuple(self.values)

    @property
    def sites(self) -> tuple[Site, ...]:
        """The scored sites, in depth order."""
        return tuple(sorted({site for column in self.values.values() for site in column}))

    def order(self, metric: str, kinds: Sequence[str]) -> list[Site]:
        """Sites of these kinds, the first to remove first. Of equals, the deeper goes first.

        Raises:
            ValueError: unknown metric or kind, a kind that was not scored, or a value that is not finite.
        """
        column = self.of_metric(metric)
        check_kinds(kinds)
        for kind in kinds:
            if not any(site.kind == kind for site in column):
                raise ValueError(f"The table holds no {kind} sites: score them first.")
        chosen = [site for site in column if site.kind in kinds]
        _check_finite(metric, {site: column[site] for site in chosen})
        return sorted(chosen, key=lambda site: (column[site], -site.index))

    def plan(
        self, metric: str, kinds: Sequence[str], remove: int, replacement: str = "none", **options: Any
    ) -> PruningPlan:
        """The plan that removes the sites of lowest influence.

        A site that overlaps one that goes already is passed over. The values of ``angular`` over runs of several
        blocks are those of whole runs: there the run with the lowest one goes, in one removal.

        Raises:
            ValueError: unknown metric or kind, more to remove than there is, or other than the runs that were scored.
        """
        if not kinds:
            raise ValueError("kinds is empty: name at least one of block, attention, mlp.")
        if type(remove) is not int or remove < 1:
            raise ValueError(f"Cannot remove {remove!r} sites: ask for 1 or more.")
        order = self.order(metric, kinds)
        provenance = {**self.provenance, "metric": metric, "kinds": list(kinds)}
        length = self.provenance.get("run_length", 1)
        if metric == "angular" and length > 1:
            if remove != length:
                raise ValueError(
                    f"The table's angular values are of runs of {length} blocks, which say nothing of {remove}: remove "
                    f"{length}, or score again with run_length {remove}."
                )
            removals = _run_removals(self._run(order[0], length), replacement, options)
            return PruningPlan(removals, self.fingerprint, provenance)
        chosen: list[Site] = []
        for site in order:
            if len(chosen) == remove:
                break
            if not any(site.index == other.index and "block" in (site.kind, other.kind) for other in chosen):
                chosen.append(site)
        if len(chosen) < remove:
            raise ValueError(f"Cannot remove {remove} of {len(order)} {' and '.join(kinds)} sites: choose fewer.")
        return PruningPlan(
            tuple(Removal((site,), replacement, options) for site in chosen), self.fingerprint, provenance
        )

    def carried_to(self, kind: str) -> InfluenceTable:
        """Blocks' influence taken for the attentions or MLPs inside them, as the paper does (arXiv 2407.16286).

        Args:
            kind: ``"attention"`` or ``"mlp"``.

        Raises:
            ValueError: another kind, or the table scored no blocks by themselves.
        """
        if kind not in ("attention", "mlp"):
            raise unknown_name("kind of site inside a block", kind, ("attention", "mlp"))
        values = {
            metric: {Site(site.index, kind): value for site, value in column.items() if site.kind == "block"}
            for metric, column in self.values.items()
            if metric != "angular" or self.provenance.get("run_length", 1) == 1
        }
        values = {metric: column for metric, column in values.items() if column}
        if not values:
            raise ValueError("The table holds no single blocks to carry the influence of: score them first.")
        return InfluenceTable(values, self.fingerprint, {**self.provenance, "carried_from": "block"})

    def _run(self, first: Site, length: int) -> tuple[Site, ...]:
        """The blocks of the run that starts with one; in a pruned model, blocks that are gone are passed over."""
        kept = self.provenance.get("kept_blocks") or range(first.index + length)
        place = kept.index(first.index)
        return tuple(Site(index, "block") for index in kept[place : place + length])

    def to_dict(self) -> dict[str, Any]:
        """The table as JSON-ready data."""
        return {
            "depthprune_influence": TABLE_VERSION,
            "provenance": dict(self.provenance),
            "fingerprint": {
                "architecture": dict(self.fingerprint.architecture),
                "weights": self.fingerprint.weights,
            },
            "values": {
                metric: {str(site): value for site, value in column.items()} for metric, column in self.values.items()
            },
            "errors": {
                metric: {str(site): value for site, value in column.items()} for metric, column in self.errors.items()
            },
            "stability": {metric: dict(kinds) for metric, kinds in self.stability.items()},
        }

    def to_json(self, path: Path | str) -> None:
        """Write the table as JSON, whole or not at all.

        Raises:
            ValueError: a value is not finite.
        """
        self.check_finite()
        write_json(path, self.to_dict())

    def check_finite(self) -> None:
        """Check every value.

        Raises:
            ValueError: one is not finite.
        """
        for metric, column in self.values.items():
            _check_finite(metric, column)

    @classmethod
    def from_dict(cls, data: Any, origin: str = "the table") -> InfluenceTable:
        """Read what :meth:`to_dict` gave.

        Raises:
            ValueError: it is not an influence table, or one of another version.
        """
        if not isinstance(data, dict) or data.get("depthprune_influence") != TABLE_VERSION:
            raise ValueError(
                f"{origin} is not an influence table of version {TABLE_VERSION}: make one with `depthprune influence`."
            )
        try:
            values = {
                metric: {Site.parse(site): float(value) for site, value in column.items()}
                for metric, column in data["values"].items()
            }
            if not values:
                raise ValueError("it holds no metric")
            fingerprint = Fingerprint(data["fingerprint"]["architecture"], data["fingerprint"]["weights"])
            errors = {
                metric: {Site.parse(site): float(value) for site, value in column.items()}
                for metric, column in data.get("errors", {}).items()
            }
            steady = {metric: dict(kinds) for metric, kinds in data.get("stability", {}).items()}
            provenance = dict(data["provenance"])
            if type(provenance.get("run_length", 1)) is not int:
                raise ValueError(f"its run_length is {provenance['run_length']!r}")
            return cls(values, fingerprint, provenance, errors=errors, stability=steady)
        except (KeyError, TypeError, AttributeError, ValueError, OverflowError) as error:
            raise ValueError(f"{origin} is a damaged influence table ({error!r}): make it anew.") from error

    @classmethod
    def load(cls, path: Path | str) -> InfluenceTable:
        """Read a table's JSON file.

        Raises:
            ValueError: there is no such file, or it is not an influence table.
        """
        return cls.from_dict(read_json(path, "an influence table"), str(path))

    def to_csv(self, path: Path | str) -> None:
        """Write one row for each site: its name, kind, block, and each metric's value and standard error."""
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        columns = [(metric, self.values[metric]) for metric in self.metrics]
        columns += [(f"{metric}_error", column) for metric, column in self.errors.items()]
        writer.writerow(["site", "kind", "block", *(name for name, _ in columns)])
        for site in self.sites:
            row = [column.get(site, "") for _, column in columns]
            writer.writerow([str(site), site.kind, site.index, *row])
        write_text(path, text.getvalue())

    def plot(self) -> Figure:
        """Influence by depth with error bars, one panel for each metric."""
        from depthprune.influence.figures import influence_figure

        return influence_figure(self)


def _check_finite(metric: str, column: Mapping[Site, float]) -> None:
    for site, value in column.items():
        if not math.isfinite(value):
            raise ValueError(f"The {metric} influence of {site} is {value}: check the model and the text.")


def _run_removals(run: tuple[Site, ...], replacement: str, options: Mapping[str, Any]) -> tuple[Removal, ...]:
    """One removal of a run of blocks; where blocks between them are gone and nothing is put there, one for each."""
    if replacement == "none" and run[-1].index - run[0].index >= len(run):
        return tuple(Removal((site,)) for site in run)
    return (Removal(run, replacement, options),)
