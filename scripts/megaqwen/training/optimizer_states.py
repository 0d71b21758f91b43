"""Lets Megatron's distributed optimizer save and load the states of each parameter as that parameter's.

With overlap_grad_reduce gradients lie in several buckets, each padded at its end to a multiple of the
data parallel ranks and of 128. A checkpoint that any layout can load is made of the buckets without
their padding, in which megatron-core 0.19.2 looks for parameters where they lie with it: behind the first
padded one it saves the weights and moments of others (https://github.com/NVIDIA/Megatron-LM/pull/5077).
The optimizer's weights are the model's, in more digits; what is loaded is held to that.

A save gathers them on every rank: bucket by bucket on the GPU, where a bucket may be all weights of a
pipeline stage, and whole on the host. Where there is no memory for it, one of the data parallel ranks
gathers them over gloo, as with distrib_optim_fully_reshardable_mem_efficient.
"""

import logging
from typing import Any

import torch
from torch import Tensor

from megaqwen.errors import InputError
from megaqwen.machine import free_memory
from megaqwen.training.ranks import ranks_of_node

logger = logging.getLogger("megaqwen.training")

Places = dict[Any, tuple[int, int, int]]
"""Of each parameter where it begins and ends in a buffer, and its bucket."""
BY_ONE = "distrib_optim_fully_reshardable_mem_efficient"
SAFE = 0.9
"""Of free memory, since it may be in pieces."""
ROUNDING = 2.0**-8, 1e-6
"""Relative and absolute: at least what bfloat16 and float16 leave of a weight."""


def install() -> None:
    """Mend what it saves, and hold what it loads."""
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

    save = DistributedOptimizer.sharded_param_state_fully_reshardable
    load = DistributedOptimizer.load_parameter_state_from_fully_reshardable

    def save_unpadded(self: Any, model: Any, is_loading: bool, metadata: dict[str, Any]) -> Any:
        padded = [buffer.param_index_map for buffer in self.buffers]
        if not is_loading and not metadata[BY_ONE]:
            metadata = {**metadata, BY_ONE: by_one(self)}
        try:
            for buffer in self.buffers:
                buffer.param_index_map = unpadded(buffer.param_index_map, buffer.buckets)
            return save(self, model, is_loading, metadata)
        finally:
            for buffer, places in zip(self.buffers, padded, strict=True):
                buffer.param_index_map = places

    def load_held(self: Any, states: Any) -> None:
        take, others = self._set_main_param_and_optimizer_states, []

        def take_held(parameter: Tensor, tensors: dict[str, Tensor]) -> None:
            place = self._get_model_param_range_map(parameter)["param"]
            # The precision-aware optimizer has what the model lacks of a weight, which is no weight.
            held = not self.config.use_precision_aware_optimizer
            if held and not is_weight_of(parameter, place.start, tensors["param"]):
                others.append(tuple(parameter.shape))
            # What is on the host stays: as a part it would keep all that was loaded.
            take(parameter, {name: tensor.clone() for name, tensor in tensors.items()})

        self._set_main_param_and_optimizer_states = take_held
        try:
            load(self, states)
        finally:
            del self._set_main_param_and_optimizer_states
        if others:
            raise InputError(MIXED_UP.format(count=len(others), shape=list(others[0])))

    DistributedOptimizer.sharded_param_state_fully_reshardable = save_unpadded
    DistributedOptimizer.load_parameter_state_from_fully_reshardable = load_held


def by_one(optimizer: Any) -> bool:
    """Whether one rank gathers for all of them; as the first save finds, since saves are to be alike."""
    if not hasattr(optimizer, "gathered_by_one"):
        optimizer.gathered_by_one = not fits_every_rank(optimizer)
        if optimizer.gathered_by_one:
            logger.warning(
                "too little memory to gather the optimizer's states on every rank: the first of each data"
                " parallel group does, over gloo"
            )
    return bool(optimizer.gathered_by_one)


def fits_every_rank(optimizer: Any) -> bool:
    """Whether all data parallel ranks have memory to gather what each of them has a part of.

    Of the largest bucket, in float32, the GPU has it from all ranks, flat once more, and the rank's part.
    The host of each rank of a node has weights and both moments of all buckets; of the largest as it
    comes from the GPU, put together, and the rank's part of the three.
    """
    largest, numbers = 0, 0
    for buffer in optimizer.buffers:
        numbers += buffer.numel_unpadded
        largest = max([largest, *(bucket.grad_data.numel() for bucket in buffer.buckets)])
    share = largest / optimizer.data_parallel_group.size()
    gpu, host = 4 * (2 * largest + share), 4 * (3 * numbers + 2 * largest + 3 * share)
    enough = SAFE * free_gpu_memory() > gpu and SAFE * free_memory() > ranks_of_node() * host
    fits = torch.tensor([int(enough)], device=torch.cuda.current_device())
    torch.distributed.all_reduce(
        fits, torch.distributed.ReduceOp.MIN, optimizer.data_parallel_group
    )
    return bool(fits)


def free_gpu_memory() -> float:
    """Bytes that this rank can take of its GPU; without one there is no such limit."""
    if not torch.cuda.is_initialized():
        return float("inf")
    free, _ = torch.cuda.mem_get_info()
    return free + torch.cuda.memory_reserved() - torch.cuda.memory_allocated()


MIXED_UP = (
    "the checkpoint's optimizer has other weights than its model in {count} tensors (the first of shape"
    " {shape}): whatever saved it mixed them up, as MegaQwen did until 27 November 2026 with"
    " overlap_grad_reduce. The model itself is whole: export it, and train on from there with"
    " model.source: path in another run"
)


def is_weight_of(parameter: Tensor, start: int, saved: Tensor) -> bool:
    """Whether the optimizer's weights are the parameter's, but for rounding.

    Args:
        parameter: The model's, loaded; of weights in FP8 nothing is known.
        start: The first number of the flat parameter that this rank has the optimizer's weights of.
        saved: Those, [numbers].
    """
    from megatron.core.fp8_utils import is_float8tensor

    if is_float8tensor(parameter):
        return True
    part = parameter.detach().view(-1)[start : start + len(saved)].float()
    relative, absolute = ROUNDING
    return torch.allclose(
        part, saved.to(part.device, part.dtype), relative, absolute, equal_nan=True
    )


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
