"""What starts the ranks leaves no process behind."""

import subprocess
import sys

import psutil

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
