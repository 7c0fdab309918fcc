"""The config of a llama whose blocks differ, as vLLM, SGLang and TensorRT-LLM read it (model type nemotron-nas)."""

from types import SimpleNamespace
from typing import Any

from transformers import LlamaConfig


class DeciLMConfig(LlamaConfig):
    """A llama's config, and ``block_configs``: what each block's attention and MLP are."""

    model_type = "nemotron-nas"

    def __init__(self, block_configs: list[dict[str, Any]] | None = None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.block_configs = [
            SimpleNamespace(attention=SimpleNamespace(**block["attention"]), ffn=SimpleNamespace(**block["ffn"]))
            for block in block_configs or []
        ]

    def to_dict(self) -> dict[str, Any]:
        """The config as plain data."""
        blocks = [{"attention": vars(block.attention), "ffn": vars(block.ffn)} for block in self.block_configs]
        return super().to_dict() | {"block_configs": blocks}
