"""MLPs with SwiGLU within their products, and with a kernel of its own: the speed of forward and back.

    uv run python tests/gpu/benchmark_mlp.py

In bfloat16, of the shapes below, gradients added up in float32. What is right is held by
test_swiglu_mlp.py, which takes the same sequences.
"""

import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve()
sys.path[:0] = [str(HERE.parents[2] / "scripts"), str(HERE.parent)]

from megaqwen.environment import prepare_gpu  # noqa: E402

SHAPES = {  # hidden, features
    "0.5B": (896, 4864),
    "1.5B": (1536, 8960),
    "3B": (2048, 11008),
    "4B": (2560, 9728),
    "7B": (3584, 18944),
    "8B": (4096, 12288),
}
TOKENS = 16384
START = 0.5
"""What gradients are added to."""


def main() -> int:
    """A line for each shape."""
    prepare_gpu()
    import torch
    from benchmark_attention import seconds_of
    from transformer_engine.pytorch.ops.fuser import OperationFuser

    from megaqwen.training.swiglu_mlp import fuse

    torch.manual_seed(0)
    for shape, (hidden, features) in SHAPES.items():
        weights = drawn(2 * features, hidden) * 0.02, drawn(hidden, features) * 0.02
        inputs, upstream = drawn(TOKENS, hidden).requires_grad_(), drawn(TOKENS, hidden)
        rates = []
        for fusions in ([], [fuse]):
            OperationFuser.forward_backward_fusion_functions = fusions
            model = sequence(*weights, torch.float32)

            def both(model: Any = model, inputs: Any = inputs, upstream: Any = upstream) -> None:
                inputs.grad = None
                model(inputs).backward(upstream)

            rates.append(18 * TOKENS * hidden * features / seconds_of(both) / 1e12)
        apart, within = rates
        sys.stdout.write(
            f"{shape}: apart {apart:.0f} TFLOP/s, within {within:.0f}: {within / apart:.3f}\n"
        )
        sys.stdout.flush()
    return 0


def drawn(*size: int) -> Any:
    """Random numbers on the GPU."""
    import torch

    return torch.randn(size, device="cuda", dtype=torch.bfloat16)


def sequence(first: Any, second: Any, total: Any) -> Any:
    """Linear, SwiGLU and linear, whose gradients are added to a main_grad of this dtype, or returned."""
    import torch
    from transformer_engine.pytorch import ops

    layers = []
    for weight in (first, second):
        layer = ops.BasicLinear(
            weight.shape[1],
            weight.shape[0],
            device="cuda",
            dtype=torch.bfloat16,
            accumulate_into_main_grad=total is not None,
        )
        layer.weight = torch.nn.Parameter(weight.clone())
        if total is not None:
            layer.weight.main_grad = torch.full_like(weight, START, dtype=total)
        layers.append(layer)
    return ops.Sequential(layers[0], ops.SwiGLU(), layers[1])


if __name__ == "__main__":
    sys.exit(main())
