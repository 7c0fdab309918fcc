"""Every influence metric by name, with one line on what it is."""

from __future__ import annotations

from depthprune.influence.ablation import ABLATION_METRICS
from depthprune.influence.static import STATIC_METRICS

_WHAT = {"loss": "rise of the loss (nats/token)", "logits": "distance of the logits (L2 norm)"}
_HOW = {
    "leave_one_out": "{what} when the site alone is removed.",
    "subnetwork": "{what}: mean with the site absent minus with it present, over random subsets of one size.",
    "shapley": "Shapley value of the {what}, by permutation sampling in antithetic pairs.",
}


def _sentence(text: str) -> str:
    return text[0].upper() + text[1:]


METRICS: dict[str, str] = {
    **{name: (metric.__doc__ or "").splitlines()[0].replace("``", "") for name, metric in STATIC_METRICS.items()},
    **{name: _sentence(_HOW[how].format(what=_WHAT[what])) for name, (how, what) in ABLATION_METRICS.items()},
}
"""Every metric with its description; higher influence means keep."""

DEFAULT_METRICS = tuple(STATIC_METRICS)
"""What is scored where no metrics are named: all that comes from one forward pass."""
