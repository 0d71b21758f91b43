"""Random models of every architecture, smaller than the shipped tiny ones and more awkward.

A vocabulary that no number of ranks divides, heads of a size of their own, a layer without experts in
between.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from megaqwen.sources.tiny import vary_norms_and_biases

COMMON: dict[str, Any] = {
    "vocab_size": 251,
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "max_position_embeddings": 64,
    "initializer_range": 0.1,
    "rope_theta": 1e6,
    "tie_word_embeddings": False,
}
EXPERTS = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
MODELS: dict[str, dict[str, Any]] = {
    "qwen2": {**COMMON, "model_type": "qwen2"},
    "qwen3": {
        **COMMON,
        "model_type": "qwen3",
        "head_dim": 10,
        "tie_word_embeddings": True,
        "num_key_value_heads": 2,
    },
    "qwen2_moe": {
        **COMMON,
        **EXPERTS,
        "model_type": "qwen2_moe",
        "shared_expert_intermediate_size": 24,
        "norm_topk_prob": False,
        "mlp_only_layers": [1],
    },
    "qwen3_moe": {
        **COMMON,
        **EXPERTS,
        "model_type": "qwen3_moe",
        "head_dim": 10,
        "norm_topk_prob": True,
    },
}


def make_model(
    directory: Path, facts: Mapping[str, Any], dtype: torch.dtype = torch.float32, seed: int = 1234
) -> Path:
    """Write a model, of which no two tensors are alike, with transformers: config and weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**facts))
        vary_norms_and_biases(model)
    model.to(dtype).save_pretrained(directory)
    return directory
