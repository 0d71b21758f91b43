"""Jobs that Snakemake's Slurm executor loses sight of, in the process that submitted them.

While it asks Slurm for the states of its jobs, it knows none of them: who presses Ctrl-C in those moments
cancels nothing. It asks more and more seldom, until three minutes go by before the end of a job, or
Ctrl-C, is heeded. And of a job that was preempted it expects that Slurm starts it again, which Slurm does
not where PreemptMode is CANCEL or the job was submitted with --no-requeue: it would wait for ever.
"""

import atexit
import logging
import subprocess
import threading
import time
from collections.abc import Callable
from typing import Any

SECONDS = 60  # that Slurm may take for an answer
POLL_SECONDS = 30.0

logger = logging.getLogger(__name__)


def cancel_jobs(name: str) -> None:
    """Cancel what is left of the jobs of a name: those of one Snakemake, whose run ID is their name."""
    try:
        subprocess.run(["scancel", f"--name={name}"], capture_output=True, timeout=SECONDS)
    except (OSError, subprocess.TimeoutExpired) as error:
        logger.warning("jobs may still run (scancel --name=%s ends them): %s", name, error)


def watch_jobs(executor: Any, say: Callable[[str], None]) -> None:
    """Let Snakemake look after its jobs, try again what was preempted, and leave none behind.

    Args:
        executor: Of snakemake-executor-plugin-slurm.
        say: Tells a person of each job.
    """

    atexit.register(cancel_jobs, executor.run_uuid)

    def watch() -> None:
        before: set[str] = set()
        while True:
            time.sleep(POLL_SECONDS)
            pause = executor.next_seconds_between_status_checks
            executor.next_seconds_between_status_checks = min(pause, int(POLL_SECONDS))
            # Twice: in the first moments one that will be requeued looks the same.
            preempted = preempted_jobs(executor.run_uuid)
            for job in taken_out(executor, preempted & before):
                say(f"Slurm job {job.external_jobid} was preempted, and ended: it is tried again")
                executor.report_job_error(job, msg="It was preempted. ")
            before = preempted

    threading.Thread(target=watch, name="jobs", daemon=True).start()


def preempted_jobs(name: str) -> set[str]:
    """Those of a name that were preempted, and do not wait to be started again."""
    words = ["squeue", "--noheader", f"--name={name}", "--states=PREEMPTED", "--format=%i|%T"]
    try:
        done = subprocess.run(words, capture_output=True, text=True, timeout=SECONDS)
    except (OSError, subprocess.TimeoutExpired):
        return set()
    lines = (line.split("|") for line in done.stdout.splitlines())
    return {job for job, state in lines if state == "PREEMPTED"}


def taken_out(executor: Any, jobs: set[str]) -> list[Any]:
    """The executor's own records of jobs, which it forgets; none while it asks for their states."""
    with executor.lock:
        found = [job for job in executor.active_jobs if job.external_jobid in jobs]
        executor.active_jobs = [job for job in executor.active_jobs if job not in found]
    return found
