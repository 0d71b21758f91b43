"""Trainings on the cluster, as a scenario acts on them and waits for them."""

import json
import shutil
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from clones import edit_profile
from cluster import Cluster, OnCluster
from disks import Disk

from megaqwen.training.attempts import Attempt, read_attempts

SNAKEMAKE = (sys.executable, "-m", "snakemake", "--profile")
OMP = {"OMP_NUM_THREADS": "1"}
WAIT_SECONDS = 900.0  # that one step of a scenario may take on a machine with other work
RUN = "results/runs/cluster"


@dataclass(frozen=True, kw_only=True)
class Until:
    """What a scenario waits for."""

    what: str
    """For the message when it does not come."""
    holds: Callable[[], object]
    seconds: float = WAIT_SECONDS


@dataclass(kw_only=True)
class Training:
    """The training of a clone: Snakemake on the login node, and the files that the ranks write."""

    cluster: Cluster
    clone: Path
    words: tuple[str, ...]
    profile: str = "slurm"
    environment: Mapping[str, str] = field(default_factory=dict)
    """Of Snakemake."""
    seen: Path | None = None
    """Where the tests see the clone; as it is by default."""
    said: list[str] = field(default_factory=list)
    """By each Snakemake that has ended."""
    disk: Disk | None = None
    """Of the checkpoints, where they have one of their own."""
    run: OnCluster | None = None
    over: bool = False
    """Whether its scenario has ended, well or not."""

    @property
    def checkpoints(self) -> Path:
        """The directory of the one training; of a name that is not there before it has started."""
        found = (self.seen or self.clone).glob(f"{RUN}/train/checkpoints/*")
        return next(found, self.clone / "none")

    @property
    def attempts(self) -> list[Attempt]:
        """What was recorded of each start."""
        return read_attempts(self.checkpoints)

    def start(self) -> OnCluster:
        """Snakemake."""
        environment = {**OMP, **self.environment}
        words = [*SNAKEMAKE, self.profile, *self.words]
        self.run = OnCluster(self.cluster, words, self.clone, environment)
        return self.run

    def ask_for(self, **settings: object) -> None:
        """Values for training in the profile, from the next start on."""
        edit_profile(self.clone, {"set-resources": {"train": settings}}, profile=self.profile)

    def take_nodes(self, *words: str) -> Until:
        """Until a job of more priority had the nodes of the newest attempt."""
        nodes = ",".join(f"node{number}" for number in self.cluster.nodes(self.job()))
        output = self.clone / f"taken-from-{self.job()}.txt"
        words = (*words, "--account=lab", "--exclusive", f"--nodelist={nodes}", "--mem=100")
        self.cluster.run("sbatch", *words, f"--output={output}", "--wrap=hostname")
        return self.until("the job of more priority", output.exists)

    @property
    def place(self) -> Path:
        """Where trainings have their checkpoints."""
        return self.clone / RUN / "train/checkpoints"

    def put(self, disk: Disk) -> None:
        """Have them on a filesystem of their own, which the tests see in the cluster alone."""
        self.disk, self.seen = disk, self.cluster.seen(self.clone)

    def until(self, what: str, holds: Callable[[], object], **settings: Any) -> Until:
        """A condition; an AssertionError when Snakemake ends before it holds."""

        def check() -> object:
            held = holds()
            ended = self.run is None or self.run.process.poll() is not None
            assert held or not ended, f"Snakemake ended before {what}"
            return held

        return Until(what=what, holds=check, **settings)

    def ended(self, code: int | None, **settings: Any) -> Until:
        """Until Snakemake has ended, with an exit status where one is given."""

        def check() -> bool:
            assert self.run
            if self.run.process.poll() is None:
                return False
            self.said.append(self.run.said)
            assert code in (None, self.run.process.returncode), self.run.process.returncode
            return True

        return Until(what="the end of Snakemake", holds=check, **settings)

    def gone(self, job: str) -> Until:
        """Until Slurm has nothing more of a job in its queue."""
        what = f"the end of Slurm job {job}"
        return Until(what=what, holds=lambda: not self.cluster.is_queued(job))

    def writes(self, attempt: int, count: int = 2, **settings: Any) -> Until:
        """Until an attempt has trained some iterations."""
        before: list[int] = []  # written by earlier attempts: this one has just been recorded

        def check() -> bool:
            if len(self.attempts) < attempt:
                return False
            written = self.written()
            before.append(written)
            return written >= before[0] + count

        return self.until(f"{count} iterations of attempt {attempt}", check, **settings)

    def after(self, *others: "Training") -> Until:
        """Until the scenarios of others have ended."""
        return Until(
            what="the end of other scenarios",
            holds=lambda: all(other.over for other in others),
            seconds=5 * WAIT_SECONDS,  # each of their steps has its own time
        )

    def written(self) -> int:
        """How many iterations have been trained, those that were trained again as well."""
        file = self.checkpoints / "metrics.jsonl"
        return file.read_text().count('"loss"') if file.is_file() else 0

    def job(self) -> str:
        """That of the newest attempt."""
        job = self.attempts[-1].slurm_job_id
        assert job
        return job

    def state(self) -> str:
        """What is known where a scenario goes wrong."""
        attempts = "\n".join(map(str, self.attempts))
        queue = self.cluster.run("squeue", "--states=all", "--format=%i %P %T %r %N %k")
        return f"{self.run.said if self.run else ''}\n{attempts}\n{queue}"


class StubTraining(Training):
    """Of ranks that only leave lines (stub_rank.py)."""

    def tell(self, order: str) -> None:
        """Tell the ranks something, by a file."""
        (self.clone / order).touch()

    def lines(self) -> list[dict[str, Any]]:
        """All that the ranks of all attempts wrote."""
        file = self.clone / RUN / "train/writes.jsonl"
        return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []

    def written(self) -> int:
        """How many lines there are."""
        return len(self.lines())

    def chunks(self) -> list[tuple[int, list[int]]]:
        """Attempts and their iterations, in the order of lines: one that comes back is a chunk more."""
        chunks: list[tuple[int, list[int]]] = []
        for line in self.lines():
            if not chunks or chunks[-1][0] != line["attempt"]:
                chunks.append((line["attempt"], []))
            chunks[-1][1].append(line["iteration"])
        return chunks


def stub(
    cluster: Cluster, stubs: Path, name: str, profile: Mapping[str, object], **settings: object
) -> StubTraining:
    """A copy of the clone of stubs, with values of the profile, and settings of its section train."""
    clone = Path(shutil.copytree(stubs, stubs.parent / name, symlinks=True))
    edit_profile(clone, {**profile, "set-resources": {"train": settings}})
    return StubTraining(cluster=cluster, clone=clone, words=("train",))


def outcome(ended: Mapping[str, Any], name: str) -> Any:
    """The training of a scenario that has ended; raises what ended it otherwise."""
    if isinstance(ended[name], Exception):
        raise ended[name]
    return ended[name]


def columns(line: str) -> list[str]:
    """Of a line of sacct's --parsable2."""
    return line.split("|")
