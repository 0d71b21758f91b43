"""What a checkpoint has of FusedAdam's states; tests/gpu resumes with it."""

import pytest
import torch

from megaqwen.training.fused_adam_resume import forget_steps, remainders


def test_remainders_come_back_as_they_were() -> None:
    every = torch.arange(-(2**15), 2**15).to(torch.int16)
    assert torch.equal(remainders(every.float()), every)


@pytest.mark.parametrize("number", [0.5, 2.0**15, float("nan")])
def test_weights_are_no_remainders(number: float) -> None:
    with pytest.raises(ValueError, match="whole float32 weights"):
        remainders(torch.tensor([1.0, number]))


def test_steps_are_given_once() -> None:
    groups = [{"lr": 1.0, "step": 3}, {"lr": 1.0}]
    forget_steps(groups)
    assert groups == [{"lr": 1.0}, {"lr": 1.0}]
