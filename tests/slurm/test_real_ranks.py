"""Trainings with real ranks on a Slurm cluster: to the bit, they are what they are on one machine.

However often they are stopped and what befalls them in between (real_scenarios.py).
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import pytest
import torch
from clones import ITERATIONS, WIDE_ITERATIONS
from cluster import Cluster
from disks import Quota
from trainings import RUN, SNAKEMAKE, Training, columns, outcome

from megaqwen.checkpoints import newest_finished
from megaqwen.provenance import read_json
from megaqwen.training.attempts import Attempt
from megaqwen.training.logs import MORE_MEMORY
from megaqwen.weights import read_hf_tensors
from workspace import losses

pytestmark = pytest.mark.slow
# On the cluster, and on one machine with the same layout.
TWINS = [
    pytest.param("interrupted", "alone", ITERATIONS, id="two nodes, interrupted"),
    pytest.param("wide", "wide alone", WIDE_ITERATIONS, id="four nodes of two ranks"),
]


@pytest.fixture
def whole(ended: dict[str, Any]) -> Training:
    """The embedded default."""
    training: Training = outcome(ended, "interrupted")
    return training


def submitted_jobs(cluster: Cluster, training: Training) -> list[tuple[str, tuple[str, int]]]:
    """The rule, and the end and the nodes, of each of its jobs in order."""
    said = "".join(training.said)
    jobs = re.findall(r"submitted with SLURM jobid (\d+) \(log: \S+/rule_(\w+)/", said)
    words = ("sacct", "-X", "--noheader", "--parsable2", "--format=jobid,state,nnodes")
    table = cluster.run(*words, f"--jobs={','.join(job for job, _ in jobs)}")
    states = {job: (state, int(nodes)) for job, state, nodes in map(columns, table.splitlines())}
    return [(rule, states[job]) for job, rule in jobs]


@dataclass(frozen=True, kw_only=True)
class Result:
    """What a training leaves."""

    losses: list[float]
    evaluations: object
    weights: Mapping[str, torch.Tensor]


def result(training: Training) -> Result:
    """Of one that has finished."""
    manifest = read_json(training.clone / RUN / "train/manifest.json")
    hf = next(training.clone.glob("results/shared/models/*/hf/config.json"))
    newest = newest_finished(training.checkpoints)
    return Result(
        losses=losses(training.checkpoints),
        evaluations=manifest["results"]["evaluations"],
        weights=dict(read_hf_tensors(training.checkpoints, read_json(hf), iteration=newest)),
    )


def test_every_stage_is_a_job_but_download(cluster: Cluster, whole: Training) -> None:
    said = "".join(whole.said)
    assert "parity after convert: passed" in said
    assert "parity after export: passed" in said
    found = [(rule, state, nodes) for rule, (state, nodes) in submitted_jobs(cluster, whole)]
    stages = (
        *("convert", "preprocess_shard", "preprocess_shard", "preprocess", "parity_gate"),
        *("parity_convert", "export", "parity_export", "report"),
    )
    # Where the network is, Snakemake itself runs: download is no job.
    # Parity lays out the model over four ranks, two on a node.
    nodes = {rule: 2 if rule.startswith("parity") else 1 for rule in stages}
    # That of parity after convert may have been beside the training that was stopped, or starved.
    stopped = ("parity_convert", "CANCELLED by 0", 2)
    others = sorted(each for each in found if each[0] != "train" and each != stopped)
    assert others == sorted((rule, "COMPLETED", nodes[rule]) for rule in stages)
    ends = [(state.split()[0], nodes) for rule, state, nodes in found if rule == "train"]
    # Without memory two jobs on one host are enough to give up, and three on any.
    train = [end for end, _ in groupby(ends)]
    failed = ("FAILED", 2)
    lost, preempted = ("NODE_FAIL", 2), ("PREEMPTED", 2)
    assert train == [("CANCELLED", 4), failed, lost, preempted, failed, ("COMPLETED", 2)]


def test_shards_of_the_data_are_jobs_side_by_side(whole: Training) -> None:
    said = "".join(whole.said)
    submitted = [said.index(f"/rule_preprocess_shard/{number}-of-2/") for number in (1, 2)]
    ended = re.search(r"Finished jobid: \d+ \(Rule: preprocess_shard\)", said)
    assert ended and max(submitted) < ended.start()


@dataclass(frozen=True)
class Attempts:
    """Those of the training that all of it befell."""

    stopped: Attempt
    starved: list[Attempt]
    lost: Attempt
    preempted: Attempt
    full: list[Attempt]
    last: Attempt


def attempts_of(training: Training) -> Attempts:
    """In their order."""
    starved = [each for each in training.attempts if MORE_MEMORY in each.reason]
    others = (each for each in training.attempts if each not in starved)
    # Where there is no room, an attempt's end may not be recorded.
    stopped, lost, preempted, *full, last = others
    return Attempts(stopped, starved, lost, preempted, full, last)


def test_training_went_on_from_what_was_saved(whole: Training) -> None:
    text = (whole.clone / RUN / "logs/train.log.rank3.log").read_text()
    left = re.findall(rf"stopped: iteration (\d+) of {ITERATIONS} is saved", text)
    found = attempts_of(whole)
    assert found.stopped.resumed == 0 < found.lost.resumed, text
    assert {each.resumed for each in found.starved} == {found.lost.resumed}
    # Stopped, and preempted, it saved; with the node it lost at most what it had trained since.
    assert {str(found.lost.resumed), str(found.full[0].resumed)} <= set(left)
    assert found.lost.resumed <= found.preempted.resumed < found.full[0].resumed
    assert found.full[0].resumed <= found.last.resumed
    assert (found.last.reached, found.last.reason) == (ITERATIONS, "finished")
    manifest = read_json(whole.clone / RUN / "train/manifest.json")
    assert manifest["slurm_job"]["job_id"] == found.last.slurm_job_id


def test_a_job_with_too_little_memory_says_so(whole: Training) -> None:
    said = whole.said[1]
    assert "each started after iteration" in said
    assert "failed before they saved another checkpoint: not tried again" in said
    assert "exceeded memory limit" in said and MORE_MEMORY in said


def test_preempted_by_a_partition(whole: Training) -> None:
    job = attempts_of(whole).preempted.slurm_job_id
    assert f"Slurm job {job} was preempted, and ended: it is tried again" in whole.said[2]


def test_a_full_quota_says_so(whole: Training) -> None:
    said, disk = whole.said[2], whole.disk
    assert "train failed: the disk is full" in said and "not tried again" in said
    assert disk and disk.message in said
    if not isinstance(disk, Quota):
        pytest.skip("a small disk was full in place of a quota: apt-get install btrfs-progs")


@pytest.mark.parametrize(("on_cluster", "on_one_machine", "iterations"), TWINS)
def test_it_is_bitwise_the_training_of_one_machine(
    ended: dict[str, Any], on_cluster: str, on_one_machine: str, iterations: int
) -> None:
    """Losses, evaluations and every weight."""
    found, alone = (result(outcome(ended, name)) for name in (on_cluster, on_one_machine))
    assert len(found.losses) == iterations and found.losses == alone.losses
    assert found.evaluations == alone.evaluations
    differ = [
        name for name in alone.weights if not torch.equal(alone.weights[name], found.weights[name])
    ]
    assert alone.weights.keys() == found.weights.keys() and differ == []


@pytest.mark.parametrize(("on_cluster", "on_one_machine", "iterations"), TWINS)
def test_its_gates_measure_the_same_to_the_bit(
    ended: dict[str, Any], on_cluster: str, on_one_machine: str, iterations: int
) -> None:
    """Before training, after convert and after export: every figure of every position and tensor."""
    found, alone = (outcome(ended, name).clone for name in (on_cluster, on_one_machine))
    for place in ("results/shared/gates/*", f"{RUN}/parity/convert", f"{RUN}/parity/export"):
        there, here = (measured(clone, place) for clone in (found, alone))
        assert there == here
        assert there["ranks"]["ranks"] == (4 if on_cluster == "interrupted" else 8)


def measured(clone: Path, place: str) -> dict[str, Any]:
    """What a gate measured, without what was not of the numbers."""
    (file,) = clone.glob(f"{place}/parity.json")
    results: dict[str, Any] = read_json(file)["results"]
    results.pop("seconds")
    results["ranks"].pop("peak_memory_bytes")
    return results


def test_ranks_of_four_nodes(cluster: Cluster, ended: dict[str, Any]) -> None:
    """Two on each, of training and of every gate."""
    training: Training = outcome(ended, "wide")
    jobs = dict(submitted_jobs(cluster, training))
    assert jobs.pop("export") == ("COMPLETED", 1)
    rules = ("parity_gate", "train", "parity_convert", "parity_export")
    assert jobs == dict.fromkeys(rules, ("COMPLETED", 4))
    assert training.attempts[-1].ranks == 8


def test_topology_and_profile_redo_nothing(cluster: Cluster, whole: Training) -> None:
    said = cluster.run(
        *("env", "--chdir", whole.clone, *SNAKEMAKE, whole.profile, *whole.words),
        *("--set-resources", "train:nodes=1"),
        seconds=300,
    )
    assert "Nothing to be done" in said
