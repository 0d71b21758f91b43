"""Megatron's own loading of a checkpoint, of the tensors of one layer at a time."""

from dataclasses import replace
from typing import Any

from megatron.core.dist_checkpointing.mapping import ShardedTensor
from megatron.core.dist_checkpointing.strategies.torch import TorchDistLoadShardedStrategy


class PartialLoad(TorchDistLoadShardedStrategy):
    """Loads some layers of tensors that stand for all of them.

    Megatron stacks the layers along an axis that its ShardedTensor calls prepended, and then wants to
    know who loads each layer. An ordinary axis of size 1 means the same and asks for nothing.
    """

    def load(self, sharded_state_dict: Any, *arguments: Any, **named: Any) -> Any:
        """The tensors, with Megatron's own reading of them."""
        loaded = super().load(each(plain, sharded_state_dict), *arguments, **named)
        return each(shaped, sharded_state_dict, loaded)


def plain(shard: Any) -> Any:
    """A shard whose prepended axes are its own."""
    if not isinstance(shard, ShardedTensor) or not shard.prepend_axis_num:
        return shard
    shape = (1,) * shard.prepend_axis_num + tuple(shard.local_shape)
    data = None if shard.data is None else shard.data.detach().view(shape)
    return replace(shard, local_shape=shape, prepend_axis_num=0, data=data)


def shaped(shard: Any, loaded: Any) -> Any:
    """What was loaded, in the shape that the layer's shard has."""
    return loaded.view(shard.local_shape) if isinstance(shard, ShardedTensor) else loaded


def each(change: Any, *trees: Any) -> Any:
    """A function of every leaf of trees of the same form."""
    first = trees[0]
    if isinstance(first, dict):
        return {key: each(change, *(tree[key] for tree in trees)) for key in first}
    if isinstance(first, list):
        return [each(change, *leaves) for leaves in zip(*trees, strict=True)]
    return change(*trees)
