"""The quickstart study on the embedded model, with fewer tokens."""

import json
from pathlib import Path

import pytest

from depthprune.report.results import StudyResults
from tests.command_line import FAST_DTYPE, run, scalars

CONFIG = Path(__file__).parents[2] / "configs" / "study" / "quickstart.yaml"
PLANS = [{"kind": "block", "remove": 10, "train": True}, {"kind": "attention", "remove": 10}]


@pytest.mark.integration
def test_the_quickstart_study(tmp_path, capsys):
    small = {
        "plans": json.dumps(PLANS),
        "score_sequences": 4,
        "calibration_sequences": 4,
        "test_sequences": 3,
        "tune_sequences": 2,
        "sequence_length": 128,
        "rung.training.steps": 4,
        "rung.training.batch_size": 2,
        "accelerator": "cpu",
        "dtype": FAST_DTYPE,
    }
    options = [f"--{name}={value}" for name, value in small.items()]
    assert run("study", "--config", CONFIG, "--output", tmp_path / "study", *options) == 0
    printed = capsys.readouterr().out
    study = json.loads((tmp_path / "study" / "study.json").read_text())
    results = StudyResults.of(study)

    assert len(study["influence"]["values"]["cosine"]) == 90
    assert "Loss above the unpruned model" in printed
    assert "10 attentions" in printed
    plans = {plan.name: plan for plan in results.plans}
    for domain in ("xsum", "quac"):
        unpruned = results.loss("unpruned", domain)
        few = results.above_unpruned(plans["attentions-10"], "none", domain)
        many = results.above_unpruned(plans["blocks-10"], "none", domain)
        mended = results.above_unpruned(plans["blocks-10"], "emulated_update", domain)
        trained = results.above_unpruned(plans["blocks-10"], "low_rank_adapter", domain)
        assert unpruned is not None
        assert few is not None
        assert many is not None
        assert mended is not None
        assert trained is not None
        assert 2 < unpruned.loss < 5  # nats per token of a 135M model on English prose
        assert 0 < few.value < many.value
        assert trained.value not in (mended.value, many.value)
        if domain == "xsum":  # so few tokens of it need not mend anything on another text
            assert mended.value < many.value

    report = (tmp_path / "study" / "report.md").read_text()
    for said in (
        "# Depth pruning study: quickstart",
        "## Findings",
        "10 attentions cost less than 10 blocks",
        "smollm2-135m-instruct-q4",
        "Q4_1",
        "xsum",
        "quac",
        "figures/damage.png",
        "figures/recovery.png",
        "figures/training.png",
        "figures/influence.png",
        "## Definitions",
        "## How it was made",
    ):
        assert said in report
    for name in ("removed", "damage", "recovery", "training", "influence"):
        assert (tmp_path / "study" / "figures" / f"{name}.png").stat().st_size > 5000
    curve = study["training"]["blocks-10"]["curve"]
    assert [point["step"] for point in curve] == [0, 1, 2, 3, 4]
    assert curve[-1]["xsum"] != curve[0]["xsum"]
    assert (tmp_path / "study" / "training" / "blocks-10" / "last.ckpt").stat().st_size < 20e6  # never the base
    tags = scalars(tmp_path / "study" / "tensorboard" / "blocks-10")
    assert any(tag.startswith("1_overfitting/") for tag in tags)
    assert any(tag.startswith("2_forgetting/quac") for tag in tags)
