"""What the gates over ranks are made of: options, batches, schedules and the comparison of tensors."""

import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from commands import ROOT
from megaqwen.config import load_config
from megaqwen.config.rank_options import (
    check_ranks,
    deciding,
    nodes_for,
    number_format,
    ranks_of_layout,
    ranks_of_replica,
)
from megaqwen.config.reading import read_yaml
from megaqwen.errors import InputError
from megaqwen.machine import free_memory
from megaqwen.parity.affordable import Machine, Size, bytes_needed, reasons_not_to
from megaqwen.parity.batches import make_batches
from megaqwen.parity.dtype_gates import DTYPE_THRESHOLD, error_ratio, mean_and_least
from megaqwen.parity.gates import Gate
from megaqwen.parity.gathering import Gathered, Part, parts_to_send, put
from megaqwen.parity.localization import likely_cause
from megaqwen.parity.rank_gates import losses_gate
from megaqwen.parity.rank_outputs import in_order
from megaqwen.parity.reference import learning_rates, published, recipe_of
from megaqwen.parity.tensor_error import first_on_the_way_back, tensor_error, worst_of
from megaqwen.parity.texts import memory_for
from workspace import OPTIONS

TRAIN: dict[str, Any] = {"lr": 1.0, "min_lr": 0.2, "train_iters": 12, "lr_warmup_iters": 2}


@pytest.mark.parametrize(
    ("options", "ranks"),
    [
        ({}, 1),
        ({"tensor_model_parallel_size": 2}, 2),
        ({"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 3}, 6),
        ({"expert_model_parallel_size": 4}, 4),
        # Experts are whole on each rank where their own size says so, otherwise cut as the rest.
        ({"tensor_model_parallel_size": 2, "expert_model_parallel_size": 4}, 8),
        (
            {
                "tensor_model_parallel_size": 2,
                "expert_model_parallel_size": 4,
                "expert_tensor_parallel_size": 1,
            },
            4,
        ),
        ({"context_parallel_size": 2}, 1),
    ],
)
def test_the_ranks_of_a_layout(options: dict[str, Any], ranks: int) -> None:
    assert ranks_of_layout(options) == ranks
    check_ranks(options, 2 * ranks)
    if ranks > 1:
        with pytest.raises(
            InputError, match=f"takes {ranks} ranks, and parity runs on 1: start it"
        ):
            check_ranks(options, 1)


def test_the_ranks_that_train_a_layout() -> None:
    layout = {"tensor_model_parallel_size": 2, "expert_model_parallel_size": 4}
    assert ranks_of_replica(layout) == ranks_of_layout(layout) == 8
    assert ranks_of_replica({"context_parallel_size": 2}) == 2
    whole_experts = {**layout, "expert_tensor_parallel_size": 1, "context_parallel_size": 4}
    assert ranks_of_replica(whole_experts) == 8 and ranks_of_layout(whole_experts) == 4


@pytest.mark.parametrize(
    ("ranks", "most", "nodes"), [(8, 0, 1), (8, 8, 1), (8, 3, 4), (6, 4, 2), (9, 4, 3), (7, 4, 7)]
)
def test_the_nodes_that_share_ranks_evenly(ranks: int, most: int, nodes: int) -> None:
    assert nodes_for(ranks, most) == nodes


def test_what_decides_the_verdict_before_training() -> None:
    options = {"lr": 1.0, "train_iters": 3, "seed": 1, "bf16": True, "adam_beta2": 0.9}
    assert deciding(options) == {"bf16": True, "adam_beta2": 0.9}
    # The longest text that is compared is as long as a sample.
    assert deciding({"seq_length": 4096, "eval_iters": 1}) == {"seq_length": 4096}
    assert number_format({"bf16": True}) == "bfloat16"
    assert number_format({"bf16": True, "fp8": "hybrid"}) == "fp8"
    assert number_format({"bf16": False}) == "float32"


def test_learning_rates_go_up_in_a_line_and_down_to_the_lowest() -> None:
    found = learning_rates({**TRAIN, "lr_decay_style": "linear"}, 13)
    assert found[:4] == pytest.approx((0.0, 0.5, 1.0, 0.92))
    assert found[-1] == pytest.approx(0.2)
    half = learning_rates({**TRAIN, "lr_decay_style": "cosine"}, 13)[7]
    assert half == pytest.approx(0.6)
    assert learning_rates({**TRAIN, "lr_decay_style": "constant"}, 13)[-1] == 1.0


@pytest.mark.parametrize(
    "option",
    [
        {"optimizer": "muon"},
        {"lr_decay_style": "WSD"},
        {"apply_wd_to_qk_layernorm": True},
        {"weight_decay_incr_style": "linear"},
    ],
)
def test_what_the_plain_loop_cannot_do_is_said(option: dict[str, Any]) -> None:
    assert isinstance(recipe_of({**TRAIN, **option}, 3), str)
    assert not isinstance(recipe_of(TRAIN, 3), str)


def test_batches_are_the_texts_one_after_another() -> None:
    first, second = make_batches([[1, 2, 3], [4, 5]], 2, 2, 40, 100)
    assert first.shape == (2, 33)  # a multiple of 16, and the last target
    flat = torch.cat([first, second]).flatten().tolist()
    assert flat[:7] == [1, 2, 3, 4, 5, 1, 2] and len(flat) == 132
    assert make_batches([[1, 2]], 1, 4, 4096, 2**22)[0].shape == (4, 17)  # few, of many logits


def test_a_position_that_went_astray_is_one_of_many() -> None:
    exact = torch.randn(9, 50, generator=torch.Generator().manual_seed(1))
    other = exact * 1.03
    other[4] += 100.0  # as where a router chose another expert
    assert error_ratio(exact, exact * 1.01, other) == pytest.approx(3.0, rel=1e-4)


def test_a_tensors_error_is_told_in_units_of_rounding() -> None:
    exact = torch.tensor([3.0, 4.0], dtype=torch.float64)
    found = tensor_error("a", exact, exact * (1 + 1e-7), exact * (1 + 3e-7))
    assert found.ratio == pytest.approx(3.0, rel=1e-6)
    assert (found.cosine, found.relative_norm) == pytest.approx((1.0, 1.0))
    nothing = torch.zeros(2)
    assert tensor_error("b", nothing, nothing, nothing).ratio == 0.0
    # No float32 need be nearer than its own last place.
    assert tensor_error("c", exact, exact, exact * (1 + 2**-24)).ratio == pytest.approx(1.0)
    assert tensor_error("d", exact, exact, exact * 1.1).ratio > 1e6


def test_the_first_tensor_on_the_way_back_is_the_nearest_to_the_head() -> None:
    exact, nan = torch.ones(3), torch.full((3,), math.nan)
    near, far = exact * (1 + 1e-6), exact * 1.1
    rows = {"embedding": nan, "layer 0": far, "layer 1": far, "head": near}
    errors = [tensor_error(name, exact, near, other) for name, other in rows.items()]
    first = first_on_the_way_back(errors, 10.0)
    assert first and first.name == "layer 1"
    assert first_on_the_way_back(errors[-1:], 10.0) is None
    assert worst_of(errors).name == "embedding"


def test_a_loss_in_float32_is_no_more_exact_than_its_size_allows() -> None:
    exact = [8.0, 7.5]
    lucky = losses_gate([8.0 + 9e-7, 7.5], [8.0 + 1e-8, 7.5], exact)
    assert lucky.passed and lucky.threshold == pytest.approx(4 * 8 * 2**-23)
    rounded = losses_gate([8.0, 7.5 + 9e-6], [8.0 + 3e-6, 7.5], exact)
    assert rounded.passed and rounded.threshold == pytest.approx(12e-6)
    wrong = losses_gate([8.0, 7.5 + 9e-6], [8.0, 7.5], exact)
    assert not wrong.passed and "before step 2" in wrong.detail


def test_micro_batches_are_put_together_in_the_order_of_the_batch() -> None:
    """Two data parallel ranks of two stages, the second of which has no first layer."""
    numbers = [torch.full((2, 1), float(number)) for number in range(4)]
    found = [(0, {0: numbers[0::2]}), (1, {0: numbers[1::2]}), (0, {}), (1, {})]
    assert in_order(found, 0).flatten().tolist() == [0, 0, 1, 1, 2, 2, 3, 3]


def test_what_may_be_chance_is_taken_off() -> None:
    assert mean_and_least([1.2] * 16) == pytest.approx((1.2, 1.2))
    mean, least = mean_and_least([0.8, 1.25] * 8)
    assert mean == pytest.approx(1.0) and 0.8 < least < 0.95
    assert math.isnan(mean_and_least([1.0, float("nan")])[1])


@pytest.mark.parametrize("wrong", [[100.0], [1e8], [100.0] * 2, [4.0], [2.0] * 4, [float("inf")]])
def test_sequences_that_are_wrong_do_not_pass_as_chance(wrong: list[float]) -> None:
    """However far they are from the others: what is taken off is not of their making."""
    healthy = [0.93, 0.97] * 8
    assert mean_and_least(healthy)[1] < DTYPE_THRESHOLD
    assert mean_and_least([*wrong, *healthy[len(wrong) :]])[1] > DTYPE_THRESHOLD


def test_the_memory_of_a_job_is_what_its_cgroup_leaves(tmp_path: Path) -> None:
    job = tmp_path / "cgroups" / "job" / "step"
    job.mkdir(parents=True)
    membership = tmp_path / "membership"
    membership.write_text("0::/job/step\n")
    (job / "memory.max").write_text("max\n")
    (job.parent / "memory.max").write_text("5000000\n")
    (job.parent / "memory.current").write_text("4000000\n")
    (job.parent / "memory.stat").write_text("anon 1000000\nfile 3000000\n")
    assert free_memory(membership, tmp_path / "cgroups") == 4_000_000
    assert free_memory(tmp_path / "none", tmp_path / "cgroups") > 4_000_000


def test_experts_get_the_names_of_the_published_files() -> None:
    fused = torch.arange(2 * 4 * 3).view(2, 4, 3)
    down = torch.arange(2 * 3 * 2).view(2, 3, 2)
    found = published({"a.mlp.experts.gate_up_proj": fused, "a.mlp.experts.down_proj": down})
    assert torch.equal(found["a.mlp.experts.1.gate_proj.weight"], fused[1, :2])
    assert torch.equal(found["a.mlp.experts.1.up_proj.weight"], fused[1, 2:])
    assert torch.equal(found["a.mlp.experts.0.down_proj.weight"], down[0])


def gate(name: str, *, passed: bool) -> Gate:
    return Gate(name=name, statistic="", value=0.0 if passed else 2.0, threshold=1.0)


def test_the_likely_cause_is_that_of_the_first_gate_that_failed() -> None:
    order = ("logits", "layout", "gradients", "trajectory")

    def cause(*failed: str) -> str:
        return likely_cause([gate(name, passed=name not in failed) for name in order], [])

    assert "share out the weights" in cause("layout", "gradients", "trajectory")
    assert "backward pass" in cause("gradients", "trajectory")
    assert "weight decay" in cause("trajectory")
    assert "output head" in cause("logits", "layout")
    assert "longer or packed text" in likely_cause([gate("perplexity", passed=False)], [])


def reasons(machine: Machine, *, with_steps: bool = True, **train: Any) -> dict[str, str]:
    """Of a model of a billion parameters, half of them in experts."""
    options = {**OPTIONS, **train}
    config = load_config(ROOT / "config" / "config.yaml", {"train": options})
    size = Size(parameters=10**9, in_experts=5 * 10**8)
    return reasons_not_to(config, size, machine, with_steps=with_steps)


ONE = Machine(ranks=1, on_a_node=1, free=100e9, rate=1e15)
LAID_OUT = {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2}
FOUR = Machine(ranks=4, on_a_node=4, free=100e9, rate=1e15)


def test_what_fits_the_memory_of_one_rank_is_measured() -> None:
    plain = {"tensor_model_parallel_size": 1, "sequence_parallel": False}
    assert reasons(ONE, bf16=True, **plain) == {}
    assert set(reasons(ONE, **plain)) == {"dtype"}
    less = reasons(replace(ONE, free=60e9), bf16=True, **plain)
    assert less == {"trajectory": "64 GB of memory are needed and 42 GB may be used"}
    least = reasons(replace(ONE, free=50e9), bf16=True, **plain)
    assert set(least) == {"layout", "gradients", "trajectory"}
    assert least["layout"] == "training's layout is one rank, as that of the other gates"
    none = reasons(replace(ONE, free=16e9), bf16=True, **plain)
    assert set(none) == {"layout", "dtype", "gradients", "trajectory"}
    assert none["layout"] == "12 GB of memory are needed and 11 GB may be used"
    slow = reasons(replace(ONE, rate=1e9), bf16=True, **plain)
    assert "more than parity.minutes" in slow["gradients"] and "gpu" in slow


GATES = ("layout", "dtype", "gradients", "gradients with one tensor parallel rank", "trajectory")


def test_the_profile_tells_what_parity_takes() -> None:
    """In bytes a parameter: with those of its comment a gate is measured, and with one less it is not."""
    told = (ROOT / "profiles" / "slurm" / "config.yaml").read_text()
    told = told.split("In bytes a parameter of")[1].split("parity_gate:")[0]
    layout, gradients, each, more, steps = map(int, re.findall(r"\b\d\d\b", told))
    least = dict(zip(GATES, (layout, layout, gradients, 4 * each + more, steps), strict=True))
    for gate, bytes_each in least.items():
        machine = replace(FOUR, free=bytes_each * 1e9)
        assert gate not in reasons(machine, bf16=True, **LAID_OUT)
        # Those of each rank are rounded up before they are multiplied.
        less = 0.93 if gate == GATES[3] else 1 - 1 / bytes_each
        machine = replace(FOUR, free=less * machine.free)
        assert gate in reasons(machine, bf16=True, **LAID_OUT), gate


def test_what_parity_of_an_8b_takes() -> None:
    """The mem_mb that its config names, in MiB as Slurm counts."""
    file = ROOT / "config" / "experiments" / "qwen3-8b.yaml"
    config = load_config(ROOT / "config" / "config.yaml", read_yaml(file))
    most, steps = map(int, re.findall(r"\b\d\d0000\b", file.read_text()))
    # And of a whole sample, for the loss that training logged.
    (sample,) = map(int, re.findall(r"\b\d\d\d00\b(?<!16000)", file.read_text()))
    needed = memory_for(config.train["seq_length"], 32) / 2**20
    assert needed < sample < 1.02 * needed
    minutes = int(file.read_text().split("parity: {minutes: ")[1].split("}")[0])
    # Of the time three tenths are for held-out samples, each of which takes four passes.
    affordable = minutes * 60 * 0.3e12 / (2 * 8_190_735_360) * 0.3 / 4
    assert config.train["seq_length"] < affordable < 1.1 * config.train["seq_length"]

    def absent(mem_mb: int) -> set[str]:
        machine = Machine(ranks=2, on_a_node=2, free=mem_mb * 2**20, rate=1e15)
        return set(reasons_not_to(config, Size(parameters=8_190_735_360), machine, with_steps=True))

    assert absent(16000) >= {"layout", "dtype", "gradients", "trajectory"}
    assert absent(most) == {"trajectory"} and "gradients" in absent(most * 9 // 10)
    assert absent(steps) == set() and "trajectory" in absent(steps * 9 // 10)


def test_a_copy_of_the_model_on_each_rank_takes_memory_for_each() -> None:
    assert reasons(FOUR, bf16=True, **LAID_OUT) == {}
    whole = "gradients with one tensor parallel rank"
    # 4 * 12 and 8 bytes a parameter, which as many ranks on two nodes share.
    little = replace(FOUR, free=75e9)
    found = reasons(little, bf16=True, with_steps=False, **LAID_OUT)
    assert found[whole] == "56 GB of memory are needed and 52 GB may be used"
    assert set(found) == {whole, "trajectory"}
    assert whole not in reasons(replace(little, on_a_node=2), bf16=True, **LAID_OUT)
    # Gradients that are not measured at all are not listed twice.
    assert whole not in reasons(replace(FOUR, free=50e9), bf16=True, **LAID_OUT)


def test_what_expert_parallel_ranks_have_copies_of_counts_for_each() -> None:
    size = Size(parameters=10**9, in_experts=5 * 10**8)
    needed = bytes_needed({"expert_model_parallel_size": 4}, size, FOUR)
    assert needed["layout"] == 12 * (4 * 5e8 + 5e8)
    assert bytes_needed(LAID_OUT, size, FOUR)["layout"] == 12e9
    sixteen = replace(FOUR, ranks=16, on_a_node=16)
    layout = {"tensor_model_parallel_size": 4, "pipeline_model_parallel_size": 4}
    needed = bytes_needed(layout, size, sixteen)
    assert needed["layout"] == 12e9 and needed["gradients"] == 40e9
    assert needed["gradients with one tensor parallel rank"] == 200e9


def part(key: str, offset: int, digest: bytes) -> Part:
    return Part(
        key=key, whole=(4,), offset=(offset,), shape=(2,), dtype=torch.float32, digest=digest
    )


def test_of_copies_that_are_alike_none_is_sent() -> None:
    table = [
        [part("norm", 0, b"n"), part("weight", 0, b"w"), part("other", 0, b"o")],
        [part("norm", 0, b"x"), part("other", 0, b"o"), part("other", 2, b"p")],
        [part("norm", 0, b"n"), part("weight", 2, b"v")],
    ]
    # What the last rank lacks, once; and a norm that is not the others'.
    assert parts_to_send(table) == [(0, 1), (0, 2), (1, 0), (1, 2)]
    gathered = Gathered()
    for each, value in ((table[2][0], 1.0), (table[1][0], 1.5), (table[2][1], 2.0)):
        put(gathered, each, torch.full((2,), value))
    assert gathered.copies == {"norm": 0.5}
    assert gathered.tensors["norm"][:2].tolist() == [1.0, 1.0]
    assert gathered.tensors["weight"].isnan().tolist() == [True, True, False, False]
