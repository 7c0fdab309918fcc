"""The trunk and the head apart, against the whole model in float64."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor

from depthprune import head
from depthprune.data.batches import restarting_positions
from depthprune.head import hidden_states, on_device, predicted_mask, token_losses
from tests.brute_force import exact_copy
from tests.tiny_models import FAMILIES, attentions, tiny_batch, tiny_model, tokens


def exact_losses(model: torch.nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """Cross-entropy of next tokens ``(B, T - 1)`` from a model's logits in float64."""
    logits = model(**batch).logits[:, :-1].double().log_softmax(-1)
    return -logits.gather(2, batch["input_ids"][:, 1:, None])[..., 0]


@pytest.mark.parametrize("pad", [None, "left", "right"])
@pytest.mark.parametrize("family", FAMILIES)
def test_losses_equal_those_of_the_whole_model(family: str, pad: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch = tiny_model(family), tiny_batch(pad)
    monkeypatch.setattr(head, "CHUNK", 7)  # does not divide 3 x 11
    with torch.no_grad():
        exact, losses = exact_losses(exact_copy(model), batch), token_losses(model, batch)
        assert torch.equal(token_losses(model, batch, hidden_states(model, batch)), losses)
        last = model(**batch, output_hidden_states=True).hidden_states[-1]
    keep = predicted_mask(batch)
    assert losses.shape == keep.shape == (3, 11)
    assert losses.dtype == torch.float32
    torch.testing.assert_close(losses[keep].double(), exact[keep].double(), rtol=1e-5, atol=1e-5)
    assert torch.equal(hidden_states(model, batch), last)
    if pad is None:
        torch.testing.assert_close(losses.mean(), model(**batch, labels=batch["input_ids"]).loss)


def test_chunks_do_not_change_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(head, "CHUNK", 4)
    model, batch = tiny_model("qwen2"), tiny_batch()  # tied, so that the head's gradient joins the embedding's
    token_losses(model, batch).mean().backward()
    other = copy.deepcopy(model)
    other.zero_grad()
    exact_losses(other, batch).mean().backward()
    for (name, one), (_, two) in zip(model.named_parameters(), other.named_parameters(), strict=True):
        torch.testing.assert_close(one.grad, two.grad, rtol=1e-4, atol=1e-6, msg=name)


def test_frozen_trunks_still_train_the_head() -> None:
    model, batch = tiny_model("mistral"), tiny_batch()
    model.model.requires_grad_(False)
    token_losses(model, batch).mean().backward()
    wanted = copy.deepcopy(model)
    wanted.zero_grad()
    exact_losses(wanted, batch).mean().backward()
    torch.testing.assert_close(model.lm_head.weight.grad, wanted.lm_head.weight.grad, rtol=1e-4, atol=1e-6)


def test_sequences_longer_than_learned_positions_are_refused() -> None:
    for family in ("gpt2", "opt"):
        model, batch = tiny_model(family, max_position_embeddings=16), {"input_ids": tokens(1, 17)}
        with pytest.raises(ValueError, match=r"17 tokens long, and .* has positions for 16: set sequence_length to 16"):
            hidden_states(model, batch)
        hidden_states(model, {"input_ids": tokens(1, 16)})


def test_flash_attention_does_not_keep_documents_apart_in_batches() -> None:
    model, batch = tiny_model(), {"input_ids": tokens(2, 8), "position_ids": torch.arange(8).expand(2, -1) % 4}
    model.config._attn_implementation_internal = "flash_attention_2"
    with pytest.raises(ValueError, match="only in batches of one: set batch_size to 1"):
        hidden_states(model, batch)


def test_tiles_of_the_vocabulary_do_not_change_losses(monkeypatch: pytest.MonkeyPatch) -> None:
    for family in ("phi", "cohere", "gemma2"):  # a bias, a scale, a cap
        model, batch = tiny_model(family), tiny_batch("left")
        with torch.no_grad():
            whole = token_losses(model, batch)
            monkeypatch.setattr(head, "TILE", (5, 13))  # divide neither 33 nor 97
            tiled = token_losses(model, batch)
            exact = exact_losses(exact_copy(model), batch)
        keep = predicted_mask(batch)
        torch.testing.assert_close(tiled[keep], whole[keep], rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(tiled[keep].double(), exact[keep].double(), rtol=1e-5, atol=1e-5)


def test_head_in_bf16_gives_fp32_losses() -> None:
    model, batch = tiny_model(dtype=torch.bfloat16), tiny_batch()
    with torch.no_grad():
        losses = token_losses(model, batch)
    assert losses.dtype == torch.float32
    torch.testing.assert_close(losses, exact_losses(copy.deepcopy(model).float(), batch).float(), rtol=0.1, atol=0.1)


def test_which_predictions_count() -> None:
    ids = torch.ones(2, 5, dtype=torch.long)
    assert predicted_mask({"input_ids": ids}).tolist() == [[True] * 4] * 2
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 0, 0]])
    wanted = [[False, False, True, True], [True, True, False, False]]
    assert predicted_mask({"input_ids": ids, "attention_mask": mask}).tolist() == wanted


def test_batches_go_where_the_model_takes_its_input() -> None:
    model = torch.nn.Module()
    model.get_input_embeddings = lambda: torch.nn.Embedding(2, 2, device="meta")  # type: ignore[assignment]
    moved = list(on_device([tiny_batch("left"), tiny_batch()], model))  # type: ignore[arg-type]
    assert [set(batch) for batch in moved] == [{"input_ids", "attention_mask"}, {"input_ids"}]
    assert all(tensor.device.type == "meta" for batch in moved for tensor in batch.values())


PARTS = (7, 5, 9)  # tokens of the documents of a sequence


@pytest.mark.parametrize(
    ("family", "attention"), [(family, name) for family in FAMILIES for name in attentions(family)]
)
def test_documents_whose_positions_start_again_know_nothing_of_each_other(family: str, attention: str) -> None:
    model = tiny_model(family, attn_implementation=attention)
    documents = [tokens(2, length, seed=length) for length in PARTS]
    numbers = torch.arange(len(PARTS)).repeat_interleave(torch.tensor(PARTS)).expand(2, -1)
    batch = {"input_ids": torch.cat(documents, 1), "position_ids": restarting_positions(numbers)}
    if family == "opt":
        with pytest.raises(ValueError, match="opt cannot keep the documents of a sequence apart"):
            token_losses(model, batch)
        return
    with torch.no_grad():
        together = hidden_states(model, batch)
        alone = torch.cat([model.get_decoder()(part, use_cache=False).last_hidden_state for part in documents], 1)
        losses = token_losses(model, batch)[predicted_mask(batch)].sum()
        wanted = sum(exact_losses(model, {"input_ids": part}).sum() for part in documents)
    assert float((together - alone).abs().max()) < 1e-5
    torch.testing.assert_close(losses.double(), wanted, rtol=1e-5, atol=1e-4)
    assert int(predicted_mask(batch).sum()) == 2 * sum(length - 1 for length in PARTS)
