"""Slurm's job arrays as snakemake-executor-plugin-slurm 2.8.0 makes them, and what it takes to be safe.

Each task of an array starts a Snakemake for the first task's job, and only that one would start the
task's own. It goes wrong where the rule starts its ranks itself (every task would run the first task's
job), and where the first job has not ended yet (a task then waits for the first one's output, fails
without it, and removes it when it fails itself). So a task becomes its own job's Snakemake before it has
looked at any.
"""

import base64
import json
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

OPTION = "--slurm-jobstep-array-execs"
LONGEST_ARRAY = (
    25  # tasks: the commands of all are one word on each task's command line, of 128 KiB
)


def own_command(words: Sequence[str], environment: Mapping[str, str]) -> str | None:
    """The shell command of this array task's own job; None where that is what runs already.

    Args:
        words: This process's command line.
        environment: With SLURM_ARRAY_TASK_ID in a task.
    """
    task = environment.get("SLURM_ARRAY_TASK_ID")
    given = [word.removeprefix(f"{OPTION}=") for word in words if word.startswith(f"{OPTION}=")]
    if task is None or not given:
        return None
    commands = json.loads(base64.b64decode(given[-1].strip("'\"")))
    packed = commands.get(task)  # the first task's is the rest of the command line
    return zlib.decompress(bytes.fromhex(packed)).decode() if packed else None


@dataclass(frozen=True, kw_only=True)
class ArraySettings:
    """What a profile says of arrays."""

    rules: str | None
    """slurm-array-jobs: names with commas between, or all."""
    limit: int
    jobs: int | None
    """jobs: how many may be submitted at once; None for any number."""
    jobs_at_once: int | None
    """The number in max-jobs-per-timespan; None without."""
    status_command: str | None
    memory_added: bool
    """Not slurm-disable-memory-fudge."""
    not_by_squeue: str | None = None
    """Why squeue would not be asked, though it is the status_command."""


def array_mistakes(settings: ArraySettings, runs: int, ranks: Iterable[Any]) -> Iterator[str]:
    """What in a profile would keep a sweep's arrays from being run, or have them run wrongly.

    Args:
        settings: The profile's.
        runs: How many runs the sweep has.
        ranks: How many ranks each run's training has, at the least.
    """
    if not settings.rules or runs < 2:
        return
    for name, value in (("jobs", settings.jobs), ("max-jobs-per-timespan", settings.jobs_at_once)):
        if value is not None and value < runs:
            yield (
                f"{name} is {value}, and {runs} jobs of a rule are ready at once: an array is submitted"
                f" once all of them may be, so that nothing would go on. At least {runs} is needed"
            )
    if settings.limit > LONGEST_ARRAY:
        yield (
            f"slurm-array-limit is {settings.limit}: at most {LONGEST_ARRAY} tasks fit a command line"
        )
    if settings.status_command != "squeue":
        yield "slurm-status-command has to be squeue: sacct names the tasks of an array otherwise"
    elif settings.not_by_squeue:
        yield f"sacct would be asked in place of squeue. {settings.not_by_squeue}"
    if settings.memory_added:
        yield "slurm-disable-memory-fudge has to be true: mem_mb: 0 would become 1 MB"
    if len(set(ranks)) > 1:
        yield (
            "the runs train on different numbers of ranks, and an array gives each what the first has:"
            " name no train and no parity in slurm-array-jobs"
        )
