"""A Slurm cluster and what befalls trainings on it: scenarios.py tells, here is what must come of it.

A training that was told to leave, and then lost a node, has the losses and the weights of one that
nothing happened to, on one machine: to the bit.
"""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from checkout import Checkout
from cluster import Cluster
from scenarios import (
    SNAKEMAKE,
    StubTraining,
    Training,
    cancelled_and_lost,
    failing,
    interrupted,
    stopped,
    stub,
    time_limit,
    together,
)

from megaqwen.provenance import read_json
from megaqwen.training.attempts import KILLED
from megaqwen.weights import read_hf_tensors
from workspace import losses

pytestmark = pytest.mark.slow

# The embedded default for fewer iterations.
ITERATIONS = 80
SMALL = {
    "train_iters": ITERATIONS,
    "lr_warmup_iters": 2,
    "save_interval": 20,
    "eval_interval": 40,
    "eval_iters": 1,
    "micro_batch_size": 8,
}
WORDS = ("--configfile", "config/experiments/cluster.yaml", "small.yaml")
# Two nodes of two ranks each, beside others.
SHARED = {"ranks_per_node": 2, "mem_mb": 3000, "sbatch_options": "", "slurm_partition": "third"}


@pytest.fixture(scope="module")
def ended(cluster: Cluster, clone: Path, stubs: Path) -> dict[str, Any]:
    """What came of each scenario."""
    (clone / "small.yaml").write_text(yaml.safe_dump({"train": SMALL}))
    whole = Training(cluster=cluster, clone=clone, words=("all", *WORDS))
    lost = stub(cluster, stubs, "lost", **{**SHARED, "slurm_partition": "second"})
    limit = stub(cluster, stubs, "limit", **SHARED, runtime=3, save_seconds=60)
    return together(
        {
            "interrupted": interrupted(whole),
            "cancelled and lost": cancelled_and_lost(lost),
            "time limit": time_limit(limit),
            "stopped": stopped(stub(cluster, stubs, "stopped", **SHARED)),
            "failing": failing(stub(cluster, stubs, "failing", **SHARED)),
        }
    )


def outcome(ended: dict[str, Any], name: str) -> Any:
    if isinstance(ended[name], Exception):
        raise ended[name]
    return ended[name]


@pytest.fixture
def whole(ended: dict[str, Any]) -> Training:
    """The embedded default."""
    training: Training = outcome(ended, "interrupted")
    return training


def test_every_stage_is_a_job_but_download(cluster: Cluster, whole: Training) -> None:
    (said,) = whole.said
    assert "parity after convert: passed" in said
    assert "parity after export: passed" in said
    jobs = re.findall(r"submitted with SLURM jobid (\d+) \(log: \S+/rule_(\w+)/", said)
    words = ("sacct", "-X", "--noheader", "--parsable2", "--format=jobid,state,nnodes")
    table = cluster.run(*words, f"--jobs={','.join(job for job, _ in jobs)}")
    states = {job: (state, int(nodes)) for job, state, nodes in map(columns, table.splitlines())}
    found = [(rule, *states[job]) for job, rule in jobs]
    stages = ("convert", "preprocess", "parity_gate", "parity_convert", "export", "parity_export")
    # Where the network is, Snakemake itself runs: download is no job.
    assert {(rule, *rest) for rule, *rest in found if rule != "train"} == {
        (stage, "COMPLETED", 1) for stage in (*stages, "report")
    }
    ends = [state for rule, *state in found if rule == "train"]
    assert ends == [["FAILED", 2], ["NODE_FAIL", 2], ["COMPLETED", 2]]


def columns(line: str) -> list[str]:
    return line.split("|")


def test_training_went_on_from_what_was_saved(whole: Training) -> None:
    text = (whole.clone / "results/runs/cluster/logs/train.log.rank1.log").read_text()
    (left,) = re.findall(rf"stopped: iteration (\d+) of {ITERATIONS} is saved", text)
    first, second, third = whole.attempts
    assert (first.resumed, second.resumed) == (0, int(left))
    assert third.resumed >= second.resumed and third.reason == "finished"
    manifest = read_json(whole.clone / "results/runs/cluster/train/manifest.json")
    assert manifest["slurm_job"]["job_id"] == third.slurm_job_id
    assert manifest["slurm_job"]["node_list"] == "node[3-4]"  # what was lost is left out


def test_it_is_bitwise_the_training_of_one_machine(whole: Training) -> None:
    clone = whole.clone
    done = Checkout(clone).snakemake("--profile", "local", "train", *WORDS, "--config", "run=alone")
    assert done.returncode == 0, done.stdout
    assert re.search(r"^train +1$", done.stdout, re.MULTILINE)
    results = []
    for run in ("alone", "cluster"):
        (checkpoints,) = (clone / "results/runs" / run / "train/checkpoints").iterdir()
        manifest = read_json(clone / "results/runs" / run / "train/manifest.json")
        hf = next((clone / "results/shared/models").glob("*/hf/config.json"))
        weights = dict(read_hf_tensors(checkpoints, read_json(hf), iteration=ITERATIONS))
        results.append((losses(checkpoints), manifest["results"]["evaluations"], weights))
    (alone_losses, alone_evaluations, alone), (found, evaluations, there) = results
    assert len(found) == ITERATIONS and found == alone_losses
    assert evaluations == alone_evaluations
    assert [name for name in alone if not torch.equal(alone[name], there[name])] == []


def test_topology_and_profile_redo_nothing(cluster: Cluster, whole: Training) -> None:
    said = cluster.run(
        *("env", "--chdir", whole.clone, *SNAKEMAKE, *whole.words),
        *("--set-resources", "train:nodes=1"),
        seconds=300,
    )
    assert "Nothing to be done" in said


def one_writer_at_a_time(training: StubTraining) -> None:
    """Each job wrote once, in one go, from where an earlier one had saved."""
    chunks = training.chunks()
    assert len({job for job, _ in chunks}) == len(chunks)
    starts = {each.slurm_job_id: each.resumed for each in training.attempts}
    for job, iterations in chunks:
        first = starts[job] + 1
        assert iterations == list(range(first, first + len(iterations)))


def test_a_cancelled_job_and_a_lost_node(ended: dict[str, Any]) -> None:
    training: StubTraining = outcome(ended, "cancelled and lost")
    one_writer_at_a_time(training)
    first, second, third = training.attempts
    assert first.resumed == 0 < second.resumed <= third.resumed
    assert third.reason == "finished"
    (said,) = training.said
    assert "SLURM status is: 'CANCELLED'" in said
    assert "SLURM status is: 'NODE_FAIL'" in said


def test_the_ranks_of_each_node(ended: dict[str, Any]) -> None:
    training: StubTraining = outcome(ended, "stopped")
    logs = (training.clone / "results/runs/cluster/logs").glob("train.log.rank*.log")
    words = {path.read_text().splitlines()[0].partition("INFO ")[2] for path in logs}
    nodes = {0: 9, 1: 9, 2: 10, 3: 10}
    assert words == {f"rank {rank} of 4 on node{node}" for rank, node in nodes.items()}


def test_slurm_tells_the_ranks_before_the_time_limit(ended: dict[str, Any]) -> None:
    training: StubTraining = outcome(ended, "time limit")
    one_writer_at_a_time(training)
    first, second = training.attempts
    assert first.resumed == 0 < second.resumed == first.reached
    assert first.reason != KILLED and second.reason == "finished"


def test_stopped_by_ctrl_c_sigterm_and_sigkill(ended: dict[str, Any]) -> None:
    training: StubTraining = outcome(ended, "stopped")
    one_writer_at_a_time(training)
    resumed = [each.resumed for each in training.attempts]
    assert len(resumed) == 4 and resumed == sorted(resumed) and 0 < resumed[1] < resumed[2]
    assert "was killed: its lock on this directory is taken off" in training.said[-1]
    # The job of the Snakemake that was killed ended by itself, and the next one had nothing to train.
    assert [each.reason for each in training.attempts[2:]] == ["finished", "finished"]
    assert len(training.chunks()) == 3


def test_what_fails_at_once_is_not_tried_fifty_times(ended: dict[str, Any]) -> None:
    training: StubTraining = outcome(ended, "failing")
    (said,) = training.said
    assert "each started after iteration 0 and failed before they saved" in said
    assert "told to fail" in said
    assert 2 <= len(training.attempts) <= 3
