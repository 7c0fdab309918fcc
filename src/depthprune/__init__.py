"""Remove depth from pretrained causal language models, recover what was lost, and see what was forgotten.

The names below are the front door; each is imported when it is first used, so that ``import depthprune`` is quick.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from depthprune.influence.estimate import estimate_influence
    from depthprune.influence.table import InfluenceTable
    from depthprune.loading import load, load_tokenizer, save
    from depthprune.pruning import prune, swapped
    from depthprune.sites import PruningPlan, Removal, Site

_ROOMS = {
    "InfluenceTable": "influence.table",
    "PruningPlan": "sites",
    "Removal": "sites",
    "Site": "sites",
    "estimate_influence": "influence.estimate",
    "load": "loading",
    "load_tokenizer": "loading",
    "prune": "pruning",
    "save": "loading",
    "swapped": "pruning",
}

__all__ = [
    "InfluenceTable",
    "PruningPlan",
    "Removal",
    "Site",
    "estimate_influence",
    "load",
    "load_tokenizer",
    "prune",
    "save",
    "swapped",
]


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def __getattr__(name: str) -> Any:
    if name not in _ROOMS:
        raise AttributeError(f"module 'depthprune' has no attribute {name!r}")
    return getattr(import_module(f"depthprune.{_ROOMS[name]}"), name)
