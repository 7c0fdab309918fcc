"""A tokenizer in a GGUF file."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf

_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
PRE_TOKENIZERS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("gpt-2", ("ByteLevel",)),
    ("smollm", ("Digits", "ByteLevel")),
    ("llama-bpe", (rf"{_WORDS}|\p{{N}}{{1,3}}|{_REST}", "ByteLevel")),
    ("qwen2", (rf"{_WORDS}|\p{{N}}|{_REST}", "ByteLevel")),
)
"""llama.cpp's names of the ways to cut text before byte-level BPE, with the parts of ``tokenizer.json`` that each one
has: kinds, or the pattern of a split."""

SPACE = "\u2581"  # what SentencePiece writes for a space


def add_tokenizer(writer: gguf.GGUFWriter, folder: Path, vocabulary: int) -> None:
    """Write a tokenizer from its files: byte-level BPE, as GPT-2, Llama 3, Qwen and SmolLM have, or SentencePiece's.

    Args:
        writer: of the file.
        folder: with ``tokenizer.json`` and ``tokenizer_config.json``.
        vocabulary: rows of the embeddings; those without a token are marked as unused.

    Raises:
        ValueError: it is another kind of tokenizer, or has more tokens than there are embeddings.
    """
    path = folder / "tokenizer.json"
    content = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    model = content.get("model", {})
    is_sentencepiece, name = _is_sentencepiece(content), _pre_tokenizer(content)
    if model.get("type") != "BPE" or (name is None and not is_sentencepiece):
        known = ", ".join(known for known, _ in PRE_TOKENIZERS)
        raise ValueError(
            "The tokenizer is none of those that can be written to a GGUF file (SentencePiece's BPE, or byte-level BPE "
            f"that cuts text as one of {known} does): choose the format plain, and convert its folder with llama.cpp's "
            "own script."
        )
    tokens = _tokens(content)
    if max(tokens) >= vocabulary:
        raise ValueError(
            f"The tokenizer has tokens up to number {max(tokens)}, and the model has embeddings for {vocabulary}, so "
            "that a GGUF file cannot hold them all: put the model's own tokenizer into its folder, or give the model "
            "larger embeddings."
        )
    found = [tokens.get(number, (f"[PAD{number}]", gguf.TokenType.UNUSED)) for number in range(vocabulary)]
    writer.add_tokenizer_model("llama" if is_sentencepiece else "gpt2")
    writer.add_tokenizer_pre("default" if name is None else name)
    writer.add_token_list([token for token, _ in found])
    writer.add_token_types([kind for _, kind in found])
    if is_sentencepiece:
        scores = _scores(model["merges"])
        writer.add_token_scores([scores.get(token, 0.0) for token, _ in found])
        writer.add_add_space_prefix(_puts_space_first(content))
    special = gguf.SpecialVocab(folder, load_merges=not is_sentencepiece, n_vocab=vocabulary)
    special.add_special_token.setdefault("bos", _adds_first(content))
    special.add_to_gguf(writer, quiet=True)


def _tokens(content: Mapping[str, Any]) -> dict[int, tuple[str, gguf.TokenType]]:
    """Every token by its number, with what llama.cpp takes it for."""
    model = content["model"]
    has_bytes, unknown = model.get("byte_fallback", False), model.get("unk_token")
    found: dict[int, tuple[str, gguf.TokenType]] = {}
    for token, number in model["vocab"].items():
        kind = gguf.TokenType.NORMAL
        if has_bytes and re.fullmatch(r"<0x[0-9A-F]{2}>", token):
            kind = gguf.TokenType.BYTE
        found[number] = token, kind
    for added in content.get("added_tokens", []):
        kind = gguf.TokenType.CONTROL if added["special"] else gguf.TokenType.USER_DEFINED
        found[added["id"]] = added["content"], kind
    for number, (token, _) in found.items():
        if token == unknown:
            found[number] = token, gguf.TokenType.UNKNOWN
    return found


def _scores(merges: list[Any]) -> dict[str, float]:
    """What SentencePiece merges by, the highest first: the rank of the first merge that makes a token."""
    found: dict[str, float] = {}
    for rank, merge in enumerate(merges):
        left, right = merge.split(" ") if isinstance(merge, str) else merge
        found.setdefault(left + right, -float(rank))
    return found


def _is_sentencepiece(content: Mapping[str, Any]) -> bool:
    """Whether it is BPE that writes spaces as SentencePiece does, and unknown characters as their bytes."""
    normalizer = content.get("normalizer") or {}
    steps = normalizer.get("normalizers", [normalizer] if normalizer else [])
    spaces = [step for step in steps if step.get("type") == "Replace"]
    metaspace = (content.get("pre_tokenizer") or {}).get("type") == "Metaspace"
    return (
        content.get("model", {}).get("byte_fallback", False)
        and all(step.get("type") in ("Prepend", "Replace") for step in steps)
        and all(step["pattern"] == {"String": " "} and step["content"] == SPACE for step in spaces)
        and (metaspace or (bool(spaces) and not content.get("pre_tokenizer")))
    )


def _puts_space_first(content: Mapping[str, Any]) -> bool:
    """Whether SentencePiece's space is put before a text."""
    normalizer = content.get("normalizer") or {}
    steps = normalizer.get("normalizers", [normalizer])
    scheme = (content.get("pre_tokenizer") or {}).get("prepend_scheme", "never")
    return any(step.get("type") == "Prepend" for step in steps) or scheme in ("first", "always")


def _pre_tokenizer(content: Mapping[str, Any]) -> str | None:
    """llama.cpp's name of how text is cut before byte-level BPE; None if it has none that is known here."""
    first = content.get("pre_tokenizer") or {}
    parts = first.get("pretokenizers", [first])
    if content.get("normalizer") or any(part.get("add_prefix_space") for part in parts):
        return None
    for name, wanted in PRE_TOKENIZERS:
        if len(parts) == len(wanted) and all(map(_is, parts, wanted)):
            return name
    return None


def _is(part: Mapping[str, Any], wanted: str) -> bool:
    """Whether a pre-tokenizer is of a kind, or a split by this pattern."""
    if part.get("type") == "Split":
        return part.get("pattern", {}).get("Regex") == wanted and part.get("behavior") == "Isolated"
    return part.get("type") == wanted and (wanted != "Digits" or part.get("individual_digits", False))


def _adds_first(content: Mapping[str, Any]) -> bool:
    """Whether a token is put before every text."""
    processor = content.get("post_processor") or {}
    for each in processor.get("processors", [processor]):
        if each.get("type") == "TemplateProcessing" and "SpecialToken" in (each.get("single") or [{}])[0]:
            return True
    return False
