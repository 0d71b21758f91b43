"""What befalls trainings on the cluster, all of them at once: most of the time each of them waits.

A scenario is a generator that yields conditions: it goes on when the last one holds. What it returns is
what the tests look at.
"""

import json
import re
import shutil
import signal
import sys
import time
from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cluster import Cluster, OnCluster

from conftest import edit_profile
from megaqwen.training.attempts import Attempt, read_attempts
from megaqwen.training.metrics import read_metrics

Scenario = Generator[Callable[[], object], None, Any]
SNAKEMAKE = (sys.executable, "-m", "snakemake", "--profile", "slurm")
OMP = {"OMP_NUM_THREADS": "1"}
LONG = 3600.0  # seconds that anything may take on a machine with other work
POLL_SECONDS = 0.5


def together(scenarios: Mapping[str, Scenario]) -> dict[str, Any]:
    """What each scenario returns, or the exception that ended it."""
    waiting: dict[str, Callable[[], object]] = dict.fromkeys(scenarios, lambda: True)
    ended: dict[str, Any] = {}
    end = time.monotonic() + LONG
    while waiting:
        for name, holds in list(waiting.items()):
            try:
                assert time.monotonic() < end, f"{name} takes more than {LONG:.0f} s"
                if holds():
                    waiting[name] = next(scenarios[name])
            except StopIteration as stop:
                ended[name] = stop.value
                del waiting[name]
            except (AssertionError, OSError) as error:  # of this scenario; the others go on
                ended[name] = error
                del waiting[name]
                scenarios[name].close()
        time.sleep(POLL_SECONDS)
    return ended


@dataclass(kw_only=True)
class Training:
    """The training of a clone: Snakemake on the login node, and the files that the ranks write."""

    cluster: Cluster
    clone: Path
    words: tuple[str, ...]
    said: list[str] = field(default_factory=list)
    """By each Snakemake that has ended."""
    run: OnCluster | None = None

    @property
    def checkpoints(self) -> Path:
        """The directory of the one training; of a name that is not there before it has started."""
        found = self.clone.glob("results/runs/cluster/train/checkpoints/*")
        return next(found, self.clone / "none")

    @property
    def attempts(self) -> list[Attempt]:
        """What was recorded of each start."""
        return read_attempts(self.checkpoints)

    def start(self) -> OnCluster:
        """Snakemake."""
        self.run = OnCluster(self.cluster, [*SNAKEMAKE, *self.words], self.clone, OMP)
        return self.run

    def while_running(self, holds: Callable[[], object]) -> Callable[[], object]:
        """A condition; an AssertionError when Snakemake ends before it holds."""

        def check() -> object:
            held = holds()
            assert held or self.run is None or self.run.process.poll() is None, self.run.said
            return held

        return check

    def ended(self) -> bool:
        """Whether Snakemake has ended."""
        assert self.run
        if self.run.process.poll() is None:
            return False
        self.said.append(self.run.said)
        return True

    def writes(self, attempt: int, since: int = 2) -> Callable[[], object]:
        """Whether an attempt has trained some iterations."""

        def check() -> bool:
            if len(self.attempts) < attempt:
                return False
            return self.iteration() >= self.attempts[attempt - 1].resumed + since

        return self.while_running(check)

    def iteration(self) -> int:
        """The last one that was trained."""
        file = self.checkpoints / "metrics.jsonl"
        rows = read_metrics(file) if file.is_file() else []
        return max((row["iteration"] for row in rows), default=0)

    def job(self) -> str:
        """That of the newest attempt."""
        job = self.attempts[-1].slurm_job_id
        assert job
        return job


class StubTraining(Training):
    """Of ranks that only leave lines (stub_rank.py)."""

    def lines(self) -> list[dict[str, Any]]:
        """All that the ranks of all attempts wrote."""
        file = self.clone / "results/runs/cluster/train/writes.jsonl"
        return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []

    def iteration(self) -> int:
        """The last one; 0 while the newest attempt has written none."""
        lines = self.lines()
        return int(lines[-1]["iteration"]) if lines and lines[-1]["job"] == self.job() else 0

    def chunks(self) -> list[tuple[str, list[int]]]:
        """Jobs and their iterations, in the order of lines: a job that comes back is a chunk more."""
        chunks: list[tuple[str, list[int]]] = []
        for line in self.lines():
            if not chunks or chunks[-1][0] != line["job"]:
                chunks.append((line["job"], []))
            chunks[-1][1].append(line["iteration"])
        return chunks


def stub(cluster: Cluster, stubs: Path, name: str, **settings: object) -> StubTraining:
    """A copy of the clone of stubs, with settings of the profile's section train."""
    clone = Path(shutil.copytree(stubs, stubs.parent / name, symlinks=True))
    edit_profile(clone, {"set-resources": {"train": settings}})
    return StubTraining(cluster=cluster, clone=clone, words=("train",))


def interrupted(training: Training) -> Scenario:
    """The whole run; its training is told to leave, as before a time limit, and then loses a node."""
    run = training.start()
    yield training.writes(attempt=1)
    training.cluster.run("scancel", "--signal=USR1", training.job())
    yield training.writes(attempt=2, since=6)
    training.cluster.kill_node(training.cluster.nodes(training.job())[-1])
    yield training.ended
    assert run.process.returncode == 0, run.said
    return training


def cancelled_and_lost(training: StubTraining) -> Scenario:
    """A job is cancelled by somebody, the next one loses a node, the third one ends."""
    run = training.start()
    yield training.writes(attempt=1)
    training.cluster.run("scancel", training.job())
    yield training.writes(attempt=2)
    training.cluster.kill_node(training.cluster.nodes(training.job())[-1])
    yield training.writes(attempt=3)
    (training.clone / "finish").touch()
    yield training.ended
    assert run.process.returncode == 0, run.said
    return training


def time_limit(training: StubTraining) -> Scenario:
    """Slurm itself says that a job's time is nearly up."""
    run = training.start()
    yield training.writes(attempt=2)
    (training.clone / "finish").touch()
    yield training.ended
    assert run.process.returncode == 0, run.said
    return training


def stopped(training: StubTraining) -> Scenario:
    """Ctrl-C of Snakemake, SIGTERM, and SIGKILL, which leaves its job: the next one waits for it."""
    for attempt, number in enumerate((signal.SIGINT, signal.SIGTERM), start=1):
        run = training.start()
        yield training.writes(attempt)
        job = training.job()
        run.send(number)
        yield training.ended
        assert run.process.returncode == 1, run.said
        yield lambda job=job: not training.cluster.is_queued(job)  # type: ignore[misc]
    run = training.start()
    yield training.writes(attempt=3)
    job = training.job()
    run.send(signal.SIGKILL)
    yield training.ended
    assert training.cluster.is_queued(job)
    run = training.start()
    waits = re.compile(rf"Slurm job {job} of an earlier start still trains in")
    yield training.while_running(lambda: waits.search(run.said))
    (training.clone / "finish").touch()
    yield training.ended
    assert run.process.returncode == 0, run.said
    return training


def failing(training: StubTraining) -> Scenario:
    """A training that fails at once, each time."""
    (training.clone / "fail").touch()
    run = training.start()
    yield training.ended
    assert run.process.returncode == 1, run.said
    return training
