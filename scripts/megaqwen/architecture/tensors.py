"""The tensors that a Hugging Face Qwen consists of: names, shapes, count."""

import math
from collections.abc import Mapping
from typing import Any

from megaqwen.architecture.qwen import Architecture, read_architecture


def tensor_shapes(qwen: Architecture) -> dict[str, tuple[int, ...]]:
    """The shape of every tensor in the safetensors files, by name and in the model's order.

    A tied output head is not in it: it is the embedding.
    """
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (qwen.vocab_size, qwen.hidden_size)
    }
    for layer in range(qwen.layers):
        for name, shape in layer_shapes(qwen).items():
            shapes[f"model.layers.{layer}.{name}"] = shape
    shapes["model.norm.weight"] = (qwen.hidden_size,)
    if not qwen.tied_embeddings:
        shapes["lm_head.weight"] = (qwen.vocab_size, qwen.hidden_size)
    return shapes


def layer_shapes(qwen: Architecture) -> dict[str, tuple[int, ...]]:
    """The shapes of one decoder layer's tensors, by their names within the layer."""
    hidden, ffn = qwen.hidden_size, qwen.ffn_size
    query_rows = qwen.heads * qwen.head_dim
    key_rows = qwen.query_groups * qwen.head_dim
    shapes: dict[str, tuple[int, ...]] = {
        "input_layernorm.weight": (hidden,),
        "self_attn.q_proj.weight": (query_rows, hidden),
        "self_attn.k_proj.weight": (key_rows, hidden),
        "self_attn.v_proj.weight": (key_rows, hidden),
        "self_attn.o_proj.weight": (hidden, query_rows),
        "post_attention_layernorm.weight": (hidden,),
        "mlp.gate_proj.weight": (ffn, hidden),
        "mlp.up_proj.weight": (ffn, hidden),
        "mlp.down_proj.weight": (hidden, ffn),
    }
    if qwen.qkv_bias:
        shapes["self_attn.q_proj.bias"] = (query_rows,)
        shapes["self_attn.k_proj.bias"] = (key_rows,)
        shapes["self_attn.v_proj.bias"] = (key_rows,)
    if qwen.qk_norm:
        shapes["self_attn.q_norm.weight"] = (qwen.head_dim,)
        shapes["self_attn.k_norm.weight"] = (qwen.head_dim,)
    return shapes


def count_parameters(hf_config: Mapping[str, Any]) -> int:
    """The model's parameters to the unit, as transformers counts them: tied weights once."""
    shapes = tensor_shapes(read_architecture(hf_config))
    return sum(math.prod(shape) for shape in shapes.values())
