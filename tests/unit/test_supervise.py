"""What starts the ranks leaves no process behind."""

import signal
import subprocess
import sys

import psutil
import pytest

from commands import ROOT
from megaqwen.training.supervise import is_alive

LAUNCH = """
import sys
from megaqwen.training.supervise import Ranks
ranks = Ranks(["bash", "-c", "sleep 600 & echo $!; exit 3"], hands_on_signals=False, say=print)
sys.exit(ranks.wait())
"""


def test_what_an_ended_launcher_left_is_ended() -> None:
    done = subprocess.run(
        [sys.executable, "-c", LAUNCH],
        cwd=ROOT / "scripts",
        stdout=subprocess.PIPE,
        text=True,
        timeout=60,
    )
    assert done.returncode == 3
    sleeping = int(done.stdout)
    assert not psutil.pid_exists(sleeping) or not is_alive(psutil.Process(sleeping))


STOPPED = """
import os, signal, sys, threading
from megaqwen.training.supervise import Ranks
words = ["bash", "-c", "trap 'sleep 1; exit 75' TERM; sleep 600 & wait"]
ranks = Ranks(words, hands_on_signals=True, say=lambda text: print(text, flush=True))
for seconds, number in ((1, signal.SIGTERM), (1.3, getattr(signal, sys.argv[1]))):
    threading.Timer(seconds, os.kill, (os.getpid(), number)).start()
sys.exit(ranks.wait())
"""


@pytest.mark.parametrize(("second", "at_once"), [("SIGTERM", True), ("SIGHUP", False)])
def test_the_end_of_the_snakemake_above_is_no_second_wish(second: str, at_once: bool) -> None:
    """As where Slurm ends a job, and with it both."""
    done = subprocess.run(
        [sys.executable, "-c", STOPPED, second],
        cwd=ROOT / "scripts",
        stdout=subprocess.PIPE,
        text=True,
        timeout=60,
    )
    assert done.returncode == 128 + signal.SIGTERM
    assert ("ending at once" in done.stdout) == at_once


FULL = """
import os, signal, subprocess, sys, threading
from pathlib import Path
from megaqwen.training.logs import LaunchLog
from megaqwen.training.supervise import Ranks
words = ["bash", "-c", "trap 'echo saved; exit 75' TERM; echo started; sleep 600 & wait"]
log = LaunchLog(path=Path("/dev/full"))
ranks = Ranks(words, hands_on_signals=True, say=log.say, stdout=subprocess.PIPE, text=True)
assert ranks.process.stdout.readline() == "started\\n"
threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGTERM)).start()
code = ranks.wait()
log.say("the end", "ERROR")
print(code, ranks.process.stdout.read())
"""


def test_on_a_full_disk_the_ranks_are_asked_to_save() -> None:
    """The launcher's log and its terminal, Slurm's file on the same disk, take no word of it."""
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-c", FULL],
            cwd=ROOT / "scripts",
            stdout=subprocess.PIPE,
            stderr=full,
            text=True,
            timeout=60,
        )
    assert done.stdout.split() == [str(128 + signal.SIGTERM), "saved"]
