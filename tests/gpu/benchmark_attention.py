"""Transformer Engine's attention by each backend that is installed: speed, error, whether bits repeat.

    uv run python tests/gpu/benchmark_attention.py

Causal, bfloat16, 4096 tokens, of the shapes below. TFLOP/s count half of the products, and backward as
two and a half times forward; errors are those of output and of the gradients of query, key and value,
relative to PyTorch's attention in float32.
"""

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve()
sys.path.insert(0, str(HERE.parents[2] / "scripts"))

from megaqwen.environment import prepare_gpu  # noqa: E402

BACKENDS = {"cuDNN": {"NVTE_FLASH_ATTN": "0"}, "FlashAttention": {"NVTE_FUSED_ATTN": "0"}}
SHAPES = {  # batch, heads, query groups
    "Qwen2.5-1.5B": (4, 12, 2),
    "Qwen3-8B": (2, 32, 8),
    "Qwen3-30B-A3B": (4, 32, 4),
}
TOKENS, WIDTH = 4096, 128
SECONDS = 2.5  # that each is kept up: a card slows down under load


def main() -> int:
    """Each backend in a process of its own: Transformer Engine chooses once."""
    if len(sys.argv) > 1:
        return measure(sys.argv[1])
    codes = [
        subprocess.run([sys.executable, HERE, name], env={**os.environ, **variables}).returncode
        for name, variables in BACKENDS.items()
    ]
    return max(codes)


def measure(backend: str) -> int:
    """All shapes with what the environment leaves Transformer Engine."""
    prepare_gpu()
    import torch
    import transformer_engine.pytorch as te
    from torch import Tensor

    torch.manual_seed(0)
    for shape, (batch, heads, groups) in SHAPES.items():

        def drawn(count: int, batch: int = batch) -> Tensor:
            return torch.randn(
                (TOKENS, batch, count, WIDTH), device="cuda", dtype=torch.bfloat16
            ).requires_grad_()

        inputs = [drawn(heads), drawn(groups), drawn(groups)]
        attention: Any = te.DotProductAttention(
            heads, WIDTH, num_gqa_groups=groups, attn_mask_type="causal", qkv_format="sbhd"
        )
        gradient = torch.randn(TOKENS, batch, heads * WIDTH, device="cuda", dtype=torch.bfloat16)

        def forward(attention: Any = attention, inputs: Any = inputs) -> Tensor:
            return attention(*inputs, attn_mask_type="causal")

        def both(forward: Callable[[], Tensor] = forward, gradient: Tensor = gradient) -> Tensor:
            output = forward()
            output.backward(gradient)
            return output

        def without_gradients(forward: Callable[[], Tensor] = forward) -> None:
            with torch.no_grad():
                forward()

        flops = 4 * batch * heads * TOKENS**2 * WIDTH / 2
        rates = [
            f"{name} {flops * passes / seconds_of(work) / 1e12:.0f}"
            for name, work, passes in (("forward", without_gradients, 1), ("both", both, 3.5))
        ]
        forget(inputs)
        found = [both(), *(each.grad for each in inputs)]
        exact = in_float32(inputs, gradient)
        errors = [relative(*pair) for pair in zip(found, exact, strict=True)]
        forget(inputs)
        both()
        repeats = torch.equal(found[1], inputs[0].grad)
        sys.stdout.write(
            f"{backend} {shape}: {', '.join(rates)} TFLOP/s; errors"
            f" {' '.join(f'{error:.1e}' for error in errors)}; the same bits again: {repeats}\n"
        )
        sys.stdout.flush()
    return 0


def seconds_of(work: Callable[[], object]) -> float:
    """Of one call, kept up for SECONDS."""
    import torch

    for _ in range(3):
        work()
    torch.cuda.synchronize()
    calls, began = 0, time.monotonic()
    while time.monotonic() - began < SECONDS:
        for _ in range(20):
            work()
        torch.cuda.synchronize()
        calls += 20
    return (time.monotonic() - began) / calls


def in_float32(inputs: Any, gradient: Any) -> list[Any]:
    """PyTorch's output and gradients of the first sample, as [TOKENS, heads, WIDTH]."""
    from torch.nn.functional import scaled_dot_product_attention

    wide = [each.detach()[:, :1].permute(1, 2, 0, 3).float().requires_grad_() for each in inputs]
    output = scaled_dot_product_attention(*wide, is_causal=True, enable_gqa=True)
    heads = output.shape[1]
    output.backward(gradient.view(TOKENS, -1, heads, WIDTH)[:, :1].permute(1, 2, 0, 3).float())
    return [each[0].transpose(0, 1) for each in (output.detach(), *(each.grad for each in wide))]


def relative(found: Any, exact: Any) -> float:
    """The error of the first sample."""
    first = found.view(TOKENS, -1, *exact.shape[1:])[:, 0].float()
    return float((first - exact).norm() / exact.norm())


def forget(inputs: Any) -> None:
    """Gradients that would be added to."""
    for each in inputs:
        each.grad = None


if __name__ == "__main__":
    sys.exit(main())
