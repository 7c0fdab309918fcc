"""What is explained of updates, against least squares on all tokens at once."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import pytest
import torch
from torch import Tensor

from depthprune import moments
from depthprune.influence import cca_bound
from depthprune.recovery import explained as room
from depthprune.recovery.explained import measure_updates
from depthprune.recovery.regression import STRENGTHS
from depthprune.sites import PruningPlan, Site
from depthprune.surgery import install_slots
from tests import brute_force
from tests.influence.test_cca_bound import collected
from tests.tiny_models import WIDTH, tiny_batch, tiny_model

TEXTS = [[tiny_batch("left", 4, 14, seed=seed), tiny_batch(None, 3, 12, seed=seed + 1)] for seed in (1, 20, 40)]
SPANS = [(Site(1, "block"),), (Site(2, "attention"),), (Site(3, "block"), Site(4, "block")), (Site(5, "mlp"),)]
Text = Iterable[Mapping[str, Tensor]]


def tokens_of(batches: Text) -> dict[str, tuple[Tensor, Tensor]]:
    """What each span reads and adds, ``(N, D)``, by the name of its first site."""
    model = tiny_model()
    names = [str(site) for span in SPANS for site in span]
    seen = {name: tuple(map(torch.tensor, pair)) for name, pair in collected(model, batches, names).items()}
    exact = brute_force.exact_copy(model)
    streams = [brute_force.streams(exact, batch) for batch in batches]
    found = {}
    for span in SPANS:
        first, last = str(span[0]), str(span[-1])
        updates = torch.cat([stream[last][1] - stream[first][0] for stream in streams])
        found[first] = (seen[first][0], updates)
    return found


def share(fit: tuple[Tensor, Tensor], other: tuple[Tensor, Tensor], rank: int, strength: float) -> float:
    """The share that the ridge map of a rank explains of other tokens, from an SVD of its fitted values."""
    (reads, updates), (x, y) = fit, (fit[0].mean(0), fit[1].mean(0))
    ridge = strength * reads.var(0, correction=0).mean() * len(reads)
    rows = torch.cat([reads - x, ridge.sqrt() * torch.eye(WIDTH, dtype=reads.dtype)])
    wanted = torch.cat([updates - y, torch.zeros(WIDTH, WIDTH, dtype=reads.dtype)])
    weight = torch.linalg.lstsq(rows, wanted).solution
    directions = torch.linalg.svd(rows @ weight, full_matrices=False).Vh[:rank]
    predicted = y + (other[0] - x) @ weight @ directions.T @ directions
    return 1 - float((other[1] - predicted).square().sum() / other[1].square().sum())


@pytest.mark.parametrize("rank", [0, 1, 5, WIDTH])
def test_shares_are_those_of_least_squares_on_all_tokens(rank: int) -> None:
    fit, tune, held_out = map(tokens_of, TEXTS)
    measured = measure_updates(tiny_model(), SPANS, *TEXTS)
    assert list(measured.explained) == [span[0] for span in SPANS]
    for site, found in measured.explained.items():
        name = str(site)
        best = max(STRENGTHS, key=lambda strength: share(fit[name], tune[name], rank, strength))
        expected = share(fit[name], held_out[name], rank, best)
        assert float(found.by_rank[rank]) == pytest.approx(expected, abs=1e-4), name
        assert len(found.by_rank) == WIDTH + 1
        assert found.tokens == len(held_out[name][0])


def test_a_constant_explains_the_square_of_the_mean() -> None:
    measured = measure_updates(tiny_model(), SPANS, TEXTS[0], TEXTS[1], TEXTS[0])
    for name, (_, updates) in tokens_of(TEXTS[0]).items():
        found = measured.explained[Site.parse(name)]
        expected = updates.mean(0).square().sum() / updates.square().sum(1).mean()
        assert found.constant == pytest.approx(float(expected), abs=1e-5)
        assert found.linear == float(found.by_rank[-1]) > found.constant  # on the text that it was fitted to


def test_mean_updates_of_all_sites_of_these_kinds_are_compared() -> None:
    model = tiny_model()
    means = brute_force.mean_updates(brute_force.exact_copy(model), TEXTS[0])
    similarity = measure_updates(model, SPANS[:2], *TEXTS).similarity()
    assert set(similarity) == {"block", "attention"}
    for kind, (sites, matrix) in similarity.items():
        assert [str(site) for site in sites] == [f"{kind}.{index}" for index in range(6)]
        rows = [means[str(site)] for site in sites]
        expected = [[float(torch.cosine_similarity(one, other, dim=0)) for other in rows] for one in rows]
        assert matrix.tolist() == [pytest.approx(row, abs=1e-5) for row in expected]


def test_groups_and_slots_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = measure_updates(tiny_model(), SPANS, *TEXTS)
    monkeypatch.setattr(room, "site_groups", lambda sites, width, _: cca_bound.site_groups(sites, width, 1))
    model = tiny_model()
    install_slots(model, PruningPlan.of("block.1", "attention.2"))
    parts = measure_updates(model, SPANS, *TEXTS)
    for site, found in whole.explained.items():
        torch.testing.assert_close(parts.explained[site].by_rank, found.by_rank)
    for site, mean in whole.means.items():
        torch.testing.assert_close(parts.means[site], mean)


def test_massive_tokens_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(moments, "MASSIVE", 1.2)  # times the median
    updates: dict[str, list[Tensor]] = {"block.1": [], "block.3": []}
    left_out = 0
    for batch in TEXTS[0]:
        streams = brute_force.streams(brute_force.exact_copy(tiny_model()), batch)
        for name, rows in updates.items():
            ends = streams[name][0], streams["block.4" if name == "block.3" else name][1]
            norms = [end.norm(dim=-1) for end in ends]
            small = torch.stack([norm <= 1.2 * norm.median() for norm in norms]).all(0)
            rows.append((ends[1] - ends[0])[small])
            left_out += int((~small).sum())
    assert left_out > 2
    measured = measure_updates(tiny_model(), SPANS, TEXTS[0], TEXTS[1], TEXTS[0], leave_out_massive=True)
    for name, parts in updates.items():
        kept = torch.cat(parts)
        found = measured.explained[Site.parse(name)]
        assert found.tokens == len(kept)
        expected = kept.mean(0).square().sum() / kept.square().sum(1).mean()
        assert found.constant == pytest.approx(float(expected), abs=1e-5)
    mean = torch.cat(updates["block.1"]).mean(0).float()
    torch.testing.assert_close(measured.means[Site(1, "block")], mean, rtol=1e-4, atol=1e-6)


def test_an_empty_text_is_refused() -> None:
    with pytest.raises(ValueError, match="no token to score or calibrate on"):
        measure_updates(tiny_model(), SPANS, TEXTS[0], TEXTS[1], [])
