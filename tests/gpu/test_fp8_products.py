"""A product in FP8 as a GPU computes it, beside what the parity gate takes for it.

Skipped without an H100.
"""

import pytest
import torch
from torch import Tensor

from megaqwen.parity.fp8 import LARGEST, Fp8

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() < (9, 0),
    reason="no GPU with FP8: run `uv sync --extra gpu && uv run pytest tests/gpu` on one that has it",
)
BOUND = 1.01


@pytest.mark.parametrize("terms", [256, 4864, 18944])
@pytest.mark.parametrize("fast", [True, False])
def test_its_error_is_that_of_the_rounded_factors(terms: int, fast: bool) -> None:
    """With the fast sums of tensorwise and delayed scaling, and with those of blocks."""
    generator = torch.Generator("cuda").manual_seed(7)

    def draw() -> Tensor:
        return torch.randn(1024, terms, generator=generator, device="cuda").bfloat16().float()

    inputs, weight = draw(), 0.02 * draw()
    exact = inputs.double() @ weight.double().T
    tensorwise = Fp8(recipe="tensorwise")
    rounded = tensorwise.rounded(inputs, 1).double() @ tensorwise.rounded(weight, 1).double().T
    factors, scales = [], []
    for each in (inputs, weight):
        scales.append(each.abs().max() / LARGEST)
        factors.append((each / scales[-1]).to(torch.float8_e4m3fn))
    product = torch._scaled_mm(
        factors[0],
        factors[1].T,
        scale_a=scales[0],
        scale_b=scales[1],
        out_dtype=torch.bfloat16,
        use_fast_accum=fast,
    )

    def error(found: Tensor) -> float:
        return float(((found.double() - exact).norm(dim=1) / exact.norm(dim=1)).median())

    print(f"{terms} terms, fast {fast}: {error(product) / error(rounded):.4f}")
    assert 1 / BOUND < error(product) / error(rounded) < BOUND
