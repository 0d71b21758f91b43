"""Snakemake's lock after a kill: taken off where its owner is known to be gone, and nowhere else."""

import json
import os
from dataclasses import replace
from pathlib import Path

import pytest

from megaqwen.stale_lock import record_running, remove_stale_lock
from megaqwen.training.lease import Owner, read_owner, this_process


def locked(state: Path, owner: Owner | None) -> Path:
    """A lock as Snakemake leaves it, taken before its owner was recorded."""
    lock = state / "locks" / "0.output.lock"
    lock.parent.mkdir()
    lock.write_text("results/a\n")
    os.utime(lock, (1, 1))
    if owner:
        (state / "running.json").write_text(json.dumps(vars(owner)))
    return lock


def killed() -> Owner:
    return replace(this_process(), process_began=0.0)


def test_of_a_killed_run(tmp_path: Path) -> None:
    lock = locked(tmp_path, killed())
    words = remove_stale_lock(tmp_path)
    assert words and f"process {os.getpid()}" in words
    assert not lock.exists()
    assert remove_stale_lock(tmp_path) is None


def test_of_a_run_before_a_reboot(tmp_path: Path) -> None:
    _, processes = killed().machine.split()
    lock = locked(tmp_path, replace(this_process(), machine=f"another-boot {processes}"))
    assert "taken off" in (remove_stale_lock(tmp_path) or "")
    assert not lock.exists()


@pytest.mark.parametrize("whose", ["a living process", "nobody known"])
def test_of_anybody_else(tmp_path: Path, whose: str) -> None:
    lock = locked(tmp_path, {"a living process": this_process()}.get(whose))
    assert remove_stale_lock(tmp_path) is None
    assert lock.exists()


@pytest.mark.parametrize("where", ["another host", "another container of this host"])
def test_of_somebody_who_cannot_be_seen(tmp_path: Path, where: str) -> None:
    boot, _ = killed().machine.split()
    elsewhere = {
        "another host": replace(killed(), host="login2", machine="another-boot pid:[1]"),
        "another container of this host": replace(killed(), machine=f"{boot} pid:[1]"),
    }
    lock = locked(tmp_path, elsewhere[where])
    assert "add --unlock" in (remove_stale_lock(tmp_path) or "")
    assert lock.exists()


def test_one_that_was_taken_since(tmp_path: Path) -> None:
    lock = locked(tmp_path, killed())
    os.utime(lock, None)
    os.utime(tmp_path / "running.json", (2, 2))
    assert remove_stale_lock(tmp_path) is None
    assert lock.exists()


def test_the_first_of_two_runs_is_watched(tmp_path: Path) -> None:
    (tmp_path / "running.json").write_text(json.dumps(vars(killed())))
    record_running(tmp_path)
    first = read_owner(tmp_path / "running.json")
    assert first and first.is_running()
    record_running(tmp_path)
    assert read_owner(tmp_path / "running.json") == first
