"""The cases of benchmark_training.py without a GPU: each is a config that a user could have written."""

from pathlib import Path

import pytest
from training_cases import CASES, small
from training_worker import training_run

from megaqwen.config.checks import check_model_fits
from megaqwen.training.arguments import RunPaths, training_options

OFFLOADED = ("8b-whole", "14b-whole")


@pytest.mark.parametrize("shrunk", [False, True])
@pytest.mark.parametrize("name", CASES)
def test_a_case_passes_the_checks_of_a_config(tmp_path: Path, name: str, shrunk: bool) -> None:
    case = small(CASES[name]) if shrunk else CASES[name]
    run = training_run(case, tmp_path / name)
    assert check_model_fits(run.config, run.hf_config, 1) == []
    paths = RunPaths(pretrained=tmp_path, checkpoints=tmp_path, tensorboard=tmp_path)
    options = training_options(run.config, run.hf_config, paths, gpu=not shrunk)
    assert ("cuda_graph_impl" in options) == ("graphs" in name and not shrunk)
    assert ("optimizer_cpu_offload" in options) == (name in OFFLOADED and not shrunk)
