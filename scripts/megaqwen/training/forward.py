"""One micro batch: fetch it, run the model, sum the loss."""

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from megatron.core import mpu
from megatron.core.utils import get_attr_wrapped_model, get_batch_on_this_cp_rank
from megatron.training import get_args, get_timers

from megaqwen.training.evaluation import watch_losses

Batch = dict[str, torch.Tensor]
KEYS = ("tokens", "labels", "loss_mask", "position_ids")


def micro_batch(iterator: Iterator[Batch] | None, vp_stage: int | None) -> Batch:
    """This rank's micro batch; each tensor is [micro batch, sequence / context parallel size].

    Tensor parallel rank 0 reads it and the others receive it. Middle pipeline stages need none.
    """
    first = mpu.is_pipeline_first_stage(ignore_virtual=False, vp_stage=vp_stage)
    last = mpu.is_pipeline_last_stage(ignore_virtual=False, vp_stage=vp_stage)
    if not (first or last):
        return {}
    arguments = get_args()
    training = torch.is_grad_enabled()
    rows = arguments.micro_batch_size if training else arguments.eval_micro_batch_size
    shape = (rows, arguments.seq_length)
    batch: Batch = {}
    if mpu.get_tensor_model_parallel_rank() == 0:
        if iterator is None:
            raise RuntimeError("the rank that reads data has no data iterator")
        read = next(iterator)
        batch = {key: read[key].to(torch.cuda.current_device(), non_blocking=True) for key in KEYS}
    else:
        for key in KEYS:
            dtype = torch.float32 if key == "loss_mask" else torch.int64
            batch[key] = torch.empty(shape, dtype=dtype, device=torch.cuda.current_device())
    if mpu.get_tensor_model_parallel_world_size() > 1:
        source = mpu.get_tensor_model_parallel_src_rank()
        for tensor in batch.values():
            torch.distributed.broadcast(tensor, source, group=mpu.get_tensor_model_parallel_group())
    # Without a group it would cut each sequence among all ranks of the job.
    group = mpu.get_context_parallel_group()
    return get_batch_on_this_cp_rank(batch, is_hybrid_cp=False, cp_group=group)


def summed_loss(
    loss_mask: torch.Tensor, losses: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
    """The micro batch's loss, summed over its target tokens.

    Args:
        loss_mask: [batch, sequence], 1 where a token is a target.
        losses: [batch, sequence], cross entropy in nats.

    Returns:
        The sum in nats, the number of targets, and both for the log: Megatron divides them after
        summing over micro batches and ranks, so the mean is over tokens whatever the layout.
    """
    watch_losses(loss_mask, losses)
    mask = loss_mask.view(-1).float()
    loss = torch.sum(losses.view(-1).float() * mask)
    targets = mask.sum().to(torch.int)
    report = torch.stack([loss.detach(), targets.float()])
    return loss, targets.clone().detach(), {"lm loss": report}


def forward_step(iterator: Iterator[Batch] | None, model: Any) -> tuple[torch.Tensor, Any]:
    """What `pretrain` calls for each micro batch: the model's output and its loss function."""
    timers = get_timers()
    timers("batch-generator", log_level=2).start()
    batch = micro_batch(iterator, get_attr_wrapped_model(model, "vp_stage"))
    timers("batch-generator").stop()
    output = model(
        batch.get("tokens"),
        batch.get("position_ids"),
        None,
        labels=batch.get("labels"),
    )
    # Only the last pipeline stage calls it, and that stage has a mask.
    return output, partial(summed_loss, batch.get("loss_mask", output))
