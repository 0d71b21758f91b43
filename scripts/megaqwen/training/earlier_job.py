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
    """Wait until no Slurm job trains in a directory: another one would be refused by its lease."""
    said = None
    while (owner := lease.read_owner(checkpoints / lease.NAME)) and owner.slurm_job_id:
        if not is_queued(owner.slurm_job_id):
            return
        if said != owner.slurm_job_id:
            said = owner.slurm_job_id
            say(
                f"train: Slurm job {said} of an earlier start still trains in {checkpoints}: waiting"
                f" for it to end (scancel {said} ends it now; its last checkpoint is gone on from)"
            )
        time.sleep(poll_seconds)
