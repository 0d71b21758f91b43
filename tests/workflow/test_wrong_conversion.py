"""A bridge with a mistake stops the workflow before anything trains, by the place of what is wrong."""

from pathlib import Path

import pytest
from checkout import copy_repository, overlay

pytestmark = pytest.mark.slow
RIGHT = '"mlp.gate_proj.weight", "mlp.up_proj.weight"'
SWAPPED = '"mlp.up_proj.weight", "mlp.gate_proj.weight"'


def test_a_wrong_conversion_is_not_trained_on(tmp_path: Path) -> None:
    checkout = copy_repository(tmp_path / "checkout")
    # In both directions alike, so that every tensor comes back by its bits.
    checkout.edit("scripts/megaqwen/weights/mapping.py", f"({RIGHT})", f"({SWAPPED})")
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
    done = checkout.snakemake("all", "--profile", "local", "--configfile", small)
    assert done.returncode != 0
    (message,) = (
        line for line in done.stdout.splitlines() if line.startswith("parity_gate failed")
    )
    assert "failed at layers, " in message
    assert "The models part first at layer 0 mlp out (worst in " in message
    assert "gate and up swapped" in message
    results = checkout.directory / "results"
    assert not list(results.glob("shared/gates/*/parity.json"))
    assert not list(results.glob("runs/*/train")) and not list(results.glob("runs/*/logs/train*"))
