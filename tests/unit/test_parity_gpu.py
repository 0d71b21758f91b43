"""The gate on what a GPU computes in training's dtype: what is asked of it, and what is not and why."""

import os
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from megaqwen.environment import Surroundings, surroundings
from megaqwen.parity import ranks
from megaqwen.parity.affordable import ATTENTION, LONG, long_positions, parameters_met
from megaqwen.parity.batches import IN_PART, PARTS, compared_at, long_batch
from megaqwen.parity.dtype_gates import hold_dtype, hold_dtypes
from megaqwen.parity.fp8 import Fp8
from megaqwen.parity.gpu import (
    THRESHOLDS,
    Forwarded,
    computes_in,
    forward_options,
    last_error,
)
from megaqwen.parity.on_all_ranks import FromRanks, ModelOf
from megaqwen.parity.ranks import join, leave, with_gpu
from trained_models import PUBLIC

FP8 = {"bf16": True, "fp8": "hybrid", "fp8_recipe": "blockwise"}
DELAYED = {"bf16": True, "fp8": "hybrid"}
OTHERWISE = {**DELAYED, "fp8_recipe": "tensorwise"}
MXFP8 = {**DELAYED, "fp8_recipe": "mxfp8"}
BATCH = torch.zeros(16, 33, dtype=torch.int64)
MODEL = ModelOf(architecture={}, checkpoint=Path("none"), vocabulary=10, rounded_to=None)
ALONE = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1"}
QWEN = {**PUBLIC["Qwen2.5-0.5B"].config, "max_position_embeddings": 32768}
RANKS = FromRanks(ranks=1, layout={}, dtype="bfloat16", padding=0, batches=[BATCH], sampled=BATCH)


@pytest.mark.parametrize(
    ("train", "name"),
    [
        ({}, None),
        ({"fp16": True}, None),
        ({"bf16": True}, "bfloat16"),
        (FP8, "fp8 blockwise"),
        (DELAYED, "fp8 delayed"),
        ({"bf16": True, "fp4": "e2m1"}, "fp4 nvfp4"),
    ],
)
def test_what_training_computes_in(train: dict[str, Any], name: str | None) -> None:
    assert computes_in(train) == name


@pytest.mark.parametrize(
    ("train", "no_gpu", "reason"),
    [
        ({}, "", None),
        ({"bf16": True}, "this machine has no GPU", "this machine has no GPU"),
        (FP8, "this Slurm job has no GPU", "this Slurm job has no GPU"),
        (MXFP8, "", "what fp8 mxfp8 does to a healthy model is not known here"),
        (
            OTHERWISE,
            "",
            "what a healthy model has with NVTE_FP8_CURRENT_SCALING_POWER_2_SCALES=1 is not known here",
        ),
        (
            {**FP8, "te_precision_config_file": "recipe.yaml"},
            "",
            "which products are in which dtype by te_precision_config_file is not known here",
        ),
    ],
)
def test_what_is_not_measured_and_why(
    train: dict[str, Any], no_gpu: str, reason: str | None
) -> None:
    scales = "NVTE_FP8_CURRENT_SCALING_POWER_2_SCALES"
    outside = Surroundings(variables={scales: "1" if train == OTHERWISE else "0"}, no_gpu=no_gpu)
    found = with_gpu(RANKS, train, MODEL, 100, outside, never)
    assert found.unmeasured == ({"gpu": reason} if reason else {})
    assert found.outputs_on_gpu is None
    late = replace(RANKS, unmeasured={"gpu": "it would take 9 minutes"})
    assert with_gpu(late, train, MODEL, 100, outside, never).unmeasured == late.unmeasured


def never() -> tuple[torch.Tensor, str]:
    raise AssertionError("nothing is computed, so no tokens are needed")


@pytest.mark.parametrize(
    ("limit", "without_long", "unmeasured"),
    [
        ("", "", {}),
        (
            "memory is enough for 256 of 4,096 tokens",
            "",
            {LONG: "memory is enough for 256 of 4,096 tokens"},
        ),
        ("", "the GPU's memory is too small", {LONG: "the GPU's memory is too small"}),
    ],
)
def test_what_is_computed_and_what_shortens_it(
    monkeypatch: pytest.MonkeyPatch, limit: str, without_long: str, unmeasured: dict[str, str]
) -> None:
    batch = long_batch([[1, 2, 3]], 256)
    short, long = [torch.ones(1)], None if without_long else [torch.zeros(1)]
    asked: list[Any] = []

    def forward(*given: Any, **named: Any) -> Forwarded:
        asked.extend(given)
        return Forwarded(outputs=short, long=long, without_long=without_long)

    monkeypatch.setattr(ranks, "forward_elsewhere", forward)
    outside = Surroundings(variables={}, no_gpu="")
    found = with_gpu(RANKS, {"bf16": True}, MODEL, 100, outside, lambda: (batch, limit))
    options, sampled, given = asked
    assert found.fp8 is None and options["micro_batch_size"] == 16
    in_fp8 = with_gpu(RANKS, FP8, MODEL, 100, outside, lambda: (batch, limit))
    assert in_fp8.fp8 == Fp8(recipe="blockwise")
    assert (options["seq_length"], options["global_batch_size"]) == (256, 16)
    assert sampled is BATCH and given is batch
    assert (found.outputs_on_gpu, found.long, found.long_on_gpu) == (short, batch, long)
    assert found.unmeasured == unmeasured and found.computes_in == "bfloat16"


@pytest.mark.parametrize(
    ("seq_length", "in_memory", "rate", "found"),
    [
        (4096, 10**6, 1e15, (4096, "")),
        (10**6, 10**6, 1e15, (32768, "")),
        (4096, 2000, 1e15, (2000, "memory is enough for 2,000 of 4,096 tokens in one sequence")),
        (
            4096,
            10**6,
            1e12,
            (2800, "parity.minutes is enough for 2,800 of 4,096 tokens in one sequence"),
        ),
        (4096, 10**6, 1e9, (0, "parity.minutes is enough for 0 of 4,096 tokens in one sequence")),
        (240, 10**6, 1e15, (0, "")),  # no longer than the others
    ],
)
def test_the_long_sequence_is_trainings_as_far_as_it_can_be(
    seq_length: int, in_memory: int, rate: float, found: tuple[int, str]
) -> None:
    config: Any = SimpleNamespace(
        train={"seq_length": seq_length}, parity=SimpleNamespace(minutes=1)
    )
    assert long_positions(config, QWEN, rate, in_memory) == found


def test_time_goes_by_the_parameters_that_a_token_meets_and_by_attention() -> None:
    config: Any = SimpleNamespace(train={"seq_length": 10**9}, parity=SimpleNamespace(minutes=1))
    wide: Any = {**QWEN, "max_position_embeddings": 10**9}
    positions, _ = long_positions(config, wide, 1e12, 10**9)
    products = 2 * parameters_met(wide) * positions
    attention = ATTENTION * 24 * 14 * 64 * positions**2
    assert 2 * (products + attention) / 1e12 == pytest.approx(15, rel=0.02)


def test_the_long_sequence_is_compared_from_its_first_to_its_last_position() -> None:
    batch = long_batch([[1, 2, 3], [4, 5]], 256)
    assert batch.shape == (1, 257) and batch[0, :7].tolist() == [1, 2, 3, 4, 5, 1, 2]
    for length in (256, 32768):
        at = compared_at(torch.zeros(1, length + 1)).tolist()
        assert len(set(at)) == PARTS * IN_PART and at == sorted(at)
        assert at[0] == 0 and at[-IN_PART:] == list(range(length - IN_PART, length))


def test_a_job_of_slurms_takes_no_gpu_that_it_was_not_given(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert surroundings().no_gpu == "this Slurm job has no GPU"
    monkeypatch.delenv("SLURM_JOB_ID")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    found = surroundings()
    assert found.no_gpu == "this machine has no GPU that may be used"
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3")
    assert found.variables["CUDA_VISIBLE_DEVICES"] == ""  # as it was


def test_the_gpu_is_asked_for_trainings_own_forward_pass() -> None:
    train = {
        **FP8,
        "async_save": True,
        "tensor_model_parallel_size": 1,
        "moe_token_dispatcher_type": "flex",
        "use_distributed_optimizer": True,
        "num_layers_at_start_in_bf16": 2,
    }
    dense = {"position_embedding_type": "yarn"}
    found = forward_options(train, dense, Path("there"), 250, (16, 32))
    assert (
        found.items()
        >= {
            **FP8,
            "num_layers_at_start_in_bf16": 2,
            "transformer_impl": "transformer_engine",
            "use_transformer_engine_op_fuser": True,
            "apply_rope_fusion": False,
            "skip_train": True,
            "seq_length": 32,
            "global_batch_size": 16,
            "padded_vocab_size": 250,
        }.items()
    )
    others = {"async_save", "use_distributed_optimizer", "moe_token_dispatcher_type"}
    assert not others & found.keys()
    train["moe_token_dispatcher_type"] = "alltoall"
    experts = forward_options(train, {"num_experts": 4}, Path("there"), 250, (16, 32))
    assert experts["moe_token_dispatcher_type"] == "alltoall"
    assert "use_transformer_engine_op_fuser" not in experts


@pytest.mark.parametrize(
    ("dtype", "times", "passes"),
    [
        ("bfloat16", 1.05, True),
        ("bfloat16", 1.2, False),
        ("fp8 tensorwise", 1.4, True),
        ("fp8 tensorwise", 1.6, False),
        ("fp8 blockwise", 1.1, True),
        ("fp8 blockwise", 1.3, False),
        ("fp8 blockwise", float("nan"), False),
    ],
)
def test_what_is_beyond_the_threshold_fails(dtype: str, times: float, passes: bool) -> None:
    generator = torch.Generator().manual_seed(1)
    exact = [torch.randn(9, 50, generator=generator) for _ in range(16)]
    error = [0.01 * torch.randn(9, 50, generator=generator) for _ in exact]
    own = [e + d for e, d in zip(exact, error, strict=True)]
    other = torch.stack([e + times * d for e, d in zip(exact, error, strict=True)])
    gate, ratios = hold_dtype(
        "gpu", dtype, THRESHOLDS[dtype], [exact, exact], [own, own], [other, other]
    )
    bounds = {"bfloat16": 1.1, "fp8 tensorwise": 1.5, "fp8 blockwise": 1.2}
    assert gate.passed == passes and gate.threshold == bounds[dtype]
    assert len(ratios) == 16
    assert ("own with its products rounded so" in gate.statistic) == (dtype != "bfloat16")
    assert ("the first beyond it: layer 0" in gate.detail) != passes


@pytest.mark.parametrize(("worst", "passes"), [(3.2, True), (3.5, False), (float("nan"), False)])
def test_one_part_of_the_long_sequence_is_enough_to_fail(worst: float, passes: bool) -> None:
    exact = [torch.ones(9, 50) for _ in range(16)]
    own = [each * 1.01 for each in exact]
    gate, _ = hold_dtype(
        "gpu",
        "bfloat16 on a GPU",
        1.1,
        [exact],
        [own],
        [torch.stack(own)],
        [[1.0, worst, 1.0, 0.9]],
    )
    assert gate.passed == passes
    assert f"{worst:.3g} of the worst part of a long one" in gate.detail


@pytest.mark.parametrize(
    ("said", "last"),
    [
        ("", "nothing"),
        ("building\n\nloading\n", "loading"),
        (
            "[rank0]: torch.OutOfMemoryError: first\n[rank0]: During handling of the exception\n"
            "[rank0]: RuntimeError: the reason\n[rank0]:[W1127 ProcessGroupNCCL.cpp] Warning: bye\n",
            "RuntimeError: the reason",
        ),
    ],
)
def test_an_error_is_told_and_not_the_warning_after_it(said: str, last: str) -> None:
    assert last_error(said) == last


def test_what_was_not_computed_is_no_gate() -> None:
    weights: Any = None
    assert hold_dtypes(RANKS, weights) == ([], {})


@pytest.mark.parametrize(("cpus", "threads"), [(64, 8), (6, 6)])
def test_the_last_rank_goes_on_alone_with_its_nodes_threads(
    monkeypatch: pytest.MonkeyPatch, cpus: int, threads: int
) -> None:
    """Of 4 ranks with 2 threads each; not with those of other nodes, nor with more than it has CPUs."""
    before = torch.get_num_threads()
    for name, value in {**ALONE, "LOCAL_WORLD_SIZE": "4"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(cpus)))
    try:
        join()
        torch.set_num_threads(2)
        leave()
        assert torch.get_num_threads() == threads
        assert {name: os.environ[name] for name in ALONE} == ALONE
    finally:
        torch.set_num_threads(before)
