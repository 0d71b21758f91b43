"""Trainings that a killed Snakemake left on the cluster: their jobs go on, and hold the leases."""

import time
from collections.abc import Callable, Sequence
from pathlib import Path

from megaqwen.slurm_job import queued
from megaqwen.training import lease

POLL_SECONDS = 10.0


def wait_for_earlier_jobs(
    places: Sequence[Path], say: Callable[[str], None], poll_seconds: float = POLL_SECONDS
) -> None:
    """Wait until no Slurm job trains in any of these directories: another would be refused by its lease.

    A controller that is away for a moment is no reason to submit one.

    Args:
        places: Directories of checkpoints.
        say: Tells a person which jobs are waited for, once each.
        poll_seconds: Between two looks; squeue is asked once in each.
    """
    said: set[str] = set()
    while jobs := {job: place for place in places if (job := owning_job(place))}:
        living = queued(list(jobs))
        if living is None:
            living = set(jobs)
            text = "may train in {}, but squeue gives no answer: asking it again"
        elif living:
            text = (
                "of an earlier start still trains in {}: waiting for it to end (scancel ends it now; its"
                " last checkpoint is gone on from)"
            )
        else:
            return
        for job in sorted(living - said):
            say(f"train: Slurm job {job} {text.format(jobs[job])}")
        said |= living
        time.sleep(poll_seconds)


def owning_job(checkpoints: Path) -> str | None:
    """The Slurm job that holds the lease on a directory of checkpoints."""
    owner = lease.read_owner(checkpoints / lease.NAME)
    return owner.slurm_job_id if owner else None
