"""``depthprune generate``: a model's own continuations of a text, to recover what is left of it on.

After "Self-Data Distillation for Recovering Quality in Pruned Large Language Models" (arXiv 2410.09982): what the
unpruned model writes itself lies nearer to its distribution than a text by others does.
"""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Sequence
from hashlib import blake2b
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from depthprune.anatomy import unpruned_fingerprint
from depthprune.configuration import as_data, check_config
from depthprune.data.opening import open_text
from depthprune.data.packing import PackingSpec
from depthprune.data.text import Document, RoleShares, Text, TextSource, role_documents
from depthprune.devices import start_fabric
from depthprune.files import make_folder, only_writer, read_json, write_json
from depthprune.head import input_device
from depthprune.loading import load
from depthprune.progress import tracked

VERSION = 1


def generate(
    model: str,
    text: TextSource,
    output: str,
    prompts: int = 1000,
    prompt_tokens: int = 32,
    new_tokens: int = 224,
    temperature: float = 1.0,
    top_p: float = 1.0,
    batch_size: int = 16,
    shares: RoleShares = RoleShares(),  # noqa: B008 -- frozen
    seed: int = 0,
    dtype: str = "auto",
    revision: str | None = None,
    accelerator: str = "auto",
) -> None:
    """Let a model go on with the beginnings of a text's documents; writes JSON lines to train on.

    The prompts are the first tokens of the documents that have the role *fit*. A row holds the prompt, the response,
    both together as text, and a group, so that documents of one group stay together. The same command goes on where a
    killed one stopped, and the file is the same.

    Args:
        model: an embedded model's name, a hub name or a folder: the unpruned model.
        text: the text that the prompts are taken from.
        output: the file to write, with the ending .jsonl.
        prompts: how many, at most.
        prompt_tokens: tokens of a prompt; all of a document that is shorter.
        new_tokens: tokens of a response, at most; it ends where the model ends it.
        temperature: of sampling; 0 takes the most likely token.
        top_p: sample from the most likely tokens that have this share of the probability.
        batch_size: prompts that are continued at once; what is sampled depends on it.
        shares: shares of the documents for the four roles.
        seed: of sampling.
        dtype: auto (as saved), bfloat16, float16 or float32.
        revision: branch, tag or commit on the hub.
        accelerator: as in Lightning: auto, cpu, gpu.
    """
    config = as_data(locals())
    path = _checked(output, config)
    with only_writer(make_folder(path.parent)):
        opened = open_text(text)
        fabric = start_fabric(accelerator)
        causal_lm, tokenizer = load(model, dtype=dtype, revision=revision)
        _check_length(causal_lm, prompt_tokens + new_tokens)
        torch.nn.Module.to(causal_lm, fabric.device)
        spec = PackingSpec.of(tokenizer)
        documents = list(islice(role_documents(opened, "fit", shares), prompts))
        if not documents:
            raise ValueError(f"The text {text.path} has no document for the role fit: take a longer text.")
        if len(documents) < prompts:
            warnings.warn(f"The text {text.path} has only {len(documents)} of the {prompts} prompts.", stacklevel=2)
        done = _go_on(path, config, causal_lm, opened, len(documents))
        print(f"Continuing {len(documents)} documents of {text.path} with {model}; {done} are there.", flush=True)
        sampling = _sampling(causal_lm, tokenizer, spec, config)
        with path.open("ab") as file:
            for start in tracked(range(done, len(documents), batch_size), "Batches"):
                torch.manual_seed(_seed_of_batch(seed, start))
                rows = _rows(causal_lm, tokenizer, spec, documents[start : start + batch_size], prompt_tokens, sampling)
                file.write("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode())
                file.flush()
                os.fsync(file.fileno())
    print(f"Wrote {path}.")
    print(f"Next: depthprune fit --config FILE --data.text.path {path} --data.text.group_column group")


def _checked(output: str, config: dict[str, Any]) -> Path:
    """The path of the output.

    Raises:
        ValueError: it is no file of JSON lines, or a setting is out of range.
    """
    for name in ("prompts", "prompt_tokens", "new_tokens", "batch_size"):
        if config[name] < 1:
            raise ValueError(f"{name} is {config[name]}: set it to 1 or more.")
    if not 0 <= config["temperature"] < float("inf"):
        raise ValueError(f"temperature is {config['temperature']}: set it to 0 (the most likely token) or more.")
    if not 0 < config["top_p"] <= 1:
        raise ValueError(f"top_p is {config['top_p']}: set it above 0 and up to 1.")
    if config["text"]["chat"]:
        raise ValueError("Prompts are taken from plain text: leave text.chat out.")
    path = Path(output).expanduser()
    if path.suffix != ".jsonl" or path.is_dir():
        raise ValueError(f"The output {path} is no file with the ending .jsonl: name one, such as checkpoints/x.jsonl.")
    return path


def _check_length(causal_lm: PreTrainedModel, tokens: int) -> None:
    longest = getattr(causal_lm.config, "max_position_embeddings", None)
    if longest is not None and tokens + 1 > longest:  # with BOS
        raise ValueError(
            f"prompt_tokens and new_tokens make {tokens} tokens, and the model takes {longest} with BOS: set less."
        )


def _go_on(path: Path, config: dict[str, Any], causal_lm: PreTrainedModel, text: Text, count: int) -> int:
    """How many rows of a file are whole, cut off after the last whole batch; its settings stand in a file beside it.

    Raises:
        ValueError: the file is of other settings, or of none.
    """
    settings = path.with_name(f".{path.name}.json")  # hidden, so that a folder of texts does not take it for one
    about = {**config, "weights": unpruned_fingerprint(causal_lm).weights, "documents": text.fingerprint}
    if not path.exists():
        write_json(settings, {"depthprune_generation": VERSION, "config": about})
        return 0
    saved = read_json(settings, "the settings of a generated text") if settings.exists() else {}
    if saved.get("depthprune_generation") != VERSION:
        raise ValueError(f"{path} was not written by this version of generate: remove it, or name another output.")
    check_config(path, "a text", saved["config"], about)
    lines = path.read_bytes().splitlines(keepends=True)
    whole = sum(line.endswith(b"\n") for line in lines)
    kept = whole if whole == count else whole // config["batch_size"] * config["batch_size"]
    if kept < len(lines):
        os.truncate(path, sum(map(len, lines[:kept])))
    return kept


def _seed_of_batch(seed: int, start: int) -> int:
    """The batch's own seed, so that a resumed run draws the same numbers; of 32 bits, which is all that is used."""
    return int.from_bytes(blake2b(f"{seed}:{start}".encode(), digest_size=4).digest(), "big")


def _sampling(
    causal_lm: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, spec: PackingSpec, config: dict[str, Any]
) -> GenerationConfig:
    """How responses are sampled; nothing of what the model's own generation config says but where it ends."""
    own = causal_lm.generation_config.eos_token_id if causal_lm.generation_config else None
    ends = {spec.end_of_text, *(own if isinstance(own, list) else [] if own is None else [own])}
    is_sampled = config["temperature"] > 0
    drawn = {"temperature": config["temperature"], "top_p": config["top_p"], "top_k": 0} if is_sampled else {}
    return GenerationConfig(
        max_new_tokens=config["new_tokens"],
        do_sample=is_sampled,
        repetition_penalty=1.0,
        eos_token_id=sorted(ends),
        pad_token_id=spec.end_of_text if tokenizer.pad_token_id is None else tokenizer.pad_token_id,
        **drawn,
    )


def _rows(
    causal_lm: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    spec: PackingSpec,
    documents: Sequence[Document],
    prompt_tokens: int,
    sampling: GenerationConfig,
) -> list[dict[str, str]]:
    """The rows of one batch.

    Raises:
        ValueError: the model gives logits that are not finite.
    """
    starts = [spec.encode(document.text)[0][:-1][:prompt_tokens] for document in documents]
    heads = [start if spec.bos is None else [spec.bos, *start] for start in starts]
    length = max(map(len, heads))
    ids = torch.full((len(heads), length), sampling.pad_token_id)  # (B, T)
    mask = torch.zeros_like(ids)
    for row, head in enumerate(heads):
        ids[row, length - len(head) :] = torch.tensor(head)
        mask[row, length - len(head) :] = 1
    device = input_device(causal_lm)
    generator: Any = causal_lm
    with torch.no_grad():
        if not torch.isfinite(generator(ids.to(device), attention_mask=mask.to(device), logits_to_keep=1).logits).all():
            raise ValueError("The model's logits are not finite: check its weights, or set dtype to float32.")
        made: Tensor = generator.generate(
            inputs=ids.to(device), attention_mask=mask.to(device), generation_config=sampling
        )
    responses = [_ended(row, sampling.eos_token_id) for row in made[:, length:].tolist()]
    return [
        _row(tokenizer, start, response, document.group)
        for start, response, document in zip(starts, responses, documents, strict=True)
    ]


def _ended(response: list[int], ends: Sequence[int]) -> list[int]:
    """A response up to where the model ended it."""
    return response[: next((place for place, token in enumerate(response) if token in ends), len(response))]


def _row(tokenizer: PreTrainedTokenizerBase, start: list[int], response: list[int], group: str) -> dict[str, str]:
    """One row. The group is not that of the document, by which every row would have the role *fit* again."""
    prompt, text = (str(tokenizer.decode(ids, skip_special_tokens=True)) for ids in (start, start + response))
    pairs = enumerate(zip(prompt, text, strict=False))
    border = next((place for place, (one, other) in pairs if one != other), len(prompt))  # a prompt may cut a character
    return {"prompt": text[:border], "response": text[border:], "text": text, "group": f"continued {group}"}
