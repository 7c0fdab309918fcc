"""Every influence metric by name, with one line on what it is."""

from __future__ import annotations

from depthprune.influence.ablation import ABLATION_METRICS
from depthprune.influence.angular import angular
from depthprune.influence.attention import ATTENTION_METRICS
from depthprune.influence.baselines import BASELINES
from depthprune.influence.cca_bound import cca_bound
from depthprune.influence.gradient import GRADIENT_METRICS
from depthprune.influence.static import STATIC_METRICS

_WHAT = {
    "loss": "rise of the loss (nats/token; on questions, of the letters)",
    "logits": "distance of the logits (L2 norm)",
    "zero_one": "rise of the share of wrong answers (questions only)",
    "likelihood": "fall of the right answer's likelihood (questions only)",
}
_HOW = {
    "leave_one_out": "{what} when the site alone is removed.",
    "subnetwork": "{what}: mean with the site absent minus with it present, over random subsets of one size.",
    "shapley": "Shapley value of the {what}, by permutation sampling in antithetic pairs.",
}


def _sentence(text: str) -> str:
    return text[0].upper() + text[1:]


def _first_line(metric: object) -> str:
    return (metric.__doc__ or "").splitlines()[0].replace("``", "")


METRICS: dict[str, str] = {
    **{name: _first_line(metric) for name, metric in STATIC_METRICS.items()},
    "angular": _first_line(angular),
    **{name: _first_line(metric) for name, metric in ATTENTION_METRICS.items()},
    **{name: _first_line(metric) for name, metric in GRADIENT_METRICS.items()},
    "cca_bound": _first_line(cca_bound),
    **{name: _sentence(_HOW[how].format(what=_WHAT[what])) for name, (how, what) in ABLATION_METRICS.items()},
    **{name: _first_line(metric) for name, metric in BASELINES.items()},
}
"""Every metric with its description; higher influence means keep."""

DEFAULT_METRICS = tuple(STATIC_METRICS)
"""What is scored where no metrics are named: all that one forward pass gives for every kind of site."""
