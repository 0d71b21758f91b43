"""What the benchmarks on GPUs train: published Qwens, with fewer layers or of a size for a CPU."""

from typing import Any

from published import published_config

SMALL: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "moe_intermediate_size": 32,
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "head_dim": 8,
}


def shape_config(name: str, layers: int | None = None, *, small: bool = False) -> dict[str, Any]:
    """config.json of a published model.

    Args:
        name: As in published.py.
        layers: How many in place of its own.
        small: As narrow as SMALL, where it has such a size.
    """
    facts = published_config(name)
    if layers:
        facts["num_hidden_layers"] = layers
    return {**facts, **{key: value for key, value in SMALL.items() if small and key in facts}}
