"""The gates: what they measure, and that each mistake of a conversion fails one of them."""

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from megaqwen.parity.gates import Gate, compare_logits, forward_gates, tensors_gate

TOKENS = torch.arange(48) * 37 % 2500
Tensors = dict[str, Tensor]


@torch.no_grad()
def logits(directory: Path, change: Callable[[Tensors], None], **settings: float) -> Tensor:
    """transformers' logits of TOKENS by a model with changed weights or settings."""
    model = AutoModelForCausalLM.from_pretrained(directory, attn_implementation="eager", **settings)
    tensors = model.state_dict()
    change(tensors)
    model.load_state_dict(tensors)
    return model(TOKENS[None]).logits[0]


def failed(reference: Tensor, other: Tensor) -> set[str]:
    gates = forward_gates([compare_logits("text", TOKENS, reference, other)], 1e-4)
    return {gate.name for gate in gates if not gate.passed}


def nothing(tensors: Tensors) -> None:
    """Leave the weights alone."""


def swap(first: str, second: str) -> Callable[[Tensors], None]:
    def change(tensors: Tensors) -> None:
        names = (f"model.layers.2.{first}", f"model.layers.2.{second}")
        one, other = (tensors[name].clone() for name in names)
        tensors[names[0]].copy_(other)
        tensors[names[1]].copy_(one)

    return change


def drop_bias(tensors: Tensors) -> None:
    tensors["model.layers.2.self_attn.q_proj.bias"].zero_()


@pytest.mark.parametrize(
    ("model", "change", "settings"),
    [
        ("tiny_qwen3", swap("mlp.gate_proj.weight", "mlp.up_proj.weight"), {}),
        ("tiny_qwen3", swap("self_attn.q_norm.weight", "self_attn.k_norm.weight"), {}),
        ("tiny_qwen2", drop_bias, {}),
        ("tiny_qwen2", nothing, {"rms_norm_eps": 1e-3}),
        ("tiny_qwen3", nothing, {"rms_norm_eps": 1e-4}),
    ],
)
def test_a_mistake_fails_the_gate_on_logits(
    request: pytest.FixtureRequest,
    model: str,
    change: Callable[[Tensors], None],
    settings: dict[str, float],
) -> None:
    directory: Path = request.getfixturevalue(model)
    reference = logits(directory, nothing)
    assert failed(reference, logits(directory, nothing)) == set()
    assert "logits" in failed(reference, logits(directory, change, **settings))


def test_the_comparison_measures_what_it_says() -> None:
    tokens = torch.tensor([0, 1, 0])
    reference = torch.zeros(3, 2)
    other = reference.clone()
    other[1, 1] = math.log(3)  # probabilities 1/4 and 3/4 at position 1
    found = compare_logits("a", tokens, reference, other)
    assert (found.positions, found.worst_position, found.argmax_differences) == (3, 1, 1)
    assert found.max_difference == pytest.approx(math.log(3))
    assert found.max_kl == pytest.approx(0.5 * math.log(2) + 0.5 * math.log(2 / 3))
    assert found.reference_loss == pytest.approx(math.log(2))
    assert found.loss == pytest.approx((math.log(2) + math.log(4)) / 2)


def test_a_nan_in_any_text_fails() -> None:
    reference = torch.randn(8, 5, generator=torch.Generator().manual_seed(1))
    broken = reference.clone()
    broken[3, 2] = float("nan")
    tokens = torch.arange(8) % 5
    comparisons = [
        compare_logits(name, tokens, reference, other)
        for name, other in (("good", reference), ("bad", broken), ("good too", reference))
    ]
    gates = {gate.name: gate for gate in forward_gates(comparisons, 1e-4)}
    assert not any(gates[name].passed for name in ("logits", "kl", "loss"))
    assert "bad at position 3" in str(gates["logits"])
    assert not Gate(name="x", statistic="y", value=float("nan"), threshold=1e9).passed


def test_the_tensors_gate_sees_each_bit() -> None:
    one = {"a": torch.tensor([0.0, 1.0]), "b": torch.tensor([float("nan")])}
    assert tensors_gate(one.__getitem__, one.items()).passed
    for other in (torch.tensor([-0.0, 1.0]), torch.tensor([0.0, 1.0]).bfloat16()):
        gate = tensors_gate(one.__getitem__, [("b", one["b"]), ("a", other)])
        assert (gate.passed, gate.value) == (False, 1)
        assert "of 2 tensors; the first that differs: a" in str(gate)
