"""``depthprune list``: everything that has a name."""

from __future__ import annotations

from depthprune.embedded_catalogue import MODELS, TASKS, TEXTS, WORD_PROBLEMS
from depthprune.export.table import FORMATS
from depthprune.families import FAMILIES
from depthprune.influence.registry import METRICS
from depthprune.recovery.objectives import OBJECTIVES
from depthprune.replacements.registry import REPLACEMENTS
from depthprune.search.budget import RESOURCES
from depthprune.search.registry import SEARCHES
from depthprune.sites import KINDS


def names() -> dict[str, dict[str, str]]:
    """Every name by what it names, with its one-line description."""
    return {
        "embedded models": {name: model.description for name, model in MODELS.items()},
        "embedded texts": {name: text.description for name, text in TEXTS.items()},
        "embedded tasks": {name: task.description for name, task in TASKS.items()},
        "embedded word problems": {name: task.description for name, task in WORD_PROBLEMS.items()},
        "model types": {name: "" for family in FAMILIES for name in family.model_types},
        "kinds of site": dict.fromkeys(KINDS, ""),
        "metrics": METRICS,
        "replacements": {
            "none": "Nothing stands in the site's place.",
            **{name: _first_line(kind) for name, kind in REPLACEMENTS.items()},
        },
        "resources of a budget": {name: f"{what.capitalize()}." for name, what in RESOURCES.items()},
        "methods of search": {name: _first_line(method) for name, method in SEARCHES.items()},
        "formats of an export": FORMATS,
        "objectives": {name: _first_line(objective) for name, objective in OBJECTIVES.items()},
    }


def catalogue() -> None:
    """List every name that a command or config takes: models, texts, metrics, replacements, searches and others."""
    for what, known in names().items():
        print(f"{what}:")
        for name, description in known.items():
            print(f"  {name:<26} {description}".rstrip())


def _first_line(thing: object) -> str:
    return (thing.__doc__ or "").strip().splitlines()[0].replace("``", "")
