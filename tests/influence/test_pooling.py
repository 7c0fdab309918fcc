"""Two processes score their shares of the text and hold the sums of all of it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from depthprune.influence.choice_costs import refuse_chance
from depthprune.influence.estimate import estimate_influence
from depthprune.influence.registry import DEFAULT_METRICS
from tests.influence.test_choice_costs import questions
from tests.tiny_models import calibration, tiny_model

METRICS = [*DEFAULT_METRICS, "angular", "attention_sink", "attention_entropy", "taylor", "fisher", "cca_bound"]


def share(rank: int, folder: str) -> None:
    """What each process runs: the first takes one batch, the second two."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    batches = calibration()[:1] if rank == 0 else calibration()[1:]
    try:
        refuse_chance(tiny_model(), questions()[: rank + 1])
    except ValueError as error:
        Path(folder, f"{rank}.txt").write_text(str(error))
    table = estimate_influence(tiny_model("qwen2"), batches, METRICS, leave_out_massive=False)
    means = {str(site): mean.tolist() for site, mean in table.mean_updates.items()}
    content = {"values": table.to_dict()["values"], "means": means, "tokens": table.provenance["tokens"]}
    Path(folder, f"{rank}.json").write_text(json.dumps(content))
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def shares(tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    """What each of two processes found."""
    folder = tmp_path_factory.mktemp("pooling")
    mp.spawn(share, args=(str(folder),), nprocs=2)
    files = [folder / f"{rank}.json" for rank in range(2)]
    return [{**json.loads(file.read_text()), "refusal": file.with_suffix(".txt").read_text()} for file in files]


def test_two_processes_pool_their_sums(shares: list[dict]) -> None:
    whole = estimate_influence(tiny_model("qwen2"), calibration(), METRICS)
    for found in shares:
        for metric in whole.metrics:
            assert found["values"][metric] == pytest.approx(whole[metric], rel=1e-6), metric
        for site, mean in whole.mean_updates.items():
            torch.testing.assert_close(torch.tensor(found["means"][str(site)]), mean, rtol=1e-5, atol=1e-6)


def test_the_table_counts_the_tokens_of_all_processes(shares: list[dict]) -> None:
    assert [found["tokens"] for found in shares] == [30 + 18 + 44] * 2


def test_all_processes_judge_by_all_questions(shares: list[dict]) -> None:
    assert all("of 9 questions" in found["refusal"] for found in shares)
