"""``depthprune export``: a pruned model as a checkpoint that other engines open, with a proof that it is the same."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from depthprune.data.module import one_text
from depthprune.data.text import RoleShares, TextSource
from depthprune.export.card import CARD, CardData, check_repository, push
from depthprune.export.folder import EXPORT_FILE
from depthprune.export.folder import export as export_model
from depthprune.export.formats import Settings, check_settings
from depthprune.export.texts import padded_texts
from depthprune.files import check_new_folder, read_json
from depthprune.loading import load


def export(
    model: str,
    output: str,
    format: str = "plain",
    as_llama: bool = False,
    untie: bool = False,
    max_shard_size: str = "5GB",
    gguf_type: str | None = None,
    license: str | None = None,
    evaluation: str | None = None,
    push_to_hub: str | None = None,
    private: bool = True,
    text: TextSource = TextSource("xsum"),  # noqa: B008 -- frozen
    sequences: int = 4,
    sequence_length: int = 64,
    shares: RoleShares = RoleShares(),  # noqa: B008 -- frozen
    dtype: str = "auto",
    revision: str | None = None,
    offload: bool = False,
) -> None:
    """Write a pruned model in a form that other engines open.

    The exported folder is opened in a process of its own, without depthprune, and its logits and greedy text are
    compared with those of the model in memory; a folder that does not match is deleted.

    Args:
        model: a pruned model's folder, as `depthprune prune` writes it.
        output: folder for the exported model; must not exist or be empty.
        format: plain (the architecture's own folder, with fewer blocks), compatible (removed attentions and MLPs stay
            with weights of zero), custom-code (a folder with a modelling file of its own, for any replacement),
            nemotron-nas (a llama for vLLM, SGLang and TensorRT-LLM) or gguf (a llama as one file for llama.cpp).
        as_llama: write the llama that a mistral or qwen2 without a window is, whose layers can have biases;
            nemotron-nas and gguf always do.
        untie: give the head weights of its own where the embeddings have to take a constant.
        max_shard_size: the size at which files of weights are split, such as 5GB.
        gguf_type: of the matrices in a GGUF file: f32, f16, bf16 or q8_0; the model's own if not given.
        license: the unpruned model's, for the model card, as the hub names it; known of embedded models.
        evaluation: evaluation.json of `depthprune evaluate`, whose losses the model card shows.
        push_to_hub: upload the folder under this name, owner/name.
        private: whether only the owner sees it there.
        text: the text for the comparison; its fit role is used.
        sequences: how many sequences are compared.
        sequence_length: tokens of the longest one.
        shares: shares of the documents for the four roles.
        dtype: auto (as saved), bfloat16, float16 or float32.
        revision: branch, tag or commit on the hub.
        offload: leave the weights in their files and have one block at a time in memory, for models larger than it;
            the comparison takes longer.
    """
    check(dict(locals()))
    output = str(check_new_folder(output))
    settings = Settings(as_llama, untie, max_shard_size, gguf_type)
    card = CardData(license, None if evaluation is None else read_json(evaluation, "an evaluation's results") or {})
    causal_lm, tokenizer = load(model, dtype=dtype, revision=revision)
    data = one_text(model, text, sequence_length, sequences, shares, revision, calibration_sequences=sequences)
    proving = "" if format == "gguf" else ", and opening it in a process of its own"
    print(f"Writing {model} as {format}{proving}.", flush=True)
    batch = padded_texts(next(iter(data.calibration_dataloader())))
    about = export_model(causal_lm, tokenizer, output, batch, format, settings, card, offload)
    for site, key in about["folded"].items():
        print(f"The constant of {site} is in {key}.")
    if about["untied_bytes"]:
        print(f"The head has weights of its own: {about['untied_bytes'] / 1e6:.1f} MB more.")
    sizes, cache, proof = about["parameters"], about["cache_bytes_per_token"], about["proof"]
    print(
        f"Parameters: {sizes['exported'] / 1e6:.1f}M"
        + (f" of {sizes['unpruned'] / 1e6:.1f}M" if sizes["unpruned"] else "")
        + f". Cache: {cache['exported']:,.0f} of {cache['unpruned']:,.0f} bytes per token."
    )
    if proof["kind"] == "structure":
        print("The file holds the model's weights; no engine ran it here.")
    else:
        print(
            f"The same model: logits differ by up to {proof['logits_difference']:.1e} on {proof['tokens']} tokens, and "
            f"{proof['generated_alike']:.0%} of the texts that it writes are the same."
        )
    print(f"Wrote {output}: {EXPORT_FILE} has the figures, and {CARD} says how to open it.")
    if push_to_hub is not None:
        print(f"Uploaded it to {push(Path(output), push_to_hub, private)}.")


def check(settings: Mapping[str, Any]) -> None:
    """Refuse settings that are out of range or do not go together, before anything is opened.

    Args:
        settings: of the command, by name.

    Raises:
        ValueError: some are.
    """
    if settings["push_to_hub"] is not None:
        check_repository(settings["push_to_hub"])
    how = Settings(settings["as_llama"], settings["untie"], settings["max_shard_size"], settings["gguf_type"])
    check_settings(settings["format"], how)
    for name in ("sequences", "sequence_length"):
        if settings[name] < 1:
            raise ValueError(f"{name} is {settings[name]}: set it to 1 or more.")
    if settings["offload"] and settings["dtype"] != "auto":
        raise ValueError("With offload the weights are those in the files, in their own dtype: leave dtype out.")
