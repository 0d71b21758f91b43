"""What Slurm knows of the job that this process is in, and of jobs that have ended."""

import os
import subprocess
from collections.abc import Sequence
from typing import Any

SECONDS = 20  # sacct waits for a database that may be away
FIELDS = {
    "JobIDRaw": "job_id",  # a task of an array has its own there, as in its SLURM_JOB_ID
    "State": "state",
    "Partition": "partition",
    "Account": "account",
    "NNodes": "nodes",
    "NodeList": "node_list",
    "AllocTRES": "allocated",
    "Submit": "submitted",
    "Start": "started",
    "Elapsed": "elapsed",
    "Timelimit": "time_limit",
    "TotalCPU": "cpu_time",
}


def this_job() -> dict[str, Any] | None:
    """This process's job: its id, its nodes, and what sacct tells of it until now; None in no job."""
    job = os.environ.get("SLURM_JOB_ID")
    if not job:
        return None
    nodes = os.environ.get("SLURM_JOB_NODELIST")
    return {"job_id": job, "node_list": nodes, **accounted([job]).get(job, {})}


def queued(jobs: Sequence[str]) -> set[str] | None:
    """Those of some jobs that squeue has, waiting, running or ending; None where it gives no answer now.

    None of them where there is no squeue to ask.
    """
    words = ["squeue", "--noheader", f"--jobs={','.join(jobs)}", "--format=%A"]
    try:
        done = subprocess.run(words, capture_output=True, text=True, timeout=SECONDS)
    except OSError:
        return set()
    except subprocess.TimeoutExpired:
        return None
    if done.returncode and "Invalid job id" not in done.stderr:  # as of one that ended long ago
        return None
    return set(done.stdout.split()) & set(jobs)


def accounted(jobs: Sequence[str]) -> dict[str, dict[str, str]]:
    """What sacct tells of jobs, by id: FIELDS, times as sacct writes them, and the peak memory of a step.

    Empty without accounting; a job that it does not know is left out.
    """
    words = ["sacct", "--noheader", "--parsable2", f"--jobs={','.join(jobs)}"]
    try:
        done = subprocess.run(
            [*words, f"--format={','.join(FIELDS)},MaxRSS"],
            capture_output=True,
            text=True,
            timeout=SECONDS,
        )
    except (OSError, subprocess.TimeoutExpired):
        return {}
    found: dict[str, dict[str, str]] = {}
    for line in done.stdout.splitlines():
        *values, memory = line.split("|")
        job, step, _ = values[0].partition(".")
        if not step:
            found[job] = dict(zip(FIELDS.values(), values, strict=True))
        elif job in found and kibibytes(memory) > kibibytes(found[job].get("peak_memory", "")):
            found[job]["peak_memory"] = memory  # of one task of the step that had most
    return found


def kibibytes(text: str) -> float:
    """sacct's `1234K` or `1.5M` as a number; 0 where it knows none."""
    units = {"K": 1, "M": 1024, "G": 1024**2, "T": 1024**3}
    if not text:
        return 0.0
    number, unit = (text[:-1], text[-1]) if text[-1] in units else (text, "")
    return float(number) * units.get(unit, 1 / 1024)
