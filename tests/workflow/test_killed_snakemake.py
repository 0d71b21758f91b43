"""Snakemake killed while it trains: training saves and ends, and the same command goes on from there."""

import os
import subprocess
import sys
import time
from pathlib import Path

from checkout import copy_repository, put_stubs

from commands import ROOT
from megaqwen.training.attempts import read_attempts

# In place of scripts/train.py: each rank waits for the signal to save, or finds that it did.
RANK = """
import os, pathlib, signal, sys, time

words = dict(zip(sys.argv, sys.argv[1:]))
output = pathlib.Path(words["--output"])
rank = os.environ["RANK"]
output.mkdir(parents=True, exist_ok=True)

def save(number, frame):
    (output / f"saved-{rank}").touch()
    sys.exit(75)

signal.signal(signal.SIGTERM, save)
if (output / f"saved-{rank}").exists():
    (output / "manifest.json").write_text("{}")
    sys.exit()
(output / f"started-{rank}").touch()
time.sleep(600)
"""
SECONDS = 300.0  # that a step may take on a loaded machine


def printed_by(directory: Path) -> str:
    return (directory / "printed").read_text()


def test_the_same_command_goes_on(tmp_path: Path) -> None:
    checkout = copy_repository(tmp_path)
    put_stubs(checkout)
    scripts = tmp_path / "scripts"
    (scripts / "launch.py").write_bytes((ROOT / "scripts" / "launch.py").read_bytes())
    (scripts / "train.py").write_text(RANK)
    words = ["--profile", "local", "train"]
    train = tmp_path / "results" / "runs" / "default" / "train"
    with open(tmp_path / "printed", "w") as printed:
        killed = subprocess.Popen(
            [sys.executable, "-m", "snakemake", *words],
            cwd=tmp_path,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            stdout=printed,
            stderr=subprocess.STDOUT,
        )
    end = time.monotonic() + SECONDS
    try:
        while len(list(train.glob("started-*"))) < 2:
            assert killed.poll() is None and time.monotonic() < end, printed_by(tmp_path)
            time.sleep(0.1)
    finally:
        killed.kill()  # its ranks notice
        killed.wait()
    (lease,) = train.glob("checkpoints/*/lease.json")
    while lease.exists():
        assert time.monotonic() < end
        time.sleep(0.1)
    assert len(list(train.glob("saved-*"))) == 2

    done = checkout.snakemake(*words)
    assert done.returncode == 0, done.stdout
    assert "was killed: its lock on this directory is taken off" in done.stdout
    assert (train / "manifest.json").is_file()
    attempts = read_attempts(lease.parent)
    assert [each.reason for each in attempts] == ["SIGHUP", "finished"]
