"""The shapes of the tiny models, as the facts of a Hugging Face config.json. Light: no torch."""

import copy
from typing import Any

BPE_TOKENS = 2528
SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
MARKUP_TOKENS = ("<tool_call>", "</tool_call>", "<think>", "</think>")
END_OF_TEXT = BPE_TOKENS  # ids: the BPE vocabulary, then the special tokens, then the markup tokens

COMMON: dict[str, Any] = {
    "hidden_act": "silu",
    "hidden_size": 192,
    "intermediate_size": 512,
    "num_hidden_layers": 4,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 1024,
    "initializer_range": 0.02,
    "rope_theta": 1000000.0,
    "attention_dropout": 0.0,
    "use_sliding_window": False,
    "use_cache": True,
    "bos_token_id": END_OF_TEXT,
    "eos_token_id": END_OF_TEXT,
}

# As in the real models, the embedding has more rows than the tokenizer has tokens (2535).
# 2600 rows are no multiple of 128, so that Megatron has to pad them; 2560 are.
TINY: dict[str, dict[str, Any]] = {
    "qwen3": {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "head_dim": 48,  # not hidden_size / num_attention_heads
        "vocab_size": 2560,
        "tie_word_embeddings": True,
        "attention_bias": False,
        "rms_norm_eps": 1e-06,
    },
    "qwen2": {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "vocab_size": 2600,
        "tie_word_embeddings": False,
        "rms_norm_eps": 1e-05,
    },
    "qwen3_moe": {
        "architectures": ["Qwen3MoeForCausalLM"],
        "model_type": "qwen3_moe",
        "head_dim": 48,
        "vocab_size": 2560,
        "tie_word_embeddings": False,
        "attention_bias": False,
        "rms_norm_eps": 1e-06,
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 192,
        "norm_topk_prob": True,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
    },
    "qwen2_moe": {
        "architectures": ["Qwen2MoeForCausalLM"],
        "model_type": "qwen2_moe",
        "vocab_size": 2600,
        "tie_word_embeddings": False,
        "rms_norm_eps": 1e-06,
        "num_experts": 6,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 128,
        "shared_expert_intermediate_size": 256,
        "norm_topk_prob": False,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [1],  # a plain MLP of intermediate_size
    },
}


def tiny_hf_config(architecture: str) -> dict[str, Any]:
    """The config.json facts of a tiny model, as a new dict in the form that the Hub's models have.

    Args:
        architecture: qwen3 (q/k norm, head_dim of its own, tied embeddings), qwen2 (Qwen2.5:
            QKV bias, untied embeddings), qwen3_moe (as qwen3 but untied, experts in every layer) or
            qwen2_moe (as qwen2, experts and a shared one in all layers but the second).
    """
    return copy.deepcopy({**COMMON, **TINY[architecture]})
