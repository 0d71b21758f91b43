"""Hold the kernel against float64 arithmetic, where there is no GPU by Triton's interpreter.

TRITON_INTERPRET=1 python tests/split_norm_rotate.py
"""

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "scripts"))
from megaqwen.training.split_norm_rotate import SplitNormRotate

EPSILON = 1e-6


def reference(
    mixed: torch.Tensor,
    angles: torch.Tensor,
    q_weight: torch.Tensor | None,
    k_weight: torch.Tensor | None,
    groups: int,
    size: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The same, step by step."""
    sequence, batch = mixed.shape[:2]
    parts = mixed.view(sequence, batch, groups, -1, size)
    query = parts[:, :, :, :-2].reshape(sequence, batch, -1, size)
    key, value = parts[:, :, :, -2], parts[:, :, :, -1]

    def prepare(heads: torch.Tensor, weight: torch.Tensor | None) -> torch.Tensor:
        if weight is not None:
            heads = heads * (heads.square().mean(-1, keepdim=True) + EPSILON).rsqrt() * weight
        first, second = heads.chunk(2, -1)
        turned = torch.cat((-second, first), -1)
        return heads * angles.cos() + turned * angles.sin()

    return prepare(query, q_weight), prepare(key, k_weight), value


def largest_error(groups: int, ratio: int, size: int, norm: bool, device: str) -> float:
    """Of outputs and gradients, the largest relative to the size of the tensor."""
    generator = torch.Generator().manual_seed(1234)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    sequence, batch = 9, 2  # not a multiple of the rows of a program
    mixed = draw(sequence, batch, groups * (ratio + 2) * size)
    speeds = 10_000.0 ** (-torch.arange(0, size, 2, dtype=torch.float64) / size)
    angles = torch.outer(torch.arange(sequence, dtype=torch.float64) * 17, speeds).repeat(1, 2)
    angles = angles.float().view(sequence, 1, 1, size)  # what both are given
    weights = [draw(size), draw(size)] if norm else [None, None]
    inputs = [mixed, *(weight for weight in weights if weight is not None)]
    upstream = [draw(sequence, batch, heads, size) for heads in (groups * ratio, groups, groups)]

    def run(function: object, dtype: torch.dtype, where: str, *rest: object) -> list[torch.Tensor]:
        leaves = [tensor.to(where, dtype, copy=True).requires_grad_() for tensor in inputs]
        turned = angles.to(where, torch.float64 if dtype is torch.float64 else torch.float32)
        norms = leaves[1:] if norm else [None, None]
        outputs = function(leaves[0], turned, *norms, groups, size, *rest)  # type: ignore[operator]
        torch.autograd.backward(outputs, [each.to(where, dtype) for each in upstream])
        return [
            each.detach().cpu().double() for each in (*outputs, *(leaf.grad for leaf in leaves))
        ]

    ours = run(SplitNormRotate.apply, torch.float32, device, EPSILON)
    exact = run(reference, torch.float64, "cpu")
    return max(
        ((got - want).norm() / want.norm()).item() for got, want in zip(ours, exact, strict=True)
    )


def main() -> None:
    """Grouped and ungrouped heads, counts and sizes that are no power of two, with and without norms."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    shapes = ((2, 3, 16, True), (1, 6, 24, True), (3, 1, 24, False))
    for groups, ratio, size, norm in shapes:
        error = largest_error(groups, ratio, size, norm, device)
        sys.stdout.write(f"groups {groups} ratio {ratio} size {size} norm {norm}: {error:.1e}\n")
        assert error < 1e-5


if __name__ == "__main__":
    main()
