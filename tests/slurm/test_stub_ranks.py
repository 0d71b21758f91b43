"""What befalls trainings on a Slurm cluster, with ranks that compute nothing: scenarios.py tells."""

import json
import sys
from typing import Any

import pytest
from cluster import Cluster
from scenarios import SWEPT
from trainings import RUN, StubTraining, columns, outcome

from commands import ROOT
from megaqwen.training.attempts import KILLED, read_attempts

pytestmark = pytest.mark.slow

ACCOUNTED = """
import json, sys
sys.path.insert(0, sys.argv[1])
from megaqwen.slurm_job import accounted
print(json.dumps(accounted(sys.argv[2:])))
"""


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


def test_slurm_requeues_what_lost_its_first_node(cluster: Cluster, ended: dict[str, Any]) -> None:
    training: StubTraining = outcome(ended, "lost and requeued")
    one_writer_at_a_time(training)
    first, second, third = training.attempts
    assert first.resumed == 0 < second.resumed <= third.resumed and third.reason == "finished"
    # Its job goes on under its number; what Snakemake submits when that is cancelled is another one.
    assert first.slurm_job_id == second.slurm_job_id != third.slurm_job_id
    assert first.reason == KILLED and first.host != second.host


@pytest.mark.parametrize("name", ["preempted by QOS", "requeued"])
def test_what_is_preempted_goes_on(ended: dict[str, Any], name: str) -> None:
    training: StubTraining = outcome(ended, name)
    one_writer_at_a_time(training)
    first, second = training.attempts
    assert first.resumed == 0 < second.resumed and second.reason == "finished"
    # Slurm starts a job again under its number, in its place in the queue; Snakemake submits another one.
    assert (first.slurm_job_id == second.slurm_job_id) == (name == "requeued")
    (said,) = training.said
    again = f"Slurm job {first.slurm_job_id} was preempted, and ended: it is tried again"
    assert (again in said) == (name != "requeued")


def test_a_squeue_that_gives_no_answer(ended: dict[str, Any]) -> None:
    training: StubTraining = outcome(ended, "unanswered")
    one_writer_at_a_time(training)
    first, second, third = training.attempts
    assert first.resumed == 0 < second.resumed < third.resumed and third.reason == "finished"


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
