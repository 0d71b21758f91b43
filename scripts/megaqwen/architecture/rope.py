"""Rotary positions: the base, and YaRN's scaling where config.json asks for it.

transformers 5 writes all of it into rope_parameters; 4 had rope_theta at the top and the scaling in
rope_scaling. Both are read.
"""

import math
from dataclasses import dataclass
from typing import Any

from megaqwen.architecture.reading import Facts, above_zero, given, positive
from megaqwen.errors import InputError

DEFAULT_THETA = 10000.0
POSITIONS = "max_position_embeddings"
ORIGINAL = "original_max_position_embeddings"
ROPE_TYPES = ("default", "yarn")


@dataclass(frozen=True, kw_only=True)
class Yarn:
    """YaRN as Megatron's options have it."""

    factor: float
    """How many times longer the positions became."""
    original_positions: int
    beta_fast: float
    beta_slow: float
    mscale: float
    mscale_all_dim: float
    whole_range: bool
    """Whether the corrected range of dimensions ends at whole numbers."""


def rope_parameters(hf_config: Facts) -> dict[str, Any]:
    """What either spelling says; null says nothing.

    Raises:
        InputError: One is no object, or there are both and they differ: transformers 5 would take
            rope_scaling alone, and with it its default base.
    """
    found = []
    for name in ("rope_parameters", "rope_scaling"):
        value = hf_config.get(name)
        if value and not isinstance(value, dict):
            raise InputError(f"{name} is {value!r}: an object is expected")
        if value and (said := given(value)):
            found.append(said)
    if len(found) == 2 and found[0] != found[1]:
        raise InputError(
            "config.json has rope_parameters and rope_scaling, which differ: put all that is meant"
            " into rope_parameters, with rope_theta, and remove rope_scaling"
        )
    return found[0] if found else {}


def rope_type(hf_config: Facts) -> Any:
    """The rope's type, which older configs call `type`."""
    parameters = rope_parameters(hf_config)
    return parameters.get("rope_type", parameters.get("type", "default"))


def read_theta(hf_config: Facts) -> float:
    """The rotary base."""
    theta = rope_parameters(hf_config).get("rope_theta", hf_config.get("rope_theta"))
    return above_zero({"rope_theta": DEFAULT_THETA if theta is None else theta}, "rope_theta")


def read_yarn(hf_config: Facts) -> Yarn | None:
    """YaRN's parameters with transformers' defaults; None without YaRN.

    Raises:
        InputError: A value is out of range, or Megatron has no option that says it.
    """
    if rope_type(hf_config) != "yarn":
        return None
    at_top = {ORIGINAL: hf_config[ORIGINAL]} if hf_config.get(ORIGINAL) is not None else {}
    facts = {ORIGINAL: hf_config.get(POSITIONS), **rope_parameters(hf_config), **at_top}
    original = positive(facts, ORIGINAL)
    factor = above_zero({"factor": positive(hf_config, POSITIONS) / original, **facts}, "factor")
    mscale, mscale_all_dim = read_mscale(facts, factor)
    return Yarn(
        factor=factor,
        original_positions=original,
        beta_fast=float(facts.get("beta_fast") or 32),
        beta_slow=float(facts.get("beta_slow") or 1),
        mscale=mscale,
        mscale_all_dim=mscale_all_dim,
        whole_range=bool(facts.get("truncate", True)),
    )


def read_mscale(facts: Facts, factor: float) -> tuple[float, float]:
    """Megatron's mscale and mscale_all_dim, which come to transformers' attention factor.

    Megatron scales cosine and sine by scale(mscale) / scale(mscale_all_dim), where
    scale(x) = 0.1 * x * log(factor) + 1.
    """
    if facts.get("attention_factor") is not None:
        wanted = above_zero(facts, "attention_factor")
        if factor <= 1 and wanted != 1:
            raise InputError(
                f"config.json: attention_factor {wanted} with a YaRN factor of {factor} is not"
                " supported: Megatron scales attention only where factor is above 1"
            )
        return (1.0 if factor <= 1 else (wanted - 1) / (0.1 * math.log(factor))), 0.0
    mscale, all_dim = facts.get("mscale"), facts.get("mscale_all_dim")
    return (float(mscale), float(all_dim)) if mscale and all_dim else (1.0, 0.0)
