"""``depthprune fetch``: fetch embedded models and texts now, for instance before going offline."""

from __future__ import annotations

from depthprune import embedded


def fetch(names: list[str] = []) -> None:  # noqa: B006 -- read only
    """Fetch embedded models and texts into the cache.

    Args:
        names: their names, such as [xsum]; everything if not given.
    """
    chosen = names or [*embedded.MODELS, *embedded.TEXTS]
    for name, path in zip(chosen, embedded.fetch(chosen), strict=True):
        print(f"{name}: {path}")
    print("Next: depthprune study --config configs/study/quickstart.yaml")
