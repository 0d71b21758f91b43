"""A save's copy from the GPU beside training: it is waited for where weights change, not before.

Megatron stops training until its worker has copied every tensor to the host's memory. But forward and
backward passes change nothing of a checkpoint, whose random and scaling states are bytes by then; the
optimizer's step does, and what finalizing gradients does to a router's bias. So training goes on, and
waits before gradients are finalized, in the first iteration after a save: mostly for nothing.
"""

import threading
import time
from collections.abc import Callable
from typing import Any, Protocol

LOOK_SECONDS = 1.0  # between two looks at whether the worker is alive
POLL_SECONDS = 0.1  # between two looks at whether a checkpoint is saved


class Worker(Protocol):
    """Of a process what is asked of it here."""

    exitcode: int | None

    def is_alive(self) -> bool:
        """Whether it runs."""
        ...


class CopyBeside:
    """Stands for the queue by which Megatron's worker tells that it has copied.

    Megatron puts a save's number into it and joins it at once; the joining is left to a thread.
    """

    def __init__(self, queue: Any, worker: Worker, *, beside: bool = True):
        """Stand for a `multiprocessing.JoinableQueue` that a worker reads.

        Args:
            queue: That one.
            worker: The process.
            beside: Whether training goes on; if not, `join` waits.
        """
        self.queue, self.worker, self.beside = queue, worker, beside
        self.copying: threading.Thread | None = None

    def put(self, number: int) -> None:
        """Ask for a save's copy."""
        self.queue.put(number)

    def join(self) -> None:
        """Begin to wait; `wait` ends it."""
        self.copying = threading.Thread(target=self.queue.join, name="copying", daemon=True)
        self.copying.start()
        if not self.beside:
            self.wait()

    def wait(self) -> float:
        """Until the copy that was asked for is made; the seconds that it took from training.

        Raises:
            RuntimeError: The worker has ended or was not told, so that there will be none.
        """
        if self.copying is None:
            return 0.0
        began = time.monotonic()
        while self.copying.is_alive():
            self.copying.join(LOOK_SECONDS)
            raise_unsent()
            if self.copying.is_alive() and not self.worker.is_alive():
                raise ended(self.worker)
        self.copying = None
        return time.monotonic() - began


def ended(worker: Worker) -> RuntimeError:
    """That there is no process any more that would save."""
    return RuntimeError(
        f"the process that saves checkpoints ended (exit {worker.exitcode}; -9 where memory ran out)"
        " before it had saved one: training goes on from the one before"
    )


UNSENT: list[Exception] = []
"""Why what was to be saved did not reach the worker; at most one error."""


def note_unsent(error: Exception, request: Any) -> None:
    """What a `multiprocessing.Queue` does in its thread where it cannot send, and then goes on."""
    UNSENT[:] = [error]


def raise_unsent() -> None:
    """RuntimeError where the worker waits for something that was not sent."""
    if UNSENT:
        raise RuntimeError(
            f"a checkpoint did not reach the process that saves it: {UNSENT[0]}. It takes two open files"
            " for each tensor of the distributed optimizer (ulimit -n), and its size in /dev/shm: more"
            " of either, or train.async_save false; training goes on from the checkpoint before"
        ) from UNSENT[0]


def watch_worker() -> None:
    """Have Megatron's waits for its worker end where it has ended or was not told: they would never."""
    from megatron.core.dist_checkpointing.strategies.async_utils import PersistentAsyncCaller

    start = PersistentAsyncCaller._get_process.__func__

    def start_watched(caller: Any, *words: Any, **named: Any) -> Any:
        process = start(caller, *words, **named)
        caller._persistent_queue._on_queue_feeder_error = note_unsent
        return process

    PersistentAsyncCaller._get_process = classmethod(start_watched)
    is_done = PersistentAsyncCaller.is_current_async_call_done

    def is_done_or_never(caller: Any, blocking: bool = False, no_dist: bool = False) -> bool:
        told = caller._persistent_comp_q
        while caller.process and caller.cur_item is None and told.empty():
            if not caller.process.is_alive() and told.empty():
                raise ended(caller.process)
            raise_unsent()
            if not blocking:
                break
            time.sleep(POLL_SECONDS)
        done: bool = is_done(caller, blocking, no_dist)
        return done

    PersistentAsyncCaller.is_current_async_call_done = is_done_or_never


class Waiting:
    """Where training waits for the copy, and for how long it did."""

    def __init__(self) -> None:
        self.beside: CopyBeside | None = None
        self.seconds = 0.0

    def install(self, *, beside: bool) -> None:
        """Take the place of the queue of Megatron's worker, where it has one; see `CopyBeside`."""
        from megatron.core.dist_checkpointing.strategies.async_utils import PersistentAsyncCaller

        queue = PersistentAsyncCaller._persistent_preload_q
        if queue is None:
            return
        worker = PersistentAsyncCaller._persistent_process
        self.beside = CopyBeside(queue, worker, beside=beside)
        PersistentAsyncCaller._persistent_preload_q = self.beside

    def wait(self) -> None:
        """For what is being copied, if anything is."""
        if self.beside:
            self.seconds += self.beside.wait()

    def before(self, finalize: Callable[..., Any]) -> Callable[..., Any]:
        """`finalize_model_grads` that waits first."""

        def finalize_after_copy(*words: Any, **named: Any) -> Any:
            self.wait()
            return finalize(*words, **named)

        return finalize_after_copy

    def taken(self) -> dict[str, float]:
        """The seconds since the last call, for metrics.jsonl; {} if there were none."""
        seconds, self.seconds = self.seconds, 0.0
        return {"save_wait_seconds": round(seconds, 3)} if seconds else {}


COPY = Waiting()
