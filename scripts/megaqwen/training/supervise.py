"""Running what starts the ranks, so that a signal reaches the ranks and none of them outlives us.

torchrun gives its ranks thirty seconds after a signal and then kills them, in the middle of a save if
need be; and it hands on Ctrl-C as it is, on which a rank ends without saving. So torchrun is kept away
from the terminal's signals, and the ranks get SIGTERM, on which Megatron finishes the running
iteration, saves and exits. srun hands SIGTERM on to its tasks by itself.
"""

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

import psutil

WATCH_SECONDS = 2.0
STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
PARENT_DEATH_SIGNAL = 1  # prctl's PR_SET_PDEATHSIG
CHILD_SUBREAPER = 36  # prctl's PR_SET_CHILD_SUBREAPER


class Ranks:
    """The launcher (torchrun or srun) and the ranks below it."""

    def __init__(
        self,
        command: Sequence[str],
        *,
        hands_on_signals: bool,
        say: Callable[[str], None],
        **settings: Any,
    ):
        """Start the launcher.

        Args:
            command: Its words.
            hands_on_signals: It passes SIGTERM on to the ranks and leaves them their time, as srun does.
            say: Tells a person what a signal brings about.
            settings: Of subprocess.Popen.
        """
        self.hands_on_signals = hands_on_signals
        self.say = say
        self.signal: signal.Signals | None = None
        """The first that asked to stop."""
        adopt_orphans()
        self.process = subprocess.Popen(
            command, start_new_session=True, preexec_fn=end_with_parent, **settings
        )
        for number in STOPPING:
            signal.signal(number, self.stop)

    def wait(self) -> int:
        """Wait until the launcher and every rank ended, and end what a rank that was killed left behind.

        As Megatron's writing of checkpoints starts one, which would wait for its rank for ever.

        Returns:
            The launcher's exit status; after a signal that kept it from ending well, 128 plus the signal.
        """
        code = self.process.wait()
        for left in psutil.Process().children(recursive=True):
            with contextlib.suppress(psutil.NoSuchProcess):
                left.kill()
        if self.signal and code:
            return 128 + self.signal
        return code if code >= 0 else 128 - code

    def stop(self, number: int, frame: FrameType | None) -> None:
        """A signal came: let the ranks save and end; at the second one, end them at once.

        SIGHUP is nobody's second wish: where Slurm ends a job, it ends the Snakemake above us as well.
        """
        if self.signal and number == signal.SIGHUP:
            return
        with contextlib.suppress(psutil.NoSuchProcess):
            if self.signal:
                self.say("ending at once")
                self.kill()
                return
            self.signal = signal.Signals(number)
            self.say("stopping; a running iteration is finished and saved (again: end at once)")
            self.ask_to_save()

    def ask_to_save(self) -> None:
        """Send SIGTERM to each rank."""
        ranks = [] if self.hands_on_signals else psutil.Process(self.process.pid).children()
        for rank in ranks:
            # To the rank alone: it needs what it started, readers of data and writers of checkpoints.
            rank.send_signal(signal.SIGTERM)
        if not ranks:  # srun hands it on; torchrun has no rank yet, and ends
            self.process.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        """End the launcher and all that it started on this machine."""
        if self.hands_on_signals:
            self.process.send_signal(signal.SIGINT)  # with --quit-on-interrupt srun ends its tasks
            return
        launcher = psutil.Process(self.process.pid)
        launcher.suspend()  # so that it starts none while they are counted
        for process in (*launcher.children(recursive=True), launcher):
            process.kill()


def stop_with_snakemake() -> None:
    """Send SIGHUP to this process when a Snakemake that it works for is killed.

    Between Snakemake and this process are shells and another Snakemake, which outlive it: the kernel's
    signal at a parent's death would not come. On a cluster the one that submitted the job is elsewhere,
    and the job goes on without it.
    """
    above = [each for each in psutil.Process().parents() if is_snakemake(each)]

    def watch() -> None:
        while all(is_alive(each) for each in above):
            time.sleep(WATCH_SECONDS)
        os.kill(os.getpid(), signal.SIGHUP)

    if above:
        threading.Thread(target=watch, name="snakemake", daemon=True).start()


def is_snakemake(process: psutil.Process) -> bool:
    """Whether a process is Snakemake's, by its command line."""
    with contextlib.suppress(psutil.Error):
        words = process.cmdline()[:3]
        return any(Path(word).name.startswith("snakemake") for word in words)
    return False


def is_alive(process: psutil.Process) -> bool:
    """Whether a process is there and has not ended, whether or not its parent was told."""
    with contextlib.suppress(psutil.NoSuchProcess):
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    return False


def end_with_parent() -> None:
    """In the launcher before it starts: SIGTERM to it when this process is killed. Linux has that."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PARENT_DEATH_SIGNAL, signal.SIGTERM)


def adopt_orphans() -> None:
    """Be the parent of what a process below this one leaves when it ends. Linux has that."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(CHILD_SUBREAPER, 1)
