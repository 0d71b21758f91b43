"""layouts.py without a GPU: its arithmetic, its reading of traces, and two layouts over gloo."""

import gzip
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from communication import read_shares, shares
from layout_plan import DENSE, EXPERTS, hf_config, plan, small_config, small_options

from commands import ROOT, write_config
from megaqwen.config import load_config
from megaqwen.config.checks import check_model_fits
from megaqwen.provenance import read_json

TENSOR, PIPELINE = "tensor_model_parallel_size", "pipeline_model_parallel_size"
CONTEXT, EXPERT = "context_parallel_size", "expert_model_parallel_size"
SCHEDULE = {"train_iters": 20, "save_interval": 10}


@pytest.mark.parametrize("small", [False, True])
@pytest.mark.parametrize("gpus", [1, 2, 4, 8])
def test_every_experiment_passes_the_checks_of_a_config(
    tmp_path: Path, gpus: int, small: bool
) -> None:
    for each in plan(gpus):
        options = {**each.options(gpus), **SCHEDULE}
        model = small_config(each.shape) if small else hf_config(each.shape)
        train = small_options(options) if small else options
        anything = {"source": "hub", "repo_id": f"Qwen/{each.shape}"}
        config = load_config(write_config(tmp_path / "config.yaml", train=train, model=anything))
        assert check_model_fits(config, model, each.ranks) == [], each.name


@pytest.mark.parametrize("gpus", [2, 4, 8])
def test_every_kind_of_layout_is_there_at_every_size_that_fits(gpus: int) -> None:
    experiments = plan(gpus)
    assert len({each.name for each in experiments}) == len(experiments)

    def sizes(shape: str, option: str) -> set[int]:
        return {each.sizes.get(option, 1) for each in experiments if each.shape == shape}

    powers = {size for size in (1, 2, 4, 8) if size <= gpus}
    assert sizes(DENSE, TENSOR) == powers
    assert sizes(EXPERTS, EXPERT) == powers
    assert sizes(DENSE, CONTEXT) == powers - {8}
    assert max(sizes(DENSE, PIPELINE)) == min(gpus, 4)
    for each in experiments:
        assert each.ranks in (1, gpus)
        assert (TENSOR in each.sizes) == ("sequence_parallel" in each.sizes)
        assert (CONTEXT in each.sizes) <= (each.sequence == 32768)
        assert each.samples(gpus) * each.sequence == gpus * 32768


def kernel(name: str, start: float, end: float, cat: str = "kernel") -> dict[str, Any]:
    return {"ph": "X", "cat": cat, "name": name, "ts": start, "dur": end - start}


def test_communication_that_nothing_hides(tmp_path: Path) -> None:
    events = [
        kernel("gemm", 100, 140),
        kernel("ncclDevKernel_AllGather", 130, 160),  # hidden for 10
        kernel("ncclDevKernel_ReduceScatter", 150, 170),  # on another stream, together with it
        kernel("Memcpy DtoD", 180, 190, "gpu_memcpy"),
        kernel("gemm", 185, 200),
        kernel("aten::mm", 0, 500, "cpu_op"),
        {"ph": "M", "name": "process_name"},
    ]
    trace = tmp_path / "rank-0.json.gz"
    trace.write_bytes(gzip.compress(json.dumps({"traceEvents": events}).encode()))
    found = read_shares(trace)
    assert found is not None
    assert (found.communication, found.exposed) == (0.4, 0.3)
    assert found.idle == pytest.approx(0.1)
    assert shares([kernel("aten::mm", 0, 500, "cpu_op")]) is None


@pytest.mark.slow
def test_two_layouts_over_gloo_train_alike(tmp_path: Path) -> None:
    directory = tmp_path / "layouts"
    done = subprocess.run(
        [
            *(sys.executable, ROOT / "tests" / "gpu" / "layouts.py", "--directory", directory),
            *("--gpus", "2", "--seconds", "900", "dense-1", "dense-tp2"),
        ],
        env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=1200,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    results = read_json(directory / "results.json")
    assert results["machine"]["gpus"] == 2
    one, two = results["experiments"]
    assert two["compared_with"] == one["name"] == "dense-1"
    assert two["losses_agree"] and two["loss_difference"] < 1e-3
    # Another order of sums: not the first layout's figures again.
    assert one["gradient_norms"] != two["gradient_norms"]
    assert one["losses"][0] != one["losses"][-1]
    assert all(each["tokens_per_second_per_gpu"] > 0 for each in (one, two))
