"""What a benchmark counts, against the configuration."""

from __future__ import annotations

import pytest

from depthprune.evaluation.benchmark import Load, check_loads, measure
from depthprune.pruning import prune
from depthprune.sites import PruningPlan
from tests.tiny_models import BLOCKS, tiny_model

HEADS, HEAD, NUMBER = 2, 8, 4
PER_BLOCK = 2 * HEADS * HEAD * NUMBER


def test_every_turn_of_every_model_is_there() -> None:
    models = {"whole": tiny_model(), "pruned": prune(tiny_model(), PruningPlan.of("block.1", "block.2"))}
    found = measure(models, Load(2, 5, 3), repeats=4)
    assert list(found) == ["whole", "pruned"]
    for measured in found.values():
        assert len(measured.first_token) == len(measured.writing) == 4
        assert min(measured.first_token + measured.writing) > 0
        assert measured.working_bytes is None
    assert found["whole"].cache_bytes == BLOCKS * PER_BLOCK
    assert found["pruned"].cache_bytes == (BLOCKS - 2) * PER_BLOCK


def test_a_removed_attention_holds_two_numbers_of_a_token() -> None:
    model = prune(tiny_model(), PruningPlan.of("attention.1", "attention.3"))
    found = measure({"": model}, Load(2, 5, 3), repeats=1)[""]
    assert found.cache_bytes == (BLOCKS - 2) * PER_BLOCK + 2 * 2 * NUMBER


def test_loads_beyond_the_positions_are_refused() -> None:
    config = tiny_model("gpt2", max_position_embeddings=64).config
    check_loads(config, [Load(1, 60, 4)])
    with pytest.raises(ValueError, match="60 prompt_tokens and 5 new_tokens are more than the 64 positions"):
        check_loads(config, [Load(1, 8, 8), Load(1, 60, 5)])
    setattr(config, "model_type", "depthprune_gpt2")  # noqa: B010 -- a class variable to mypy
    with pytest.raises(ValueError, match="positions that depthprune_gpt2 has"):
        check_loads(config, [Load(1, 60, 5)])
    check_loads(tiny_model(max_position_embeddings=64).config, [Load(1, 60, 5)])


def test_memory_grows_with_the_load_and_holds_the_cache() -> None:
    models = {"": tiny_model()}
    small, large = (
        measure(models, Load(batch, 40, 2), repeats=1, counts_memory=True)[""].working_bytes for batch in (1, 4)
    )
    assert small is not None
    assert large is not None
    assert small > 40 * BLOCKS * PER_BLOCK
    assert 2.5 < large / small < 4.5


@pytest.mark.parametrize("numbers", [(0, 1, 1), (1, 0, 1), (1, 1, 0)])
def test_no_load_is_empty(numbers: tuple[int, int, int]) -> None:
    with pytest.raises(ValueError, match="set it to 1 to"):
        Load(*numbers)
