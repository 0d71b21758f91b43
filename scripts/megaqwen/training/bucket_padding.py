"""Lets Megatron's distributed optimizer save the states of each parameter as that parameter's.

With overlap_grad_reduce gradients lie in several buckets, each padded at its end to a multiple of the
data parallel ranks and of 128. A checkpoint that any layout can load is made of the buckets without
their padding, in which megatron-core 0.19.2 looks for parameters where they lie with it: behind the first
padded one it saves the weights and moments of others (https://github.com/NVIDIA/Megatron-LM/pull/5077).
"""

from typing import Any

Places = dict[Any, tuple[int, int, int]]
"""Of each parameter where it begins and ends in a buffer, and its bucket."""


def install() -> None:
    """Mend what it saves."""
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

    save = DistributedOptimizer.sharded_param_state_fully_reshardable

    def save_unpadded(self: Any, *words: Any, **named: Any) -> Any:
        padded = [buffer.param_index_map for buffer in self.buffers]
        try:
            for buffer in self.buffers:
                buffer.param_index_map = unpadded(buffer.param_index_map, buffer.buckets)
            return save(self, *words, **named)
        finally:
            for buffer, places in zip(self.buffers, padded, strict=True):
                buffer.param_index_map = places

    DistributedOptimizer.sharded_param_state_fully_reshardable = save_unpadded


def unpadded(places: Places, buckets: list[Any]) -> Places:
    """Where the parameters lie once every bucket's padding is left out."""
    earlier, position = {}, 0
    for bucket in buckets:
        earlier[bucket.bucket_id] = bucket.offset - position
        position += bucket.numel_unpadded
    return {
        parameter: (start - earlier[bucket], end - earlier[bucket], bucket)
        for parameter, (start, end, bucket) in places.items()
    }
