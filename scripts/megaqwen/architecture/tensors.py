"""The tensors that a Hugging Face Qwen consists of: names, shapes, count."""

import math
from collections.abc import Mapping
from typing import Any

from megaqwen.architecture.experts import Experts
from megaqwen.architecture.qwen import Architecture, read_architecture

Shape = tuple[int, ...]


def tensor_shapes(qwen: Architecture) -> dict[str, Shape]:
    """The shape of every tensor in the safetensors files, by name and in the model's order.

    A tied output head is not in it: it is the embedding. Experts have a tensor each, as on the Hub;
    transformers stacks them when it loads them.
    """
    shapes: dict[str, Shape] = {"model.embed_tokens.weight": (qwen.vocab_size, qwen.hidden_size)}
    for layer in range(qwen.layers):
        for name, shape in layer_shapes(qwen, layer).items():
            shapes[f"model.layers.{layer}.{name}"] = shape
    shapes["model.norm.weight"] = (qwen.hidden_size,)
    if not qwen.tied_embeddings:
        shapes["lm_head.weight"] = (qwen.vocab_size, qwen.hidden_size)
    return shapes


def layer_shapes(qwen: Architecture, layer: int) -> dict[str, Shape]:
    """The shapes of one decoder layer's tensors, by their names within the layer."""
    hidden = qwen.hidden_size
    feed_forward = (
        expert_shapes(qwen.experts, hidden)
        if qwen.experts and qwen.has_experts(layer)
        else mlp_shapes("mlp", hidden, qwen.ffn_size)
    )
    return {
        "input_layernorm.weight": (hidden,),
        **attention_shapes(qwen),
        "post_attention_layernorm.weight": (hidden,),
        **feed_forward,
    }


def attention_shapes(qwen: Architecture) -> dict[str, Shape]:
    """The projections, with biases or head norms where the model has them."""
    hidden = qwen.hidden_size
    query_rows = qwen.heads * qwen.head_dim
    key_rows = qwen.query_groups * qwen.head_dim
    shapes: dict[str, Shape] = {
        "self_attn.q_proj.weight": (query_rows, hidden),
        "self_attn.k_proj.weight": (key_rows, hidden),
        "self_attn.v_proj.weight": (key_rows, hidden),
        "self_attn.o_proj.weight": (hidden, query_rows),
    }
    if qwen.qkv_bias:
        shapes["self_attn.q_proj.bias"] = (query_rows,)
        shapes["self_attn.k_proj.bias"] = (key_rows,)
        shapes["self_attn.v_proj.bias"] = (key_rows,)
    if qwen.qk_norm:
        shapes["self_attn.q_norm.weight"] = (qwen.head_dim,)
        shapes["self_attn.k_norm.weight"] = (qwen.head_dim,)
    return shapes


def expert_shapes(experts: Experts, hidden: int) -> dict[str, Shape]:
    """The router, each expert by its number, and the shared expert with its gate."""
    shapes: dict[str, Shape] = {"mlp.gate.weight": (experts.count, hidden)}
    for expert in range(experts.count):
        shapes |= mlp_shapes(f"mlp.experts.{expert}", hidden, experts.ffn_size)
    if experts.shared_ffn_size is not None:
        shapes |= mlp_shapes("mlp.shared_expert", hidden, experts.shared_ffn_size)
        shapes["mlp.shared_expert_gate.weight"] = (1, hidden)
    return shapes


def mlp_shapes(prefix: str, hidden: int, ffn: int) -> dict[str, Shape]:
    """A gated MLP."""
    return {
        f"{prefix}.gate_proj.weight": (ffn, hidden),
        f"{prefix}.up_proj.weight": (ffn, hidden),
        f"{prefix}.down_proj.weight": (hidden, ffn),
    }


def count_parameters(hf_config: Mapping[str, Any]) -> int:
    """The model's parameters to the unit, as transformers counts them: tied weights once."""
    shapes = tensor_shapes(read_architecture(hf_config))
    return sum(math.prod(shape) for shape in shapes.values())
