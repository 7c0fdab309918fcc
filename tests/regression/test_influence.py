"""Influence of all sites of the embedded model against committed figures.

Regenerate them, after a change that is meant to change them, with ``python -m tests.regression.test_influence`` in the
root of the repository, and say in the commit why they changed.
"""

import json
from pathlib import Path

import pytest

from depthprune.data.module import TextDataModule
from depthprune.data.text import TextSource
from depthprune.influence.estimate import estimate_influence
from depthprune.influence.table import InfluenceTable
from depthprune.loading import load

MODEL = "smollm2-135m-instruct-q4"
REFERENCE = Path(__file__).parents[1] / "reference" / "smollm2_influence.json"
METRICS = ("cosine", "relative_l2")


def measured() -> InfluenceTable:
    """Both metrics of all 90 sites on 2 sequences of 128 tokens, in fp32."""
    model, _ = load(MODEL, dtype="float32")
    data = TextDataModule(MODEL, TextSource("xsum"), sequence_length=128, batch_size=2, score_sequences=2)
    return estimate_influence(model, data.score_dataloader(), METRICS)


@pytest.mark.regression
@pytest.mark.integration
def test_influence_is_as_it_was():
    table, reference = measured(), json.loads(REFERENCE.read_text(encoding="utf-8"))
    assert set(reference) == set(METRICS)
    for metric, expected in reference.items():
        assert len(expected) == 90
        assert table[metric] == pytest.approx(expected, rel=1e-3), metric


def main() -> None:
    """Write the figures anew."""
    table = measured()
    figures = {metric: {site: float(f"{value:.6g}") for site, value in table[metric].items()} for metric in METRICS}
    REFERENCE.parent.mkdir(exist_ok=True)
    REFERENCE.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
