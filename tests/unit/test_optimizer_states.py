"""What the distributed optimizer saves and loads of each parameter; tests/distributed resumes with it."""

from types import SimpleNamespace

import pytest
import torch

from megaqwen.training.optimizer_states import is_weight_of, unpadded


def test_padding_of_the_buckets_before_is_left_out() -> None:
    """Three parameters in two buckets of 128 and 256 numbers; between two parameters padding stays."""
    buckets = [
        SimpleNamespace(bucket_id=0, offset=0, numel_unpadded=100),
        SimpleNamespace(bucket_id=1, offset=128, numel_unpadded=200),
    ]
    padded = {"a": (0, 100, 0), "b": (128, 138, 1), "c": (192, 328, 1)}
    assert unpadded(padded, buckets) == {"a": (0, 100, 0), "b": (100, 110, 1), "c": (164, 300, 1)}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_rounded_weight_is_the_same_and_another_is_not(dtype: torch.dtype) -> None:
    saved = 0.02 * torch.randn(64, generator=torch.Generator().manual_seed(7))
    parameter = torch.nn.Parameter(saved.to(dtype).view(8, 8))
    assert is_weight_of(parameter, 0, saved)
    assert is_weight_of(parameter, 16, saved[16:40])
    assert not is_weight_of(parameter, 0, saved[16:40])
    assert not is_weight_of(parameter, 0, torch.zeros(64))
