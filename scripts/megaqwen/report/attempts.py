"""The starts of a training in a report: how far each came, why it ended, and what alarmed it."""

from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

from megaqwen.report.pages import table
from megaqwen.training.attempts import Attempt
from megaqwen.words import duration

HEADER = ("start", "iterations", "kept", "ranks", "where", "started", "took", "commit", "ended by")


def attempts_section(attempts: Sequence[Attempt], records: Sequence[Mapping[str, Any]]) -> str:
    """A row for each start of the training, and its alarms.

    Args:
        attempts: In order.
        records: Of metrics.jsonl.
    """
    kept = [kept_after(attempts, index) for index in range(len(attempts))]
    starts = table(HEADER, [row(*each) for each in zip(attempts, kept, strict=True)])
    alarms = [(record["iteration"], record["alarm"]) for record in records if "alarm" in record]
    return starts + (table(("after iteration", "alarm"), alarms) if alarms else "")


def kept_after(attempts: Sequence[Attempt], index: int) -> int | None:
    """The newest whole checkpoint that a start left; None where nothing tells it."""
    attempt, *later = attempts[index:]
    # One that was killed did not say it: the next start looked.
    return later[0].resumed if later and attempt.reached is None else attempt.reached


def row(attempt: Attempt, kept: int | None) -> tuple[Any, ...]:
    """A start in the table."""
    job = f", Slurm job {attempt.slurm_job_id}" if attempt.slurm_job_id else ""
    return (
        attempt.number,
        f"from {attempt.resumed + 1}",
        "not known" if kept is None else f"{max(0, kept - attempt.resumed)}, to {kept}",
        attempt.ranks,
        f"{attempt.host}{job}",
        attempt.started,
        duration(seconds(attempt)) if attempt.ended else "",
        (attempt.code or {}).get("commit", "")[:10],
        attempt.reason,
    )


def seconds(attempt: Attempt) -> float:
    """How long it took."""
    started, ended = (datetime.fromisoformat(str(at)) for at in (attempt.started, attempt.ended))
    return (ended - started).total_seconds()
