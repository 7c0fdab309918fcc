"""The map after which the stream points as nearly as it can where it should: mean cosine distance, minimised by L-BFGS.

The objective is that of ReplaceMe's numerical variant (arXiv 2505.02819) with the stream beside the layer counted in.
There, Adam goes from the identity over ten epochs of 1024 tokens a step; here L-BFGS starts at the least-squares map
and goes on over all tokens at once until a held-out text no longer gains.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from depthprune.recovery.regression import AffineMap
from depthprune.shards import pooled

STEPS = 10  # of L-BFGS between two looks at the held-out text
LOOKS = 40  # at most
PATIENCE = 2  # looks without a gain before the search ends
GAIN = 1e-5  # that counts, as a share of the distance


@dataclass(frozen=True)
class Tokens:
    """What a layer's change starts from, for some tokens in fp32.

    Attributes:
        inputs: what the change maps, ``(N, P)``.
        stream: the stream as it is without a change, ``(N, D)``.
        wanted: the stream as it should be, ``(N, D)``.
    """

    inputs: Tensor
    stream: Tensor
    wanted: Tensor


def cosine_distance(tokens: Tokens, weight: Tensor, constant: Tensor | None = None) -> Tensor:
    """The cosine distance between ``stream + weight inputs + constant`` and what is wanted, summed over tokens.

    Args:
        tokens: the tokens.
        weight: ``(D, P)``.
        constant: ``(D,)``, if there is one.
    """
    changed = tokens.stream + functional.linear(tokens.inputs, weight, constant)
    return (1 - functional.cosine_similarity(changed, tokens.wanted, dim=-1)).sum(dtype=torch.float64)


def cosine_map(fit: Sequence[Tokens], tune: Sequence[Tokens], start: AffineMap, has_constant: bool) -> AffineMap:
    """The map that minimises the mean cosine distance to the wanted stream, stopped early on held-out tokens.

    All tokens are held meanwhile: ``P + 2 D`` numbers of 4 bytes for each.

    Args:
        fit: the tokens to fit to, in parts.
        tune: the held-out ones.
        start: where the search begins.
        has_constant: whether the map has a constant.

    Returns:
        The map that was best on the held-out tokens; its error is their cosine distance as a share of that without it.
    """
    weight = start.weight.float().requires_grad_()
    parameters = [weight]
    if has_constant:
        parameters.append((start.y - start.weight @ start.x).float().requires_grad_())
    optimizer = torch.optim.LBFGS(
        parameters, max_iter=STEPS, tolerance_grad=0.0, tolerance_change=0.0, line_search_fn="strong_wolfe"
    )
    (count,) = pooled(weight.new_tensor(sum(len(part.inputs) for part in fit)))

    def mean_distance() -> Tensor:
        optimizer.zero_grad()
        total = weight.new_zeros((), dtype=torch.float64)
        for part in fit:
            with torch.enable_grad():
                distance = cosine_distance(part, *parameters) / count
                distance.backward()
            total += distance.detach()
        pooled(total, *(parameter.grad for parameter in parameters if parameter.grad is not None))
        return total

    before = _mean(tune, [torch.zeros_like(parameter) for parameter in parameters])
    lowest, best, waited = float("inf"), [parameter.detach().clone() for parameter in parameters], 0
    for look in range(LOOKS + 1):
        if look:
            optimizer.step(mean_distance)
        held_out = _mean(tune, parameters)
        waited = 0 if held_out < lowest * (1 - GAIN) else waited + 1
        if held_out < lowest:
            lowest, best = held_out, [parameter.detach().clone() for parameter in parameters]
        if waited == PATIENCE:
            break
    found = best[0].double()
    constant = best[1].double() if has_constant else found.new_zeros(len(found))
    identity = torch.eye(found.shape[1]).to(found)
    return AffineMap(found.new_zeros(found.shape[1]), constant, found, identity, 0.0, lowest / before)


def _mean(parts: Sequence[Tokens], parameters: Sequence[Tensor]) -> float:
    """The mean cosine distance over the tokens of all processes."""
    with torch.no_grad():
        distances = [cosine_distance(part, *parameters) for part in parts]
    total = torch.stack(distances).sum() if distances else parameters[0].new_zeros((), dtype=torch.float64)
    count = total.new_tensor(sum(len(part.inputs) for part in parts))
    pooled(total, count)
    return float(total / count)
