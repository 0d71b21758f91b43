"""One micro batch of packed conversations: as in forward.py, with attention within each conversation.

Every rank reads its micro batch itself: all pipeline stages need the bounds of the conversations, and
what would be sent is small enough to be read. The bounds are found before anything is on the GPU,
which has to wait for no answer from it.
"""

from argparse import Namespace
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from megatron.core import mpu
from megatron.core.num_microbatches_calculator import get_num_microbatches
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.utils import get_attr_wrapped_model, get_model_config
from megatron.training import get_timers

from megaqwen.training.forward import KEYS as UNPACKED_KEYS
from megaqwen.training.forward import Batch, summed_loss

KEYS = (*UNPACKED_KEYS, "padding_mask")
TARGET_TOKENS = "target tokens"


def conversation_bounds(position_ids: torch.Tensor) -> PackedSeqParams:
    """Where each conversation of a micro batch begins and ends, as Transformer Engine takes it.

    What pads a sequence counts as one more conversation, so that the bounds cover all positions.

    Args:
        position_ids: [micro batch, sequence] on the CPU, from 0 in each conversation.
    """
    positions = position_ids.flatten()
    starts = torch.nonzero(positions == 0).flatten()
    bounds = torch.cat([starts, starts.new_tensor([len(positions)])]).to(torch.int32)
    # The true maximum: Megatron takes rotary frequencies of as many positions as there are in all
    # for those of one long conversation.
    longest = int(torch.diff(bounds).max())
    on_device = bounds.to(torch.cuda.current_device(), non_blocking=True)
    return PackedSeqParams(
        qkv_format="thd",
        cu_seqlens_q=on_device,
        cu_seqlens_kv=on_device,
        max_seqlen_q=longest,
        max_seqlen_kv=longest,
    )


def padding_mask(padding: torch.Tensor, model: Any) -> torch.Tensor | None:
    """The mask by which experts' losses leave out padding, as this stage needs it; None without experts.

    Args:
        padding: [1, positions], true where nothing is.
        model: The rank's (part of the) model.
    """
    config = get_model_config(model)
    if config.num_moe_experts is None:
        return None
    if config.sequence_parallel and not get_attr_wrapped_model(model, "pre_process"):
        # Megatron cuts it to this rank's part of the sequence where there is an embedding, not elsewhere.
        padding = padding.chunk(mpu.get_tensor_model_parallel_world_size(), dim=1)[
            mpu.get_tensor_model_parallel_rank()
        ].contiguous()
    return padding


def summed_target_loss(
    loss_mask: torch.Tensor, training: bool, losses: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
    """`summed_loss`, and in training the number of targets of the global batch for the log.

    Args:
        loss_mask: [micro batch, sequence], 1 where a token is a target.
        training: Whether this is no evaluation.
        losses: [1, micro batch x sequence], cross entropy in nats.
    """
    loss, targets, report = summed_loss(loss_mask, losses.view_as(loss_mask))
    if training:
        # Megatron divides the sums over micro batches and ranks: these parts sum to 1.
        part = 1 / (get_num_microbatches() * mpu.get_data_parallel_world_size())
        report[TARGET_TOKENS] = torch.stack([targets.float(), torch.full_like(loss.detach(), part)])
    return loss, targets, report


class PackedForwardStep:
    """What `pretrain` calls for each micro batch: the model's output and its loss function."""

    def __init__(self, transformer: TransformerConfig, arguments: Namespace) -> None:
        """Prepare a model's config for packed micro batches.

        Args:
            transformer: The model's config; it is changed.
            arguments: Megatron's.
        """
        self.share_of_targets = 1.0
        self.config: Any = transformer
        transformer.moe_grad_scale_func = self.moe_loss_scale
        # [micro batch x sequence, 1, hidden] goes from stage to stage: the stages tell each other so.
        sizes = (arguments.micro_batch_size, arguments.eval_micro_batch_size)
        transformer.variable_seq_lengths = max(sizes) > 1

    def moe_loss_scale(self) -> torch.Tensor:
        """What the gradients of experts' auxiliary losses are multiplied by.

        Megatron weighs the auxiliary losses of a micro batch with its tokens and divides all
        gradients by the batch's targets: where few tokens are targets, the losses would count for
        too much. With this they are weighed with the targets.
        """
        scale = torch.tensor([self.share_of_targets], device=torch.cuda.current_device())
        grad_scale = getattr(self.config, "grad_scale_func", None)
        return scale if grad_scale is None else grad_scale(scale)

    def __call__(self, iterator: Iterator[Batch], model: Any) -> tuple[torch.Tensor, Any]:
        """One micro batch; what it reads is [micro batch, sequence], what the model gets [1, both]."""
        timers = get_timers()
        timers("batch-generator", log_level=2).start()
        read = next(iterator)
        packed = conversation_bounds(read["position_ids"])
        self.config = get_model_config(model)
        filled = int((~read["padding_mask"]).sum())
        self.share_of_targets = float(read["loss_mask"].sum()) / max(filled, 1)
        batch = {
            key: read[key].reshape(1, -1).to(torch.cuda.current_device(), non_blocking=True)
            for key in KEYS
        }
        timers("batch-generator").stop()
        output = model(
            batch["tokens"],
            batch["position_ids"],
            None,
            labels=batch["labels"],
            packed_seq_params=packed,
            padding_mask=padding_mask(batch["padding_mask"], model),
        )
        loss_mask = batch["loss_mask"].view_as(read["loss_mask"])
        return output, partial(summed_target_loss, loss_mask, model.training)
