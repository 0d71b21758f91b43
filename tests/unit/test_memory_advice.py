"""A GPU that is too small ends a training with advice."""

import pytest
import torch

from megaqwen.errors import InputError
from megaqwen.training.memory import memory_advice


@pytest.mark.parametrize(("micro_batch_size", "smaller"), [(4, True), (1, False)])
def test_a_full_gpu_is_explained(micro_batch_size: int, smaller: bool) -> None:
    with pytest.raises(InputError) as refused, memory_advice(micro_batch_size):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9.27 GiB")
    message = str(refused.value)
    assert "9.27 GiB" in message and "recompute_granularity: selective" in message
    assert ("micro_batch_size below 4" in message) == smaller
