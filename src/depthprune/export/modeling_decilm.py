"""A llama without some of its attentions and MLPs, for transformers; other engines have code of their own for it.

Open it with::

    AutoModelForCausalLM.from_pretrained(FOLDER, trust_remote_code=True)
"""

from typing import Any

from torch import nn
from transformers import LlamaForCausalLM

from .configuration_decilm import DeciLMConfig
from .modeling_depthprune import RemovedSite


class DeciLMForCausalLM(LlamaForCausalLM):
    """A llama; where ``block_configs`` says ``no_op``, there is neither an attention or MLP nor the norm before it."""

    config_class = DeciLMConfig

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        for place, block in enumerate(config.block_configs):
            layer: Any = self.model.layers[place]
            if block.attention.no_op:
                layer.self_attn = RemovedSite(layer.self_attn, "attention", place, None)
                layer.input_layernorm = nn.Identity()
            if block.ffn.no_op:
                layer.mlp = RemovedSite(layer.mlp, "mlp", place, None)
                layer.post_attention_layernorm = nn.Identity()
