"""Products in FP8 for transformers: what is rounded, by which scales, and that it is a product in FP8."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from megaqwen.parity.fp8 import Fp8, ProductsInFp8, fp8_of
from megaqwen.parity.reference import outputs_of
from megaqwen.sources.tiny import write_tiny_model
from megaqwen.weights import HuggingFaceWeights

BATCH = torch.randint(250, (4, 17), generator=torch.Generator().manual_seed(3))
TENSORWISE, BLOCKWISE = Fp8(recipe="tensorwise"), Fp8(recipe="blockwise")


def drawn(*size: int) -> Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(len(size)))


def steps(matrix: Tensor, scale: float) -> Tensor:
    """By E4M3's definition: three bits after the first, exponents from -6 on, at most 448."""
    scaled = (matrix.double() * scale).clamp(-448, 448)
    exponent = scaled.abs().clamp(min=2.0**-6).log2().floor()
    unit = torch.exp2(exponent - 3)
    return torch.round(scaled / unit) * unit / scale


@pytest.mark.parametrize(
    ("train", "fp8"),
    [
        ({"bf16": True}, None),
        ({"fp8": "hybrid", "fp8_margin": 2}, Fp8(recipe="delayed", margin=2)),
        (
            {"fp8": "e4m3", "fp8_recipe": "tensorwise", "fp8_margin": 1},
            Fp8(recipe="tensorwise"),
        ),
        (
            {"fp8": "hybrid", "fp8_recipe": "blockwise", "first_last_layers_bf16": True},
            Fp8(recipe="blockwise", first=1, last=1),
        ),
        ({"fp8": "hybrid", "num_layers_at_end_in_bf16": 2}, Fp8(recipe="delayed")),
    ],
)
def test_training_says_how(train: dict[str, Any], fp8: Fp8 | None) -> None:
    assert fp8_of(train) == fp8


@pytest.mark.parametrize("margin", [0, 3])
def test_a_tensor_has_one_scale_that_fills_the_format(margin: int) -> None:
    matrix = drawn(40, 30) ** 3
    rounded = Fp8(recipe="delayed", margin=margin).rounded(matrix, 1)
    scale = 448 / float(matrix.abs().max()) / 2**margin
    torch.testing.assert_close(rounded.double(), steps(matrix, scale), rtol=1e-5, atol=1e-9)
    assert torch.equal(TENSORWISE.rounded(torch.zeros(2, 3), 1), torch.zeros(2, 3))


@pytest.mark.parametrize("rows", [1, 128])
def test_a_block_has_a_scale_that_is_a_power_of_two(rows: int) -> None:
    matrix = drawn(200, 300) * torch.logspace(-4, 4, 300)
    rounded = BLOCKWISE.rounded(matrix, rows)
    for top in range(0, 200, rows):
        for left in range(0, 300, 128):
            block = matrix[top : top + rows, left : left + 128]
            scale = 2.0 ** (448 / block.abs().max()).log2().floor().item()
            expected = steps(block, scale)
            found = rounded[top : top + rows, left : left + 128].double()
            torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_what_is_one_tensor_of_megatrons_has_one_scale() -> None:
    tensors = {
        "self_attn.q_proj.weight": drawn(8, 16),
        "self_attn.k_proj.weight": 0.01 * drawn(4, 16),
        "self_attn.o_proj.weight": 0.01 * drawn(16, 8),
        "self_attn.k_proj.bias": drawn(4),
        "mlp.gate.weight": drawn(2, 16),
        "mlp.experts.gate_up_proj": drawn(2, 6, 16) * torch.tensor([1.0, 0.01])[:, None, None],
        "mlp.shared_expert_gate.weight": drawn(1, 16),
        "input_layernorm.weight": drawn(16),
    }
    rounded = TENSORWISE.rounded_weights({k: v.bfloat16() for k, v in tensors.items()})
    products = {name for name, tensor in rounded.items() if tensor.dtype == torch.float32}
    assert products == {name for name in tensors if "_proj" in name and "bias" not in name}
    given = {name: tensor.bfloat16().float() for name, tensor in tensors.items()}
    scale = 448 / float(given["self_attn.q_proj.weight"].abs().max())
    for name, own in (
        ("self_attn.k_proj.weight", scale),
        ("self_attn.o_proj.weight", 448 / float(given["self_attn.o_proj.weight"].abs().max())),
    ):
        torch.testing.assert_close(
            rounded[name].double(), steps(given[name], own), rtol=1e-5, atol=0
        )
    experts = rounded["mlp.experts.gate_up_proj"], given["mlp.experts.gate_up_proj"]
    for found, matrix in zip(*experts, strict=True):
        own = 448 / float(matrix.abs().max())
        torch.testing.assert_close(found.double(), steps(matrix, own), rtol=1e-5, atol=0)


def test_a_product_is_of_rounded_factors_and_others_are_as_they_were() -> None:
    inputs, weight, bias = drawn(2, 3, 16).bfloat16(), drawn(8, 16).bfloat16(), drawn(8).bfloat16()
    (rounded,) = TENSORWISE.rounded_weights({"o_proj.weight": weight}).values()
    expected = TENSORWISE.rounded(inputs.flatten(0, 1).float(), 1) @ rounded.T + bias.float()
    with ProductsInFp8(TENSORWISE):
        found = nn.functional.linear(inputs, rounded, bias)
        other = nn.functional.linear(inputs, weight, bias)
    assert torch.equal(found, expected.bfloat16().view(2, 3, 8))
    assert torch.equal(other, nn.functional.linear(inputs, weight, bias))


@pytest.mark.parametrize("architecture", ["qwen2", "qwen2_moe"])
@pytest.mark.parametrize("fp8", [TENSORWISE, BLOCKWISE])
def test_a_models_layers_are_in_it_but_those_at_the_ends(
    architecture: str, fp8: Fp8, tmp_path: Path
) -> None:
    write_tiny_model(tmp_path, architecture, seed=1234)
    weights = HuggingFaceWeights(tmp_path)
    exact, own, in_fp8, first = (
        outputs_of(weights, dtype, BATCH, fp8=each)
        for dtype, each in (
            (torch.float32, None),
            (torch.bfloat16, None),
            (torch.bfloat16, fp8),
            (torch.bfloat16, Fp8(recipe=fp8.recipe, first=1)),
        )
    )

    def error(outputs: list[list[Tensor]], point: int) -> float:
        pairs = zip(outputs[point], exact[point], strict=True)
        return sum(float((a.float() - b).norm() / b.norm()) for a, b in pairs) / len(BATCH)

    assert error(in_fp8, 0) > 1.5 * error(own, 0)
    assert error(first, 0) < 1.1 * error(own, 0)
    assert error(first, 1) > 1.5 * error(own, 1)
    assert error(in_fp8, -1) < 1  # and it still is the same model
