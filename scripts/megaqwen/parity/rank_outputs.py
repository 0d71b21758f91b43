"""What layers put out and routers choose in a model over many ranks, put together on the last.

Call `cpu_emulation.install` before this is imported.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from megatron.core import mpu
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from megatron.core.utils import get_model_config, unwrap_model
from torch import Tensor

from megaqwen.parity.routing import Routes


@contextmanager
def layer_outputs(
    model: Sequence[Any], at: Tensor | slice = slice(None)
) -> Iterator[dict[int, list[Tensor]]]:
    """Keep what this rank's layers put out, by their numbers from 0, for each micro batch.

    [sequences, positions, hidden], at the positions that are asked for.
    """
    points: dict[int, list[Tensor]] = {}
    sequence_parallel = get_model_config(model[0]).sequence_parallel

    def keep(layer: Any, args: Any, output: Any) -> None:
        states = output[0]
        if sequence_parallel:
            states = gather_from_sequence_parallel_region(states)
        # A copy: the pipeline frees what it has sent on.
        whole = states[at].transpose(0, 1).float().cpu().clone()
        points.setdefault(layer.layer_number - 1, []).append(whole)

    hooks = [layer.register_forward_hook(keep) for layer in layers_of(model)]
    try:
        yield points
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def expert_choices(model: Sequence[Any]) -> Iterator[Routes]:
    """Keep which experts the routers choose for a batch; afterwards the last rank has all of them."""
    mine: dict[int, list[Tensor]] = {}
    whole: Routes = {}
    config = get_model_config(model[0])

    def keep(router: Any, args: Any, output: Any) -> None:
        found = chosen(output[1], args[0], sequence_parallel=config.sequence_parallel)
        mine.setdefault(router.layer_number - 1, []).append(found)

    routers = [layer.mlp.router for layer in layers_of(model) if hasattr(layer.mlp, "router")]
    hooks = [router.register_forward_hook(keep) for router in routers]
    try:
        yield whole
    finally:
        for hook in hooks:
            hook.remove()
    if config.num_moe_experts:
        knows = mpu.get_tensor_model_parallel_rank() == 0
        found = to_last_rank((mpu.get_data_parallel_rank(), mine if knows else {})) or []
        for number in sorted({number for _, each in found for number in each}):
            whole[number] = in_order(found, number)


@torch.no_grad()
def chosen(routing_map: Tensor, states: Tensor, *, sequence_parallel: bool) -> Tensor:
    """[sequences, positions, chosen] experts of a micro batch.

    Args:
        routing_map: [tokens, experts] whether an expert was chosen, of the tokens that this rank has.
        states: [positions, sequences, hidden] of them.
        sequence_parallel: This rank has but a part of the positions.
    """
    by_position = routing_map.view(*states.shape[:2], -1).float()
    if sequence_parallel:
        by_position = gather_from_sequence_parallel_region(by_position)
    positions, sequences, _ = by_position.shape
    found = by_position.nonzero()[:, 2].view(positions, sequences, -1)
    return found.transpose(0, 1).contiguous()


def layers_of(model: Sequence[Any]) -> list[Any]:
    """The decoder's layers that this rank has."""
    return [layer for chunk in model for layer in unwrap_model(chunk).decoder.layers]


def in_order(found: Sequence[tuple[int, Mapping[int, list[Tensor]]]], point: int) -> Tensor:
    """[sequences, ...] of a batch whose micro batches were dealt to the data parallel ranks in turn.

    Args:
        found: Data parallel rank, and by point its micro batches, of each rank of the job.
        point: The one that is asked for.
    """
    by_rank = {rank: points[point] for rank, points in found if point in points}
    ranks = sorted(by_rank)
    return torch.cat([each for turn in zip(*map(by_rank.get, ranks), strict=True) for each in turn])


def to_last_rank(value: Any) -> list[Any] | None:
    """Every rank's value on the last rank; elsewhere None."""
    ranks = torch.distributed.get_world_size()
    last = torch.distributed.get_rank() == ranks - 1
    found: list[Any] | None = [None] * ranks if last else None
    torch.distributed.gather_object(value, found, dst=ranks - 1)
    return found
