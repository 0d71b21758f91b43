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

    def __init__(self, queue: Any, worker: Worker):
        """Stand for a `multiprocessing.JoinableQueue` that a worker reads."""
        self.queue, self.worker = queue, worker
        self.copying: threading.Thread | None = None

    def put(self, number: int) -> None:
        """Ask for a save's copy."""
        self.queue.put(number)

    def join(self) -> None:
        """Begin to wait; `wait` ends it."""
        self.copying = threading.Thread(target=self.queue.join, name="copying", daemon=True)
        self.copying.start()

    def wait(self) -> float:
        """Until the copy that was asked for is made; the seconds that it took from training.

        Raises:
            RuntimeError: The worker has ended, so that there will be none.
        """
        if self.copying is None:
            return 0.0
        began = time.monotonic()
        while self.copying.is_alive():
            self.copying.join(LOOK_SECONDS)
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


def watch_worker() -> None:
    """Have Megatron's wait for a checkpoint end where its worker has ended: it would last for good."""
    from megatron.core.dist_checkpointing.strategies.async_utils import PersistentAsyncCaller

    is_done = PersistentAsyncCaller.is_current_async_call_done

    def is_done_or_never(caller: Any, blocking: bool = False, no_dist: bool = False) -> bool:
        told = caller._persistent_comp_q
        while caller.process and caller.cur_item is None and told.empty():
            if not caller.process.is_alive() and told.empty():
                raise ended(caller.process)
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

    def install(self) -> None:
        """Take the place of the queue of Megatron's worker, where it has one."""
        from megatron.core.dist_checkpointing.strategies.async_utils import PersistentAsyncCaller

        queue = PersistentAsyncCaller._persistent_preload_q
        if queue is None:
            return
        self.beside = CopyBeside(queue, PersistentAsyncCaller._persistent_process)
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
