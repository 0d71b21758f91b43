"""Snakemake's lock on the working directory, when the Snakemake that took it was killed.

Its lock does not say whose it is, so that after a kill Snakemake asks for --unlock. Here each run leaves
its process in a file beside the lock: where that process is gone, the same command can go on.
"""

import shutil
from pathlib import Path

from megaqwen.provenance import write_json
from megaqwen.training.lease import read_owner, this_process

LOCKS, RUNNING = "locks", "running.json"


def record_running(state: Path) -> None:
    """Say that this process holds the lock; `state` is the .snakemake directory."""
    owner = read_owner(state / RUNNING)
    if not (owner and owner.is_here() and owner.is_running()):  # of two runs, the first is watched
        write_json(state / RUNNING, vars(this_process()))


def remove_stale_lock(state: Path) -> str | None:
    """Take off the lock of a run of this host that was killed; what to tell a person of a lock."""
    locks, owner = state / LOCKS, read_owner(state / RUNNING)
    if owner is None or not locks.is_dir() or (owner.is_here() and owner.is_running()):
        return None
    taken = [path.stat().st_mtime for path in locks.iterdir()]
    if not taken or max(taken) > (state / RUNNING).stat().st_mtime:
        return None  # somebody took one since, who has not said yet who it is
    if not owner.is_gone():
        return (
            f"this directory is locked for {owner}: only there can one see whether that still runs."
            " If it has ended, add --unlock to the command, once"
        )
    shutil.rmtree(locks, ignore_errors=True)
    return f"the run of {owner} was killed: its lock on this directory is taken off"
