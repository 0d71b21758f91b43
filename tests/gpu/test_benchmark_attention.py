"""The errors that benchmark_attention.py tells, without a GPU: of PyTorch's own attention in bfloat16."""

import benchmark_attention
import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention


def test_errors_are_those_of_the_first_sample(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(benchmark_attention, "TOKENS", 64)
    torch.manual_seed(1)
    shapes = [(64, 2, heads, 128) for heads in (4, 2, 2)]
    inputs = [torch.randn(s, dtype=torch.bfloat16).requires_grad_() for s in shapes]
    gradient = torch.randn(64, 2, 4 * 128, dtype=torch.bfloat16)
    ours = [each.permute(1, 2, 0, 3) for each in inputs]
    output = scaled_dot_product_attention(*ours, is_causal=True, enable_gqa=True)
    output = output.permute(2, 0, 1, 3).reshape(64, 2, -1)
    output.backward(gradient)
    found = [output.detach(), *(each.grad for each in inputs)]
    exact = benchmark_attention.in_float32(inputs, gradient)
    errors = [benchmark_attention.relative(*pair) for pair in zip(found, exact, strict=True)]
    assert all(1e-4 < error < 1e-2 for error in errors)
    found[0][:, 1] = 0  # the other sample's
    assert benchmark_attention.relative(found[0], exact[0]) == errors[0]
    found[0][:, 0] *= 1.5
    assert benchmark_attention.relative(found[0], exact[0]) > 0.4
