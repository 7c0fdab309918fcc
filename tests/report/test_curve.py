"""Which findings a report of curves calls reproduced."""

from __future__ import annotations

from typing import Any

import pytest

from depthprune.report.curve import verdicts

LOSSES = {"unpruned": 3.0, "block": 3.5, "attention": 3.2, "mlp": 4.0}


def content(losses: dict[str, dict[str, float]]) -> dict[str, Any]:
    """Three sites of 30 of each kind, on texts of four equal documents."""
    tokens = [10.0, 20.0, 30.0, 40.0]
    rows = [
        {
            "domain": domain,
            "metric": "cosine",
            "kind": kind,
            "replacement": "none",
            "removed": 3,
            "of": 30,
            "loss": loss,
            "above_unpruned": {"value": loss - by_kind["unpruned"], "low": None, "high": None},
            "above_none": None,
            "nats": [loss * count for count in tokens],
        }
        for domain, by_kind in losses.items()
        for kind, loss in by_kind.items()
        if kind != "unpruned"
    ]
    about = {"tokens": tokens, "bytes": tokens}
    return {"domains": dict.fromkeys(losses, about), "rows": rows}


@pytest.mark.parametrize(
    ("news", "law", "cheap", "blocks", "mlps"),
    [
        ({}, {}, "not reproduced", "reproduced", "reproduced"),
        ({"block": 3.05}, {}, "reproduced in part", "reproduced in part", "reproduced"),
        ({"block": 3.05}, {"block": 3.09}, "reproduced", "not reproduced", "reproduced"),
        ({"mlp": 3.1}, {"mlp": 3.2}, "not reproduced", "reproduced", "not reproduced"),
    ],
)
def test_verdicts(news: dict[str, float], law: dict[str, float], cheap: str, blocks: str, mlps: str) -> None:
    found = list(verdicts(content({"news": LOSSES | news, "law": LOSSES | law})))
    assert found == [
        f"About 10% of the blocks go cheaply, for under 0.1 nats/token: **{cheap}**.",
        f"Attentions go further than blocks: **{blocks}**.",
        f"Attentions go further than MLPs: **{mlps}**.",
    ]
