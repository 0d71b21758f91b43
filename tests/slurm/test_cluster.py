"""A Slurm cluster and what befalls trainings on it: scenarios.py tells, here is what must come of it.

A training that was stopped on four nodes, went on over two and lost one of them has the losses and the
weights of one that nothing happened to, on one machine: to the bit.
"""

import json
import os
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from checkout import Checkout
from cluster import Cluster
from scenarios import (
    SWEPT,
    cancelled_and_lost,
    failing,
    full,
    interrupted,
    out_of_memory,
    preempted,
    stopped,
    swept,
    time_limit,
    together,
    unanswered,
)
from trainings import RUN, SNAKEMAKE, StubTraining, Training, stub

from commands import ROOT
from conftest import edit_profile
from megaqwen.provenance import read_json
from megaqwen.training.attempts import KILLED, read_attempts
from megaqwen.training.logs import MORE_MEMORY
from megaqwen.weights import read_hf_tensors
from workspace import losses

pytestmark = pytest.mark.slow

# The embedded default over two stages and for fewer iterations: four ranks hold one copy of the model.
ITERATIONS = 40
SMALL = {
    "pipeline_model_parallel_size": 2,
    "train_iters": ITERATIONS,
    "lr_warmup_iters": 2,
    "save_interval": 10,
    "eval_interval": 20,
    "eval_iters": 1,
    "micro_batch_size": 4,
}
WORDS = ("--configfile", "config/experiments/cluster.yaml", "small.yaml")
SWEEP = ("--configfile", "config/experiments/sweep.yaml", "fits.yaml")
# Two nodes of two ranks each, beside others.
SHARED = {
    "nodes": 2,
    "ranks_per_node": 2,
    "mem_mb": 3000,
    "sbatch_options": "",
    "slurm_partition": "third",
}
# A squeue that takes its time, and that can be away.
SQUEUE = """#!/bin/sh
if [ -e away ]; then
  printf . >>unanswered
  echo "slurm_load_jobs error: Unable to contact slurm controller (connect failure)" >&2
  exit 1
fi
case "$*" in *--states=all*) touch asking && sleep 10 ;; esac
/usr/bin/squeue "$@"
code=$?
rm -f asking
exit $code
"""


ACCOUNTED = """
import json, sys
sys.path.insert(0, sys.argv[1])
from megaqwen.slurm_job import accounted
print(json.dumps(accounted(sys.argv[2:])))
"""


@pytest.fixture(scope="module")
def ended(cluster: Cluster, clone: Path, stubs: Path) -> dict[str, Any]:
    """What came of each scenario."""
    small = {"train": SMALL, "data": {"shards": 2}}
    (clone / "small.yaml").write_text(yaml.safe_dump(small))
    whole = Training(cluster=cluster, clone=clone, words=("all", *WORDS))

    def stubbed(name: str, profile: dict[str, object] | None = None, **settings: object) -> Any:
        return stub(cluster, stubs, name, profile or {}, **{**SHARED, **settings})

    requeue = {"slurm-no-requeue": False, "slurm-requeue": True}
    # Nodes of their own: what takes those of one preempts not the other.
    low = {"slurm_partition": "low", "sbatch_options": "--exclusive"}
    busy = stubbed("unanswered")
    busy.environment = {"PATH": f"{put_squeue(busy.clone)}:{os.environ['PATH']}"}
    sweep = stubbed("swept")
    (sweep.clone / "fits.yaml").write_text(yaml.safe_dump({"train": {"micro_batch_size": 1}}))
    sweep.words = ("all", "--until", "train", *SWEEP)
    return together(
        {
            "interrupted": (whole, interrupted),
            "cancelled and lost": (stubbed("lost", slurm_partition="second"), cancelled_and_lost),
            "time limit": (stubbed("limit", runtime=3, save_seconds=60), time_limit),
            "preempted": (stubbed("preempted", **low), preempted),
            "requeued": (stubbed("requeued", requeue, **low), preempted),
            "out of memory": (stubbed("memory", mem_mb=1500), out_of_memory),
            "full": (stubbed("full"), full),
            "stopped": (stubbed("stopped"), stopped),
            "unanswered": (busy, unanswered),
            "failing": (stubbed("failing"), failing),
            "swept": (sweep, swept),
        }
    )


def put_squeue(clone: Path) -> Path:
    """A directory with a slow squeue in it."""
    tool = clone / "tools" / "squeue"
    tool.parent.mkdir()
    tool.write_text(SQUEUE)
    tool.chmod(0o755)
    return tool.parent


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
    said = "".join(whole.said)
    assert "parity after convert: passed" in said
    assert "parity after export: passed" in said
    jobs = re.findall(r"submitted with SLURM jobid (\d+) \(log: \S+/rule_(\w+)/", said)
    words = ("sacct", "-X", "--noheader", "--parsable2", "--format=jobid,state,nnodes")
    table = cluster.run(*words, f"--jobs={','.join(job for job, _ in jobs)}")
    states = {job: (state, int(nodes)) for job, state, nodes in map(columns, table.splitlines())}
    found = [(rule, *states[job]) for job, rule in jobs]
    stages = (
        *("convert", "preprocess_shard", "preprocess_shard", "preprocess", "parity_gate"),
        *("parity_convert", "export", "parity_export", "report"),
    )
    # Where the network is, Snakemake itself runs: download is no job.
    # Parity lays out the model over four ranks, two on a node.
    nodes = {rule: 2 if rule.startswith("parity") else 1 for rule in stages}
    # That of parity after convert may have been beside the training that was stopped.
    stopped = ("parity_convert", "CANCELLED by 0", 2)
    others = sorted(each for each in found if each[0] != "train" and each != stopped)
    assert others == sorted((rule, "COMPLETED", nodes[rule]) for rule in stages)
    ends = [(state.split()[0], nodes) for rule, state, nodes in found if rule == "train"]
    assert ends == [("CANCELLED", 4), ("NODE_FAIL", 2), ("COMPLETED", 2)]


def test_shards_of_the_data_are_jobs_side_by_side(whole: Training) -> None:
    said = "".join(whole.said)
    submitted = [said.index(f"/rule_preprocess_shard/{number}-of-2/") for number in (1, 2)]
    ended = re.search(r"Finished jobid: \d+ \(Rule: preprocess_shard\)", said)
    assert ended and max(submitted) < ended.start()


def columns(line: str) -> list[str]:
    return line.split("|")


def test_training_went_on_from_what_was_saved(whole: Training) -> None:
    text = (whole.clone / RUN / "logs/train.log.rank3.log").read_text()
    (left,) = re.findall(rf"stopped: iteration (\d+) of {ITERATIONS} is saved", text)
    first, second, third = whole.attempts
    assert (first.resumed, second.resumed) == (0, int(left)), text
    assert third.resumed >= second.resumed and third.reason == "finished"
    manifest = read_json(whole.clone / RUN / "train/manifest.json")
    assert manifest["slurm_job"]["job_id"] == third.slurm_job_id
    assert "node2" not in manifest["slurm_job"]["node_list"]  # what was lost is left out


def test_it_is_bitwise_the_training_of_one_machine(whole: Training) -> None:
    clone = whole.clone
    local = {"set-resources": {"train": {"ranks_per_node": 4}}}
    edit_profile(clone, local, profile="local")
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
    """Each attempt wrote once, in one go, from where an earlier one had saved."""
    chunks = training.chunks()
    assert len({attempt for attempt, _ in chunks}) == len(chunks)
    starts = {each.number: each.resumed for each in training.attempts}
    for attempt, iterations in chunks:
        first = starts[attempt] + 1
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
    logs = (training.clone / RUN / "logs").glob("train.log.rank*.log")
    words = {path.read_text().splitlines()[0].partition("INFO ")[2] for path in logs}
    nodes = {0: 9, 1: 9, 2: 10, 3: 10}
    assert words == {
        f"rank {rank} of 4 on node{node}, one of 2 there" for rank, node in nodes.items()
    }


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


@pytest.mark.parametrize("name", ["preempted", "requeued"])
def test_what_is_preempted_goes_on(ended: dict[str, Any], name: str) -> None:
    training: StubTraining = outcome(ended, name)
    one_writer_at_a_time(training)
    first, second = training.attempts
    assert first.resumed == 0 < second.resumed and second.reason == "finished"
    # Slurm starts a job again under its number, in its place in the queue; Snakemake submits another one.
    assert (first.slurm_job_id == second.slurm_job_id) == (name == "requeued")
    (said,) = training.said
    again = f"Slurm job {first.slurm_job_id} was preempted, and ended: it is tried again"
    assert (again in said) == (name == "preempted")


def test_a_rank_without_memory(ended: dict[str, Any]) -> None:
    training: StubTraining = outcome(ended, "out of memory")
    one_writer_at_a_time(training)
    first, second, *_ = training.attempts
    assert first.resumed == 0 < second.resumed
    (said,) = training.said
    assert "failed before they saved another checkpoint: not tried again" in said
    assert "exceeded memory limit" in said and MORE_MEMORY in said


def test_a_full_disk(ended: dict[str, Any]) -> None:
    training: StubTraining = outcome(ended, "full")
    one_writer_at_a_time(training)
    first, _ = training.said
    assert "the last 3 jobs ended before their training began: not tried again" in first
    assert "train failed: the disk is full" in first
    assert training.attempts[-1].resumed >= 20 and training.attempts[-1].reason == "finished"


def test_a_squeue_that_gives_no_answer(ended: dict[str, Any]) -> None:
    training: StubTraining = outcome(ended, "unanswered")
    one_writer_at_a_time(training)
    first, second = training.attempts
    assert first.resumed == 0 < second.resumed and second.reason == "finished"


def test_a_sweeps_trainings_are_one_array(cluster: Cluster, ended: dict[str, Any]) -> None:
    training: StubTraining = outcome(ended, "swept")
    runs = sorted((training.clone / "results/runs").glob("lr-sweep.*"))
    assert len(runs) == SWEPT
    attempts = []
    for run in runs:
        assert (run / "train/manifest.json").is_file()
        (place,) = (run / "train/checkpoints").iterdir()
        (attempt,) = read_attempts(place)
        attempts.append(attempt.slurm_job_id)
    words = ("sacct", "-X", "--noheader", "--parsable2", "--format=jobid,jobidraw,state,nnodes")
    table = [columns(line) for line in cluster.run(*words).splitlines()]
    tasks = [(job, state, nodes) for job, raw, state, nodes in table if raw in attempts]
    assert len({job.partition("_")[0] for job, *_ in tasks}) == 1
    assert sorted(job.partition("_")[2] for job, *_ in tasks) == ["1", "2", "3", "4"]
    assert {(state, nodes) for _, state, nodes in tasks} == {("COMPLETED", "2")}
    # By the number that each task knows of itself, as a retry and a report ask.
    facts = json.loads(cluster.run(sys.executable, "-c", ACCOUNTED, ROOT / "scripts", *attempts))
    assert {job: facts[job]["state"] for job in attempts} == dict.fromkeys(attempts, "COMPLETED")
