"""What attempts.jsonl tells, and when a retry is refused."""

import json
import os
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from megaqwen.errors import InputError
from megaqwen.slurm_job import this_job
from megaqwen.training.attempts import (
    KILLED,
    NAME,
    Attempt,
    check_progress,
    check_retry,
    check_started,
    next_attempt,
    read_attempts,
    record_end,
    record_start,
)


def failed(directory: Path, resumed: int, reason: str = "no memory", **changes: object) -> Attempt:
    """Record an attempt that saved nothing."""
    attempt = upcoming(directory, resumed)
    attempt = replace(attempt, **changes)  # type: ignore[arg-type]
    record_start(directory, attempt)
    record_end(directory, attempt, reached=resumed, reason=reason, failed=True)
    return attempt


def upcoming(directory: Path, resumed: int) -> Attempt:
    return next_attempt(directory, resumed=resumed, ranks=2, log=Path("logs/train.log"))


def test_an_attempt_is_told_in_two_lines(tmp_path: Path) -> None:
    attempt = upcoming(tmp_path, 0)
    record_start(tmp_path, attempt)
    (started,) = read_attempts(tmp_path)
    assert (started.reason, started.failed, started.ended) == (KILLED, True, None)
    record_end(tmp_path, attempt, reached=8, reason="finished", failed=False)
    (ended,) = read_attempts(tmp_path)
    assert (ended.number, ended.resumed, ended.reached, ended.failed) == (1, 0, 8, False)
    assert len((tmp_path / NAME).read_text().splitlines()) == 2
    assert upcoming(tmp_path, 8).number == 2


def test_a_line_that_a_kill_cut_short_is_left_out(tmp_path: Path) -> None:
    failed(tmp_path, 0)
    with open(tmp_path / NAME, "a") as stream:
        stream.write('{"number": 2, "resu')
    record_start(tmp_path, upcoming(tmp_path, 0))
    assert [attempt.number for attempt in read_attempts(tmp_path)] == [1, 2]
    assert json.loads((tmp_path / NAME).read_text().splitlines()[-1])["number"] == 2


def test_a_third_try_that_would_fail_alike_is_refused(tmp_path: Path) -> None:
    failed(tmp_path, 4, "the first words")
    check_progress(tmp_path, upcoming(tmp_path, 4))
    failed(tmp_path, 4, "other words")
    with pytest.raises(InputError) as refusal:
        check_progress(tmp_path, upcoming(tmp_path, 4))
    assert "attempts 1, 2 each started after iteration 4" in str(refusal.value)
    assert "the first words (log: logs/train.log.rank*.log" in str(refusal.value)


def test_progress_another_host_or_other_code_are_worth_a_try(tmp_path: Path) -> None:
    failed(tmp_path, 4)
    failed(tmp_path, 4)
    same = upcoming(tmp_path, 4)
    for change in ({"resumed": 6}, {"host": "node8"}, {"code": {"commit": "1"}}, {"ranks": 4}):
        check_progress(tmp_path, replace(same, **change))  # type: ignore[arg-type]


def test_being_told_to_stop_is_no_failure(tmp_path: Path) -> None:
    failed(tmp_path, 4)
    attempt = upcoming(tmp_path, 4)
    record_start(tmp_path, attempt)
    record_end(tmp_path, attempt, reached=4, reason="SIGTERM", failed=False)
    check_progress(tmp_path, upcoming(tmp_path, 4))


def test_kills_without_a_message_count(tmp_path: Path) -> None:
    for _ in range(2):
        record_start(tmp_path, upcoming(tmp_path, 0))
    with pytest.raises(InputError, match=KILLED):
        check_progress(tmp_path, upcoming(tmp_path, 0))


def test_before_a_job_is_submitted_no_host_is_known(tmp_path: Path) -> None:
    failed(tmp_path, 0, host="node1")
    check_retry(tmp_path)
    failed(tmp_path, 0, host="node2")
    check_retry(tmp_path)  # a third host is worth a try
    failed(tmp_path, 0, host="node1")
    with pytest.raises(InputError, match="attempts 1, 2, 3 each started after iteration 0"):
        check_retry(tmp_path)


def test_no_job_is_submitted_where_a_host_failed_twice(tmp_path: Path) -> None:
    failed(tmp_path, 0)
    failed(tmp_path, 0)
    with pytest.raises(InputError, match="attempts 1, 2 each started after iteration 0"):
        check_retry(tmp_path)


def test_jobs_that_leave_no_trace_are_not_tried_for_ever(tmp_path: Path) -> None:
    planned: dict[int, int] = {}
    check_started(tmp_path, planned, 1)
    failed(tmp_path, 0)
    for number in (2, 3, 4, 4):  # Snakemake asks more than once
        check_started(tmp_path, planned, number)
    with pytest.raises(InputError, match="the last 3 jobs ended before their training began"):
        check_started(tmp_path, planned, 5)
    failed(tmp_path, 0)
    check_started(tmp_path, planned, 6)


# As sacct does it: the fields that are asked for, and of an array's tasks two kinds of number.
SACCT = """#!{python} -S
import sys
states = {states}
(fields,) = [word.split("=")[1] for word in sys.argv if word.startswith("--format=")]
(jobs,) = [word.split("=")[1] for word in sys.argv if word.startswith("--jobs=")]
for task, (job, state) in enumerate(states.items(), start=1):
    for step, memory in (("", ""), (".batch", "3K"), (".0", "5K")):
        ids = {{"JobID": f"7_{{task}}{{step}}", "JobIDRaw": f"{{job}}{{step}}"}}
        row = ids | {{"State": state, "MaxRSS": memory}}
        if job in jobs.split(","):
            print("|".join(row.get(field, "") for field in fields.split(",")))
"""


@pytest.fixture
def ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Lets sacct tell the states of two tasks of an array, 8 and 7, its last one."""
    tool = tmp_path / "tools" / "sacct"
    tool.parent.mkdir()
    monkeypatch.setenv("PATH", str(tool.parent), prepend=os.pathsep)

    def tell(*states: str) -> None:
        jobs = dict(zip("87", states, strict=True))
        tool.write_text(SACCT.format(python=sys.executable, states=jobs))
        tool.chmod(0o755)

    return tell


def test_jobs_whose_nodes_were_taken_or_lost_did_not_fail(
    tmp_path: Path, ended: Callable[..., None]
) -> None:
    for job in ("7", "8"):
        record_start(tmp_path, replace(upcoming(tmp_path, 0), slurm_job_id=job))
    ended("PREEMPTED", "NODE_FAIL")
    check_retry(tmp_path)
    ended("OUT_OF_MEMORY", "FAILED")
    with pytest.raises(InputError, match=KILLED):
        check_retry(tmp_path)


def test_a_task_of_an_array_knows_its_own_facts(
    ended: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    ended("RUNNING", "COMPLETED")
    monkeypatch.setenv("SLURM_JOB_ID", "8")
    facts = this_job()
    assert facts and (facts["job_id"], facts["state"]) == ("8", "RUNNING")
    assert facts["peak_memory"] == "5K"
