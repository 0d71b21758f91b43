"""A training that is killed, whenever and however, ends in the bits of one that never was.

One training of two ranks runs through; others are hurt in turn and started again by the same command.
"""

import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from commands import ROOT, run_script
from megaqwen.checkpoints import FILES, TRACKER, is_finished, iterations
from megaqwen.provenance import read_json
from megaqwen.training.attempts import read_attempts
from megaqwen.training.metrics import read_metrics
from megaqwen.training.supervise import is_alive
from workspace import BUCKETS, Workspace, differing, losses, weights

RANKS = 2
SCHEDULE: dict[str, Any] = {"train_iters": 6, "save_interval": 2, "eval_interval": 6}
OPTIONS: dict[str, Any] = {**SCHEDULE, **BUCKETS}
SECONDS = 400.0  # that a start may take on a loaded machine


@pytest.fixture(scope="module")
def straight(workspace: Workspace) -> Path:
    """Trained without a stop."""
    return workspace.train("straight", RANKS, OPTIONS)


@pytest.fixture(scope="module")
def expected(workspace: Workspace, straight: Path) -> dict[str, torch.Tensor]:
    return weights(workspace, straight, 6)


class Training:
    """One that will be hurt, in a directory of its own."""

    def __init__(self, workspace: Workspace, name: str):
        self.workspace, self.name = workspace, name
        self.words = workspace.launch_words(name, RANKS, OPTIONS)
        self.directory = Path(self.words[self.words.index("--checkpoints") + 1])

    @contextlib.contextmanager
    def started(self) -> Iterator[subprocess.Popen[str]]:
        process = subprocess.Popen(
            [sys.executable, ROOT / "scripts" / "launch.py", *self.words],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        try:
            yield process
        finally:
            end_all(process)

    def run(self) -> str:
        """Start it, and wait for its good end; what it said."""
        with self.started() as process:
            said, _ = process.communicate(timeout=SECONDS)
        assert process.returncode == 0, said
        return said

    def hurt(self, when: Callable[[], object], how: Callable[[subprocess.Popen[str]], None]) -> str:
        """Start it, do something to it at some moment, and wait for its end; what it said.

        Nothing that it started is left, and a rank started no Python from the beginning.
        """
        with self.started() as process:
            end = time.monotonic() + SECONDS
            while not when():
                assert process.poll() is None and time.monotonic() < end
                time.sleep(0.002)
            below = psutil.Process(process.pid).children(recursive=True)
            assert not [each for each in below if "spawn_main" in " ".join(each.cmdline())]
            how(process)
            said, _ = process.communicate(timeout=SECONDS)
            _, left = psutil.wait_procs(below, timeout=20)
            assert not [each.cmdline() for each in left if is_alive(each)]
        assert process.returncode != 0, said
        return said

    def reached(self, iteration: int) -> Callable[[], bool]:
        """Whether an iteration was logged."""
        file = self.directory / "metrics.jsonl"
        return lambda: file.is_file() and len(losses(self.directory)) >= iteration


def ranks_of(process: subprocess.Popen[str]) -> list[psutil.Process]:
    """The ranks below a launcher, in order."""
    (torchrun,) = psutil.Process(process.pid).children()
    return sorted(torchrun.children(), key=lambda rank: int(rank.environ()["RANK"]))


def kill_a_rank(process: subprocess.Popen[str]) -> None:
    ranks_of(process)[0].kill()


def kill_everything(process: subprocess.Popen[str]) -> None:
    """As a power cut does: no process does anything more."""
    below = psutil.Process(process.pid).children(recursive=True)
    for one in below:
        one.suspend()
    for one in (psutil.Process(process.pid), *below):
        one.send_signal(signal.SIGKILL)


def end_all(process: subprocess.Popen[str]) -> None:
    with contextlib.suppress(psutil.NoSuchProcess):
        for one in psutil.Process(process.pid).children(recursive=True):
            one.kill()
    process.kill()
    process.wait()


def flip_a_bit(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def killed_in_its_first_save(workspace: Workspace) -> Training:
    """Tried again where the save was whole before the kill came: on a busy machine it may be."""
    for number in range(5):
        training = Training(workspace, f"killed-{number}")
        saved = training.directory

        def saving(saved: Path = saved) -> bool:
            return any(not is_finished(each) for each in saved.glob("iter_*"))

        training.hurt(saving, kill_everything)
        if not (saved / TRACKER).exists():
            return training
    raise AssertionError("every save was whole before the kill came")


def test_killed_in_a_save_and_after_one(
    workspace: Workspace, expected: dict[str, torch.Tensor], straight: Path
) -> None:
    training = killed_in_its_first_save(workspace)
    said = training.hurt(training.reached(5), kill_a_rank)
    assert "taking over from process" in said
    assert "iter_0000002, which is not complete" in said
    assert iterations(training.directory) == [2, 4]
    said = training.run()
    assert "resuming after iteration 4" in said
    assert losses(training.directory) == losses(straight)
    assert differing(weights(workspace, training.directory, 6), expected) == []
    attempts = read_attempts(training.directory)
    assert [(each.resumed, each.failed) for each in attempts] == [(0, True), (0, True), (4, False)]
    assert attempts[1].reached == 4


@pytest.mark.slow
def test_damaged_on_disk(workspace: Workspace, straight: Path, expected: Any) -> None:
    """The last checkpoint truncated and the one before it with a flipped bit: back to the first."""
    training = Training(workspace, "damaged")
    shutil.copytree(straight.parents[1], training.directory.parents[1])
    (training.directory.parents[1] / "manifest.json").unlink()
    newest, second = (training.directory / f"iter_000000{number}" for number in (6, 4))
    sizes = read_json(newest / FILES)["files"]
    largest = max((name for name in sizes if name.startswith("__")), key=lambda name: sizes[name])
    os.truncate(newest / largest, sizes[largest] - 10)
    flip_a_bit(second / largest)
    said = training.run()
    assert f"{largest} has {sizes[largest] - 10:,} of its {sizes[largest]:,} bytes" in said
    assert f"{largest} has CRC-32" in said
    assert "resuming after iteration 2" in said
    assert len(list(training.directory.glob("damaged-*"))) == 2
    assert differing(weights(workspace, training.directory, 6), expected) == []


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Callable[[int], Path]]:
    """A filesystem of so many bytes; given again, it grows."""
    place = tmp_path / "disk"
    place.mkdir()

    def sized(size: int) -> Path:
        again = "remount," if place.is_mount() else ""
        words = ["mount", "-t", "tmpfs", "-o", f"{again}size={size}", "tmpfs", str(place)]
        if subprocess.run(words, capture_output=True).returncode:
            pytest.skip("mounting a small filesystem takes root")
        return place

    yield sized
    if place.is_mount():
        subprocess.run(["umount", "--lazy", place], check=True)


@pytest.mark.slow
def test_a_full_disk_in_a_save(
    workspace: Workspace, straight: Path, expected: Any, small_disk: Callable[[int], Path]
) -> None:
    """Of three checkpoints one and a half have room: the first is whole and resumed from."""
    checkpoint = sum(file.stat().st_size for file in (straight / "iter_0000002").iterdir())
    disk = small_disk(checkpoint * 3 // 2 + (4 << 20))
    training = Training(workspace, "full")
    training.directory.parents[1].symlink_to(disk)
    with training.started() as process:
        said, _ = process.communicate(timeout=SECONDS)
    assert process.returncode != 0
    assert "the disk is full" in said
    assert iterations(training.directory)[0] == 2 and is_finished(
        training.directory / "iter_0000002"
    )
    small_disk(checkpoint * 5)
    said = training.run()
    assert "resuming after iteration 2" in said
    assert differing(weights(workspace, training.directory, 6), expected) == []


def test_a_loss_that_is_no_number_ends_training_and_is_no_stop(workspace: Workspace) -> None:
    """It would come again from what is saved: the third try is none."""
    wild = {"lr": 1e30, "min_lr": 1e30, "lr_warmup_iters": 0, "clip_grad": 0.0, "save_interval": 6}
    words = workspace.launch_words("wild", 1, {**SCHEDULE, **wild})
    checkpoints = Path(words[words.index("--checkpoints") + 1])
    for _ in range(2):
        done = run_script("launch.py", *words)
        assert done.returncode == 1, done.stdout + done.stderr
        assert "error: a loss or a gradient is no number: Rank 0, " in done.stdout + done.stderr
        assert "stopped" not in done.stdout and "Traceback" not in done.stdout + done.stderr
    assert iterations(checkpoints) == []
    assert [attempt.failed for attempt in read_attempts(checkpoints)] == [True, True]
    alarms = [row for row in read_metrics(checkpoints / "metrics.jsonl") if "alarm" in row]
    assert "found NaN in local" in alarms[-1]["alarm"]
    done = run_script("launch.py", "--try-number", "3", *words)
    assert done.returncode == 2
    assert "not tried again" in done.stderr and "is no number" in done.stderr


@pytest.mark.slow
def test_another_layout_goes_on(workspace: Workspace, straight: Path) -> None:
    """From two data parallel ranks to two stages, to two tensor parallel ranks that take less memory."""
    training = Training(workspace, "layouts")
    shutil.copytree(straight.parents[1], training.directory.parents[1])
    (training.directory.parents[1] / "manifest.json").unlink()
    shutil.rmtree(training.directory / "iter_0000006")
    shutil.rmtree(training.directory / "iter_0000004")
    stages = {**OPTIONS, "pipeline_model_parallel_size": 2}
    assert workspace.train("layouts", 2, stages) == training.directory
    log = (workspace.directory / "layouts.log.rank1.log").read_text()
    assert "saved under another layout: pipeline 1 -> 2, data 2 -> 1" in log
    assert "resuming after iteration 2" in log
    curve, straight_curve = losses(training.directory), losses(straight)
    assert max(abs(a - b) for a, b in zip(curve, straight_curve, strict=True)) < 1e-3
    shutil.rmtree(training.directory / "iter_0000006")
    less = {"micro_batch_size": 1, "recompute_granularity": "selective"}
    tensor = {**OPTIONS, **less, "tensor_model_parallel_size": 2, "sequence_parallel": True}
    assert workspace.train("layouts", 2, tensor) == training.directory
    log = (workspace.directory / "layouts.log.rank1.log").read_text()
    assert "saved under another layout: tensor 1 -> 2, pipeline 2 -> 1, micro batch 2 -> 1" in log
    assert "recompute_granularity None -> selective" in log
    assert "resuming after iteration 4" in log
    curve = losses(training.directory)
    assert max(abs(a - b) for a, b in zip(curve, straight_curve, strict=True)) < 1e-3


def test_a_full_disk_in_a_save_that_nobody_waits_for(small_disk: Callable[[int], Path]) -> None:
    """It is told when the save is ended; Megatron's own words name no disk."""
    command = [
        sys.executable,
        Path(__file__).with_name("saves_on_full_disk.py"),
        small_disk(20 << 20),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS)
    said = re.findall(
        r"^(.*): OSError\(28, 'No space left on device'\)$", done.stdout, re.MULTILINE
    )
    assert said == ["waited for", "asynchronous"], done.stdout + done.stderr
