"""Generation health: what a model writes by itself, which multiple choice does not show.

A pruned model may keep its scores while its text falls into loops. Four probes look at greedy text: repetition,
agreement with the unpruned model, sums, and brackets to be closed. Each gives a score for every prompt, so that models
are compared on the same prompts.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Sequence
from dataclasses import dataclass
from random import Random
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from depthprune.head import evaluating, input_device

PROBES = ("repetition", "agreement", "sums", "brackets")
NGRAM = 4
SHOTS = 4
BRACKETS = {"(": ")", "[": "]", "{": "}"}


@dataclass(frozen=True)
class Health:
    """How a model's greedy text is probed.

    Attributes:
        prompts: starts of held-out sequences to go on with.
        prompt_tokens: tokens of each, BOS included.
        new_tokens: tokens that are written.
        problems: sums, and lines of brackets, made on the fly.
        seed: of those.
    """

    prompts: int = 16
    prompt_tokens: int = 32
    new_tokens: int = 64
    problems: int = 32
    seed: int = 0

    def __post_init__(self) -> None:
        least = {"prompts": 1, "prompt_tokens": 1, "new_tokens": NGRAM + 1, "problems": 1}
        for name, minimum in least.items():
            if getattr(self, name) < minimum:
                raise ValueError(f"health.{name} is {getattr(self, name)}: set it to {minimum} or more.")


def probe(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    starts: Tensor,
    health: Health,
    unpruned: Tensor | None = None,
) -> tuple[dict[str, np.ndarray], Tensor]:
    """All probes of a model.

    Args:
        model: the model, as it is switched.
        tokenizer: its tokenizer.
        starts: prompts of one length, ``(N, P)``.
        health: how it is probed.
        unpruned: what the unpruned model writes after them, ``(N, S)``; the model's own text if not given.

    Returns:
        By the probe's name a score for each prompt or problem, and what the model writes, ``(N, S)``.
    """
    padding = int(padded_left(tokenizer).pad_token_id)
    written = continuations(model, starts, health.new_tokens, padding)
    scores = (
        repetition(written),
        agreement(model, starts, written if unpruned is None else unpruned),
        solved(model, tokenizer, sums(health.problems, health.seed)),
        solved(model, tokenizer, brackets(health.problems, health.seed)),
    )
    return dict(zip(PROBES, scores, strict=True)), written


def continuations(model: PreTrainedModel, starts: Tensor, new_tokens: int, padding: int) -> Tensor:
    """What a model writes by itself, the likeliest token each time, and never an end.

    Args:
        model: the model, as it is switched.
        starts: prompts of one length, ``(N, P)``.
        new_tokens: how many tokens ``S`` it writes.
        padding: any token.

    Returns:
        The tokens, ``(N, S)``.
    """
    written = greedy(model, starts, torch.ones_like(starts), new_tokens, padding, min_new_tokens=new_tokens)
    assert written.shape[1] == new_tokens
    return written


def repetition(written: Tensor) -> np.ndarray:
    """Of each text, the share of its runs of four tokens that it had before (Welleck et al. 2020, seq-rep-4).

    Args:
        written: ``(N, S)``.

    Returns:
        ``(N,)``.
    """
    runs = written.unfold(1, NGRAM, 1)  # (N, S - 3, 4)
    return np.array([1 - len(set(map(tuple, row))) / len(row) for row in runs.tolist()])


def agreement(model: PreTrainedModel, starts: Tensor, written: Tensor) -> np.ndarray:
    """Of each text, the share of its tokens that a model too puts first, after the same tokens.

    Args:
        model: the model.
        starts: what the text goes on from, ``(N, P)``.
        written: the text, ``(N, S)``.

    Returns:
        ``(N,)``.
    """
    device = input_device(model)
    whole = torch.cat([starts, written], dim=1).to(device)
    with evaluating(model):
        logits: Tensor = model(whole[:, :-1], logits_to_keep=written.shape[1], use_cache=False).logits
    return (logits.argmax(-1) == written.to(logits.device)).double().mean(1).cpu().numpy()


def sums(count: int, seed: int) -> list[tuple[str, str]]:
    """Additions and subtractions below 20, each after the same answered ones, with their answers."""
    random = Random(f"{seed}:sums")

    def draw() -> tuple[str, str]:
        one, other = random.randint(1, 9), random.randint(1, 9)
        if random.random() < 0.5:
            return f"{one} + {other} =", str(one + other)
        return f"{max(one, other)} - {min(one, other)} =", str(max(one, other) - min(one, other))

    shots = "".join(f"{asked} {answer}\n" for asked, answer in (draw() for _ in range(SHOTS)))
    return [(shots + asked, answer) for asked, answer in (draw() for _ in range(count))]


def brackets(count: int, seed: int) -> list[tuple[str, str]]:
    """One to three open brackets to be closed, each line after the same answered ones, with their answers."""
    random = Random(f"{seed}:brackets")

    def draw() -> tuple[str, str]:
        opened = random.choices(list(BRACKETS), k=random.randint(1, 3))
        return f"Open: {' '.join(opened)} Close:", " ".join(BRACKETS[one] for one in reversed(opened))

    shots = "".join(f"{asked} {answer}\n" for asked, answer in (draw() for _ in range(SHOTS)))
    return [(shots + asked, answer) for asked, answer in (draw() for _ in range(count))]


def solved(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, problems: Sequence[tuple[str, str]]
) -> np.ndarray:
    """Which problems a model answers, by what it writes up to the end of the line.

    Args:
        model: the model.
        tokenizer: its tokenizer.
        problems: prompts and answers.

    Returns:
        1 or 0 for each, ``(N,)``.
    """
    own = padded_left(tokenizer)
    asked = own([prompt for prompt, _ in problems], return_tensors="pt", padding=True)
    longest = max(len(own(f" {answer}\n", add_special_tokens=False)["input_ids"]) for _, answer in problems)
    written = greedy(model, asked["input_ids"], asked["attention_mask"], longest + 1, int(own.pad_token_id))
    lines = [str(own.decode(row, skip_special_tokens=True)).split("\n")[0] for row in written.tolist()]
    return np.array([float(_words(line) == _words(answer)) for line, (_, answer) in zip(lines, problems, strict=True)])


def _words(line: str) -> list[str]:
    """Numbers and brackets, whatever stands between them."""
    return re.findall(r"-?\d+|[^\w\s]", line)


def padded_left(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """A copy of a tokenizer that pads on the left, as generation wants it."""
    own = copy.deepcopy(tokenizer)
    own.padding_side = "left"
    if own.pad_token_id is None:
        own.pad_token = own.eos_token
    return own


def greedy(model: PreTrainedModel, ids: Tensor, mask: Tensor, new_tokens: int, padding: int, **more: Any) -> Tensor:
    """The likeliest tokens after left-padded prompts, ``(N, S)``, of the model alone: no penalty of its config's."""
    device = input_device(model)
    config = GenerationConfig(
        max_new_tokens=new_tokens, do_sample=False, repetition_penalty=1.0, pad_token_id=padding, **more
    )
    generator: Any = model
    with evaluating(model):
        made: Tensor = generator.generate(
            inputs=ids.to(device), attention_mask=mask.to(device), generation_config=config
        )
    return made[:, ids.shape[1] :].cpu()
