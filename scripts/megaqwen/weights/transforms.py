"""How tensors of one model become a tensor of the other: pure functions, exact both ways."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

Shape = tuple[int, ...]


class Transform(Protocol):
    """Fuses Hugging Face's tensors into Megatron's, and splits it again: `split(fuse(x)) == x`."""

    def fused_shape(self, shapes: Sequence[Shape]) -> Shape:
        """The shape of `fuse` of tensors of these shapes."""

    def fuse(self, parts: Sequence[Tensor]) -> Tensor:
        """Megatron's tensor."""

    def split(self, fused: Tensor) -> list[Tensor]:
        """Hugging Face's tensors, in the row's order."""


@dataclass(frozen=True)
class Copy:
    """The same tensor in both models."""

    def fused_shape(self, shapes: Sequence[Shape]) -> Shape:
        """The part's shape."""
        return shapes[0]

    def fuse(self, parts: Sequence[Tensor]) -> Tensor:
        """The part."""
        return parts[0]

    def split(self, fused: Tensor) -> list[Tensor]:
        """The tensor."""
        return [fused]


@dataclass(frozen=True)
class GateUp:
    """gate_proj over up_proj, both [ffn, hidden], as [2 * ffn, hidden]."""

    def fused_shape(self, shapes: Sequence[Shape]) -> Shape:
        """Both parts' rows."""
        return (shapes[0][0] + shapes[1][0], *shapes[0][1:])

    def fuse(self, parts: Sequence[Tensor]) -> Tensor:
        """Gate first."""
        return torch.cat(list(parts))

    def split(self, fused: Tensor) -> list[Tensor]:
        """Gate, up."""
        return list(fused.chunk(2))


@dataclass(frozen=True, kw_only=True)
class QueryKeyValue:
    """The projections' rows by query group: its queries, its key, its value, then the next group.

    Hugging Face has all queries [heads * head_dim, hidden], all keys and all values
    [query_groups * head_dim, hidden]. A tensor parallel rank of Megatron takes whole groups. Biases
    are the same without the hidden axis.
    """

    heads: int
    query_groups: int
    head_dim: int

    def fused_shape(self, shapes: Sequence[Shape]) -> Shape:
        """All rows of the three parts."""
        return (sum(shape[0] for shape in shapes), *shapes[0][1:])

    def fuse(self, parts: Sequence[Tensor]) -> Tensor:
        """[(heads + 2 * query_groups) * head_dim, hidden] of query, key, value."""
        rest = parts[0].shape[1:]
        by_group = [part.reshape(self.query_groups, -1, *rest) for part in parts]
        return torch.cat(by_group, dim=1).reshape(-1, *rest)

    def split(self, fused: Tensor) -> list[Tensor]:
        """Query, key, value."""
        rest = fused.shape[1:]
        query_rows = self.heads // self.query_groups * self.head_dim
        groups = fused.reshape(self.query_groups, -1, *rest)
        parts = groups.split([query_rows, self.head_dim, self.head_dim], dim=1)
        return [part.reshape(-1, *rest) for part in parts]
