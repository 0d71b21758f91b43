"""Attention within each conversation of a pack, on a machine without Transformer Engine.

Transformer Engine's attention takes `PackedSeqParams` itself. Megatron's local one refuses them, so
here it is asked once for each conversation: what it computes is what it would compute for that
conversation alone, and nothing of a neighbour can reach it.
"""

from itertools import pairwise
from typing import Any

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.dot_product_attention import DotProductAttention


class PackedDotProductAttention(DotProductAttention):
    """Megatron's local attention, for packed sequences too."""

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        packed_seq_params: PackedSeqParams | None = None,
        **arguments: Any,
    ) -> torch.Tensor:
        """Attend; without `packed_seq_params` as Megatron does.

        Args:
            query: [positions, heads, channels] of packed sequences; else [sequence, batch, heads,
                channels]. Likewise key and value, with the heads of query groups.
            key: As query.
            value: As query.
            attention_mask: None: the mask is causal.
            packed_seq_params: Where each conversation begins and ends.
            arguments: Megatron's others.

        Returns:
            [positions, 1, heads x channels], or [sequence, batch, heads x channels].
        """
        attend = super().forward
        if packed_seq_params is None:
            return attend(query, key, value, attention_mask, **arguments)
        bounds = packed_seq_params.cu_seqlens_q.tolist()
        conversations = [
            attend(
                *(tensor[begin:end].unsqueeze(1) for tensor in (query, key, value)),
                attention_mask,
                **arguments,
            )
            for begin, end in pairwise(bounds)
        ]
        return torch.cat(conversations)
