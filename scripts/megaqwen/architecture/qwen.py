"""Reads a Qwen's config.json into the facts that the bridge and Megatron need.

What a config leaves out means what transformers makes of it: the defaults below are those of
Qwen2Config and Qwen3Config. What the bridge cannot carry is refused by name.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from megaqwen.errors import InputError


@dataclass(frozen=True, kw_only=True)
class Family:
    """What a model_type decides by itself."""

    qkv_bias: bool
    """Whether the query, key and value projections have a bias; the output projection has none."""
    qk_norm: bool
    """Whether each head's query and key pass an RMSNorm before the rotary embedding."""
    head_dim: int | None
    """Head size where config.json has none; None: hidden_size / num_attention_heads."""


FAMILIES = {
    "qwen2": Family(qkv_bias=True, qk_norm=False, head_dim=None),
    "qwen3": Family(qkv_bias=False, qk_norm=True, head_dim=128),
}
DEFAULTS: dict[str, Any] = {
    "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-6,
    "initializer_range": 0.02,
    "tie_word_embeddings": False,
    "hidden_act": "silu",
}
DEFAULT_ROPE_THETA = 10000.0


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """A dense Qwen's shape and constants."""

    model_type: str
    layers: int
    hidden_size: int
    ffn_size: int
    """Rows of gate_proj and of up_proj."""
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
    init_std: float
    tied_embeddings: bool
    qkv_bias: bool
    qk_norm: bool


def read_architecture(hf_config: Mapping[str, Any]) -> Architecture:
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
    refuse_unsupported(hf_config)
    family = FAMILIES[model_type]
    heads = positive(hf_config, "num_attention_heads")
    hidden_size = positive(hf_config, "hidden_size")
    values = {**DEFAULTS, **hf_config}
    architecture = Architecture(
        model_type=model_type,
        layers=positive(hf_config, "num_hidden_layers"),
        hidden_size=hidden_size,
        ffn_size=positive(hf_config, "intermediate_size"),
        heads=heads,
        query_groups=positive(
            {"num_key_value_heads": heads, **given(hf_config)}, "num_key_value_heads"
        ),
        head_dim=read_head_dim(hf_config, family, hidden_size, heads),
        vocab_size=positive(hf_config, "vocab_size"),
        max_positions=positive(values, "max_position_embeddings"),
        norm_epsilon=float(values["rms_norm_eps"]),
        rope_theta=read_rope_theta(hf_config),
        init_std=float(values["initializer_range"]),
        tied_embeddings=bool(values["tie_word_embeddings"]),
        qkv_bias=family.qkv_bias,
        qk_norm=family.qk_norm,
    )
    if heads % architecture.query_groups:
        raise InputError(
            f"config.json: num_attention_heads {heads} is no multiple of num_key_value_heads"
            f" {architecture.query_groups}"
        )
    return architecture


def given(hf_config: Mapping[str, Any]) -> dict[str, Any]:
    """The keys whose value is not null."""
    return {key: value for key, value in hf_config.items() if value is not None}


def positive(hf_config: Mapping[str, Any], key: str) -> int:
    """A whole number above zero; InputError where there is none."""
    value = hf_config.get(key)
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        found = f"{value!r}" if key in hf_config else "missing"
        raise InputError(f"config.json: {key} is {found}: a whole number above zero is expected")
    return value


def read_head_dim(
    hf_config: Mapping[str, Any], family: Family, hidden_size: int, heads: int
) -> int:
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


def read_rope_theta(hf_config: Mapping[str, Any]) -> float:
    """The rotary base: transformers 5 writes it into rope_parameters, 4 at the top level."""
    parameters = hf_config.get("rope_parameters") or {}
    theta = parameters.get("rope_theta", hf_config.get("rope_theta"))
    return DEFAULT_ROPE_THETA if theta is None else float(theta)


def refuse_unsupported(hf_config: Mapping[str, Any]) -> None:
    """InputError for the first setting that the bridge would have to drop."""
    rope = {**(hf_config.get("rope_parameters") or {}), **(hf_config.get("rope_scaling") or {})}
    rope_type = rope.get("rope_type", rope.get("type", "default"))
    layer_types = hf_config.get("layer_types") or []
    refusals = {
        "use_sliding_window true": hf_config.get("use_sliding_window"),
        "layer_types other than full_attention": set(layer_types) - {"full_attention"},
        f"rope type {rope_type!r} (only 'default')": rope_type != "default",
        "partial_rotary_factor other than 1": rope.get("partial_rotary_factor", 1) != 1
        or (hf_config.get("partial_rotary_factor") or 1) != 1,
        "a quantization_config: give the model before quantization": hf_config.get(
            "quantization_config"
        ),
        f"hidden_act {hf_config.get('hidden_act')!r} (only 'silu')": hf_config.get(
            "hidden_act", "silu"
        )
        != "silu",
        "attention_bias true in qwen3": hf_config.get("model_type") == "qwen3"
        and hf_config.get("attention_bias"),
    }
    for what, refused in refusals.items():
        if refused:
            raise InputError(f"config.json: {what} is not supported")
