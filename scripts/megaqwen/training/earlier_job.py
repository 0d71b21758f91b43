"""A training that a killed Snakemake left on the cluster: its job goes on, and holds the lease."""

import time
from collections.abc import Callable
from pathlib import Path

from megaqwen.slurm_job import is_queued
from megaqwen.training import lease

POLL_SECONDS = 10.0


def wait_for_earlier_job(
    checkpoints: Path, say: Callable[[str], None], poll_seconds: float = POLL_SECONDS
) -> None:
    """Wait until no Slurm job trains in a directory: another one would be refused by its lease.

    A controller that is away for a moment is no reason to submit another one.
    """
    said = ""
    while (owner := lease.read_owner(checkpoints / lease.NAME)) and owner.slurm_job_id:
        job = owner.slurm_job_id
        queued = is_queued(job)
        if queued is False:
            return
        text = (
            f"train: Slurm job {job} of an earlier start still trains in {checkpoints}: waiting"
            f" for it to end (scancel {job} ends it now; its last checkpoint is gone on from)"
            if queued
            else f"train: waiting for squeue to tell whether Slurm job {job} still trains in"
            f" {checkpoints}: it gives no answer"
        )
        if said != text:
            said = text
            say(text)
        time.sleep(poll_seconds)
