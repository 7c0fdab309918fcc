"""``depthprune fetch``: fetch embedded models, texts and tasks now, for instance before going offline."""

from __future__ import annotations

from depthprune import embedded
from depthprune.embedded_catalogue import MODELS, TASKS, TEXTS, WORD_PROBLEMS


def fetch(names: list[str] = []) -> None:  # noqa: B006 -- read only
    """Fetch embedded models, texts and tasks into the cache.

    Args:
        names: their names, such as [xsum]; everything if not given.
    """
    chosen = names or [*MODELS, *TEXTS, *TASKS, *WORD_PROBLEMS]
    for name, path in zip(chosen, embedded.fetch(chosen), strict=True):
        print(f"{name}: {path}")
    print("Next: depthprune study --config configs/study/quickstart.yaml")
