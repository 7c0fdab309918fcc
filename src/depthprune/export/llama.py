"""Families that are llamas under another name."""

from __future__ import annotations

from transformers import LlamaConfig, PreTrainedConfig

from depthprune.families import Family


def check_llama(config: PreTrainedConfig, family: Family, format: str) -> None:
    """Refuse what a format of llamas has no word for.

    Raises:
        ValueError: the model is no llama, under any name.
    """
    if not isinstance(config, LlamaConfig) and family.as_llama is None:
        raise ValueError(
            f"{format} is a format of llamas, and this is a {config.model_type}: choose another one, or keep what "
            "depthprune.save wrote."
        )


def llama_config(config: PreTrainedConfig, family: Family) -> LlamaConfig:
    """The config of the llama that a model is; the weights have the same names.

    Args:
        config: the model's.
        family: its row.

    Raises:
        ValueError: the model is no llama, or it attends only to a window.
    """
    if isinstance(config, LlamaConfig):
        return config
    if family.as_llama is None:
        raise ValueError(f"A {config.model_type} is not a llama under another name: leave as_llama out.")
    window = getattr(config, "sliding_window", None)
    windowed = "sliding_attention" in (getattr(config, "layer_types", None) or ["sliding_attention"])
    if window is not None and windowed and window < config.max_position_embeddings:
        raise ValueError(
            f"This {config.model_type} attends to a window of {window} tokens, which a llama does not: leave as_llama "
            "out, and choose another format than those of llamas."
        )
    known = LlamaConfig().to_dict()
    same = {name: value for name, value in config.to_dict().items() if name in known or name == "depthprune"}
    for name in ("model_type", "architectures", "transformers_version"):
        same.pop(name, None)
    return LlamaConfig(**{**same, **family.as_llama})
