"""The processes that a rank started, when its training fails."""

import contextlib
import multiprocessing
import signal
from collections.abc import Iterator

from megatron.core.dist_checkpointing.strategies.async_utils import (
    AsyncCallsQueue,
    PersistentAsyncCaller,
)


@contextlib.contextmanager
def ended_by_failure() -> Iterator[None]:
    """Kill the rank's processes where the block fails: Python waits for them at its exit.

    It asks them to end by SIGTERM first, which Megatron has those that load data only take note of. What
    was on its way to the one that saves is let go: Python would wait until that reads it, and Megatron,
    as it is taken down, until that has done it.
    """
    try:
        yield
    except SystemExit:  # training was told to stop, and has ended them
        raise
    except BaseException:
        # torch's handler would raise an error for each in place of this one.
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        for process in multiprocessing.active_children():
            process.kill()
        if (requests := PersistentAsyncCaller._persistent_queue) is not None:
            requests.cancel_join_thread()
        if (caller := AsyncCallsQueue._persistent_caller) is not None:
            caller.process = None
        raise
