import pytest
import torch

from depthprune.recovery.objectives import OBJECTIVES, language_modelling
from tests.tiny_models import tiny_batch, tiny_model


@pytest.mark.parametrize("pad", [None, "right"])
def test_language_modelling_is_the_loss_of_transformers(pad: str | None) -> None:
    model, batch = tiny_model(), tiny_batch(pad)
    labels = batch["input_ids"]
    if pad:
        labels = labels.masked_fill(batch["attention_mask"] == 0, -100)
    expected = model(**batch, labels=labels).loss
    loss = language_modelling(model, batch)
    assert loss.shape == ()
    torch.testing.assert_close(loss, expected)
    weight = model.model.layers[1].mlp.down_proj.weight
    torch.testing.assert_close(torch.autograd.grad(loss, weight), torch.autograd.grad(expected, weight))


def test_the_first_token_after_padding_is_not_predicted() -> None:
    model, batch = tiny_model(), tiny_batch("left")
    rows = [row[mask.bool()][None] for row, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)]
    sums = [model(row, labels=row).loss * (row.shape[1] - 1) for row in rows]
    expected = torch.stack(sums).sum() / sum(row.shape[1] - 1 for row in rows)
    # rotary positions are relative, so a sequence shifted by its padding has the same losses
    torch.testing.assert_close(OBJECTIVES["language_modelling"](model, batch), expected)
