"""The CCA bound against numpy's eigenvalues on collected reads and streams of a copy in float64."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from depthprune.influence import estimate
from depthprune.influence.cca_bound import RIDGE, cca_bound, run_cca_bound, site_groups
from depthprune.influence.estimate import estimate_influence
from depthprune.pruning import prune
from depthprune.sites import PruningPlan, Site
from tests import brute_force
from tests.brute_force import NOTHING, part, without
from tests.tiny_models import BLOCKS, FAMILIES, WIDTH, calibration, tiny_batch, tiny_model

SITES = [f"{kind}.{index}" for index in range(BLOCKS) for kind in ("block", "attention", "mlp")]


def collected(
    model: PreTrainedModel, batches: Iterable[Mapping[str, Tensor]], names: Iterable[str]
) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """What each site reads and the stream after it, ``(N, D)`` float64 without padding."""
    exact = brute_force.exact_copy(model)
    rows: dict[str, tuple[list[Tensor], list[Tensor]]] = {name: ([], []) for name in names}

    def catcher(name: str, seen: dict[str, Tensor]) -> Callable[..., None]:
        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            # the first call is the model's own; brute_force.streams runs parallel blocks again
            seen.setdefault(name, args[0] if args else kwargs["hidden_states"])

        return hook

    for batch in batches:
        mask = batch.get("attention_mask", torch.ones_like(batch["input_ids"])).bool().flatten()
        seen: dict[str, Tensor] = {}
        handles = [part(exact, name).register_forward_pre_hook(catcher(name, seen), with_kwargs=True) for name in rows]
        streams = brute_force.streams(exact, batch)
        for handle in handles:
            handle.remove()
        for name, (reads, afters) in rows.items():
            reads.append(seen[name].reshape(len(mask), -1)[mask])
            afters.append(streams[name][1])
    return {name: (stacked(reads), stacked(afters)) for name, (reads, afters) in rows.items()}


def stacked(parts: list[Tensor]) -> np.ndarray:
    return torch.cat(parts).double().numpy()


def by_hand(read: np.ndarray, after: np.ndarray) -> float:
    """``1/D sum (1 - rho^2)`` with the squared correlations as eigenvalues; each covariance with its ridge."""
    width = read.shape[1]
    whole = np.cov(read, after, rowvar=False, bias=True)
    rr, ry, yy = whole[:width, :width], whole[:width, width:], whole[width:, width:]
    rr, yy = (matrix + RIDGE * np.trace(matrix) / width * np.eye(width) for matrix in (rr, yy))
    squares = np.linalg.eigvals(np.linalg.inv(rr) @ ry @ np.linalg.inv(yy) @ ry.T)
    return float((1 - squares.real).mean())


@pytest.mark.parametrize("family", FAMILIES)
def test_equals_the_correlations_of_collected_reads(family: str) -> None:
    model, batches = tiny_model(family), calibration()
    table = estimate_influence(model, batches, ["cca_bound"])
    wanted = {name: by_hand(*rows) for name, rows in collected(model, batches, SITES).items()}
    assert table["cca_bound"] == pytest.approx(wanted, rel=1e-5)
    assert len(set(wanted.values())) == len(SITES)
    assert table.errors == {}
    assert table.provenance["tokens"] == 92


def test_is_the_error_of_the_best_linear_map_of_whitened_streams() -> None:
    generator = torch.Generator().manual_seed(0)
    read, noise = torch.randn(2, 4000, 8, generator=generator, dtype=torch.float64)
    read, noise = read - read.mean(0), noise - noise.mean(0)
    after = read @ torch.randn(8, 8, generator=generator, dtype=torch.float64) + noise
    rr, ry, yy = (one.T @ other / 4000 for one, other in ((read, read), (read, after), (after, after)))
    white = torch.linalg.solve_triangular(torch.linalg.cholesky(yy), after.T, upper=False).T
    fit = read @ torch.linalg.lstsq(read, white).solution
    assert float(cca_bound(rr, ry, yy)) == pytest.approx(float((white - fit).square().mean()), rel=1e-4)


def test_linear_and_unrelated_reads_are_the_ends() -> None:
    generator = torch.Generator().manual_seed(1)
    square = torch.randn(8, 8, generator=generator, dtype=torch.float64)
    rr, turn = square @ square.T + torch.eye(8), torch.randn(8, 8, generator=generator, dtype=torch.float64)
    assert float(cca_bound(rr, rr @ turn, turn.T @ rr @ turn)) < 1e-3
    assert float(cca_bound(rr, torch.zeros_like(rr), rr)) == 1.0
    assert 0 <= float(cca_bound(torch.zeros_like(rr), torch.zeros_like(rr), rr)) <= 1  # an update that is no use


def test_more_tokens_than_fit_in_a_batch_are_the_same_text() -> None:
    model, batch = tiny_model(), tiny_batch("left", 4, 14)
    rows = [{name: values[row : row + 1] for name, values in batch.items()} for row in range(4)]
    tables = [estimate_influence(model, text, ["cca_bound"]) for text in ([batch], rows)]
    assert tables[0]["cca_bound"] == pytest.approx(tables[1]["cca_bound"], rel=1e-5)


def test_groups_give_the_same_values(monkeypatch: pytest.MonkeyPatch) -> None:
    model, calls = tiny_model(), []
    whole = estimate_influence(model, calibration(), ["cca_bound"])
    room = 5 * 2 * 8 * (3 * WIDTH * WIDTH + 2 * WIDTH)  # bytes of 5 sites
    monkeypatch.setattr(estimate, "site_groups", lambda sites, width: site_groups(sites, width, room))
    model.model.register_forward_hook(lambda *_: calls.append(1))
    grouped = estimate_influence(model, iter(calibration()), ["cca_bound"])
    assert len(calls) == 3 * 4  # 18 sites in 4 groups
    assert grouped["cca_bound"] == whole["cca_bound"]
    assert grouped.provenance == whole.provenance


def test_sums_stay_under_a_gigabyte() -> None:
    sites = [Site(index, "block") for index in range(90)]
    for width in (576, 2048, 4096):
        groups = site_groups(sites, width)
        assert [site for group in groups for site in group] == sites
        assert max(map(len, groups)) * 2 * 8 * 3 * width**2 < 10**9
    assert max(map(len, site_groups(sites, 16384))) == 1  # which no group can make smaller


def test_a_pruned_model_is_scored_as_it_is() -> None:
    model, batches = tiny_model("olmo2"), calibration()
    reference = without(model, {"block.1": NOTHING, "attention.3": NOTHING})
    prune(model, PruningPlan.of("block.1", "attention.3"))
    table = estimate_influence(model, batches, ["cca_bound"])
    names = [str(site) for site in table.sites]
    assert "attention.3" not in names
    assert "mlp.3" in names
    wanted = {name: by_hand(*rows) for name, rows in collected(reference, batches, names).items()}
    assert table["cca_bound"] == pytest.approx(wanted, rel=1e-5)


def test_without_text() -> None:
    empty = {"input_ids": torch.ones(1, 4, dtype=torch.long), "attention_mask": torch.zeros(1, 4, dtype=torch.long)}
    for batches in ([], [empty]):
        with pytest.raises(ValueError, match="no token to score"):
            run_cca_bound(tiny_model(), batches, [Site(0, "block")])
