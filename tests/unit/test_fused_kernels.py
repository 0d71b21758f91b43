"""What training on a GPU has of its own, as far as a machine without one can tell."""

import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from megatron.core.transformer.moe.moe_layer import MoELayer

from commands import ROOT, write_config
from megaqwen import training
from megaqwen.config import load_config
from megaqwen.errors import InputError
from megaqwen.training import model
from megaqwen.training.arguments import NEED_GPU, cpu_options, gpu_options
from megaqwen.training.fused_kernels import add_weight_gradient
from megaqwen.training.fused_sequences import wait_for_parameters


def test_split_norm_rotate_is_the_arithmetic_step_by_step() -> None:
    """By Triton's interpreter: outputs, the product's gradient and the norms'."""
    done = subprocess.run(
        [sys.executable, ROOT / "tests" / "split_norm_rotate.py"],
        env={**os.environ, "CUDA_VISIBLE_DEVICES": "", "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    errors = re.findall(r"norm (True|False): (\S+)", done.stdout)
    assert {norm for norm, _ in errors} == {"True", "False"}
    assert all(0 < float(error) < 1e-5 for _, error in errors), done.stdout


def test_weight_gradients_are_added_to_what_is_there() -> None:
    inputs, gradients, total = torch.randn(5, 3), torch.randn(5, 4), torch.randn(4, 3)
    expected = total + gradients.T @ inputs
    add_weight_gradient(inputs, gradients, total)
    torch.testing.assert_close(total, expected)


DENSE: dict[str, Any] = {"num_layers": 2}


@pytest.mark.parametrize(
    ("chosen", "architecture", "fused"),
    [
        ({}, DENSE, True),
        ({"fp8": "hybrid", "fp8_recipe": "tensorwise"}, DENSE, True),
        ({"fp8": "hybrid"}, DENSE, False),  # delayed
        ({"tensor_model_parallel_size": 2}, DENSE, False),
        ({"use_distributed_optimizer": True, "overlap_param_gather": True}, DENSE, True),
        ({"cuda_graph_impl": "local"}, DENSE, False),
        ({}, {"num_experts": 8}, False),
    ],
)
def test_fused_sequences_are_the_default_where_they_are_whole(
    chosen: dict[str, Any], architecture: dict[str, Any], fused: bool
) -> None:
    options = gpu_options(chosen, architecture)
    assert options.get("use_transformer_engine_op_fuser", False) is fused


def test_scales_of_weights_in_fp8_are_loaded_before_the_weights() -> None:
    weights = {"fp8": "hybrid", "fp8_param_gather": True}
    assert gpu_options(weights, DENSE)["stream_ckpt_dequant"] is False
    assert "stream_ckpt_dequant" not in gpu_options({"fp8": "hybrid"}, DENSE)
    by_block = gpu_options({**weights, "fp8_recipe": "blockwise"}, DENSE)
    assert "stream_ckpt_dequant" not in by_block


@pytest.mark.parametrize("name", NEED_GPU)
def test_what_a_gpu_alone_can_do_is_refused_without_one(name: str, tmp_path: Path) -> None:
    train = yaml.safe_load((ROOT / "config" / "config.yaml").read_text())["train"]
    config = write_config(tmp_path / "config.yaml", train={**train, name: True})
    with pytest.raises(InputError, match=rf"{name} needs a GPU"):
        cpu_options(load_config(config).train)


@pytest.mark.parametrize("experts", [False, True])
def test_dense_mlps_may_have_swiglu_within_their_products(
    monkeypatch: pytest.MonkeyPatch, experts: bool
) -> None:
    """What installs it needs Transformer Engine, which only a machine with a GPU has."""
    installed: list[bool] = []
    stub = SimpleNamespace(install=lambda: installed.append(True))
    monkeypatch.setattr(training, "swiglu_mlp", stub, raising=False)
    monkeypatch.setattr(model, "fused_sequences", stub)
    monkeypatch.setattr(model, "get_mlp_module_spec_for_backend", lambda *given, **named: named)
    mlp = SimpleNamespace(func=MoELayer) if experts else SimpleNamespace()
    layer: Any = SimpleNamespace(submodules=SimpleNamespace(mlp=mlp))
    model.fuse_dense_mlp(layer)
    assert installed == ([] if experts else [True, True])
    assert layer.submodules.mlp == (mlp if experts else {"use_te_op_fuser": True})


def test_a_fused_sequence_waits_for_the_parameters_of_its_layer() -> None:
    """As Megatron has it with overlap_param_gather: no hook at first, nor while it evaluates."""
    layer = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2))
    sequence = torch.nn.Identity()
    wait_for_parameters(layer, sequence)
    waited: list[torch.nn.Module] = []

    def wait(module: torch.nn.Module, inputs: Any) -> None:
        waited.append(module)

    sequence(torch.ones(2))
    assert waited == []
    hooks = [module.register_forward_pre_hook(wait) for module in layer.modules()]
    sequence(torch.ones(2))
    assert waited == [layer, *layer]
    for hook in hooks:
        hook.remove()
    sequence(torch.ones(2))
    assert waited == [layer, *layer]
