"""What to do when a training does not fit on its GPUs."""

import contextlib
from collections.abc import Iterator

import torch

from megaqwen.errors import InputError


@contextlib.contextmanager
def memory_advice(micro_batch_size: int) -> Iterator[None]:
    """A GPU that runs out of memory is an InputError that says which options make it fit."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        smaller = f"micro_batch_size below {micro_batch_size}, " if micro_batch_size > 1 else ""
        raise InputError(
            f"the GPU has too little memory for this training: {error}. Under train, give {smaller}"
            "recompute_granularity: selective (or full), or a larger tensor_model_parallel_size or"
            " pipeline_model_parallel_size: it goes on from its last checkpoint. Or, which trains from"
            " the start, use_distributed_optimizer: true"
        ) from error
