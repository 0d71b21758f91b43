"""The whole run through Slurm: every stage a job, training over two nodes, interrupted on its way.

A training that was told to leave, and then lost a node, has the losses and the weights of one that
nothing happened to, on one machine: to the bit.
"""

import re
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from checkout import Checkout
from cluster import Cluster, OnCluster

from megaqwen.provenance import read_json
from megaqwen.training.metrics import read_metrics
from megaqwen.weights import read_hf_tensors
from workspace import losses

pytestmark = pytest.mark.slow

# The embedded default for fewer iterations.
SMALL = {
    "train_iters": 60,
    "lr_warmup_iters": 2,
    "save_interval": 20,
    "eval_interval": 30,
    "eval_iters": 1,
    "micro_batch_size": 8,
}
WORDS = ("--configfile", "config/experiments/cluster.yaml", "small.yaml")
SNAKEMAKE = (sys.executable, "-m", "snakemake", "--profile", "slurm")
OMP = {"OMP_NUM_THREADS": "1"}
LONG = 1800  # seconds that anything may take on a machine with other work


def eventually(run: OnCluster, true: Callable[[], object]) -> None:
    """Wait until `true` is, while Snakemake runs."""
    end = time.monotonic() + LONG
    while not true():
        assert run.process.poll() is None and time.monotonic() < end, run.said
        time.sleep(0.5)


class Training:
    """Training's jobs and what they have written."""

    def __init__(self, cluster: Cluster, clone: Path, run: OnCluster):
        self.cluster, self.clone, self.run = cluster, clone, run
        self.job: str | None = None

    def next_job(self) -> str:
        """Wait until another job of training runs; its id."""
        earlier = self.job

        def another() -> bool:
            self.job = self.cluster.running("train") or earlier
            return self.job != earlier

        eventually(self.run, another)
        assert self.job
        return self.job

    def until(self, iteration: int) -> None:
        """Wait until an iteration is trained."""
        eventually(self.run, lambda: self.iteration() >= iteration)

    def iteration(self) -> int:
        """The last one that the metrics have."""
        files = list(self.clone.glob("results/runs/cluster/train/checkpoints/*/metrics.jsonl"))
        return max((row["iteration"] for file in files for row in read_metrics(file)), default=0)


@pytest.fixture(scope="module")
def printed(cluster: Cluster, clone: Path) -> str:
    """What Snakemake says of the whole run."""
    (clone / "small.yaml").write_text(yaml.safe_dump({"train": SMALL}))
    run = OnCluster(cluster, [*SNAKEMAKE, "all", *WORDS], clone, OMP)
    training = Training(cluster, clone, run)
    job = training.next_job()
    training.until(2)
    cluster.run("scancel", "--signal=USR1", job)  # as before a time limit: to the ranks
    job = training.next_job()
    training.until(22)
    dead = cluster.nodes(job)[-1]
    cluster.kill_node(dead)
    training.next_job()
    cluster.start_node(dead)
    assert run.wait(LONG) == 0, run.said
    return run.said


def test_every_stage_is_a_job_but_download(cluster: Cluster, printed: str) -> None:
    assert "parity after convert: passed" in printed
    assert "parity after export: passed" in printed
    words = ("sacct", "-X", "--noheader", "--parsable2", "--starttime=now-1days")
    table = cluster.run(*words, "--format=comment,state,nnodes")
    rows = [line.split("|") for line in table.splitlines()]
    done = {comment: int(nodes) for comment, state, nodes in rows if state == "COMPLETED"}
    stages = ("convert", "preprocess", "parity_gate", "parity_convert", "export", "parity_export")
    # Where the network is, Snakemake itself runs: download is no job.
    assert done == {**{f"rule_{stage}": 1 for stage in (*stages, "report")}, "rule_train": 2}
    states = [state for comment, state, _ in rows if comment == "rule_train"]
    assert states == ["FAILED", "NODE_FAIL", "COMPLETED"]


def test_training_went_on_from_what_was_saved(clone: Path, printed: str) -> None:
    logs = clone / "results/runs/cluster/logs"
    text = (logs / "train.log.rank1.log").read_text()
    (left,) = re.findall(r"stopped: iteration (\d+) of 60 is saved", text)
    starts = re.findall(r"from the converted weights|resuming after iteration \d+", text)
    *first, last = starts
    assert first == ["from the converted weights", f"resuming after iteration {left}"]
    assert last in ("resuming after iteration 20", "resuming after iteration 40")


def test_it_is_bitwise_the_training_of_one_machine(clone: Path, printed: str) -> None:
    done = Checkout(clone).snakemake("--profile", "local", "train", *WORDS, "--config", "run=alone")
    assert done.returncode == 0, done.stdout
    assert re.search(r"^train +1$", done.stdout, re.MULTILINE)
    results = []
    for run in ("alone", "cluster"):
        (checkpoints,) = (clone / "results/runs" / run / "train/checkpoints").iterdir()
        manifest = read_json(clone / "results/runs" / run / "train/manifest.json")
        hf = next((clone / "results/shared/models").glob("*/hf/config.json"))
        weights = dict(read_hf_tensors(checkpoints, read_json(hf), iteration=60))
        results.append((losses(checkpoints), manifest["results"]["evaluations"], weights))
    (alone_losses, alone_evaluations, alone), (found, evaluations, there) = results
    assert len(found) == 60 and found == alone_losses
    assert evaluations == alone_evaluations
    assert [name for name in alone if not torch.equal(alone[name], there[name])] == []


def test_topology_and_profile_redo_nothing(cluster: Cluster, clone: Path, printed: str) -> None:
    said = cluster.run(
        *("env", "--chdir", clone, *SNAKEMAKE, "all", *WORDS, "--set-resources", "train:nodes=1"),
        seconds=300,
    )
    assert "Nothing to be done" in said
