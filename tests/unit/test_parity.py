"""The gates: what they measure, and that each mistake of a conversion fails one of them."""

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeTopKRouter

from megaqwen.parity import comparing
from megaqwen.parity.comparing import Comparison, point_error
from megaqwen.parity.gates import Gate, first_divergence, forward_gates, layers_gate, tensors_gate
from megaqwen.parity.localization import likely_cause, table
from megaqwen.parity.routing import OtherChoices, compare_routing, following, weights_of
from megaqwen.parity.texts import FULL_LENGTH, cut_to_budget, why_cut
from small_models import MODELS

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


def compare_logits(name: str, tokens: Tensor, reference: Tensor, other: Tensor) -> Comparison:
    """Of logits whose rounding is 0, in one block."""
    return comparing.compare_logits(name, tokens, [(reference, reference, other)], tie=2e-4)


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
    assert (found.positions, found.worst_position) == (3, 1)
    assert (found.argmax_differences, found.ties) == (0, 1)  # the reference has two equal logits
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


def test_blocks_of_positions_come_to_the_same_as_all_at_once() -> None:
    generator = torch.Generator().manual_seed(1)
    tokens = torch.arange(10) % 7
    reference = torch.randn(10, 7, generator=generator)
    other = reference + 0.1 * torch.randn(10, 7, generator=generator)
    whole = compare_logits("a", tokens, reference, other)
    runs = [slice(0, 4), slice(4, 9), slice(9, 10)]
    blocks = [(reference[run], reference[run], other[run]) for run in runs]
    parts = comparing.compare_logits("a", tokens, blocks, tie=2e-4)
    assert parts.loss == pytest.approx(whole.loss) and parts.max_kl == pytest.approx(whole.max_kl)
    assert parts.by_position == pytest.approx(whole.by_position) and len(parts.by_position) == 10
    assert parts.mean_difference == pytest.approx(float((reference - other).abs().mean()))
    assert parts.argmax_differences == whole.argmax_differences


def test_a_tie_is_no_other_token_and_more_than_a_tie_is() -> None:
    reference = torch.tensor([[1.0, 1.0 - 1e-5, 0.0], [1.0, 0.9, 0.0]])
    other = torch.tensor([[1.0 - 1e-5, 1.0, 0.0], [0.9, 1.0, 0.0]])
    found = compare_logits("a", torch.tensor([0, 1]), reference, other)
    assert (found.ties, found.argmax_differences) == (1, 1)


def test_large_logits_may_differ_by_their_own_rounding() -> None:
    reference = 1e4 * torch.randn(8, 5, generator=torch.Generator().manual_seed(1))
    exact, other = reference.double() + 1e-3, reference + 2e-3
    tokens = torch.arange(8) % 5
    found = comparing.compare_logits("a", tokens, [(exact, reference, other)], tie=2e-4)
    gates = {gate.name: gate for gate in forward_gates([found], 1e-4)}
    assert gates["logits"].passed and gates["logits"].threshold == pytest.approx(4e-3, rel=0.2)
    more = comparing.compare_logits("a", tokens, [(exact, reference, reference + 2e-2)], tie=2e-4)
    assert not {gate.name: gate for gate in forward_gates([more], 1e-4)}["logits"].passed


def test_the_first_point_beyond_rounding_is_named() -> None:
    exact = torch.randn(6, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    reference = exact * (1 + 1e-7)
    good, bad = reference * (1 + 1e-7), reference.clone()
    bad[3] *= 1.001
    names = ["prose", "code"]
    points = [
        point_error(layer, point, names, [exact] * 2, [reference] * 2, [good, other])
        for layer, point, other in ((None, "embedding", good), (0, "mlp out", bad), (0, "out", bad))
    ]
    assert points[0].ratio == pytest.approx(1, rel=1e-3) and points[1].ratio > 100
    first = first_divergence(points)
    assert first is points[1] and str(first) == "layer 0 mlp out (worst in code at position 3)"
    gate = layers_gate(points)
    assert not gate.passed and str(first) in gate.detail
    marked = [line for line in table(points) if "the first" in line]
    assert len(marked) == 1 and "mlp out" in marked[0]
    assert "gate and up" in likely_cause([gate], points)
    assert layers_gate(points[:1]).passed and first_divergence(points[:1]) is None


def test_a_lucky_reference_is_no_reason_to_fail() -> None:
    """Where transformers is in float32 in both of its walks, they may agree to the bit."""
    exact = torch.randn(6, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    for apart, passes in ((0, True), (2**-24, True), (2**-22, False)):
        point = point_error(0, "mlp in", ["prose"], [exact], [exact], [exact * (1 + apart)])
        assert layers_gate([point]).passed == passes


def test_another_expert_counts_where_no_tie_explains_it() -> None:
    logits = torch.tensor([[3.0, 2.0, 2.0 - 1e-5, 0.0], [3.0, 2.0, 1.0, 0.0]])
    mine = torch.tensor([[0, 1], [0, 1]])
    theirs = torch.tensor([[2, 0], [0, 2]])
    found = compare_routing(5, [{"router": logits, "choices": mine}], [{"choices": theirs}], 2e-4)
    assert (found.choices, found.ties, found.differences) == (4, 1, 1)
    assert (found.reference_counts, found.counts) == ([2, 2, 0, 0], [2, 0, 2, 0])
    assert found.largest_count_difference == 2
    # That the last of the chosen ties with one outside is no reason to leave out the first.
    both = torch.tensor([[1, 2]])
    rows = [{"router": logits[:1], "choices": mine[:1]}], [{"choices": both}]
    found = compare_routing(5, *rows, 2e-4)
    assert (found.ties, found.differences) == (0, 1)


@pytest.mark.parametrize("scaled", [True, False])
def test_transformers_router_follows_at_a_tie_alone(scaled: bool) -> None:
    facts = {**MODELS["qwen3_moe"], "norm_topk_prob": scaled}
    router = Qwen3MoeTopKRouter(AutoConfig.for_model(**facts))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        router.weight.copy_(torch.randn(router.weight.shape, generator=generator))
        router.weight[1] = router.weight[0]
    states = torch.randn(64, facts["hidden_size"], generator=generator)
    logits, weights, own = router(states)
    one_of_two = ((own < 2).sum(dim=1) == 1)[:, None]
    assert 5 < one_of_two.sum() < 60
    # Experts that tie change places, and elsewhere the last of the chosen is another one.
    swapped = torch.where(own < 2, 1 - own, own)
    others = torch.cat([own[:, :1], logits.argmin(dim=1, keepdim=True)], dim=1)
    theirs = torch.where(one_of_two, swapped, others)
    with following(router, OtherChoices(choices=[theirs, own], tie=2e-4)):
        _, found, taken = router(states)
        assert torch.equal(taken, torch.where(one_of_two, theirs, own))
        torch.testing.assert_close(found, weights)  # of equal logits
        assert torch.equal(found[~one_of_two[:, 0]], weights[~one_of_two[:, 0]])
        assert torch.equal(router(states)[2], own)  # the second call has choices of its own
    assert torch.equal(router(states)[2], own)
    torch.testing.assert_close(weights_of(router, logits, own), weights)


def test_texts_are_cut_to_what_a_budget_affords() -> None:
    texts = {"a": list(range(1000)), "b": list(range(10))}
    assert cut_to_budget(texts, budget=1e6) == texts
    cut = cut_to_budget(texts, budget=3000)
    assert 16 <= len(cut["a"]) <= 590 and cut["b"] == texts["b"]
    assert sum(map(len, cut.values())) * 5 <= 3000
    assert len(cut_to_budget(texts, budget=1)["a"]) == 16


def test_a_text_of_full_length_that_is_cut_is_told() -> None:
    made = {"a": [1] * 40, FULL_LENGTH: [1] * 300}

    def told(tokens: int, full: int) -> dict[str, str]:
        return why_cut(made, {"a": [1] * 40, FULL_LENGTH: [1] * tokens}, full, 512)

    assert told(300, 512) == {}  # the documents have no more
    assert told(300, 300) == {FULL_LENGTH: "memory is enough for 300 of 512 tokens in one text"}
    assert told(90, 512)[FULL_LENGTH].startswith("parity.minutes is enough for 90 of 512")
    assert why_cut({"a": [1]}, {"a": [1]}, 1, 512) == {}


def test_the_gates_on_logits_name_the_text_that_is_worst_in_each() -> None:
    even = Comparison(
        text="even",
        positions=4,
        max_difference=1.0,
        mean_difference=0.1,
        max_kl=0.0,
        argmax_differences=0,
        worst_position=1,
        loss=1.0,
        reference_loss=1.0,
        null=0.0,
        ties=0,
        by_position=[],
        pairs=[],
    )
    other = replace(even, text="other", max_difference=0.0, argmax_differences=2, loss=1.5)
    details = {gate.name: gate.detail for gate in forward_gates([even, other], 1e-4)}
    assert details["logits"].startswith("worst in even")
    assert details["argmax"] == "most in other: 2 of 4"
    assert details["loss"].startswith("most in other: Megatron 1.5")
