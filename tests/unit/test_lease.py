"""The lease on a checkpoint directory: one owner, known by name, alive or not."""

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from megaqwen.errors import InputError
from megaqwen.training.lease import (
    NAME,
    Lease,
    Owner,
    beginning,
    check_held,
    read_owner,
    this_process,
)


def lease(directory: Path, said: list[str] | None = None, **settings: float) -> Lease:
    quick = {"heartbeat_seconds": 0.05, "stale_seconds": 2.0, "ending_seconds": 1.0}
    say: Callable[[str], None] = said.append if said is not None else lambda text: None
    return Lease(directory=directory, say=say, **{**quick, **settings})


def put(directory: Path, owner: Owner, seconds_old: float = 0.0) -> Path:
    """A lease that somebody else holds."""
    file = directory / NAME
    file.write_text(json.dumps(vars(owner)))
    os.utime(file, (time.time() - seconds_old,) * 2)
    return file


def elsewhere() -> Owner:
    """An owner on another host, in a Slurm job."""
    return replace(this_process(), host="node7", machine="another boot", slurm_job_id="4711")


def test_it_is_taken_kept_fresh_and_given_back(tmp_path: Path) -> None:
    mine = lease(tmp_path / "made")
    mine.take()
    file = tmp_path / "made" / NAME
    owner = read_owner(file)
    assert owner and (owner.pid, owner.token) == (os.getpid(), mine.owner.token)
    os.utime(file, (0, 0))
    end = time.monotonic() + 30
    while file.stat().st_mtime == 0:
        assert time.monotonic() < end
        time.sleep(0.01)
    mine.release()
    assert list((tmp_path / "made").iterdir()) == []


def test_an_owner_who_lives_on_this_machine_is_named(tmp_path: Path) -> None:
    put(tmp_path, this_process(), seconds_old=5000)  # its process counts, not its age
    with pytest.raises(InputError, match=rf"in use: process {os.getpid()} on .* 500\d s ago"):
        lease(tmp_path).take()
    assert [path.name for path in tmp_path.iterdir()] == [NAME]


def test_an_owner_whose_process_is_gone_is_replaced(tmp_path: Path) -> None:
    reused = replace(this_process(), process_began=beginning(psutil.Process()) - 100)
    put(tmp_path, reused)
    said: list[str] = []
    mine = lease(tmp_path, said)
    mine.take()
    assert read_owner(tmp_path / NAME) == mine.owner
    assert len(said) == 1 and "taking over" in said[0] and "process is gone" in said[0]
    mine.release()


def test_a_clock_that_is_set_ends_no_owner(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    owner = this_process()
    began = psutil.Process().create_time()
    monkeypatch.setattr(psutil.Process, "create_time", lambda process: began + 3600)
    assert owner.is_running() and not owner.is_gone()
    assert beginning(psutil.Process(1)) < owner.process_began  # in ticks since the machine began


def test_ranks_that_a_dead_owner_left_keep_others_out(tmp_path: Path) -> None:
    gone = replace(this_process(), process_began=0.0)
    put(tmp_path, gone)
    words = [sys.executable, "-c", "import time; time.sleep(600)"]
    with subprocess.Popen(words, env={**os.environ, "MEGAQWEN_LEASE": gone.token}) as left:
        try:
            with pytest.raises(InputError, match=f"live on .* processes {left.pid}"):
                lease(tmp_path).take()
            assert read_owner(tmp_path / NAME) == gone
            threading.Timer(0.5, left.kill).start()
            mine = lease(tmp_path, ending_seconds=60)
            mine.take()
            mine.release()
        finally:
            left.kill()


def test_another_host_that_gives_signs_of_life_is_refused_at_the_next(tmp_path: Path) -> None:
    file = put(tmp_path, elsewhere())
    threading.Timer(0.3, os.utime, (file, (time.time() + 1,) * 2)).start()
    with pytest.raises(InputError, match=r"node7, Slurm job 4711.*scancel 4711"):
        lease(tmp_path, stale_seconds=600).take()


def test_another_host_that_gives_none_is_waited_for_and_replaced(tmp_path: Path) -> None:
    put(tmp_path, elsewhere())
    said: list[str] = []
    mine = lease(tmp_path, said, stale_seconds=1.0)
    started = time.monotonic()
    mine.take()
    assert time.monotonic() - started >= 0.9
    assert "no sign of life" in said[0]
    mine.release()


def test_of_many_that_take_over_at_once_one_wins(tmp_path: Path) -> None:
    put(tmp_path, elsewhere(), seconds_old=1000)
    taken, refused = [], []

    def take(mine: Lease) -> None:
        try:
            mine.take()
            taken.append(mine)
        except InputError as error:
            refused.append(str(error))

    threads = [threading.Thread(target=take, args=(lease(tmp_path),)) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert len(taken) == 1 and len(refused) == 7
    assert read_owner(tmp_path / NAME) == taken[0].owner
    taken[0].release()


def test_the_old_owner_learns_that_it_was_taken_over(tmp_path: Path) -> None:
    lost = threading.Event()
    mine = lease(tmp_path)
    mine.lost = lost.set
    mine.take()
    check_held(tmp_path, mine.owner.token)
    put(tmp_path, elsewhere())
    assert lost.wait(30)
    with pytest.raises(InputError, match=r"taken over by process .* on node7"):
        check_held(tmp_path, mine.owner.token)
    mine.release()
    assert (tmp_path / NAME).exists()  # it is the other's


def test_ranks_without_a_launcher_leave_a_leased_directory_alone(tmp_path: Path) -> None:
    check_held(tmp_path, None)
    put(tmp_path, elsewhere())
    with pytest.raises(InputError, match=r"in use: .*node7"):
        check_held(tmp_path, None)
