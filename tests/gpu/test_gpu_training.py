"""Training on a GPU with Transformer Engine: the CPU's curve, exact resumption, and the parity gates.

Skipped without a GPU: run `uv sync --extra gpu` and `uv run pytest tests/gpu` on a machine that has one.
"""

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from slow_copy import SECONDS

from megaqwen.provenance import read_json
from megaqwen.training import fused_adam_resume
from megaqwen.training.metrics import read_metrics
from workspace import (
    BUCKETS,
    Workspace,
    differing,
    forget_after,
    forget_last_evaluation,
    largest_difference,
    losses,
    prepare,
    script,
    weights,
)

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available(),
    reason="no GPU: run `uv sync --extra gpu && uv run pytest tests/gpu` on a machine that has one",
)
ON_CPU = {"CUDA_VISIBLE_DEVICES": ""}
BF16 = {"bf16": True}
LOSS_BOUND_FLOAT32, LOSS_BOUND_BF16 = 1e-3, 2e-2  # nats per token
LEVERS: dict[str, dict[str, Any]] = {
    "CUDA graphs": {"cuda_graph_impl": "transformer_engine", "cuda_graph_warmup_steps": 1},
    "precision-aware optimizer": {
        "use_distributed_optimizer": True,
        "use_precision_aware_optimizer": True,
        "exp_avg_dtype": "bf16",
        "exp_avg_sq_dtype": "bf16",
    },
    "optimizer offload": {
        "use_distributed_optimizer": True,
        "use_precision_aware_optimizer": True,
        "optimizer_cpu_offload": True,
        "optimizer_offload_fraction": 0.5,
    },
}


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    return prepare(tmp_path_factory.mktemp("gpu"))


@pytest.fixture(scope="module")
def on_cpu(workspace: Workspace) -> Path:
    return workspace.train("cpu", 1, {}, ON_CPU)


@pytest.fixture(scope="module")
def in_bf16(workspace: Workspace) -> Path:
    return workspace.train("bf16", 1, BF16)


def test_float32_follows_the_cpu(workspace: Workspace, on_cpu: Path) -> None:
    curve = losses(workspace.train("float32", 1, {}))
    difference = largest_difference(curve, losses(on_cpu))
    print(f"float32 on GPU against CPU: {difference:.2e} nats")
    assert difference < LOSS_BOUND_FLOAT32


def test_bf16_follows_the_cpu(on_cpu: Path, in_bf16: Path) -> None:
    difference = largest_difference(losses(in_bf16), losses(on_cpu))
    print(f"bf16 on GPU against float32 on CPU: {difference:.2e} nats")
    assert 0 < difference < LOSS_BOUND_BF16


def test_swiglu_is_within_the_products_of_megatron_s_mlp(
    workspace: Workspace, in_bf16: Path
) -> None:
    """What Megatron makes of the MLP is still what the fusion looks for."""
    if importlib.util.find_spec("quack") is None or torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("no H100, or no quack-kernels")
    log = (workspace.directory / "bf16.log.rank0.log").read_text()
    assert log.count("SwiGLU is within the MLPs' matrix products") == 1


def test_bf16_resumes_in_the_same_bits(workspace: Workspace, in_bf16: Path) -> None:
    expected, curve = weights(workspace, in_bf16, 4), losses(in_bf16)
    forget_after(in_bf16, 2)
    assert workspace.train("bf16", 1, BF16) == in_bf16
    log = (workspace.directory / "bf16.log.rank0.log").read_text()
    assert "resuming after iteration 2" in log
    assert losses(in_bf16) == curve
    assert differing(weights(workspace, in_bf16, 4), expected) == []


def test_what_was_stopped_before_its_last_evaluation_only_evaluates(
    workspace: Workspace, in_bf16: Path
) -> None:
    manifest = in_bf16.parents[1] / "manifest.json"
    expected = read_json(manifest)["results"]
    forget_last_evaluation(in_bf16)
    workspace.train("bf16", 1, BF16)
    found = read_json(manifest)["results"]
    assert {**found, "peak_memory_bytes": 0} == {**expected, "peak_memory_bytes": 0}


def test_saving_beside_training_saves_the_same_bits(workspace: Workspace, in_bf16: Path) -> None:
    beside = workspace.train("async", 1, {**BF16, "async_save": True})
    for iteration in (2, 4):
        saved, expected = (weights(workspace, each, iteration) for each in (beside, in_bf16))
        assert differing(saved, expected) == []


def test_training_goes_on_while_a_save_is_copied(workspace: Workspace, in_bf16: Path) -> None:
    """A copy so slow that the next iteration's gradients are there long before its end."""
    name = "slow-copy"
    slow = Path(__file__).with_name("slow_copy.py")
    script("launch.py", *workspace.launch_words(name, 1, {**BF16, "async_save": True}, slow))
    (trained,) = (workspace.directory / name / "checkpoints").iterdir()
    for iteration in (2, 4):
        saved, expected = (weights(workspace, each, iteration) for each in (trained, in_bf16))
        assert differing(saved, expected) == []
    records = read_metrics(trained / "metrics.jsonl")
    waited = {r["iteration"]: r["save_wait_seconds"] for r in records if "save_wait_seconds" in r}
    saving = [r["save_seconds"] for r in records if "save_seconds" in r]
    print(f"saves took training {saving} s, copies {waited}")
    assert list(waited) == [3]  # after the save of iteration 2; after that of 4 nothing is trained
    assert SECONDS / 2 < waited[3] < SECONDS + 2
    assert max(saving) < SECONDS


@pytest.mark.parametrize("lever", LEVERS)
def test_levers_follow_and_resume(workspace: Workspace, in_bf16: Path, lever: str) -> None:
    """With graphs bits are not compared: an iteration runs as one or not, by what came before it."""
    options, name = {**BF16, **LEVERS[lever]}, lever.replace(" ", "-")
    trained = workspace.train(name, 1, options)
    curve = losses(trained)
    difference = largest_difference(curve, losses(in_bf16))
    print(f"{lever} against bf16: {difference:.2e} nats")
    assert difference < LOSS_BOUND_BF16
    expected = weights(workspace, trained, 4)
    forget_after(trained, 2)
    workspace.train(name, 1, options)
    difference = largest_difference(losses(trained), curve)
    others = differing(weights(workspace, trained, 4), expected)
    print(f"{lever}, resumed: {difference:.2e} nats, {len(others)} tensors in other bits")
    assert difference < LOSS_BOUND_FLOAT32
    assert lever == "CUDA graphs" or others == []


def test_a_training_moves_from_cpu_to_gpu(workspace: Workspace, on_cpu: Path) -> None:
    curve = losses(on_cpu)
    forget_after(on_cpu, 2)
    workspace.train("cpu", 1, {})
    assert "resuming after iteration 2" in (workspace.directory / "cpu.log.rank0.log").read_text()
    assert largest_difference(losses(on_cpu), curve) < LOSS_BOUND_FLOAT32


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="no two GPUs")
def test_a_fused_mlp_waits_for_its_parameters(workspace: Workspace) -> None:
    """Gathered bucket by bucket while the layers before run, or all before the first of them."""
    options = {**BF16, **BUCKETS}
    before = workspace.train("before", 2, {**options, "overlap_param_gather": False})
    beside = workspace.train("beside", 2, options)
    assert losses(beside) == losses(before)
    assert differing(weights(workspace, beside, 4), weights(workspace, before, 4)) == []
    forget_after(beside, 2)
    workspace.train("beside", 2, options)
    assert differing(weights(workspace, beside, 4), weights(workspace, before, 4)) == []


def test_narrow_moments_are_saved_without_copies_in_float32() -> None:
    from transformer_engine.pytorch.optimizers import FusedAdam

    fused_adam_resume.install()
    weight = torch.nn.Parameter(torch.ones(8, dtype=torch.bfloat16, device="cuda"))
    weight.decoupled_grad = torch.ones_like(weight)
    optimizer = FusedAdam(
        [weight],
        exp_avg_dtype=torch.bfloat16,
        exp_avg_sq_dtype=torch.bfloat16,
        master_weights=True,
        use_decoupled_grad=True,
        store_param_remainders=True,
    )
    optimizer.step()
    saved, kept = optimizer.state_dict()["state"][0], optimizer.state[weight]
    assert all(saved[name] is kept[name] for name in ("exp_avg", "exp_avg_sq"))


@pytest.mark.parametrize("dtype", ["source", "float32"])
def test_what_was_trained_in_bf16_passes_the_gates(
    workspace: Workspace, in_bf16: Path, dtype: str
) -> None:
    workspace.export(f"export-{dtype}", in_bf16, BF16, dtype)
