"""What befalls trainings on the cluster, all of them at once: most of the time each of them waits.

A scenario is a generator that yields what it waits for, and goes on when that holds. What it returns is
what the tests look at.
"""

import signal
import subprocess
import time
from collections.abc import Callable, Collection, Generator, Mapping
from typing import Any

from trainings import StubTraining, Training, Until

Scenario = Generator[Until, None, Any]
POLL_SECONDS = 0.5
SWEPT = 4
"""Runs of config/experiments/sweep.yaml."""


class Going:
    """A scenario and what it waits for."""

    def __init__(self, name: str, scenario: Scenario):
        """Take its first step."""
        self.name, self.scenario = name, scenario
        self.step()

    def step(self) -> None:
        """Go on to what it waits for next; StopIteration at its end."""
        self.until = next(self.scenario)
        self.end = time.monotonic() + self.until.seconds

    def look(self) -> None:
        """Go on where what it waits for holds; an AssertionError when that takes too long."""
        if self.until.holds():
            self.step()
        elif time.monotonic() > self.end:
            late = f"waited {self.until.seconds:.0f} s for {self.until.what}"
            self.scenario.throw(AssertionError(f"{self.name}: {late}"))


def together(scenarios: Mapping[str, tuple[Training, Callable[[Any], Scenario]]]) -> dict[str, Any]:
    """The training of each scenario when it has ended, or the exception that ended it."""
    ended: dict[str, Any] = {}
    going: dict[str, Going] = {}

    def attended(name: str, act: Callable[[], object]) -> None:
        training, _ = scenarios[name]
        try:
            act()
        except StopIteration:
            ended[name], training.over = training, True
        except (AssertionError, OSError, subprocess.SubprocessError) as error:
            # Of this scenario; the others go on.
            error.add_note(training.state())
            ended[name], training.over = error, True

    def begin(name: str) -> None:
        training, scenario = scenarios[name]
        going[name] = Going(name, scenario(training))

    for name in scenarios:
        attended(name, lambda name=name: begin(name))  # type: ignore[misc]
    while left := [each for name, each in going.items() if name not in ended]:
        for each in left:
            attended(each.name, each.look)
        time.sleep(POLL_SECONDS)
    return ended


def cancelled_and_lost(training: StubTraining) -> Scenario:
    """A job is cancelled by somebody, the next one loses a node, the third one ends."""
    training.start()
    yield training.writes(attempt=1)
    training.cluster.run("scancel", training.job())
    yield training.writes(attempt=2)
    training.cluster.kill_node(training.cluster.nodes(training.job())[-1])
    yield training.writes(attempt=3)
    training.tell("finish")
    yield training.ended(0)


def time_limit(training: StubTraining) -> Scenario:
    """Slurm itself says that a job's time is nearly up."""
    training.start()
    yield training.writes(attempt=2)
    training.tell("finish")
    yield training.ended(0)


def preempted(training: StubTraining) -> Scenario:
    """A job of a partition with more priority takes the nodes."""
    training.start()
    yield training.writes(attempt=1)
    yield training.take_nodes("--partition=high")
    yield training.writes(attempt=2)
    training.tell("finish")
    yield training.ended(0)


def preempted_by_qos(training: StubTraining, others: Collection[Training]) -> Scenario:
    """The controller starts anew and goes by QOS: a job of the same partition takes the nodes."""
    yield training.after(*others)  # that are on partitions which preempt, or submit jobs
    training.start()
    yield training.writes(attempt=1)
    training.cluster.preempt_by_qos()
    yield training.take_nodes("--partition=low", "--qos=urgent")
    yield training.writes(attempt=2)
    training.tell("finish")
    yield training.ended(0)


def lost_and_requeued(training: StubTraining) -> Scenario:
    """Slurm starts a job again whose first node died, that of its script; then it is cancelled."""
    training.start()
    yield training.writes(attempt=1, count=12)
    training.cluster.kill_node(training.cluster.nodes(training.job())[0])
    yield training.writes(attempt=2)
    training.cluster.run("scancel", training.job())
    yield training.writes(attempt=3)
    training.tell("finish")
    yield training.ended(0)


def stopped(training: StubTraining) -> Scenario:
    """Ctrl-C of Snakemake, SIGTERM, and SIGKILL, which leaves its job: the next one waits for it."""
    for attempt, number in enumerate((signal.SIGINT, signal.SIGTERM), start=1):
        run = training.start()
        yield training.writes(attempt)
        job = training.job()
        run.send(number)
        yield training.ended(1)
        yield training.gone(job)
    run = training.start()
    yield training.writes(attempt=3)
    job = training.job()
    run.send(signal.SIGKILL)
    yield training.ended(None)
    assert training.cluster.is_queued(job)
    run = training.start()
    waits = f"Slurm job {job} of an earlier start still trains in"
    yield training.until("that it waits for the earlier job", lambda: waits in run.said)
    training.tell("finish")
    yield training.ended(0)


def unanswered(training: StubTraining) -> Scenario:
    """Ctrl-C while Snakemake waits for squeue's answer, or gets none; and a squeue that is away."""
    run = training.start()
    yield training.writes(attempt=1)
    job, asking = training.job(), training.clone / "asking"
    yield training.until("a question to squeue", lambda: is_new(asking))
    run.send(signal.SIGINT)
    yield training.ended(1)
    yield training.gone(job)
    run = training.start()
    yield training.writes(attempt=2)
    job, asked = training.job(), training.clone / "unanswered"
    training.tell("away")
    yield training.until("a question", asked.exists)
    run.send(signal.SIGINT)
    yield training.ended(1)
    (training.clone / "away").unlink()
    yield training.gone(job)
    asked.unlink()
    training.start()
    yield training.writes(attempt=3)
    training.tell("away")
    yield training.until("8 questions", lambda: asked.exists() and len(asked.read_text()) >= 8)
    (training.clone / "away").unlink()
    training.tell("finish")
    yield training.ended(0)


def is_new(file: Any) -> bool:
    """Whether a file was touched in the last seconds."""
    return file.exists() and time.time() - file.stat().st_mtime < 5


def swept(training: StubTraining) -> Scenario:
    """A sweep: its trainings, tasks of one array, run beside each other."""
    training.start()

    def all_train() -> bool:
        files = training.clone.glob("results/runs/*/train/writes.jsonl")
        return sum(len(file.read_text().splitlines()) >= 10 for file in files) == SWEPT

    yield training.until("all runs of the sweep train", all_train)
    training.tell("finish")
    yield training.ended(0)


def failing(training: StubTraining) -> Scenario:
    """A training that fails at once, each time."""
    training.tell("fail")
    training.start()
    yield training.ended(1)
