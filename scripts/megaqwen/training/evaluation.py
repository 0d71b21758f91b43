"""Which samples an evaluation took, and the loss of some of them one by one.

Parity asks the exported model for the same samples' losses. Of a large model it affords a few of them,
and so the mean over all would not do.
"""

from argparse import Namespace
from pathlib import Path
from typing import Any

import torch

from megaqwen.provenance import read_json, write_json

FILE = "evaluations.json"
KEPT = 64
"""Samples whose own losses are kept."""

# Of this process's current evaluation, for each of its micro batches: [samples] sums, [samples] targets.
_micro_batches: list[tuple[torch.Tensor, torch.Tensor]] = []


def watch_losses(loss_mask: torch.Tensor, losses: torch.Tensor) -> None:
    """Keep the loss of each sample of a micro batch, if this is an evaluation.

    Args:
        loss_mask: [batch, sequence], 1 where a token is a target.
        losses: [batch, sequence], cross entropy in nats.
    """
    if torch.is_grad_enabled() or sum(len(sums) for sums, _ in _micro_batches) >= KEPT:
        return
    if losses.is_cuda and torch.cuda.is_current_stream_capturing():
        return  # a CUDA graph has no place for a copy to the CPU
    mask = loss_mask.double()
    _micro_batches.append(((losses.double() * mask).sum(dim=1).cpu(), mask.sum(dim=1).cpu()))


class Evaluations:
    """What the last evaluation of each set was made of, in a file beside the metrics."""

    def __init__(self, directory: Path, drawn: tuple[int, int | None, int]):
        """Of a training process.

        Args:
            directory: With metrics.jsonl.
            drawn: How many samples were asked for of the training, validation and test set: Megatron
                shuffles by it.
        """
        self.file = directory / FILE
        self.drawn = {"validation": drawn[1], "test": drawn[2]}

    def begin(self, kind: str, arguments: Namespace) -> None:
        """An evaluation of the validation or the test set begins."""
        _micro_batches.clear()
        self.kind = kind
        # Megatron starts a test set at its first sample, whenever.
        self.first_sample = 0 if kind == "test" else arguments.consumed_valid_samples

    def end(self, loss: float, iteration: int, arguments: Namespace, rank: int) -> None:
        """Write what it was.

        Args:
            loss: Nats per token, as it is logged.
            iteration: After which it was.
            arguments: Megatron's.
            rank: Of this process among the data parallel ones.
        """
        drawn = self.drawn[self.kind]
        if drawn is None or arguments.dataloader_type != "single":
            return  # another order than that of the samples
        step = arguments.eval_micro_batch_size * arguments.data_parallel_size
        losses: dict[str, list[float]] = {}
        for number, (sums, targets) in enumerate(_micro_batches):
            start = self.first_sample + number * step + rank * arguments.eval_micro_batch_size
            for index, pair in enumerate(zip(sums.tolist(), targets.tolist(), strict=True)):
                losses[str(start + index)] = list(pair)
        facts = {
            "iteration": iteration,
            "loss": loss,
            "first_sample": self.first_sample,
            "samples": arguments.eval_iters * arguments.eval_global_batch_size,
            "drawn": drawn,
            # A context parallel rank sees a part of each sample.
            "losses": losses if arguments.context_parallel_size == 1 else {},
        }
        write_json(self.file, {**read_evaluations(self.file.parent), self.kind: facts})


def read_evaluations(directory: Path) -> dict[str, Any]:
    """By the set's name, what `Evaluations` wrote: `losses` has [sum in nats, targets] by sample."""
    file = directory / FILE
    return dict(read_json(file)) if file.is_file() else {}
