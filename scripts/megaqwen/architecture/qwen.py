"""Reads a Qwen's config.json into the facts that the bridge and Megatron need.

What a config leaves out means what transformers makes of it: the defaults below are those of its
configuration classes. What the bridge cannot carry is refused by name.
"""

from dataclasses import dataclass
from typing import Any

from megaqwen.architecture.experts import Experts, read_experts
from megaqwen.architecture.reading import Facts, above_zero, given, positive
from megaqwen.architecture.rope import (
    ROPE_TYPES,
    Yarn,
    read_theta,
    read_yarn,
    rope_parameters,
    rope_type,
)
from megaqwen.errors import InputError


@dataclass(frozen=True, kw_only=True)
class Family:
    """What a model_type decides by itself."""

    qkv_bias: bool
    """Whether the query, key and value projections have a bias; the output projection has none."""
    qk_norm: bool
    """Whether each head's query and key pass an RMSNorm before the rotary embedding."""
    head_dim: int | None = None
    """Head size where config.json has none; None: hidden_size / num_attention_heads."""
    experts: bool = False
    shared_expert: bool = False
    window_from_layer: bool = False
    """Whether a sliding window, where it is used, starts at layer max_window_layers."""


FAMILIES = {
    "qwen2": Family(qkv_bias=True, qk_norm=False, window_from_layer=True),
    "qwen3": Family(qkv_bias=False, qk_norm=True, head_dim=128, window_from_layer=True),
    "qwen2_moe": Family(qkv_bias=True, qk_norm=False, experts=True, shared_expert=True),
    "qwen3_moe": Family(qkv_bias=False, qk_norm=True, experts=True),
}
DEFAULTS: dict[str, Any] = {
    "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-6,
    "initializer_range": 0.02,
    "tie_word_embeddings": False,
    "hidden_act": "silu",
}
DEFAULT_WINDOW_LAYER = 28


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """A Qwen's shape and constants."""

    model_type: str
    layers: int
    hidden_size: int
    ffn_size: int
    """Rows of gate_proj and of up_proj in a layer without experts."""
    heads: int
    """Query heads."""
    query_groups: int
    """Key and value heads: the query heads are divided among them in order."""
    head_dim: int
    vocab_size: int
    """Rows of the embedding, which has more than the tokenizer has tokens."""
    max_positions: int
    norm_epsilon: float
    rope_theta: float
    yarn: Yarn | None
    init_std: float
    tied_embeddings: bool
    qkv_bias: bool
    qk_norm: bool
    experts: Experts | None
    """None: a dense model."""

    def has_experts(self, layer: int) -> bool:
        """Whether a layer has experts instead of one plain MLP."""
        return self.experts is not None and self.experts.in_layer[layer]

    @property
    def equal_layers(self) -> bool:
        """Whether all layers are of one kind."""
        return self.experts is None or all(self.experts.in_layer)


def read_architecture(hf_config: Facts) -> Architecture:
    """The architecture of a parsed config.json.

    Raises:
        InputError: A key is missing or out of range, or says something that is not supported.
    """
    model_type = hf_config.get("model_type")
    if model_type not in FAMILIES:
        raise InputError(
            f"config.json: model_type {model_type!r} is not supported;"
            f" supported: {', '.join(FAMILIES)}"
        )
    family = FAMILIES[model_type]
    refuse_unsupported(hf_config, family)
    layers = positive(hf_config, "num_hidden_layers")
    heads = positive(hf_config, "num_attention_heads")
    hidden_size = positive(hf_config, "hidden_size")
    values = {**DEFAULTS, **hf_config}
    architecture = Architecture(
        model_type=model_type,
        layers=layers,
        hidden_size=hidden_size,
        ffn_size=positive(hf_config, "intermediate_size"),
        heads=heads,
        query_groups=positive(
            {"num_key_value_heads": heads, **given(hf_config)}, "num_key_value_heads"
        ),
        head_dim=read_head_dim(hf_config, family, hidden_size, heads),
        vocab_size=positive(hf_config, "vocab_size"),
        max_positions=positive(values, "max_position_embeddings"),
        norm_epsilon=above_zero(values, "rms_norm_eps"),
        rope_theta=read_theta(hf_config),
        yarn=read_yarn(values),
        init_std=above_zero(values, "initializer_range"),
        tied_embeddings=bool(values["tie_word_embeddings"]),
        qkv_bias=family.qkv_bias and hf_config.get("qkv_bias", True),
        qk_norm=family.qk_norm,
        experts=read_experts(hf_config, layers, shared=family.shared_expert)
        if family.experts
        else None,
    )
    if heads % architecture.query_groups:
        raise InputError(
            f"config.json: num_attention_heads {heads} is no multiple of num_key_value_heads"
            f" {architecture.query_groups}"
        )
    return architecture


def read_head_dim(hf_config: Facts, family: Family, hidden_size: int, heads: int) -> int:
    """The size of one head."""
    if hf_config.get("head_dim") is not None:
        return positive(hf_config, "head_dim")
    if family.head_dim is not None:
        return family.head_dim
    if hidden_size % heads:
        raise InputError(
            f"config.json: hidden_size {hidden_size} is no multiple of num_attention_heads {heads},"
            " and there is no head_dim"
        )
    return hidden_size // heads


def refuse_unsupported(hf_config: Facts, family: Family) -> None:
    """InputError for the first setting that the bridge would have to drop."""
    rope = rope_type(hf_config)
    rotated = (rope_parameters(hf_config), hf_config)
    refusals = {
        "use_sliding_window true": uses_window(hf_config, family),
        "layer_types other than full_attention": set(hf_config.get("layer_types") or [])
        - {"full_attention"},
        f"rope type {rope!r} (only {' and '.join(ROPE_TYPES)})": rope not in ROPE_TYPES,
        "partial_rotary_factor other than 1": any(
            (facts.get("partial_rotary_factor") or 1) != 1 for facts in rotated
        ),
        "a quantization_config: give the model before quantization": hf_config.get(
            "quantization_config"
        ),
        f"hidden_act {hf_config.get('hidden_act')!r} (only 'silu')": hf_config.get(
            "hidden_act", "silu"
        )
        != "silu",
        f"attention_bias true in {hf_config.get('model_type')}": family.qk_norm
        and hf_config.get("attention_bias"),
    }
    for what, refused in refusals.items():
        if refused:
            raise InputError(f"config.json: {what} is not supported")


def uses_window(hf_config: Facts, family: Family) -> bool:
    """Whether attention of any layer ends at a window: Megatron has one for all layers or none.

    Configs without a window in use often name one: what counts is use_sliding_window, and for
    the dense models also the first layer that it holds for.
    """
    if not hf_config.get("use_sliding_window"):
        return False
    if not family.window_from_layer:
        return True
    if hf_config.get("layer_types") or hf_config.get("sliding_window", 0) is None:
        return False  # layer_types decide, or there is no window's size
    first = hf_config.get("max_window_layers", DEFAULT_WINDOW_LAYER)
    return bool(first < positive(hf_config, "num_hidden_layers"))
