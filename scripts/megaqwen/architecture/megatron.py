"""A Qwen's config.json in Megatron's words."""

from collections.abc import Mapping
from typing import Any

from megaqwen.architecture.experts import Experts
from megaqwen.architecture.qwen import Architecture, read_architecture
from megaqwen.architecture.rope import Yarn
from megaqwen.errors import InputError


def megatron_options(hf_config: Mapping[str, Any], tensor_parallel: int = 1) -> dict[str, Any]:
    """Megatron's options for a model, by their argparse dests.

    Every option that shapes the model or its arithmetic is here, also where the value is Megatron's
    default: a user's config may set none of them.

    Args:
        hf_config: The model's config.json.
        tensor_parallel: Tensor parallel ranks, which only `padded_vocab_size` depends on.

    Raises:
        InputError: The model is not supported, see `read_architecture`.
    """
    qwen = read_architecture(hf_config)
    return {
        "num_layers": qwen.layers,
        "hidden_size": qwen.hidden_size,
        "ffn_hidden_size": qwen.ffn_size,
        "num_attention_heads": qwen.heads,
        "group_query_attention": True,
        "num_query_groups": qwen.query_groups,
        "kv_channels": qwen.head_dim,
        "max_position_embeddings": qwen.max_positions,
        "padded_vocab_size": padded_vocabulary(qwen.vocab_size, tensor_parallel),
        "untie_embeddings_and_output_weights": not qwen.tied_embeddings,
        "position_embedding_type": "yarn" if qwen.yarn else "rope",
        "rotary_base": whole_rotary_base(qwen.rope_theta),
        "rotary_percent": 1.0,
        "use_rope_scaling": False,
        "normalization": "RMSNorm",
        "layernorm_epsilon": qwen.norm_epsilon,
        "layernorm_zero_centered_gamma": False,
        "qk_layernorm": qwen.qk_norm,
        "add_qkv_bias": qwen.qkv_bias,
        "add_bias_linear": False,
        "swiglu": True,
        "attention_dropout": 0.0,
        "hidden_dropout": 0.0,
        "init_method_std": qwen.init_std,
        **(yarn_options(qwen.yarn) if qwen.yarn else {}),
        **(expert_options(qwen.experts, qwen) if qwen.experts else {}),
    }


def yarn_options(yarn: Yarn) -> dict[str, Any]:
    """YaRN; Megatron's options without its name in theirs are of its latent attention as well."""
    return {
        "rotary_scaling_factor": yarn.factor,
        "yarn_original_max_position_embeddings": yarn.original_positions,
        "yarn_beta_fast": yarn.beta_fast,
        "yarn_beta_slow": yarn.beta_slow,
        "yarn_correction_range_round_to_int": yarn.whole_range,
        "mscale": yarn.mscale,
        "mscale_all_dim": yarn.mscale_all_dim,
    }


def expert_options(experts: Experts, qwen: Architecture) -> dict[str, Any]:
    """The experts and their router.

    Where transformers scales the chosen probabilities to sum to 1, Megatron takes the softmax over
    the chosen logits alone, which is the same; where it does not, the softmax over all comes first.
    """
    options = {
        "num_experts": experts.count,
        "moe_ffn_hidden_size": experts.ffn_size,
        "moe_router_topk": experts.per_token,
        "moe_router_pre_softmax": not experts.normalized,
        "moe_router_score_function": "softmax",
        "moe_layer_freq": 1 if qwen.equal_layers else [int(has) for has in experts.in_layer],
    }
    if experts.shared_ffn_size is not None:
        options["moe_shared_expert_intermediate_size"] = experts.shared_ffn_size
        options["moe_shared_expert_gate"] = True
    return options


def padded_vocabulary(vocab_size: int, tensor_parallel: int) -> int:
    """Rows of Megatron's embedding: the smallest multiple of `tensor_parallel` that holds them all.

    Qwen's vocabularies are multiples of 128, so that none of the usual sizes pads them: the softmax
    then runs over the rows that transformers has, and no others. Rows beyond `vocab_size` start as
    zeros, and the export leaves them out.
    """
    return -(-vocab_size // tensor_parallel) * tensor_parallel


def whole_rotary_base(rope_theta: float) -> int:
    """The rotary base as the whole number that Megatron's option takes."""
    if rope_theta != int(rope_theta):
        raise InputError(f"config.json: rope_theta {rope_theta} is no whole number: not supported")
    return int(rope_theta)
