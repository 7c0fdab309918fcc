"""Maps of least cosine distance, against scipy's minimiser from the same start."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.optimize import minimize
from torch import Tensor

from depthprune.covariances import PairedMoments
from depthprune.recovery.closed_form import calibrate_on
from depthprune.recovery.cosine import Tokens, cosine_map
from depthprune.recovery.fitting import Fitting
from depthprune.recovery.regression import AffineMap, best_map
from depthprune.removal import remove_for_good
from depthprune.replacements.registry import build_replacement
from depthprune.sites import PruningPlan
from depthprune.surgery import install_slots
from tests import brute_force
from tests.brute_force import NOTHING
from tests.recovery.test_fitting import stream, text
from tests.test_refit import layer_of
from tests.tiny_models import tiny_model

INPUTS, WIDTH, COUNT = 7, 6, 300


def tokens(seed: int, noise: float = 1.0, truth: int = 0) -> Tokens:
    """Tokens of unlike sizes, some with a very large stream."""
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(COUNT, INPUTS, generator=generator) * torch.linspace(0.2, 2, INPUTS) + 0.5
    now = torch.randn(COUNT, WIDTH, generator=generator)
    now[::50] *= 30
    change = torch.randn(INPUTS, WIDTH, generator=torch.Generator().manual_seed(truth))
    wanted = now + inputs @ change + 0.3 + noise * torch.randn(COUNT, WIDTH, generator=generator)
    return Tokens(inputs, now, wanted * torch.rand(COUNT, 1, generator=generator))


def some(whole: Tokens, rows: slice) -> Tokens:
    return Tokens(*(part[rows] for part in (whole.inputs, whole.stream, whole.wanted)))


def distance(at: Tokens, weight: Any, constant: Any = 0.0) -> float:
    """The mean cosine distance, in numpy."""
    inputs, now, wanted = (part.double().numpy() for part in (at.inputs, at.stream, at.wanted))
    changed = now + inputs @ np.asarray(weight).T + np.asarray(constant)
    lengths = np.linalg.norm(changed, axis=1) * np.linalg.norm(wanted, axis=1)
    return float(np.mean(1 - (changed * wanted).sum(1) / lengths))


def least_squares(at: Tokens, has_constant: bool) -> AffineMap:
    moments = PairedMoments(at.inputs.shape[1], at.stream.shape[1])
    moments.update(at.inputs, at.wanted - at.stream)
    covariances = moments.covariances() if has_constant else moments.covariances().about_zero()
    return best_map(covariances, covariances, strengths=[1e-7])


def by_scipy(at: Tokens, start: Tensor, constant: Tensor | None = None) -> float:
    """The least mean cosine distance that scipy finds from a start ``(D, P)``, and a constant ``(D,)``."""
    inputs, now, wanted = (part.double() for part in (at.inputs, at.stream, at.wanted))
    if constant is not None:
        inputs = torch.cat([inputs, torch.ones(len(inputs), 1).double()], 1)
        start = torch.cat([start, constant[:, None]], 1)

    def value(flat: np.ndarray) -> tuple[float, np.ndarray]:
        weight = torch.tensor(flat, requires_grad=True)
        changed = now + inputs @ weight.view(start.shape).T
        mean = (1 - (changed * wanted).sum(1) / (changed.norm(dim=1) * wanted.norm(dim=1))).mean()
        mean.backward()
        assert weight.grad is not None
        return mean.item(), weight.grad.numpy()

    options = {"maxiter": 3000, "maxfun": 6000, "ftol": 1e-15, "gtol": 1e-10}
    found = minimize(value, start.double().flatten().numpy(), jac=True, method="L-BFGS-B", options=options)
    return float(found.fun)


@pytest.mark.parametrize("has_constant", [False, True])
def test_the_minimum_is_that_of_an_independent_solver(has_constant: bool) -> None:
    fit = tokens(1)
    halves = [some(fit, slice(99)), some(fit, slice(99, None))]
    start = least_squares(fit, has_constant)
    first = start.y - start.weight @ start.x
    found = cosine_map(halves, [fit], start, has_constant)
    reached = distance(fit, found.weight, found.y)
    assert reached <= by_scipy(fit, start.weight, first if has_constant else None) + 1e-4
    assert reached < distance(fit, start.weight, first) - 0.01
    assert found.error == pytest.approx(reached / distance(fit, torch.zeros(WIDTH, INPUTS)), rel=1e-4)
    assert bool(found.y.any()) == has_constant
    assert not found.x.any()


def test_the_search_ends_when_held_out_tokens_no_longer_gain() -> None:
    many = tokens(1, noise=3.0)
    few = some(many, slice(12))
    held_out = tokens(2, noise=3.0)
    zero = torch.zeros(WIDTH, INPUTS).double()
    nothing = AffineMap(torch.zeros(INPUTS), torch.zeros(WIDTH), zero, torch.eye(INPUTS).double(), 0.0, 1.0)
    stopped, through = (cosine_map([few], [tune], nothing, False) for tune in (held_out, few))
    assert distance(few, through.weight) < distance(few, stopped.weight)
    assert distance(held_out, stopped.weight) < distance(held_out, through.weight)
    unlike = tokens(3, truth=9)  # to which all that helps the first does harm
    unlike = Tokens(unlike.inputs, unlike.stream, unlike.stream - 0.1 * (unlike.wanted - unlike.stream))
    at_start = cosine_map([unlike], [unlike], nothing, False)
    kept = cosine_map([tokens(1)], [Tokens(unlike.inputs, unlike.stream, unlike.stream)], nothing, False)
    assert at_start.weight.any()
    assert torch.equal(kept.weight, zero)


@pytest.mark.parametrize("family", ["llama", "gpt2"])  # without and with a bias
def test_a_layer_refit_by_cosine_distance(family: str) -> None:
    reached = {}
    for how in ("squared", "cosine"):
        model = tiny_model(family)
        plan = PruningPlan.of(
            "block.2", "block.3", replacement="refit", before=1, after=0, through="outputs", distance=how
        )
        install_slots(model, plan)
        calibrate_on(model, plan, text(), text(), Fitting())
        remove_for_good(model, plan)
        reached[how] = stream(model, "block.1", 1, text())
    model = tiny_model(family)
    wanted = stream(model, "block.3", 1, text())
    pruned = brute_force.without(model, {"block.2": NOTHING, "block.3": NOTHING})
    layer = layer_of(pruned, "mlp.1")
    before, after = (stream(pruned, "mlp.1", end, text()) for end in (0, 1))
    written = after - before - (0 if layer.bias is None else layer.bias.detach())
    at = Tokens(written, after, wanted)
    has_bias = layer.bias is not None
    start = least_squares(at, has_bias)
    least = by_scipy(at, start.weight, start.y - start.weight @ start.x if has_bias else None)

    def mean(found: Tensor) -> float:
        return float((1 - torch.cosine_similarity(found.double(), wanted.double())).mean())

    assert mean(reached["cosine"]) <= least + 1e-4
    assert mean(reached["cosine"]) < mean(reached["squared"])


def _half(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    fit, rows = tokens(1), (slice(120), slice(120, None))[rank]
    mine = some(fit, rows)
    tune = [fit] if rank else []  # the other has none
    found = cosine_map([mine], tune, least_squares(fit, True), True)
    torch.save([found.weight, found.y], f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


def test_two_processes_find_what_one_finds(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(_half, (str(tmp_path),), nprocs=2)
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1))
    for one, other in zip(first, second, strict=True):
        assert torch.equal(one, other)
    fit = tokens(1)
    alone = cosine_map([fit], [fit], least_squares(fit, True), True)
    assert distance(fit, *first) == pytest.approx(distance(fit, alone.weight, alone.y), abs=1e-4)


def test_a_wrong_distance_is_refused() -> None:
    with pytest.raises(ValueError, match="distance of a refit 'cosin'"):
        build_replacement("refit", WIDTH, {"distance": "cosin"})
