"""The gates that take ranks: every layout passes, and each mistake fails its gate and no other."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from rank_mistakes import MISTAKES, Mistake

from commands import write_config
from megaqwen.weights import convert_to_megatron
from small_models import MODELS, make_model
from workspace import OPTIONS

pytestmark = pytest.mark.slow
RANKS = 4
TENSOR = {"tensor_model_parallel_size": 2, "sequence_parallel": True}
PIPELINE = {"pipeline_model_parallel_size": 2}
VIRTUAL = {**PIPELINE, "num_virtual_stages_per_pipeline_rank": 2}
SHARDED = {"use_distributed_optimizer": True}
EXPERT = {"expert_model_parallel_size": 2, "moe_token_dispatcher_type": "alltoall"}
BFLOAT16 = {"bf16": True}
# Steps large enough that a decay shows.
SCHEDULE = {"lr_warmup_iters": 2, "train_iters": 20, "save_interval": 20, "eval_interval": 20}
LAYOUTS: dict[str, tuple[str, dict[str, Any]]] = {
    "data": ("qwen2", SHARDED),
    "tensor": ("qwen2", {**TENSOR, **BFLOAT16}),
    "tensor, pipeline": ("qwen3", {**TENSOR, **PIPELINE, **BFLOAT16}),
    "virtual stages": ("qwen3", {**VIRTUAL, **SHARDED}),
    "expert": ("qwen3_moe", {**EXPERT, **SHARDED, **BFLOAT16}),
    "expert, pipeline": ("qwen2_moe", {**EXPERT, **PIPELINE}),
    "expert, tensor": ("qwen2_moe", {**EXPERT, **TENSOR, "expert_tensor_parallel_size": 1}),
}
WITH_MISTAKES = "tensor"
Rows = dict[tuple[str, str], dict[str, dict[str, Any]]]


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Rows:
    """The gates of every layout and mistake, by one start of the ranks."""
    directory = tmp_path_factory.mktemp("ranks")
    for model in {model for model, _ in LAYOUTS.values()}:
        make_model(directory / model / "hf", MODELS[model])
        (directory / model / "megatron").mkdir()
        convert_to_megatron(directory / model / "hf", directory / model / "megatron")
    jobs = []
    for number, (name, (model, options)) in enumerate(LAYOUTS.items()):
        config = directory / f"{number}.yaml"
        tiny = {"source": "tiny", "architecture": model}
        write_config(config, train={**OPTIONS, **SCHEDULE, **options}, model=tiny)
        mistakes = [mistake.name for mistake in MISTAKES] if name == WITH_MISTAKES else []
        paths = {"model": directory / model / "hf", "checkpoint": directory / model / "megatron"}
        words = {key: str(path) for key, path in {**paths, "config": config}.items()}
        jobs.append({"name": name, "mistakes": mistakes, **words})
    (directory / "jobs.json").write_text(json.dumps(jobs))
    command: list[str | Path] = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", str(RANKS), Path(__file__).with_name("rank_mistakes.py")]
    command += [directory / "jobs.json", directory / "rows.json"]
    with open(directory / "log", "w") as log:
        ranks = subprocess.Popen(
            command,
            env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
            stdout=log,
            stderr=subprocess.STDOUT,
        )
        try:
            returned = ranks.wait(timeout=900)
        finally:
            ranks.terminate()  # which ends its ranks; killed, it would leave them
    assert returned == 0, (directory / "log").read_text()[-20_000:]
    found = json.loads((directory / "rows.json").read_text())
    return {
        (row["job"], row["mistake"]): {gate["name"]: gate for gate in row["gates"]} for row in found
    }


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_healthy_layout_passes(rows: Rows, layout: str) -> None:
    gates = rows[layout, "healthy"]
    measured = {"layout", "gradients", "trajectory", "losses", "copies"}
    assert gates.keys() == measured | ({"dtype"} if "bf16" in LAYOUTS[layout][1] else set())
    assert [gate for gate in gates.values() if not gate["passed"]] == []
    assert gates["gradients"]["value"] > 0  # something was compared
    assert gates["trajectory"]["value"] > 0


@pytest.mark.parametrize("mistake", MISTAKES, ids=lambda mistake: mistake.name)
def test_a_mistake_fails_its_gate_and_no_other(rows: Rows, mistake: Mistake) -> None:
    gates = rows[WITH_MISTAKES, mistake.name]
    failed = {name for name, gate in gates.items() if not gate["passed"]}
    assert set(mistake.gates) <= failed <= {*mistake.gates, *mistake.also}, gates
    assert mistake.worst in gates[mistake.gates[0]]["detail"]
