"""Every parallel mode that a machine without a GPU has: its losses are those of one rank.

Four ranks train a small model through Megatron's `pretrain` under one layout after another, one rank
does it alone, and the curves are held against each other. Ranks that a layout leaves are data parallel.
ALL_LAYOUTS=1 in the environment adds those that the suite has no time for.
"""

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

from commands import start_ranks
from megaqwen.provenance import read_json
from megaqwen.weights import convert_to_megatron
from small_models import MODELS, make_model
from workspace import BUCKETS

RANKS = 4
SECONDS = 2400  # for all layouts, on a loaded machine; a tenth of it is usual
BOUND = {"float32": 1e-5, "bfloat16": 2e-3}  # of the relative difference; found: 1e-7 and 1e-4
TRAIN: dict[str, Any] = {
    "seq_length": 32,
    "micro_batch_size": 1,
    "global_batch_size": 8,
    "train_iters": 4,
    "lr": 1e-3,
    "min_lr": 1e-4,
    "lr_decay_style": "cosine",
    "lr_warmup_iters": 1,
    "weight_decay": 0.1,
    "clip_grad": 1.0,
    "seed": 1234,
    "bf16": False,
    "save_interval": 4,
    "eval_interval": 4,
    "eval_iters": 0,
    "log_interval": 1,
    "num_workers": 0,
}
TENSOR, PIPELINE = "tensor_model_parallel_size", "pipeline_model_parallel_size"
EXPERT, EXPERT_TENSOR = "expert_model_parallel_size", "expert_tensor_parallel_size"
SEQUENCE = {"sequence_parallel": True}
DISTRIBUTED = {"use_distributed_optimizer": True}
VIRTUAL = "num_virtual_stages_per_pipeline_rank"


def selective(*modules: str) -> dict[str, Any]:
    return {"recompute_granularity": "selective", "recompute_modules": list(modules)}


def full(method: str, **settings: Any) -> dict[str, Any]:
    return {
        "recompute_granularity": "full",
        "recompute_method": method,
        "recompute_num_layers": 1,
        **settings,
    }


ANY: dict[str, dict[str, Any]] = {
    "dp4": {},
    "dp4-micro2": {"micro_batch_size": 2},
    "dp4-distributed-optimizer": DISTRIBUTED,
    "dp4-overlap": BUCKETS,
    "dp4-overlap-reduce": {"overlap_grad_reduce": True},
    "tp2-sp": {TENSOR: 2, **SEQUENCE},
    "tp4-sp": {TENSOR: 4, **SEQUENCE},
    "pp2": {PIPELINE: 2},
    "pp4": {PIPELINE: 4},
    "pp2-uneven": {PIPELINE: 2, "decoder_first_pipeline_num_layers": 1},
    "pp2-vpp2": {PIPELINE: 2, VIRTUAL: 2},
    "pp2-vpp2-distributed-optimizer": {PIPELINE: 2, VIRTUAL: 2, **BUCKETS},
    "tp2-sp-pp2": {TENSOR: 2, **SEQUENCE, PIPELINE: 2},
    "tp2-sp-distributed-optimizer": {TENSOR: 2, **SEQUENCE, **BUCKETS},
    "recompute-attention": selective("core_attn"),
    "recompute-mlp": selective("mlp"),
    "recompute-full-uniform-tp2-sp": full("uniform", **{TENSOR: 2}, **SEQUENCE),
    "recompute-full-block-pp2": full("block", **{PIPELINE: 2}),
}
DENSE: dict[str, dict[str, Any]] = {
    "tp2": {TENSOR: 2},
    "tp4": {TENSOR: 4},
    "tp2-pp2": {TENSOR: 2, PIPELINE: 2},
    "recompute-distributed-tp2": full("uniform", **{TENSOR: 2}, distribute_saved_activations=True),
}
EXPERTS: dict[str, dict[str, Any]] = {
    "ep2": {EXPERT: 2},
    "ep4": {EXPERT: 4},
    "ep2-alltoall": {EXPERT: 2, "moe_token_dispatcher_type": "alltoall"},
    "ep2-distributed-optimizer": {EXPERT: 2, **BUCKETS},
    "ep2-tp2-sp": {EXPERT: 2, TENSOR: 2, **SEQUENCE},
    "ep2-tp2-sp-etp1": {EXPERT: 2, TENSOR: 2, **SEQUENCE, EXPERT_TENSOR: 1},
    "ep1-tp2-sp-etp2": {TENSOR: 2, **SEQUENCE, EXPERT_TENSOR: 2},
    "ep2-pp2": {EXPERT: 2, PIPELINE: 2},
    "recompute-experts": selective("moe"),
}
SHARED = {"recompute-shared-experts": selective("shared_experts")}
BF16 = {"bf16": True}
FEW = ("dp4-distributed-optimizer", "tp2-sp", "pp2-vpp2")
LAYOUTS: dict[str, dict[str, dict[str, Any]]] = {
    "qwen2": ANY | DENSE | {f"{name}-bf16": {**ANY[name], **BF16} for name in FEW},
    "qwen3": {name: ANY[name] for name in ("tp4-sp", "pp4", "pp2-vpp2")},
    "qwen2_moe": EXPERTS | SHARED | {name: ANY[name] for name in ("tp2-sp", "pp2-vpp2")},
    "qwen3_moe": {name: EXPERTS[name] for name in ("ep2", "ep2-tp2-sp-etp1", "ep2-pp2")},
}
SUITE = {
    "qwen2": [
        *("dp4-overlap", "tp2-sp-pp2", "pp2-uneven", "pp2-vpp2-distributed-optimizer", "tp4"),
        *("recompute-mlp", "recompute-full-block-pp2", "recompute-distributed-tp2"),
        *("dp4-distributed-optimizer-bf16", "tp2-sp-bf16"),
    ],
    "qwen3": ["tp4-sp", "pp4"],
    "qwen2_moe": ["ep4", "ep2-tp2-sp", "recompute-experts", "recompute-shared-experts", "pp2-vpp2"],
    "qwen3_moe": ["ep2", "ep2-tp2-sp-etp1", "ep2-pp2"],
}
if not os.environ.get("ALL_LAYOUTS"):
    LAYOUTS = {
        model: {name: LAYOUTS[model][name] for name in names} for model, names in SUITE.items()
    }


def write_corpus(prefix: Path) -> None:
    """Sixty documents of tokens that follow a rule, which ends with token 0."""
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=numpy.uint16)
    for number in range(60):
        tokens = torch.tensor([*(1 + (number * 7 + 3 * i) % 250 for i in range(50)), 0])
        builder.add_document(tokens, [len(tokens)])
    builder.finalize(f"{prefix}.idx")


def launch(directory: Path, ranks: int, jobs: dict[str, Any]) -> subprocess.Popen[bytes]:
    """Start the ranks that do these jobs."""
    jobs = {**jobs, "losses": str(directory / f"losses-{ranks}.json")}
    told = directory / f"jobs-{ranks}.json"
    told.write_text(json.dumps(jobs))
    program, log = Path(__file__).with_name("train_layouts.py"), directory / f"log-{ranks}"
    return start_ranks(program, ranks, told, log=log, CUDA_DEVICE_MAX_CONNECTIONS="1")


def converted(directory: Path, model: str) -> dict[str, Any]:
    """A small model with random weights, and where Megatron finds them."""
    hf, megatron = directory / model / "hf", directory / model / "megatron"
    megatron.mkdir(parents=True)
    make_model(hf, {**MODELS[model], "vocab_size": 256})
    convert_to_megatron(hf, megatron)
    return {"hf_config": read_json(hf / "config.json"), "checkpoint": str(megatron)}


Curves = dict[str, dict[str, Any]]


@pytest.fixture(scope="module")
def curves(tmp_path_factory: pytest.TempPathFactory) -> tuple[Curves, Curves]:
    """By model the losses: of four ranks by layout, and of one rank by dtype."""
    directory = tmp_path_factory.mktemp("layouts")
    write_corpus(directory / "corpus")
    jobs = {
        "models": {model: converted(directory, model) for model in LAYOUTS},
        "data": str(directory / "corpus"),
    }
    shared_out = {
        model: {name: {**TRAIN, **options} for name, options in layouts.items()}
        for model, layouts in LAYOUTS.items()
    }
    still = {**TRAIN, "lr": 1e-12, "min_lr": 0.0}
    alone = {model: {"float32": TRAIN, "untrained": still} for model in LAYOUTS}
    alone["qwen2"]["bfloat16"] = {**TRAIN, **BF16}
    started = [
        launch(directory, 1, {**jobs, "layouts": alone}),
        launch(directory, RANKS, {**jobs, "layouts": shared_out}),
    ]
    try:
        codes = [process.wait(timeout=SECONDS) for process in started]
    finally:
        for process in started:
            process.terminate()  # which ends its ranks; killed, it would leave them
    logs = (directory / "log-1").read_text() + (directory / f"log-{RANKS}").read_text()
    assert codes == [0, 0], logs[-20_000:]
    return read_json(directory / f"losses-{RANKS}.json"), read_json(directory / "losses-1.json")


def relative(curve: list[float], expected: list[float]) -> float:
    """The largest difference of losses, relative to what is expected."""
    return max(abs(a - b) / b for a, b in zip(curve, expected, strict=True))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model", "layout"), [(model, name) for model, names in LAYOUTS.items() for name in names]
)
def test_a_layout_has_the_losses_of_one_rank(
    curves: tuple[Curves, Curves], model: str, layout: str
) -> None:
    by_layout, alone = curves
    dtype = "bfloat16" if layout.endswith("bf16") else "float32"
    expected, found = alone[model][dtype], by_layout[model][layout]
    assert not isinstance(found, str), found[-1500:]
    assert len(found) == len(expected) == TRAIN["train_iters"]
    # What a step changes is far more than what may differ: a wrong gradient would be seen.
    assert relative(alone[model]["untrained"], expected) > 100 * BOUND["float32"]
    worst = relative(found, expected)
    print(f"{model} {layout}: {worst:.1e}")
    assert worst <= BOUND[dtype], f"{found} for {expected}"
