"""Jobs that Snakemake's Slurm executor loses sight of, in the process that submitted them.

While it asks Slurm for the states of its jobs, it knows none of them: who presses Ctrl-C in those moments
cancels nothing. It asks more and more seldom, until three minutes go by before the end of a job is
heeded. So is Ctrl-C, and where Slurm gives no answer only when it has been asked as often as the profile
says, half an hour. And of a job that was preempted it expects that Slurm starts it again, which it does
not where PreemptMode is CANCEL or the job was submitted with --no-requeue: it would wait for ever.

It asks sacct in place of the squeue that a profile names, where Slurm may forget ended jobs too soon
(MinJobAge) or does not tell when asked. By sacct's answer it never learns that somebody cancelled a job,
and takes the state of one task of an array for that of the others.
"""

import asyncio
import atexit
import logging
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from functools import partial
from typing import Any

SECONDS = 60  # that Slurm may take for an answer
END_SECONDS = 2.0  # that Snakemake, at its end, waits for a look at the jobs that is under way
FOREVER = 10**9  # seconds, for MinJobAge=0, by which Slurm forgets nothing
PREEMPTED_SECONDS = 10  # that a job is preempted at least until it is taken for ended
LOOKS = 3  # first pauses between looks for which the plugin wants ended jobs to be remembered

logger = logging.getLogger(__name__)


def cancel_jobs(name: str) -> None:
    """Cancel what is left of the jobs of a name: those of one Snakemake, whose run ID is their name."""
    try:
        subprocess.run(["scancel", f"--name={name}"], capture_output=True, timeout=SECONDS)
    except (OSError, subprocess.TimeoutExpired) as error:
        logger.warning("jobs may still run (scancel --name=%s ends them): %s", name, error)


def remembered_seconds(executor: Any) -> int | None:
    """How long Slurm remembers an ended job (MinJobAge); None where it does not tell.

    Once it has told, the executor does not ask again before each look, when it may get no answer.
    """
    plugin: Any = sys.modules[type(executor).__module__]
    seconds: int | None = plugin.get_min_job_age()
    if seconds == 0:
        seconds = FOREVER
    if seconds is not None:
        plugin.get_min_job_age = lambda: seconds
    return seconds


def forgets_too_soon(remembered: int | None, first_look: int) -> str | None:
    """Why Snakemake would ask sacct in place of squeue, and what to do; None where it does not.

    Args:
        remembered: Seconds, of `remembered_seconds`.
        first_look: Seconds, of slurm-init-seconds-before-status-checks.
    """
    if remembered is None:
        return (
            "Slurm does not tell (scontrol show config) how long it remembers ended jobs: try again"
        )
    if remembered >= LOOKS * first_look:
        return None
    advice = (
        f"set it to {remembered // LOOKS}" if remembered >= LOOKS else "MinJobAge has to be more"
    )
    return (
        f"Slurm remembers ended jobs for {remembered} s (MinJobAge), less than {LOOKS} times"
        f" slurm-init-seconds-before-status-checks, which is {first_look}: {advice}"
    )


def watch_jobs(executor: Any, say: Callable[[str], None], remembered: int | None = None) -> None:
    """Let Snakemake look after its jobs, try again what was preempted, and leave none behind.

    They are looked at as often as Snakemake's own seconds-between-status-checks says.

    Args:
        executor: Of snakemake-executor-plugin-slurm.
        say: Tells a person of each job.
        remembered: How many seconds Slurm remembers ended jobs for: they are looked at before.
    """
    atexit.register(cancel_jobs, executor.run_uuid)
    # A daemon, which ends with the process.
    executor.wait_thread.join = partial(executor.wait_thread.join, END_SECONDS)
    longest = executor.workflow.remote_execution_settings.seconds_between_status_checks
    if remembered is not None:
        longest = min(longest, max(1, remembered // LOOKS))

    async def sleep() -> None:
        await asyncio.sleep(min(longest, executor.next_seconds_between_status_checks))

    executor.sleep = sleep

    def watch() -> None:
        before: set[str] = set()
        while True:
            time.sleep(max(longest, PREEMPTED_SECONDS))
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
