"""What can be exported in which form: the one table, which the README shows and the tests hold the code to."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

EXACT = "exact"
AS_LLAMA = "exact as llama"
REFUSED = "refused"

FORMATS = {
    "plain": "The architecture's own folder, with fewer blocks.",
    "compatible": "The architecture's own folder; removed attentions and MLPs stay with weights of zero.",
    "custom-code": "A folder with a modelling file of its own; nothing of the removed sites is left.",
    "nemotron-nas": "A llama whose config names absent attentions and MLPs, for vLLM, SGLang and TensorRT-LLM.",
    "gguf": "A llama as one file for llama.cpp.",
}
"""Every format by name."""

STANDING = ("none", "constant", "map")
"""What may stand in a removed site: nothing (also where kept layers were refit or healed), what adds the same to every
token, or what adds to each what depends on it."""


@dataclass(frozen=True)
class Row:
    """One or more cells of the table.

    Attributes:
        families: model types.
        kinds: of site.
        standing: what stands there.
        formats: names of formats.
        outcome: exact, exact as llama, or refused.
        how: where a constant goes, or why it is refused.
    """

    families: tuple[str, ...]
    kinds: tuple[str, ...]
    standing: tuple[str, ...]
    formats: tuple[str, ...]
    outcome: str
    how: str = ""


ALL = (
    *("llama", "mistral", "qwen2", "qwen3", "phi3", "smollm3", "mixtral", "qwen3_moe"),
    *("gemma2", "gemma3_text", "olmo2", "phi", "cohere", "gpt_neox", "gpt2", "opt"),
)
BOTH_BIASES = ("llama", "smollm3", "phi", "gpt_neox", "gpt2", "opt")
LLAMAS = ("mistral", "qwen2")
ATTENTION_BIAS = ("qwen3", "qwen3_moe")
NO_BIAS = ("phi3", "mixtral")
NORM_BEHIND = ("gemma2", "gemma3_text", "olmo2")
PLACELESS = "its architecture has no place for a map"
OTHERS = tuple(name for name in ALL if name not in ("llama", *LLAMAS))
LLAMA_FORMATS = ("nemotron-nas", "gguf")
NO_LLAMA = "a format of llamas"
BIASLESS = "no layer that writes to the stream has a bias"

TABLE = (
    Row(ALL, ("block", "attention", "mlp"), STANDING, ("custom-code",), EXACT),
    Row(OTHERS, ("block", "attention", "mlp"), STANDING, LLAMA_FORMATS, REFUSED, NO_LLAMA),
    Row(("llama",), ("block", "attention", "mlp"), ("none",), LLAMA_FORMATS, EXACT),
    Row(("llama",), ("block", "attention", "mlp"), ("constant",), LLAMA_FORMATS, EXACT, "a bias before the site"),
    Row(LLAMAS, ("block", "attention", "mlp"), ("none",), LLAMA_FORMATS, AS_LLAMA),
    Row(LLAMAS, ("block", "attention", "mlp"), ("constant",), LLAMA_FORMATS, AS_LLAMA, "a bias before the site"),
    Row(("llama", *LLAMAS), ("block", "attention", "mlp"), ("map",), LLAMA_FORMATS, REFUSED, PLACELESS),
    Row(ALL, ("block",), ("none",), ("plain", "compatible"), EXACT),
    Row(ALL, ("attention", "mlp"), ("none",), ("plain",), REFUSED, "a block without its half is no block of it"),
    Row(ALL, ("attention", "mlp"), ("none",), ("compatible",), EXACT, "weights of zero"),
    Row(ALL, ("block", "attention", "mlp"), ("map",), ("plain", "compatible"), REFUSED, PLACELESS),
    Row(ALL, ("attention", "mlp"), ("constant",), ("plain",), REFUSED, "a block without its half is no block of it"),
    Row(BOTH_BIASES, ("block",), ("constant",), ("plain", "compatible"), EXACT, "a bias before the site"),
    Row(BOTH_BIASES, ("attention", "mlp"), ("constant",), ("compatible",), EXACT, "the bias of the layer of zeros"),
    Row(LLAMAS, ("block",), ("constant",), ("plain", "compatible"), AS_LLAMA, "a bias before the site"),
    Row(LLAMAS, ("attention", "mlp"), ("constant",), ("compatible",), AS_LLAMA, "the bias of the layer of zeros"),
    Row(ATTENTION_BIAS, ("block",), ("constant",), ("plain", "compatible"), REFUSED, "its MLPs have no biases"),
    Row(ATTENTION_BIAS, ("attention", "mlp"), ("constant",), ("compatible",), EXACT, "the attention's bias"),
    Row(("cohere",), ("block",), ("constant",), ("plain", "compatible"), EXACT, "an attention's bias before the site"),
    Row(("cohere",), ("attention", "mlp"), ("constant",), ("compatible",), EXACT, "the attention's bias"),
    Row(NO_BIAS, ("block",), ("constant",), ("plain", "compatible"), REFUSED, BIASLESS),
    Row(NO_BIAS, ("attention", "mlp"), ("constant",), ("compatible",), REFUSED, BIASLESS),
    Row(NORM_BEHIND, ("block",), ("constant",), ("plain", "compatible"), REFUSED, "norms stand behind its layers"),
    Row(NORM_BEHIND, ("attention", "mlp"), ("constant",), ("compatible",), REFUSED, "norms stand behind its layers"),
)
"""Every cell: family by kind of site by what stands there by format."""


def cells() -> Iterator[tuple[str, str, str, str, Row]]:
    """Every cell: family, kind of site, what stands there, format, and its row."""
    for row in TABLE:
        for family in row.families:
            for kind in row.kinds:
                for standing in row.standing:
                    for name in row.formats:
                        yield family, kind, standing, name, row


def markdown() -> str:
    """The table as it stands in the README: families with the same cells share a line."""
    kinds = list(dict.fromkeys(kind for row in TABLE for kind in row.kinds))
    found: dict[tuple[str, str, str], dict[str, str]] = {}
    for family, kind, standing, name, row in cells():
        found.setdefault((kind, standing, family), {})[name] = f"{row.outcome}: {row.how}" if row.how else row.outcome
    lines = [
        f"| removed | in its place | model types | {' | '.join(FORMATS)} |",
        f"|---|---|---|{'---|' * len(FORMATS)}",
    ]
    for kind in kinds:
        for standing in STANDING:
            alike: dict[tuple[str, ...], list[str]] = {}
            for family in ALL:
                alike.setdefault(tuple(found[kind, standing, family][name] for name in FORMATS), []).append(family)
            for outcomes, families in alike.items():
                named = "all" if len(families) == len(ALL) else ", ".join(families)
                lines.append(f"| {kind} | {standing} | {named} | {' | '.join(outcomes)} |")
    return "\n".join(lines)
