"""The product with SwiGLU in it, held against float64 beside Transformer Engine's two kernels.

Skipped without an H100 and quack.
"""

import importlib.util
from typing import Any

import pytest
import torch
from benchmark_mlp import START, sequence

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available()
    or importlib.util.find_spec("quack") is None
    or torch.cuda.get_device_capability() != (9, 0),
    reason="no H100: run `uv sync --extra gpu && uv run pytest tests/gpu` on a machine that has one",
)
Results = dict[str, torch.Tensor]


def run(model: Any, inputs: torch.Tensor, upstream: torch.Tensor) -> Results:
    leaf = inputs.clone().requires_grad_()
    output = model(leaf)
    output.backward(upstream)
    found = {"output": output.detach(), "inputs": leaf.grad}
    for name, weight in (("first", model[0].weight), ("second", model[2].weight)):
        total = getattr(weight, "main_grad", None)
        found[name] = weight.grad if total is None else total - START
    return found


def exact(
    first: torch.Tensor, second: torch.Tensor, inputs: torch.Tensor, upstream: torch.Tensor
) -> Results:
    leaves = [each.double().requires_grad_() for each in (first, second, inputs)]
    gate, up = (leaves[2] @ leaves[0].T).chunk(2, -1)
    output = (torch.nn.functional.silu(gate) * up) @ leaves[1].T
    output.backward(upstream.double())
    gradients = dict(
        zip(("first", "second", "inputs"), (each.grad for each in leaves), strict=True)
    )
    return {"output": output.detach(), **gradients}


def error(found: torch.Tensor, reference: torch.Tensor) -> float:
    return float((found.double() - reference).norm() / reference.norm())


@pytest.mark.parametrize(
    ("shape", "hidden", "features"),
    [((96, 2), 64, 176), ((7, 3), 1536, 8960), ((2048, 1), 1536, 8960), ((300, 2), 4096, 1232)],
)
@pytest.mark.parametrize("total", [torch.float32, torch.bfloat16, None])
def test_it_is_as_near_to_float64_as_kernels_apart(
    shape: tuple[int, int],
    hidden: int,
    features: int,
    total: torch.dtype | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from transformer_engine.pytorch.ops.fuser import OperationFuser

    from megaqwen.training import swiglu_mlp

    generator = torch.Generator("cuda").manual_seed(7)

    def draw(*size: int) -> torch.Tensor:
        return torch.randn(size, generator=generator, device="cuda", dtype=torch.bfloat16)

    weights = draw(2 * features, hidden) * hidden**-0.5, draw(hidden, features) * features**-0.5
    inputs, upstream = draw(*shape, hidden), draw(*shape, hidden)
    monkeypatch.setattr(OperationFuser, "forward_backward_fusion_functions", [])
    apart = run(sequence(*weights, total), inputs, upstream)
    swiglu_mlp.install()
    swiglu_mlp.install()  # as of every layer
    model = sequence(*weights, total)
    fused, again = (run(each, inputs, upstream) for each in (model, sequence(*weights, total)))
    (fuser,) = model._module_groups
    assert [type(each).__name__ for each, _ in fuser._forward_ops] == ["SwiGLUMLP"]
    reference = exact(*weights, inputs, upstream)
    for name, value in reference.items():
        of_fused, of_apart = error(fused[name], value), error(apart[name], value)
        print(f"{shape} {total} {name}: {of_fused:.2e}, apart {of_apart:.2e}")
        assert of_fused < 1.05 * of_apart
        assert torch.equal(fused[name], again[name])
    with torch.no_grad():
        assert torch.equal(model(inputs), fused["output"])


def test_what_it_does_not_know_is_left_to_transformer_engine() -> None:
    from transformer_engine.common.recipe import Float8CurrentScaling
    from transformer_engine.pytorch import ops

    from megaqwen.training.swiglu_mlp import SwiGLUMLP, fuse

    def kinds(*operations: Any, recipe: Any = None) -> list[type]:
        return [type(each) for each in fuse(list(operations), recipe=recipe)]

    def linear(inputs: int, outputs: int, dtype: torch.dtype = torch.bfloat16) -> Any:
        return ops.BasicLinear(inputs, outputs, device="meta", dtype=dtype)

    first, second = linear(64, 96), linear(48, 64)
    apart = [ops.BasicLinear, ops.SwiGLU, ops.BasicLinear]
    norm = ops.RMSNorm(64, device="meta")
    assert kinds(norm, first, ops.SwiGLU(), second) == [ops.RMSNorm, SwiGLUMLP]
    assert kinds(first, ops.SwiGLU(), second, recipe=Float8CurrentScaling()) == apart
    assert kinds(linear(64, 96, torch.float32), ops.SwiGLU(), second) == apart
    assert kinds(linear(72, 96), ops.SwiGLU(), linear(48, 72)) == apart
    assert kinds(first, ops.SwiGLU(glu_interleave_size=2), second) == apart
    assert kinds(first, ops.SwiGLU(cache_quantized_input=True), second) == apart
    assert kinds(first, ops.SwiGLU()) == apart[:2]
    second.weight.requires_grad_(False)
    assert kinds(first, ops.SwiGLU(), second) == apart


def test_another_quack_is_left_alone(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from transformer_engine.pytorch.ops.fuser import OperationFuser

    from megaqwen.training import swiglu_mlp

    monkeypatch.setattr(OperationFuser, "forward_backward_fusion_functions", [])
    monkeypatch.setitem(swiglu_mlp.TESTED, "quack-kernels", "0.0.0")
    swiglu_mlp.quack_is_known.cache_clear()
    try:
        swiglu_mlp.install()
        assert OperationFuser.forward_backward_fusion_functions == []
        assert "they were tested with quack-kernels 0.0.0" in caplog.text
    finally:
        swiglu_mlp.quack_is_known.cache_clear()
