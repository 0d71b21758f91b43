"""The process that computes on a GPU: here it does so on the CPU, or says why it does not."""

import os
import shutil
from pathlib import Path

import pytest
import torch

from megaqwen.architecture import megatron_options
from megaqwen.errors import InputError
from megaqwen.parity.affordable import LONG
from megaqwen.parity.batches import IN_PART, compared_at
from megaqwen.parity.dtype_gates import hold_dtypes
from megaqwen.parity.gpu import Forwarded, forward_elsewhere, forward_options
from megaqwen.parity.megatron import recorded_options
from megaqwen.parity.on_all_ranks import FromRanks
from megaqwen.provenance import read_json, write_json
from megaqwen.training.arguments import CPU_OPTIONS, GPU_OPTIONS
from megaqwen.weights import HuggingFaceWeights, convert_to_megatron

HIDDEN = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
BATCH = torch.randint(2560, (16, 17), generator=torch.Generator().manual_seed(1))
LENGTH = 512
LONG_BATCH = torch.randint(2560, (1, LENGTH + 1), generator=torch.Generator().manual_seed(2))


def test_its_logits_are_the_models(tiny_qwen3: Path, tmp_path: Path) -> None:
    model = shutil.copytree(tiny_qwen3, tmp_path / "hf")
    config = read_json(model / "config.json")
    write_json(model / "config.json", {**config, "max_position_embeddings": LENGTH})
    convert_to_megatron(model, tmp_path)
    weights = HuggingFaceWeights(model)
    recorded = recorded_options(tmp_path, megatron_options(weights.config))
    train = {"bf16": True, "lr": 1.0}
    options = forward_options(train, recorded, tmp_path, 2560, (16, LENGTH), CPU_OPTIONS)
    both = forward_elsewhere(
        options, BATCH, LONG_BATCH, vocabulary=2560, parameters=1, rounded_to=None, variables=HIDDEN
    )
    assert isinstance(both, Forwarded) and not both.without_long
    outputs, long_outputs = both.outputs, both.long
    assert long_outputs is not None
    compared = len(compared_at(LONG_BATCH))
    assert [each.shape[:2] for each in long_outputs] == [(1, compared)] * len(outputs)
    assert outputs[-1].shape == (16, 16, 2560) and len(outputs) == recorded["num_layers"] + 1
    ranks = FromRanks(
        ranks=1,
        layout={},
        dtype="bfloat16",
        padding=0,
        batches=[BATCH],
        sampled=BATCH,
        computes_in="bfloat16",
        outputs_on_gpu=outputs,
        long=LONG_BATCH,
        long_on_gpu=long_outputs,
    )
    (gate,), ratios = hold_dtypes(ranks, weights)
    assert gate.name == "gpu" and gate.passed and gate.value > 0.5
    assert len(ratios["gpu"]) == 16
    assert all(0.7 < ratio < 1.4 for ratio in ratios[LONG])
    long_outputs[-1][:, -IN_PART:] *= 1.1
    (gate,), ratios = hold_dtypes(ranks, weights)
    assert not gate.passed and "the first beyond it: the head" in gate.detail
    assert [ratio > 3.3 for ratio in ratios[LONG]] == [False, False, False, True]
    long_outputs[-1][:, -IN_PART:] /= 1.1
    long_outputs[0][:, -IN_PART:] *= 1.1
    (gate,), _ = hold_dtypes(ranks, weights)
    assert gate.passed and "the first beyond it: layer 0" in gate.detail
    long_outputs[0][:, -IN_PART:] /= 1.1
    outputs[-1][:, :, 0] += outputs[-1].std()
    (gate,), _ = hold_dtypes(ranks, weights)
    assert not gate.passed and "the first beyond it: the head" in gate.detail


def test_it_says_why_it_cannot(tmp_path: Path) -> None:
    reason = forward_elsewhere(
        GPU_OPTIONS, BATCH, vocabulary=2560, parameters=1, rounded_to=None, variables=HIDDEN
    )
    assert reason == "torch finds no GPU that it may use"


def test_its_failure_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(
        InputError, match="exited with 1 and said last: KeyError: 'transformer_impl'"
    ):
        forward_elsewhere(
            {}, BATCH, vocabulary=2560, parameters=1, rounded_to=None, variables=HIDDEN
        )
