"""Megatron over real ranks as training lays it out: its layers, gradients, and steps of its optimizer.

Every rank of the job runs this. Model, optimizer and schedule are set up by the function by which
`pretrain` sets them up, the checkpoint is loaded by Megatron's own loader, and a micro batch goes
through training's own forward step. Call `cpu_emulation.install` before this is imported.
"""

import gc
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from megatron.core import mpu
from megatron.core.distributed import finalize_model_grads
from megatron.core.enums import ModelType
from megatron.core.num_microbatches_calculator import unset_num_microbatches_calculator
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.rerun_state_machine import RerunDataIterator
from megatron.core.tensor_parallel import gather_from_tensor_model_parallel_region
from megatron.core.utils import get_attr_wrapped_model, get_model_config
from megatron.training import global_vars, initialize
from megatron.training.argument_utils import pretrain_cfg_container_from_args
from megatron.training.arguments import parse_and_validate_args
from megatron.training.training import (
    destroy_global_state,
    setup_model_and_optimizer,
    train_step,
)
from torch import Tensor
from torch.distributed import distributed_c10d

from megaqwen.config.megatron_options import to_arguments
from megaqwen.parity.gathering import Gathered, gather_to_last_rank
from megaqwen.parity.rank_outputs import expert_choices, in_order, layer_outputs, to_last_rank
from megaqwen.parity.routing import Routes
from megaqwen.training.arguments import CPU_OPTIONS
from megaqwen.training.datasets import use_compiled_helpers
from megaqwen.training.forward import forward_step, micro_batch
from megaqwen.training.model import model_config

MICRO_BATCH = 2


@dataclass(frozen=True, kw_only=True)
class Steps:
    """What the steps of an optimizer came to."""

    losses: list[float]
    """In nats per token, each before its step."""
    rates: list[float]
    """The learning rate of each step."""
    gradient_norms: list[float]
    weights: Gathered
    """After the last step."""
    choices: list[Routes]
    """Of experts, in each step."""


@dataclass(frozen=True, kw_only=True)
class Gradients:
    """Of one batch."""

    gathered: Gathered
    choices: Routes
    """Of experts, on the way."""


class RankedModel:
    """Megatron's model over the ranks of this job, wrapped and optimized as training does it."""

    def __init__(self, options: Mapping[str, Any], rounded_to: torch.dtype | None):
        """Build it and load its weights.

        Args:
            options: All of Megatron's options; load names the checkpoint.
            rounded_to: The dtype that the other model's weights are stored in, if it is narrower.
        """
        sys.argv = [sys.argv[0], *to_arguments(options)]
        arguments = parse_and_validate_args()
        initialize.initialize_megatron(allow_no_cuda=True)
        container = pretrain_cfg_container_from_args(arguments, model_config(arguments))
        self.model, self.optimizer, self.schedule = setup_model_and_optimizer(
            ModelType.encoder_or_decoder,
            cfg_container=container,
            pg_collection=ProcessGroupCollection.use_mpu_process_groups(),
        )
        if rounded_to is not None:
            with torch.no_grad():
                for chunk in self.model:
                    for parameter in chunk.parameters():
                        parameter.copy_(parameter.to(rounded_to))
        self.micro_batch = arguments.micro_batch_size
        self.config = get_model_config(self.model[0])
        if self.optimizer is not None:  # with skip_train there is none
            self.config.grad_scale_func = self.optimizer.scale_loss
        if self.config.finalize_model_grads_func is None:
            self.config.finalize_model_grads_func = finalize_model_grads
        self.run_micro_batches = get_forward_backward_func()

    def iterators(self, batch: Tensor) -> Any:
        """This rank's micro batches of [sequences, positions + 1] tokens, once for each model chunk."""
        data_ranks, rank = mpu.get_data_parallel_world_size(), mpu.get_data_parallel_rank()

        def micro_batches() -> Iterator[dict[str, Tensor]]:
            for index, tokens in enumerate(batch.split(self.micro_batch)):
                if index % data_ranks == rank:
                    read = tokens[:, :-1].contiguous()
                    yield {
                        "tokens": read,
                        "labels": tokens[:, 1:].contiguous(),
                        "loss_mask": torch.ones_like(read, dtype=torch.float32),
                        "position_ids": torch.arange(read.shape[1]).repeat(len(read), 1),
                    }

        each = [RerunDataIterator(micro_batches()) for _ in self.model]
        return each if len(each) > 1 else each[0]

    def run(self, step: Callable[..., Any], batch: Tensor, **how: bool) -> Any:
        """Megatron's schedule of micro batches, pipelined or not."""
        return self.run_micro_batches(
            forward_step_func=step,
            data_iterator=self.iterators(batch),
            model=self.model,
            num_microbatches=max(
                1, len(batch) // self.micro_batch // mpu.get_data_parallel_world_size()
            ),
            seq_length=batch.shape[1] - 1,
            micro_batch_size=self.micro_batch,
            **how,
        )

    def forward(
        self, batch: Tensor, vocabulary: int, at: Tensor | slice = slice(None)
    ) -> list[Tensor] | None:
        """What each layer puts out and then the logits, put together on the last rank; else None.

        [sequences, positions, hidden] each, and [sequences, positions, vocabulary], in float32, at the
        positions that are asked for.
        """
        for chunk in self.model:
            chunk.eval()

        def whole(output: Tensor, non_loss_data: bool = True) -> Tensor:
            full: Tensor = gather_from_tensor_model_parallel_region(output[:, at])
            return full[..., :vocabulary].float().cpu()

        with torch.no_grad(), layer_outputs(self.model, at) as points:
            logits = self.collect(whole, batch)
        for chunk in self.model:
            chunk.train()
        if mpu.is_pipeline_last_stage():
            points[self.config.num_layers] = logits
        knows = mpu.get_tensor_model_parallel_rank() == 0
        found = to_last_rank((mpu.get_data_parallel_rank(), points if knows else {}))
        if found is None:
            return None
        return [in_order(found, point) for point in range(self.config.num_layers + 1)]

    def collect(self, keep: Callable[..., Any], batch: Tensor) -> Any:
        """What `keep` makes of the logits of each micro batch, on the last pipeline stage."""

        def step(iterator: Any, model: Any) -> tuple[Tensor, Any]:
            read = micro_batch(iterator, get_attr_wrapped_model(model, "vp_stage"))
            return model(read.get("tokens"), read.get("position_ids"), None), keep

        return self.run(step, batch, forward_only=True, collect_non_loss_data=True)

    def look_at(self, batch: Tensor) -> None:
        """A forward pass as in training, by which FP8's delayed scaling learns how large things are.

        It does so where gradients are asked for, and none are: nothing is kept for them.
        """
        with torch.autograd.graph.saved_tensors_hooks(lambda saved: None, never_backward):
            self.collect(lambda output, non_loss_data=True: None, batch)

    def gradients(self, batch: Tensor) -> Gradients | None:
        """The gradient of the mean loss by each parameter, on the last rank; else None."""
        for chunk in self.model:
            chunk.zero_grad_buffer()
        # Of a distributed optimizer each rank would have but its own part of the sum.
        with expert_choices(self.model) as choices:
            self.run(forward_step, batch, forward_only=False, force_all_reduce=True)
        gathered = gather_to_last_rank(self.model, gradients=True)
        return None if gathered is None else Gradients(gathered=gathered, choices=choices)

    def steps(self, batches: Sequence[Tensor]) -> Steps | None:
        """Train on each batch once, by Megatron's own step; the result on the last rank, else None."""
        losses, rates, norms, choices = [], [], [], []
        for number, batch in enumerate(batches):
            rates.append(max(group["lr"] for group in self.optimizer.param_groups))
            with expert_choices(self.model) as chosen:
                found, skipped, _, _, _, norm, _, _ = train_step(
                    forward_step,
                    self.iterators(batch),
                    self.model,
                    self.optimizer,
                    self.schedule,
                    self.config,
                    self.run_micro_batches,
                    iteration=number,
                )
            choices.append(chosen)
            if skipped:
                raise RuntimeError(f"Megatron's optimizer skipped step {number + 1}")
            # The last pipeline stage knows it, and the last rank is of that stage.
            losses.append(float(found["lm loss"]) if found else float("nan"))
            norms.append(float(norm))
        weights = gather_to_last_rank(self.model)
        if weights is None:
            return None
        return Steps(
            losses=losses, rates=rates, gradient_norms=norms, weights=weights, choices=choices
        )


def never_backward(saved: None) -> Tensor:
    """What would be done with what a forward pass kept."""
    raise RuntimeError("nothing was kept for a backward pass")


def model_options(
    architecture: Mapping[str, Any],
    checkpoint: Path,
    vocabulary: int,
    layout: Mapping[str, Any],
    batch: Sequence[int],
    device: Mapping[str, Any] = CPU_OPTIONS,
) -> dict[str, Any]:
    """Megatron's options for a model over some layout.

    Args:
        architecture: What the checkpoint records of its model.
        checkpoint: The directory with latest_checkpointed_iteration.txt.
        vocabulary: Rows of the embedding that stand for tokens.
        layout: Options of the layout, the dtype and the optimizer.
        batch: Sequences, and positions of each.
        device: What the machine needs.
    """
    tensor = layout.get("tensor_model_parallel_size", 1)
    options = {
        **architecture,
        **device,
        "padded_vocab_size": -(-vocabulary // tensor) * tensor,
        "vocab_size": vocabulary,
        "tokenizer_type": "NullTokenizer",
        "seq_length": batch[1],
        "micro_batch_size": MICRO_BATCH,
        "global_batch_size": batch[0],
        "train_iters": 1,
        "lr": 1.0,
        **layout,
        "load": str(checkpoint),
        "ckpt_format": "torch_dist",
        "create_attention_mask_in_dataloader": False,
        # Its checks want to be asked for each pass; here a gradient is taken without a step.
        "rerun_mode": "disabled",
        # As at the first iteration of a training: weights alone.
        **dict.fromkeys(("finetune", "no_load_optim", "no_load_rng"), True),
    }
    if layout.get("pipeline_model_parallel_size", 1) > 1:
        options["overlap_p2p_comm"] = True  # see training/arguments.py
    return options


def release(model: RankedModel) -> None:
    """Give the memory of a model back, whoever still refers to it.

    A distributed optimizer's tensors, and what a dispatcher of tokens keeps, hold nodes of autograd, and
    their hooks hold the model: no collector looks into such a circle.
    """
    model.config.grad_scale_func = None
    for chunk in model.model:
        for parameter in chunk.parameters():
            parameter.data = parameter.data.new_empty(0)
            parameter.main_grad = parameter.grad = None
        vars(chunk).clear()


@contextmanager
def ranked_model(
    options: Mapping[str, Any], rounded_to: torch.dtype | None = None
) -> Iterator[RankedModel]:
    """A model over the ranks of this job; afterwards they are free for another."""
    gc.collect()  # what is left of an earlier model, whose parts refer to each other
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    use_compiled_helpers()
    global_vars.unset_global_variables()
    unset_num_microbatches_calculator()
    model: RankedModel | None = None
    try:
        model = RankedModel(options, rounded_to)
        yield model
    finally:
        if model:
            release(model)
        destroy_global_state()
        for group in list(distributed_c10d._world.pg_map):
            if group is not torch.distributed.group.WORLD:
                torch.distributed.destroy_process_group(group)
