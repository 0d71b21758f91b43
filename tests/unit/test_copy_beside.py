"""Training goes on beside a save's copy, and waits for it before weights change; with real processes."""

import multiprocessing
import resource
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core.dist_checkpointing.strategies.async_utils import PersistentAsyncCaller

from megaqwen.training import copy_beside
from megaqwen.training.copy_beside import CopyBeside, Waiting

CONTEXT = multiprocessing.get_context("fork")
PATIENCE = 60


def copy(queue: Any, asked: Any, go_on: Any) -> None:
    """As Megatron's worker does it: one copy after another."""
    while True:
        queue.get()
        asked.set()
        assert go_on.wait(PATIENCE)
        queue.task_done()


class Copier:
    """A process that copies when it is told to."""

    def __init__(self) -> None:
        self.queue = CONTEXT.JoinableQueue()
        self.asked, self.go_on = CONTEXT.Event(), CONTEXT.Event()
        words = (self.queue, self.asked, self.go_on)
        self.process = CONTEXT.Process(target=copy, args=words, daemon=True)
        self.process.start()


@pytest.fixture
def copier() -> Iterator[Copier]:
    one = Copier()
    yield one
    one.process.kill()
    one.process.join()


@pytest.fixture
def waiting(copier: Copier, monkeypatch: pytest.MonkeyPatch) -> Waiting:
    """In the place of the queue of Megatron's caller, whose process is the copier."""
    monkeypatch.setattr(PersistentAsyncCaller, "_persistent_preload_q", copier.queue)
    monkeypatch.setattr(PersistentAsyncCaller, "_persistent_process", copier.process)
    found = Waiting()
    found.install(beside=True)
    return found


def ask() -> None:
    """As Megatron's caller does when a save is due; it would return when the copy is made."""
    PersistentAsyncCaller._persistent_preload_q.put(7)
    PersistentAsyncCaller._persistent_preload_q.join()


def test_gradients_are_finalized_after_the_copy(copier: Copier, waiting: Waiting) -> None:
    at: list[float] = []
    finalize = waiting.before(lambda *words, **named: at.append(time.monotonic()) or (words, named))
    assert finalize(1, tokens=2) == ((1,), {"tokens": 2})  # nothing is copied: nothing to wait for
    assert waiting.taken() == {}
    began = time.monotonic()
    ask()
    assert copier.asked.wait(PATIENCE) and not copier.go_on.is_set()
    CONTEXT.Process(target=end_later, args=(copier.go_on, 0.5), daemon=True).start()
    finalize(1)
    assert at[1] - began > 0.5
    assert 0.3 < waiting.taken()["save_wait_seconds"] <= at[1] - began
    finalize(1)
    assert waiting.taken() == {}


def end_later(go_on: Any, seconds: float) -> None:
    time.sleep(seconds)
    go_on.set()


def test_a_worker_that_ended_is_not_waited_for(
    copier: Copier, waiting: Waiting, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(copy_beside, "LOOK_SECONDS", 0.05)
    ask()
    assert copier.asked.wait(PATIENCE)
    copier.process.kill()
    with pytest.raises(RuntimeError, match=r"saves checkpoints ended \(exit -9;"):
        waiting.wait()


def test_where_training_does_not_go_on_the_copy_is_waited_for_at_once(copier: Copier) -> None:
    """As long as there is a worker that makes it."""
    queue = CopyBeside(copier.queue, copier.process, beside=False)
    queue.put(1)
    threading.Timer(0.3, copier.process.kill).start()
    with pytest.raises(RuntimeError, match="ended"):
        queue.join()


def test_without_a_worker_nothing_is_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(PersistentAsyncCaller, "_persistent_preload_q", None)
    waiting = Waiting()
    waiting.install(beside=True)
    assert PersistentAsyncCaller._persistent_preload_q is None
    waiting.wait()


def test_a_copy_that_is_made_costs_nothing(copier: Copier) -> None:
    beside = CopyBeside(copier.queue, copier.process)
    copier.go_on.set()
    beside.put(1)
    beside.join()
    assert beside.copying
    beside.copying.join(PATIENCE)
    assert beside.wait() < 0.05
    assert beside.wait() == 0.0


def watch_worker(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("is_current_async_call_done", "_get_process"):
        monkeypatch.setattr(PersistentAsyncCaller, name, getattr(PersistentAsyncCaller, name))
    copy_beside.watch_worker()


def test_what_did_not_reach_the_worker_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """More tensors of the host than this process may have files open: the queue drops them all."""
    for name in ("process", "queue", "preload_q", "comp_q"):
        monkeypatch.setattr(PersistentAsyncCaller, f"_persistent_{name}", None)
    monkeypatch.setattr(copy_beside, "UNSENT", [])
    watch_worker(monkeypatch)
    worker = PersistentAsyncCaller._get_process(0)
    beside = CopyBeside(PersistentAsyncCaller._persistent_preload_q, worker)
    caller = PersistentAsyncCaller()
    caller.process = worker
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(
        resource.RLIMIT_NOFILE, (len([*Path("/proc/self/fd").iterdir()]) + 50, limits[1])
    )
    try:
        beside.put(1)
        beside.join()
        PersistentAsyncCaller._persistent_queue.put([torch.ones(1) for _ in range(300)])
        with pytest.raises(RuntimeError, match=r"did not reach .*Too many open files.*ulimit -n"):
            beside.wait()
        with pytest.raises(RuntimeError, match="did not reach the process that saves it"):
            caller.is_current_async_call_done(blocking=True, no_dist=True)
        assert worker.is_alive()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
        caller.process = None  # it would be told to end
        worker.kill()
        worker.join()


@pytest.mark.parametrize("blocking", [False, True])
def test_a_save_that_will_not_end_is_not_waited_for(
    copier: Copier, monkeypatch: pytest.MonkeyPatch, blocking: bool
) -> None:
    """Megatron looks at what its worker told, and would for good."""
    watch_worker(monkeypatch)
    told = CONTEXT.Queue()
    monkeypatch.setattr(PersistentAsyncCaller, "_persistent_comp_q", told)
    caller = PersistentAsyncCaller()
    caller.process = copier.process
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        assert not caller.is_current_async_call_done(no_dist=True)
        told.put(3)
        assert caller.is_current_async_call_done(blocking=True, no_dist=True)
        threading.Timer(0.3, copier.process.kill).start()
        if not blocking:
            copier.process.join()
        with pytest.raises(RuntimeError, match="before it had saved one"):
            caller.is_current_async_call_done(blocking=blocking, no_dist=True)
    finally:
        caller.process = None  # it would be told to end
        torch.distributed.destroy_process_group()
