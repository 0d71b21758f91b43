"""The gates that take ranks: every layout passes, and each mistake fails its gate and no other.

ALL_LAYOUTS=1 in the environment adds the layouts and mistakes that the suite has no time for.
"""

import json
import os
from pathlib import Path
from typing import Any

import pytest
from rank_mistakes import LAYER_OF_TIES, MISTAKES, TIES, Mistake

from commands import start_ranks, wait_for_ranks, write_config
from megaqwen.weights import convert_to_megatron
from small_models import MODELS, make_model
from tied_experts import tie_experts_of
from workspace import OPTIONS

pytestmark = pytest.mark.slow
TENSOR = {"tensor_model_parallel_size": 2, "sequence_parallel": True}
PIPELINE = {"pipeline_model_parallel_size": 2}
VIRTUAL = {**PIPELINE, "num_virtual_stages_per_pipeline_rank": 2}
SHARDED = {"use_distributed_optimizer": True}
EXPERT = {"expert_model_parallel_size": 2, "moe_token_dispatcher_type": "alltoall"}
BFLOAT16 = {"bf16": True}
# Steps large enough that a decay shows.
SCHEDULE = {"lr_warmup_iters": 2, "train_iters": 20, "save_interval": 20, "eval_interval": 20}
WITH_TIES = "expert"
LAYOUTS: dict[int, dict[str, tuple[str, dict[str, Any]]]] = {
    2: {
        "tensor": ("qwen2", {**TENSOR, **BFLOAT16}),
        "virtual stages": ("qwen3", {**VIRTUAL, **SHARDED, **BFLOAT16}),
        WITH_TIES: ("tied experts", {**EXPERT, **SHARDED, **BFLOAT16}),
        "padded": ("padded", TENSOR),
    }
}
MADE = [mistake for mistake in MISTAKES if not mistake.milder]
if os.environ.get("ALL_LAYOUTS"):
    MADE = MISTAKES
    LAYOUTS[2] |= {
        "data": ("qwen2", SHARDED),
        "expert, tensor": (
            "qwen2_moe",
            {**EXPERT, **TENSOR, **BFLOAT16, "expert_tensor_parallel_size": 1},
        ),
    }
    LAYOUTS[4] = {"tensor, pipeline": ("qwen3", {**TENSOR, **PIPELINE, **BFLOAT16})}
OPTIONS_OF = {name: options for each in LAYOUTS.values() for name, (_, options) in each.items()}
HEALTHY = [name for name in OPTIONS_OF if name != "padded"]
WITH_MISTAKES = "tensor"
Rows = dict[tuple[str, str], dict[str, dict[str, Any]]]


def facts(model: str) -> dict[str, Any]:
    """Of a model whose vocabulary every tensor parallel size here divides; or that none does."""
    if model == "padded":
        return MODELS["qwen2"]
    model = "qwen3_moe" if model == "tied experts" else model
    return {**MODELS[model], "vocab_size": 252}


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Rows:
    """The gates of every layout and mistake, by one start of each number of ranks."""
    directory = tmp_path_factory.mktemp("ranks")
    for model in {model for each in LAYOUTS.values() for model, _ in each.values()}:
        make_model(directory / model / "hf", facts(model))
        if model == "tied experts":
            tie_experts_of(directory / model / "hf", LAYER_OF_TIES)
        (directory / model / "megatron").mkdir()
        convert_to_megatron(directory / model / "hf", directory / model / "megatron")
    found = [row for ranks in LAYOUTS for row in measured_on(ranks, directory)]
    return {
        (row["job"], row["mistake"]): {gate["name"]: gate for gate in row["gates"]} for row in found
    }


def measured_on(ranks: int, directory: Path) -> list[dict[str, Any]]:
    """What one start of the ranks measures."""
    jobs = []
    for name, (model, options) in LAYOUTS[ranks].items():
        tiny = {"source": "tiny", "architecture": facts(model)["model_type"]}
        path = directory / f"{name.replace(', ', '-').replace(' ', '-')}.yaml"
        config = write_config(path, train={**OPTIONS, **SCHEDULE, **options}, model=tiny)
        mistakes = [mistake.name for mistake in MADE] if name == WITH_MISTAKES else []
        mistakes += [TIES.name] if name == WITH_TIES else []
        paths = {"model": directory / model / "hf", "checkpoint": directory / model / "megatron"}
        words = {key: str(path) for key, path in {**paths, "config": config}.items()}
        jobs.append({"name": name, "mistakes": mistakes, **words})
    told, output, log = (directory / f"{ranks}.{kind}" for kind in ("jobs", "rows", "log"))
    told.write_text(json.dumps(jobs))
    program = Path(__file__).with_name("try_rank_mistakes.py")
    process = start_ranks(program, ranks, told, output, log=log, CUDA_VISIBLE_DEVICES="")
    wait_for_ranks(process, log, 900)
    rows: list[dict[str, Any]] = json.loads(output.read_text())
    return rows


@pytest.mark.parametrize("layout", HEALTHY)
def test_a_healthy_layout_passes(rows: Rows, layout: str) -> None:
    gates = rows[layout, "healthy"]
    measured = {"layout", "gradients", "trajectory", "losses", "copies"}
    assert gates.keys() == measured | ({"dtype"} if "bf16" in OPTIONS_OF[layout] else set())
    assert [gate for gate in gates.values() if not gate["passed"]] == []
    assert gates["gradients"]["value"] > 0  # something was compared
    assert gates["trajectory"]["value"] > 0


def test_experts_that_tie_may_be_chosen_otherwise(rows: Rows) -> None:
    assert [gate for gate in rows[WITH_TIES, TIES.name].values() if not gate["passed"]] == []


@pytest.mark.parametrize("mistake", MADE, ids=lambda mistake: mistake.name)
def test_a_mistake_fails_its_gate_and_no_other(rows: Rows, mistake: Mistake) -> None:
    gates = rows[WITH_MISTAKES, mistake.name]
    failed = {name for name, gate in gates.items() if not gate["passed"]}
    assert set(mistake.gates) <= failed <= {*mistake.gates, *mistake.also}, gates
    assert mistake.worst in gates[mistake.gates[0]]["detail"]


def test_a_padded_vocabulary_is_no_other_model_but_another_training(rows: Rows) -> None:
    gates = rows["padded", "healthy"]
    failed = [name for name, gate in gates.items() if not gate["passed"]]
    assert failed == ["gradients", "trajectory", "losses"]
    for name in failed:
        assert "softmax runs over 1 row(s) that pad the vocabulary" in gates[name]["detail"]
