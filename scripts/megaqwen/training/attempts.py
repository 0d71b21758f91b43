"""What each start of a training did: attempts.jsonl beside its checkpoints.

A line when an attempt starts and one when it ends; an attempt without its second line was killed. By them
a scheduler's retries stop where they get nowhere, and a report tells in how many chunks a training ran.
"""

import json
import os
import socket
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import Any

from megaqwen.checkpoints import newest_finished
from megaqwen.errors import InputError
from megaqwen.provenance import end_last_line, git_state, iso_time
from megaqwen.slurm_job import accounted

NAME = "attempts.jsonl"
KILLED = "killed: it left no message"
TAKEN = (
    "PREEMPTED",
    "NODE_FAIL",
    "BOOT_FAIL",
)  # ends of Slurm jobs that say nothing of the training
ALIKE = 2  # failures from one checkpoint in the same circumstances: the next would fail, too
ANYWHERE = 3  # on whatever hosts
WITHOUT_A_TRACE = 3  # jobs that ended before their training began


@dataclass(frozen=True, kw_only=True)
class Attempt:
    """One start of a training, as the file has it."""

    number: int
    resumed: int
    """The iteration whose checkpoint it started from; 0: the converted weights."""
    ranks: int
    host: str
    slurm_job_id: str | None
    code: dict[str, Any] | None
    """The repository's commit, and whether files differ from it."""
    log: str
    """Ranks log to LOG.rankN.log."""
    started: str
    ended: str | None = None
    reached: int | None = None
    """The newest whole checkpoint when it ended."""
    reason: str = KILLED
    failed: bool = True
    """Neither finished nor told to stop."""

    def same_circumstances(self, other: "Attempt") -> bool:
        """Whether another attempt is made on the same host, by the same code, with as many ranks."""
        mine = (self.host, self.code, self.ranks)
        return mine == (other.host, other.code, other.ranks)


def read_attempts(directory: Path) -> list[Attempt]:
    """All attempts in order; a line that a kill cut short is left out."""
    file = directory / NAME
    attempts: dict[int, dict[str, Any]] = {}
    for line in file.read_text(encoding="utf-8").splitlines() if file.is_file() else ():
        try:
            record = json.loads(line)
            attempts.setdefault(record["number"], {}).update(record)
        except (json.JSONDecodeError, KeyError, TypeError):
            continue
    return [Attempt(**record) for record in attempts.values() if "resumed" in record]


def next_attempt(directory: Path, *, resumed: int, ranks: int, log: Path) -> Attempt:
    """The attempt that starts now."""
    earlier = read_attempts(directory)
    return Attempt(
        number=earlier[-1].number + 1 if earlier else 1,
        resumed=resumed,
        ranks=ranks,
        host=socket.gethostname(),
        slurm_job_id=os.environ.get("SLURM_JOB_ID"),
        code=git_state(),
        log=str(log),
        started=iso_time(time.time()),
    )


def check_progress(directory: Path, attempt: Attempt) -> None:
    """InputError where a retry would fail as the last two attempts did.

    Both started from the checkpoint that this one would start from, in the same circumstances, and
    failed before they saved another.
    """
    newest = failed_from(directory, attempt.resumed)[:ALIKE]
    if len(newest) == ALIKE and all(each.same_circumstances(attempt) for each in newest):
        raise no_progress(newest)


def check_retry(directory: Path) -> None:
    """InputError where no further job should be submitted: the last ones got nowhere.

    A scheduler does not know yet where a job will run. Two failures on one host say enough, and three
    on any.
    """
    newest = failed_from(directory, newest_finished(directory))[:ANYWHERE]
    alike = len(newest) >= ALIKE and newest[0].same_circumstances(newest[1])
    if alike or len(newest) == ANYWHERE:
        raise no_progress(newest)


def check_started(directory: Path, planned: dict[int, int], number: int) -> None:
    """InputError where no further job should be submitted: the last ones never came to train.

    As on a full disk, on which no attempt can be recorded.

    Args:
        directory: The checkpoints.
        planned: How many attempts there were when each of the scheduler's tries was planned, by its
            number; this one's is added.
        number: Of this try, from 1.
    """
    planned.setdefault(number, len(read_attempts(directory)))
    earlier = [planned.get(number - back) for back in range(WITHOUT_A_TRACE + 1)]
    if None not in earlier and len(set(earlier)) == 1:
        raise InputError(
            f"the last {WITHOUT_A_TRACE} jobs ended before their training began: not tried again."
            " Mend what their logs say, and give the command again"
        )


def failed_from(directory: Path, iteration: int) -> list[Attempt]:
    """The attempts, newest first, that failed one after the other from one checkpoint.

    Without those whose nodes Slurm took away or lost before they could save.
    """
    newest_first = reversed(read_attempts(directory))
    failed = takewhile(lambda each: each.failed and each.resumed == iteration, newest_first)
    return without_taken(list(failed))


def without_taken(failed: list[Attempt]) -> list[Attempt]:
    """Those that were not killed together with their Slurm job."""
    killed = [each.slurm_job_id for each in failed if each.reason == KILLED and each.slurm_job_id]
    jobs = accounted(killed) if killed else {}
    taken = {job for job, facts in jobs.items() if facts["state"].startswith(TAKEN)}
    return [each for each in failed if each.slurm_job_id not in taken]


def no_progress(newest_first: Sequence[Attempt]) -> InputError:
    """The message for attempts that all failed from one checkpoint."""
    numbers = ", ".join(str(each.number) for each in reversed(newest_first))
    oldest = newest_first[-1]
    return InputError(
        f"attempts {numbers} each started after iteration {oldest.resumed} and failed before they saved"
        f" another checkpoint: not tried again. The first failed with: {oldest.reason}"
        f" (log: {oldest.log}.rank*.log, {oldest.started} to {oldest.ended or 'its kill'})."
        " Mend that, and give the command again"
    )


def record_start(directory: Path, attempt: Attempt) -> None:
    """Write an attempt's first line."""
    ends = ("ended", "reached", "reason", "failed")
    append(directory, {name: of for name, of in vars(attempt).items() if name not in ends})


def record_end(
    directory: Path, attempt: Attempt, *, reached: int, reason: str, failed: bool
) -> None:
    """Write an attempt's second line."""
    ended = iso_time(time.time())
    end = {"ended": ended, "reached": reached, "reason": reason, "failed": failed}
    append(directory, {"number": attempt.number, **end})


def append(directory: Path, record: Mapping[str, Any]) -> None:
    """Add one line."""
    end_last_line(directory / NAME)
    with open(directory / NAME, "a", encoding="utf-8") as stream:
        stream.write(json.dumps(record) + "\n")
