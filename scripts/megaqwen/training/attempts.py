"""What each start of a training did: attempts.jsonl beside its checkpoints.

A line when an attempt starts and one when it ends; an attempt without its second line was killed. By them
a scheduler's retries stop where they get nowhere, and a report tells in how many chunks a training ran.
"""

import json
import os
import socket
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megaqwen.errors import InputError
from megaqwen.provenance import end_last_line, git_state, iso_time

NAME = "attempts.jsonl"
KILLED = "killed: it left no message"


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
    *_, first, second = [None, None, *read_attempts(directory)]
    if first is None or second is None:
        return
    alike = all(
        each.failed and each.resumed == attempt.resumed and each.same_circumstances(attempt)
        for each in (first, second)
    )
    if alike:
        raise InputError(
            f"attempts {first.number} and {second.number} both started after iteration"
            f" {attempt.resumed} and failed before they saved another checkpoint: not tried again."
            f" The first failed with: {first.reason} (log: {first.log}.rank*.log,"
            f" {first.started} to {first.ended or 'its kill'}). Mend that, and give the command again"
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
