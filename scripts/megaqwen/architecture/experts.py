"""Mixture of experts: which layers have them, how many, and how tokens are routed."""

from dataclasses import dataclass

from megaqwen.architecture.reading import Facts, positive
from megaqwen.errors import InputError

COUNTS = ("num_experts", "num_local_experts")  # the Hub's name, and that of transformers 5


@dataclass(frozen=True, kw_only=True)
class Experts:
    """The experts of a model; each is a small MLP, and a router chooses some for each token."""

    count: int
    per_token: int
    ffn_size: int
    """Rows of one expert's gate_proj and of its up_proj."""
    shared_ffn_size: int | None
    """The same of the shared expert, which every token passes through a gate; None: there is none."""
    normalized: bool
    """Whether the chosen experts' probabilities are scaled to sum to 1."""
    in_layer: tuple[bool, ...]
    """For each layer, whether it has experts or one plain MLP."""


def read_experts(hf_config: Facts, layers: int, *, shared: bool) -> Experts:
    """The experts that a config.json describes.

    Args:
        hf_config: The parsed config.json.
        layers: How many layers the model has.
        shared: Whether the model's type has a shared expert.

    Raises:
        InputError: A key is missing or out of range, or Megatron has no words for it.
    """
    name = next((key for key in COUNTS if hf_config.get(key) is not None), COUNTS[0])
    experts = Experts(
        count=positive(hf_config, name),
        per_token=positive(hf_config, "num_experts_per_tok"),
        ffn_size=positive(hf_config, "moe_intermediate_size"),
        shared_ffn_size=positive(hf_config, "shared_expert_intermediate_size") if shared else None,
        normalized=bool(hf_config.get("norm_topk_prob", False)),
        in_layer=layers_with_experts(hf_config, layers),
    )
    if experts.per_token > experts.count:
        raise InputError(
            f"config.json: num_experts_per_tok {experts.per_token} is more than the"
            f" {experts.count} experts"
        )
    if experts.per_token == 1 and experts.normalized:
        raise InputError(
            "config.json: norm_topk_prob true with num_experts_per_tok 1 is not supported: the"
            " one expert's weight would always be 1, and Megatron refuses that"
        )
    if not any(experts.in_layer):
        raise InputError(
            "config.json: by decoder_sparse_step and mlp_only_layers no layer has experts: give it"
            f" as a dense model ({str(hf_config.get('model_type')).removesuffix('_moe')})"
        )
    return experts


def layers_with_experts(hf_config: Facts, layers: int) -> tuple[bool, ...]:
    """Whether each layer has experts: every decoder_sparse_step-th, but those of mlp_only_layers."""
    step = positive({"decoder_sparse_step": 1, **hf_config}, "decoder_sparse_step")
    plain = hf_config.get("mlp_only_layers") or []
    if not isinstance(plain, list) or not all(isinstance(layer, int) for layer in plain):
        raise InputError(f"config.json: mlp_only_layers is {plain!r}: a list of layers is expected")
    return tuple(layer not in plain and (layer + 1) % step == 0 for layer in range(layers))
