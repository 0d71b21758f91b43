"""A wrong conversion stops the workflow before anything trains, by the name of what is wrong."""

from pathlib import Path

import pytest
from checkout import copy_repository, overlay

from megaqwen.weights import convert_to_megatron
from sabotage import SABOTAGES, sabotaged

pytestmark = pytest.mark.slow
SWAPPED = next(mistake for mistake in SABOTAGES if mistake.name == "gate and up swapped")


def test_a_wrong_checkpoint_is_not_trained_on(tmp_path: Path) -> None:
    checkout = copy_repository(tmp_path / "checkout")
    small = overlay(
        checkout,
        "small.yaml",
        train={
            "tensor_model_parallel_size": 1,
            "sequence_parallel": False,
            "seq_length": 64,
            "micro_batch_size": 4,
        },
        parity={
            "texts": ["Some words."],
            "held_out_documents": 0,
            "gradients": False,
            "trajectory_iterations": 0,
        },
    )
    words = ("--profile", "local", "--configfile", small)
    done = checkout.snakemake("convert", *words)
    assert done.returncode == 0, done.stdout
    results = checkout.directory / "results"
    (model,) = results.glob("shared/models/*/hf")
    (converted,) = results.glob("shared/megatron/*/checkpoint")
    for path in sorted(converted.rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()
    convert_to_megatron(sabotaged(model, tmp_path / "wrong", SWAPPED), converted)

    done = checkout.snakemake("all", *words)
    assert done.returncode != 0
    (message,) = (
        line for line in done.stdout.splitlines() if line.startswith("parity_gate failed")
    )
    assert "failed at tensors, layers, " in message
    assert "the first that differs: model.layers.2.mlp.gate_proj.weight (" in message
    assert "The models part first at layer 2 mlp out (worst in " in message
    assert "the weight mapping" in message
    assert not list(results.glob("shared/gates/*/parity.json"))
    assert not list(results.glob("runs/*/train")) and not list(results.glob("runs/*/logs/train*"))
