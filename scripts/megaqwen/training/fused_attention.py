"""Megatron's self attention with one kernel between its first matrix product and the attention itself."""

from typing import Any

import torch
from megatron.core.transformer.attention import SelfAttention
from megatron.core.transformer.spec_utils import ModuleSpec

from megaqwen.training.split_norm_rotate import SplitNormRotate


class FusedInputAttention(SelfAttention):
    """Takes `SplitNormRotate` where nothing else is asked for, and is Megatron's own elsewhere.

    The norms stay Megatron's modules: only their weights are used, under their own names.
    """

    angles: torch.Tensor | None = None

    def forward(self, hidden_states: torch.Tensor, *rest: Any, **named: Any) -> Any:
        """As Megatron's; what is rotated at once with splitting is not rotated again."""
        angles = named.get("rotary_pos_emb")
        if isinstance(angles, torch.Tensor) and self.can_fuse(named):
            self.angles = angles
            named["rotary_pos_emb"] = None
        try:
            return super().forward(hidden_states, *rest, **named)
        finally:
            self.angles = None

    def can_fuse(self, named: dict[str, Any]) -> bool:
        """Whether it is plain training: no packed documents, no YaRN, no shared key heads."""
        config = self.config
        return (
            named.get("packed_seq_params") is None
            and named.get("inference_context") is None
            and self._yarn_concentration_factor == 1.0
            and config.num_query_groups >= self.world_size
            and config.apply_rope_fusion
        )

    def get_query_key_value_tensors(
        self, hidden_states: torch.Tensor, *rest: Any, **named: Any
    ) -> Any:
        """Query, key and value of hidden states [sequence, batch, hidden]."""
        if self.angles is None:
            return super().get_query_key_value_tensors(hidden_states, *rest, **named)
        mixed, _ = self.linear_qkv(hidden_states)
        norms = (self.q_layernorm, self.k_layernorm)
        return SplitNormRotate.apply(
            mixed,
            self.angles,
            *(None if norm is None else weight_of(norm) for norm in norms),
            self.num_query_groups_per_partition,
            self.hidden_size_per_attention_head,
            self.config.layernorm_epsilon,
        )


def weight_of(norm: torch.nn.Module) -> torch.Tensor:
    """A norm's weight, once it is whole: Megatron gathers parameters in a hook before forward."""
    for hook in norm._forward_pre_hooks.values():
        hook(norm, ())
    return norm.weight  # type: ignore[return-value]


def fuse_attention_input(layer: ModuleSpec) -> None:
    """Have a layer's spec name `FusedInputAttention` for Megatron's self attention."""
    attention = layer.submodules.self_attention
    if attention.module is SelfAttention:
        attention.module = FusedInputAttention
