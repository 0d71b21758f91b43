"""The tensors of a model over many ranks, put together on the last: its weights or its gradients.

Megatron's own sharded state dict says what each rank has of which tensor, as it does for a checkpoint.
The keys are a checkpoint's too, so that the bridge's table reads what was gathered. Tensors travel one at
a time, and of copies of the same part none that has the digest of one that is there already.
"""

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, apply_factories
from megatron.core.utils import unwrap_model
from torch import Tensor

from megaqwen.weights.mapping import Transfer

SENT_AT_ONCE = 2**27
"""Elements: half a gigabyte in float32."""


@dataclass(frozen=True, kw_only=True)
class Gathered:
    """Whole tensors by the keys of a checkpoint."""

    tensors: dict[str, Tensor] = field(default_factory=dict)
    copies: dict[str, float] = field(default_factory=dict)
    """Where ranks that hold the same part of a tensor have other values: the largest difference."""
    parts: set[tuple[str, tuple[int, ...]]] = field(default_factory=set)
    """Key and offset of what is there."""

    def by_huggingface_name(self, transfers: Iterable[Transfer]) -> dict[str, Tensor]:
        """The tensors as transformers' model has them, by the bridge's table."""
        found: dict[str, Tensor] = {}
        for transfer in transfers:
            place = next(each for each in transfer.places if each.key in self.tensors)
            fused = self.tensors[place.key][place.position][: transfer.shape[0]]
            parts = transfer.transform.split(fused)
            found |= dict(zip(transfer.huggingface, parts, strict=True))
        return found


@dataclass(frozen=True, kw_only=True)
class Part:
    """What a rank has of a tensor, without its values."""

    key: str
    whole: tuple[int, ...]
    """Shape of the whole tensor."""
    offset: tuple[int, ...]
    shape: tuple[int, ...]
    """Of this part, with as many axes."""
    dtype: torch.dtype
    digest: bytes
    """Of its values; empty where there is one rank."""


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
        shards = [each for chunk in model for each in shards_of(unwrap_model(chunk))]
    finally:
        for parameter, weight in zip(parameters, weights, strict=True):
            parameter.data = weight
    ranks, rank = torch.distributed.get_world_size(), torch.distributed.get_rank()
    mine = [described(shard, tensor, digested=ranks > 1) for shard, tensor in shards]
    table: list[list[Part]] = [[] for _ in range(ranks)]
    torch.distributed.all_gather_object(table, mine)
    last = ranks - 1
    gathered = Gathered()
    if rank == last:
        for part, (_, tensor) in zip(mine, shards, strict=True):
            put(gathered, part, tensor)
    for sender, index in parts_to_send(table):
        if rank == sender:
            for piece in shards[index][1].flatten().split(SENT_AT_ONCE):
                torch.distributed.send(piece.contiguous(), dst=last)
        elif rank == last:
            part = table[sender][index]
            received = torch.empty(part.shape, dtype=part.dtype)
            for piece in received.flatten().split(SENT_AT_ONCE):
                torch.distributed.recv(piece, src=sender)
            put(gathered, part, received)
    return gathered if rank == last else None


def shards_of(module: Any) -> Iterator[tuple[ShardedTensor, Tensor]]:
    """What this rank has of the model's tensors, each with as many axes as the whole: no copies."""
    state = module.sharded_state_dict()
    apply_factories(state)
    for each in nested_values(state):
        if isinstance(each, ShardedTensor) and each.data is not None:
            yield each, each.data.detach().reshape((1,) * each.prepend_axis_num + each.local_shape)


def described(shard: ShardedTensor, tensor: Tensor, *, digested: bool) -> Part:
    """A part, for the other ranks."""
    values = tensor.contiguous().flatten().view(torch.uint8).numpy() if digested else b""
    return Part(
        key=shard.key,
        whole=tuple(shard.global_shape),
        offset=tuple(shard.global_offset),
        shape=tuple(tensor.shape),
        dtype=tensor.dtype,
        digest=hashlib.sha256(values).digest() if digested else b"",
    )


def parts_to_send(table: Sequence[Sequence[Part]]) -> list[tuple[int, int]]:
    """Rank and index of what the last rank is sent, in order: what it lacks, and copies that differ.

    Args:
        table: The parts of each rank.
    """
    last = len(table) - 1
    digests = {(part.key, part.offset): part.digest for part in table[last]}
    sent = []
    for rank in range(last):
        for index, part in enumerate(table[rank]):
            place = (part.key, part.offset)
            if digests.get(place) != part.digest:
                sent.append((rank, index))
            digests.setdefault(place, part.digest)
    return sent


def put(gathered: Gathered, part: Part, tensor: Tensor) -> None:
    """Put a part where it belongs in its whole; where one is already, note how far the two are apart."""
    if part.key not in gathered.tensors:
        gathered.tensors[part.key] = torch.full(part.whole, float("nan"), dtype=part.dtype)
    box = tuple(
        slice(start, start + size) for start, size in zip(part.offset, part.shape, strict=True)
    )
    place = gathered.tensors[part.key][box]
    if (part.key, part.offset) not in gathered.parts:
        place.copy_(tensor)
        gathered.parts.add((part.key, part.offset))
    elif not torch.equal(place, tensor):
        apart = float((place - tensor).abs().max())
        gathered.copies[part.key] = max(apart, gathered.copies.get(part.key, 0.0))
