"""A training that is told to stop: it saves, no rank lives on, and the same command goes on from there.

What scripts/launch.py does with a signal is tried on ranks that do nothing but record theirs, which start
in seconds; that Megatron then saves and resumes, on a real training.
"""

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest

from commands import ROOT
from megaqwen.checkpoints import TRACKER, iteration_name, wrong_checksums
from megaqwen.provenance import read_json
from megaqwen.training.attempts import KILLED, read_attempts
from megaqwen.training.lease import this_process
from workspace import Workspace, forget_last_evaluation, losses

RANK = """
import os, pathlib, signal, subprocess, sys, time

here = pathlib.Path(sys.argv[1]) / os.environ["RANK"]
needs_seconds = float(sys.argv[2])

def save(number, frame):
    (here / "asked").touch()
    time.sleep(needs_seconds)
    if reader.poll() is None:
        (here / "saved").touch()
    reader.kill()
    sys.exit(75)

here.mkdir()
reader = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
signal.signal(signal.SIGTERM, save)
(here / "reader").write_text(str(reader.pid))
(here / "started").write_text(str(os.getpid()))
time.sleep(600)
"""


FAST_HEARTBEAT = """
import sys
sys.path.insert(0, "{scripts}")
import launch
from megaqwen.training import lease
launch.Lease = lambda **settings: lease.Lease(heartbeat_seconds={seconds}, **settings)
sys.exit(launch.main())
"""


def eventually(true: Callable[[], object], seconds: float, process: subprocess.Popen[str]) -> None:
    """Wait until `true` is; fail when that takes long or the process has ended."""
    end = time.monotonic() + seconds
    while not true():
        assert process.poll() is None and time.monotonic() < end, process.communicate()
        time.sleep(0.05)


def launch(
    directory: Path, *command: object, through: str = "", heartbeat: float | None = None
) -> subprocess.Popen[str]:
    """scripts/launch.py over two ranks.

    Args:
        directory: For the checkpoints and the log.
        command: What each rank runs.
        through: Another program's name, which starts a shell that starts it.
        heartbeat: Seconds between signs of life, where not the usual ones.
    """
    words: list[object] = [sys.executable, ROOT / "scripts" / "launch.py"]
    if heartbeat:
        script = directory / "launch_fast.py"
        script.write_text(FAST_HEARTBEAT.format(scripts=ROOT / "scripts", seconds=heartbeat))
        words = [sys.executable, script]
    words += ["--ranks-per-node", "2", "--checkpoints", directory, "--log", directory / "log"]
    words += command
    if through:
        script = directory / through
        line = shlex.join(map(str, words))
        script.write_text(
            f"import subprocess\nsubprocess.run(['bash', '-c', {line!r} + '; true'])\n"
        )
        words = [sys.executable, script]
    return subprocess.Popen([*map(str, words)], stderr=subprocess.PIPE, text=True)


def done(directory: Path) -> Path:
    """What ranks run that have nothing to do."""
    script = directory / "done.py"
    script.write_text("")
    return script


class Started:
    """scripts/launch.py over two ranks that record what happens to them."""

    def __init__(self, directory: Path, needs_seconds: float = 0.0, **settings: Any):
        self.directory = directory
        script = directory / "rank.py"
        script.write_text(RANK)
        self.process = launch(directory, script, directory, needs_seconds, **settings)
        eventually(lambda: len(list(filter(None, self.all("started")))) == 2, 120, self.process)
        pids = [int(text) for name in ("started", "reader") for text in self.all(name)]
        self.below = [psutil.Process(pid) for pid in pids]

    def all(self, name: str) -> list[str]:
        return [path.read_text() for path in sorted(self.directory.glob(f"[01]/{name}"))]

    def alive(self) -> list[psutil.Process]:
        """The ranks and readers that have not ended, whether or not they were waited for."""
        return [one for one in self.below if one.is_running() and not is_zombie(one)]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Started]]:
    made: list[Started] = []

    def make(**settings: Any) -> Started:
        made.append(Started(tmp_path, **settings))
        return made[-1]

    yield make
    for started in made:
        started.process.kill()
        for process in started.alive():
            process.kill()


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGHUP"])
def test_a_signal_lets_every_rank_save(start: Callable[..., Started], name: str) -> None:
    started = start()
    finished(started.directory, 7)
    started.process.send_signal(signal.Signals[name])
    _, said = started.process.communicate(timeout=60)
    assert started.alive() == []
    assert len(started.all("saved")) == 2  # each while its reader was there
    assert started.process.returncode == 128 + signal.Signals[name]
    assert "interrupted; the same command goes on after iteration 7" in said
    assert not (started.directory / "lease.json").exists()
    (attempt,) = read_attempts(started.directory)
    assert (attempt.reached, attempt.reason, attempt.failed) == (7, name, False)


def finished(directory: Path, iteration: int) -> None:
    """What counts as a checkpoint whose save came to its end."""
    saved = directory / iteration_name(iteration)
    saved.mkdir(parents=True)
    for file in (".metadata", "metadata.json"):
        (saved / file).write_text("{}")


def test_a_second_signal_ends_at_once(start: Callable[..., Started], tmp_path: Path) -> None:
    other = tmp_path.with_name(f"{tmp_path.name}-other")
    finished(other, 90)
    started = start(needs_seconds=600)
    started.process.send_signal(signal.SIGINT)
    eventually(lambda: len(started.all("asked")) == 2, 60, started.process)
    started.process.send_signal(signal.SIGINT)
    _, said = started.process.communicate(timeout=10)
    assert started.alive() == []
    assert started.all("saved") == []
    assert started.process.returncode == 130
    assert "no checkpoint was saved yet: the same command starts again" in said
    assert f"with other options or files one came to iteration 90: {other}" in said


def test_the_ranks_of_a_killed_launcher_end(start: Callable[..., Started]) -> None:
    """The next start waits for them, takes the lease over and knows that the first was killed."""
    started = start(needs_seconds=3)
    started.process.kill()
    second = launch(started.directory, done(started.directory))
    _, said = second.communicate(timeout=120)
    assert started.alive() == []
    assert len(started.all("asked")) == 2  # torchrun ends their readers as well
    assert second.returncode == 0, said
    assert "waiting for what an earlier start left running" in said
    assert "taking over from process" in said and "whose process is gone" in said
    assert [each.reason for each in read_attempts(started.directory)] == [KILLED, "finished"]


def test_a_second_start_is_refused_while_the_first_lives(start: Callable[..., Started]) -> None:
    started = start()
    second = launch(started.directory, done(started.directory))
    _, said = second.communicate(timeout=120)
    assert second.returncode == 2
    assert f"in use: process {started.process.pid} on" in said
    assert "last sign of life" in said
    assert len(started.alive()) == 4
    assert len(read_attempts(started.directory)) == 1


def test_ranks_save_and_end_when_snakemake_is_killed(start: Callable[..., Started]) -> None:
    started = start(through="snakemake")
    started.process.kill()
    end = time.monotonic() + 60
    while started.alive() or (started.directory / "lease.json").exists():
        assert time.monotonic() < end, started.alive()
        time.sleep(0.05)
    assert len(started.all("saved")) == 2
    assert [each.reason for each in read_attempts(started.directory)] == ["SIGHUP"]


def test_a_start_whose_lease_is_taken_ends_without_saving(
    start: Callable[..., Started], tmp_path: Path
) -> None:
    started = start(heartbeat=0.2)
    taken = replace(this_process(), token="of-another-host")
    (tmp_path / "lease.json").write_text(json.dumps(vars(taken)))
    _, said = started.process.communicate(timeout=60)
    assert started.alive() == []
    assert started.all("asked") == []
    assert "was taken over by" in said
    assert json.loads((tmp_path / "lease.json").read_text())["token"] == "of-another-host"


@pytest.mark.slow
def test_a_save_may_take_longer_than_torchrun_would_wait(start: Callable[..., Started]) -> None:
    started = start(needs_seconds=40)
    started.process.send_signal(signal.SIGTERM)
    started.process.wait(timeout=90)
    assert len(started.all("saved")) == 2


SLOW_CHECKSUMS = """
import sys, time
sys.path.insert(0, "{scripts}")
import train
from megaqwen import checkpoints
write = checkpoints.write_checksums
checkpoints.write_checksums = lambda *words: time.sleep(2) or write(*words)
if __name__ == "__main__":
    sys.exit(train.main())
"""


def stopped(words: Sequence[str], output: Path, how: Callable[[psutil.Process], None]) -> str:
    """Start a training of 40 iterations, stop it after three more, look at what it left; what it said."""
    before = iterations(output)
    process = subprocess.Popen(
        [sys.executable, ROOT / "scripts" / "launch.py", *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    eventually(lambda: iterations(output) >= before + 3, 200, process)
    how(psutil.Process(process.pid))
    said, _ = process.communicate(timeout=120)
    assert [one for one in psutil.process_iter(["cmdline"]) if str(output) in words_of(one)] == []
    (checkpoints,) = (output / "checkpoints").iterdir()
    saved = int((checkpoints / TRACKER).read_text())
    assert before + 3 <= saved < 40 and saved == len(losses(checkpoints))
    assert f"stopped: iteration {saved} of 40 is saved" in said
    assert not (output / "manifest.json").exists()
    return f"{said}\nexit status {process.returncode}"


def before_the_time_limit(launcher: psutil.Process) -> None:
    """As Slurm does: the ranks alone get the signal."""
    (torchrun,) = launcher.children()
    for rank in torchrun.children():
        rank.send_signal(signal.SIGUSR1)


def test_a_stopped_training_saves_and_goes_on(workspace: Workspace, tmp_path: Path) -> None:
    options = {"train_iters": 40, "save_interval": 1000, "eval_interval": 20}
    output = workspace.directory / "stopped"
    command = workspace.launch_words("stopped", 2, options)
    slow = tmp_path / "train.py"
    slow.write_text(SLOW_CHECKSUMS.format(scripts=ROOT / "scripts"))
    slowly = workspace.launch_words("stopped", 2, options, slow)
    stopped(slowly, output, before_the_time_limit)
    (checkpoints,) = (output / "checkpoints").iterdir()
    (attempt,) = read_attempts(checkpoints)
    assert attempt.reason.startswith("stopped: ") and not attempt.failed
    last = checkpoints / f"iter_{attempt.reached:07}"
    assert wrong_checksums(last) == []
    assert {path.name for path in last.glob("checksums.*")} == {
        f"checksums.rank{path.name.split('_')[2]}.json" for path in last.glob("__*")
    }

    said = stopped(command, output, lambda launcher: launcher.send_signal(signal.SIGTERM))
    saved = int((checkpoints / TRACKER).read_text())
    assert f"the same command goes on after iteration {saved}" in said
    assert said.endswith("exit status 143")

    cut_short = checkpoints / f"iter_{saved + 1:07}"
    cut_short.mkdir()
    (cut_short / "__0_0.distcp").write_bytes(b"half")
    assert workspace.train("stopped", 2, options) == checkpoints
    log = (workspace.directory / "stopped.log.rank1.log").read_text()
    assert f"resuming after iteration {saved}" in log
    assert len(losses(checkpoints)) == 40
    assert not cut_short.exists()
    results = read_json(output / "manifest.json")["results"]
    assert results["iteration"] == 40

    validation = results["evaluations"]["validation"]
    # After those of iterations 20 and 40.
    assert validation["first_sample"] == 2 * validation["samples"]

    # Killed between the last save and the manifest: only what was not evaluated yet is left to do, of
    # the same samples.
    forget_last_evaluation(checkpoints)
    workspace.train("stopped", 2, options)
    again = read_json(output / "manifest.json")["results"]
    assert {**again, "peak_memory_bytes": 0} == {**results, "peak_memory_bytes": 0}


def is_zombie(process: psutil.Process) -> bool:
    try:
        return process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def words_of(process: psutil.Process) -> list[str]:
    return process.info["cmdline"] or []


def iterations(output: Path) -> int:
    return sum(len(losses(file.parent)) for file in output.glob("checkpoints/*/metrics.jsonl"))
