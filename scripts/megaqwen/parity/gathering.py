"""The tensors of a model over many ranks, put together on the last: its weights or its gradients.

Megatron's own sharded state dict says what each rank has of which tensor, as it does for a checkpoint.
The keys are a checkpoint's too, so that the bridge's table reads what was gathered.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, apply_factories
from megatron.core.utils import unwrap_model
from torch import Tensor

from megaqwen.weights.mapping import Transfer


@dataclass(frozen=True, kw_only=True)
class Gathered:
    """Whole tensors by the keys of a checkpoint."""

    tensors: dict[str, Tensor]
    copies: dict[str, float]
    """Where ranks that hold the same part of a tensor have other values: the largest difference."""

    def by_huggingface_name(self, transfers: Iterable[Transfer]) -> dict[str, Tensor]:
        """The tensors as transformers' model has them, by the bridge's table."""
        found: dict[str, Tensor] = {}
        for transfer in transfers:
            place = next(each for each in transfer.places if each.key in self.tensors)
            fused = self.tensors[place.key][place.position][: transfer.shape[0]]
            parts = transfer.transform.split(fused)
            found |= dict(zip(transfer.huggingface, parts, strict=True))
        return found


def gather_to_last_rank(model: Sequence[Any], *, gradients: bool = False) -> Gathered | None:
    """The model's tensors on the last rank; elsewhere None.

    Args:
        model: This rank's chunks.
        gradients: Not the weights but what Megatron's buffers have of their gradients.
    """
    parameters = [each for chunk in model for each in chunk.parameters()]
    weights = [parameter.data for parameter in parameters]
    if gradients:
        for parameter in parameters:
            parameter.data = parameter.main_grad
    try:
        mine = [each for chunk in model for each in shards(unwrap_model(chunk))]
    finally:
        for parameter, weight in zip(parameters, weights, strict=True):
            parameter.data = weight
    ranks = torch.distributed.get_world_size()
    last = torch.distributed.get_rank() == ranks - 1
    found: list[Any] | None = [None] * ranks if last else None
    torch.distributed.gather_object(mine, found, dst=ranks - 1)
    return None if found is None else put_together([shard for each in found for shard in each])


@dataclass(frozen=True, kw_only=True)
class Shard:
    """A part of a tensor."""

    key: str
    shape: tuple[int, ...]
    """Of the whole."""
    offset: tuple[int, ...]
    tensor: Tensor
    """With as many axes as the whole."""


def shards(module: Any) -> list[Shard]:
    """What this rank has of the model's tensors."""
    state = module.sharded_state_dict()
    apply_factories(state)
    return [
        Shard(
            key=each.key,
            shape=tuple(each.global_shape),
            offset=tuple(each.global_offset),
            tensor=each.data.detach()
            .reshape((1,) * each.prepend_axis_num + each.local_shape)
            .clone(),
        )
        for each in nested_values(state)
        if isinstance(each, ShardedTensor) and each.data is not None
    ]


def put_together(parts: Sequence[Shard]) -> Gathered:
    """Whole tensors of parts, some of which several ranks have."""
    tensors: dict[str, Tensor] = {}
    copies: dict[str, float] = {}
    seen: set[tuple[str, tuple[int, ...]]] = set()
    for part in parts:
        if part.key not in tensors:
            tensors[part.key] = torch.full(part.shape, float("nan"), dtype=part.tensor.dtype)
        box = tuple(
            slice(start, start + size)
            for start, size in zip(part.offset, part.tensor.shape, strict=True)
        )
        place = tensors[part.key][box]
        if (part.key, part.offset) not in seen:
            place.copy_(part.tensor)
            seen.add((part.key, part.offset))
        elif not torch.equal(place, part.tensor):
            apart = float((place - part.tensor).abs().max())
            copies[part.key] = max(apart, copies.get(part.key, 0.0))
    return Gathered(tensors=tensors, copies=copies)
