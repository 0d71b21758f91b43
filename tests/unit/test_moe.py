"""Each architecture computes in Megatron what it computes in transformers, at every position.

In float32, with tiny random models. That the comparison would see a mistake is tested too: with one
option changed, the logits have to differ.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from commands import ROOT
from megaqwen.config import load_config
from megaqwen.training.arguments import RunPaths, training_options
from megaqwen.weights import MegatronWeights, convert_to_megatron, find_checkpoint
from megaqwen.weights.mapping import Place
from small_models import MODELS, make_model

BOUND = 1e-4  # of |difference| of two logits
SEEN = 1e-2  # what a mistake comes to, at least
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0}
YARN |= {"original_max_position_embeddings": 16}
WITHOUT_THETA = {key: value for key, value in MODELS["qwen3"].items() if key != "rope_theta"}

CASES: dict[str, dict[str, Any]] = {
    **MODELS,
    "qwen2_moe: every second layer, scaled, no bias": {
        **MODELS["qwen2_moe"],
        "decoder_sparse_step": 2,
        "mlp_only_layers": [],
        "norm_topk_prob": True,
        "qkv_bias": False,
    },
    "qwen2_moe: experts in all layers": {**MODELS["qwen2_moe"], "mlp_only_layers": []},
    "qwen3_moe: tied, not scaled, one expert a token": {
        **MODELS["qwen3_moe"],
        "tie_word_embeddings": True,
        "norm_topk_prob": False,
        "num_experts_per_tok": 1,
    },
    "qwen3_moe: dense layers first and last": {**MODELS["qwen3_moe"], "mlp_only_layers": [0, 3]},
    # YaRN: all but the first 16 of 64 positions lie beyond the original ones.
    "yarn": {**WITHOUT_THETA, "rope_parameters": YARN},
    "yarn: older spelling": {
        **MODELS["qwen2"],
        "rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16},
    },
    "yarn: betas, range, attention factor": {
        **WITHOUT_THETA,
        "head_dim": 24,
        "rope_parameters": {
            **YARN,
            "beta_fast": 1.2,
            "beta_slow": 0.05,
            "truncate": False,
            "attention_factor": 1.3,
        },
    },
    "yarn: mscale, with experts": {
        **{key: value for key, value in MODELS["qwen2_moe"].items() if key != "rope_theta"},
        "rope_parameters": {**YARN, "mscale": 1.5, "mscale_all_dim": 0.7},
    },
}
# One option of Megatron's that a model's logits must depend on.
MISTAKES: list[tuple[str, dict[str, Any]]] = [
    ("qwen2_moe", {"moe_router_pre_softmax": False}),
    ("qwen2_moe", {"moe_router_topk": 3}),
    ("qwen2_moe", {"moe_shared_expert_gate": False}),
    ("qwen3_moe", {"moe_router_pre_softmax": True}),
    ("yarn", {"position_embedding_type": "rope"}),
    ("yarn", {"rotary_scaling_factor": 3.9}),
    ("yarn: betas, range, attention factor", {"yarn_beta_fast": 5.0}),
    ("yarn: betas, range, attention factor", {"yarn_correction_range_round_to_int": True}),
    ("yarn: betas, range, attention factor", {"mscale": 1.0}),
]


def job(directory: Path, name: str, change: dict[str, Any]) -> dict[str, Any]:
    folder = directory / str(list(CASES).index(name))
    return {"model": f"{folder}/hf", "checkpoint": f"{folder}/megatron", "change": change}


@pytest.fixture(scope="module")
def compared(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """All cases, then all mistakes, by one process."""
    directory = tmp_path_factory.mktemp("logits")
    for number, facts in enumerate(CASES.values()):
        model, checkpoint = directory / f"{number}/hf", directory / f"{number}/megatron"
        make_model(model, facts)
        checkpoint.mkdir()
        convert_to_megatron(model, checkpoint)
    jobs = [job(directory, name, {}) for name in CASES]
    jobs += [job(directory, name, change) for name, change in MISTAKES]
    (directory / "jobs.json").write_text(json.dumps(jobs))
    done = subprocess.run(
        [sys.executable, ROOT / "tests" / "compare_logits.py", directory / "jobs.json"],
        env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-5000:]
    results: list[dict[str, Any]] = json.loads(done.stdout.splitlines()[-1])
    return results


@pytest.mark.parametrize("number", range(len(CASES)), ids=list(CASES))
def test_logits_are_those_of_transformers(compared: list[dict[str, Any]], number: int) -> None:
    result = compared[number]
    assert len(result["difference"]) == 64
    assert max(result["difference"]) < BOUND
    assert result["largest"] > 1


@pytest.mark.parametrize("number", range(len(MISTAKES)), ids=[str(each) for each in MISTAKES])
def test_a_mistake_would_be_seen(compared: list[dict[str, Any]], number: int) -> None:
    assert max(compared[len(CASES) + number]["difference"]) > SEEN


@pytest.mark.parametrize("gpu", [True, False])
def test_yarn_is_trained_without_the_fused_kernel(gpu: bool) -> None:
    """Which scales nothing by the attention factor: with packed sequences silently."""
    paths = RunPaths(pretrained=Path("a"), checkpoints=Path("b"), tensorboard=Path("c"))
    config = load_config(ROOT / "config" / "config.yaml")
    assert training_options(config, CASES["yarn"], paths, gpu=gpu)["apply_rope_fusion"] is False
    plain = training_options(config, CASES["qwen3"], paths, gpu=gpu)
    assert plain.get("apply_rope_fusion", True) is gpu


def test_objects_of_two_axes_are_named_as_megatron_names_them() -> None:
    """Transformer Engine asks for its state by such names, one for each expert of each layer."""
    from megatron.core.dist_checkpointing.mapping import ShardedObject

    ours = Place(key="a._extra_state", position=(3, 7), lengths=(4, 8)).object_key
    assert ours == ShardedObject("a._extra_state", None, (4, 8), (3, 7)).unique_key
    ours = Place(key="b._extra_state").object_key
    assert ours == ShardedObject("b._extra_state", None, (1,), (0,)).unique_key


def keys_of(tmp_path: Path, facts: dict[str, Any]) -> dict[str, list[int]]:
    make_model(tmp_path / "hf", facts)
    (tmp_path / "megatron").mkdir()
    convert_to_megatron(tmp_path / "hf", tmp_path / "megatron")
    weights = MegatronWeights(find_checkpoint(tmp_path / "megatron"))
    return {
        key: list(stored.size) if isinstance(stored, TensorStorageMetadata) else []
        for key, stored in weights.tensors.items()
    }


def test_layers_of_one_kind_are_stacked_as_megatron_stacks_them(tmp_path: Path) -> None:
    """Keys and shapes as Megatron's own sharded_state_dict has them, for both kinds of layers."""
    keys = keys_of(tmp_path, MODELS["qwen3_moe"])
    tensors = {key: size for key, size in keys.items() if size and ".self_attention." not in key}
    assert tensors == {
        "embedding.word_embeddings.weight": [251, 48],
        "decoder.layers.pre_mlp_layernorm.weight": [4, 48],  # Transformer Engine's, and ours
        "decoder.layers.mlp.linear_fc1.layer_norm_weight": [4, 48],  # Megatron's local layers
        "decoder.layers.mlp.router.weight": [4, 8, 48],
        "decoder.layers.mlp.experts.experts.linear_fc1.weight": [4, 8, 64, 48],
        "decoder.layers.mlp.experts.experts.linear_fc2.weight": [4, 8, 48, 32],
        "decoder.final_layernorm.weight": [48],
        "output_layer.weight": [251, 48],
    }
    states = [key for key in keys if "_extra_state" in key]
    assert "decoder.layers.mlp.experts.experts.linear_fc1._extra_state/shard_3.7_4.8" in states
    assert "decoder.layers.pre_mlp_layernorm._extra_state/shard_0_4" in states
    # 5 modules of attention and the norm in each layer, 2 in each expert, and the last norm
    assert len(states) == 4 * (5 + 1 + 2 * 8) + 1


def test_layers_of_two_kinds_are_numbered(tmp_path: Path) -> None:
    keys = keys_of(tmp_path, MODELS["qwen2_moe"])
    layer = {key: size for key, size in keys.items() if key.startswith("decoder.layers.0.mlp.")}
    assert {key: size for key, size in layer.items() if size} == {
        "decoder.layers.0.mlp.linear_fc1.layer_norm_weight": [48],
        "decoder.layers.0.mlp.router.weight": [8, 48],
        "decoder.layers.0.mlp.shared_experts.linear_fc1.weight": [48, 48],
        "decoder.layers.0.mlp.shared_experts.linear_fc2.weight": [48, 24],
        "decoder.layers.0.mlp.shared_experts.gate_weight": [1, 48],
        "decoder.layers.0.mlp.experts.experts.linear_fc1.weight": [8, 64, 48],
        "decoder.layers.0.mlp.experts.experts.linear_fc2.weight": [8, 48, 32],
    }
    assert "decoder.layers.0.mlp.experts.experts.linear_fc2._extra_state/shard_7_8" in layer
    assert "decoder.layers.0.mlp.shared_experts.linear_fc1._extra_state/shard_0_1" in layer
    assert keys["decoder.layers.0.pre_mlp_layernorm.weight"] == [48]
    assert keys["decoder.layers.1.mlp.linear_fc1.weight"] == [128, 48]
    assert "decoder.layers.1.pre_mlp_layernorm.weight" not in keys
    assert not any(key.startswith("decoder.layers.self_attention") for key in keys)
    assert torch.Size(keys["decoder.layers.3.self_attention.linear_qkv.bias"]).numel() == 96
