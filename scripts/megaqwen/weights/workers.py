"""Several workers over one model's tensors, in bounded memory."""

import contextlib
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any, TextIO

from megaqwen.words import duration, readable_bytes

MOST_WORKERS = 8  # more do not help: the disk is what they wait for
FILES_AT_ONCE = 2  # on their way to the disk
LEAST_MEMORY = 2**30  # bytes that the workers may share, however small the tensors are
SECONDS_BETWEEN_LINES = 10.0
SECONDS_BETWEEN_REWRITES = 0.5


def usual_workers() -> int:
    """The cores that this process may use, and no more than are of use."""
    return min(MOST_WORKERS, len(os.sched_getaffinity(0)))


def run_all[Result](
    tasks: Sequence[Callable[[], Result]],
    workers: int,
    beside: Sequence[Callable[[], None]] = (),
) -> list[Result]:
    """Run tasks in threads, which torch, files and digests leave to each other.

    Args:
        tasks: Begun in this order.
        workers: How many run at once.
        beside: Further tasks without a result, spread evenly among the others.

    Returns:
        The results, in the order of the tasks.

    Raises:
        What a task raised first; tasks that had not begun by then are left out.
    """
    with ThreadPoolExecutor(workers) as pool:
        futures, others = [], list[Future[None]]()
        for number, task in enumerate(tasks):
            while len(others) * len(tasks) < (number + 1) * len(beside):
                others.append(pool.submit(beside[len(others)]))
            futures.append(pool.submit(task))
        waited: list[Future[Any]] = [*futures, *others]
        try:
            for future in as_completed(waited):
                future.result()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return [future.result() for future in futures]


class Flusher:
    """Brings files to the disk while the workers go on; at the block's end all are there."""

    def __init__(self) -> None:
        """Take a few files at once."""
        self.pool = ThreadPoolExecutor(FILES_AT_ONCE)
        self.flushed: list[Future[None]] = []

    def __enter__(self) -> "Flusher":
        """Take files."""
        return self

    def add(self, path: Path) -> None:
        """Take a file that is written, or as much of it as is."""
        self.flushed.append(self.pool.submit(flush, path))

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        """Wait, and raise what went wrong; after another error wait for what has begun only."""
        self.pool.shutdown(cancel_futures=kind is not None)
        if kind is None:
            for future in self.flushed:
                future.result()


def flush(path: Path) -> None:
    """Bring a file's content to the disk."""
    with open(path, "rb") as stream:
        os.fsync(stream.fileno())


class MemoryBudget:
    """Bytes that the workers share: who needs more than is free waits."""

    def __init__(self, limit: int):
        """Share `limit` bytes."""
        self.limit = self.free = limit
        self.changed = threading.Condition()

    @contextlib.contextmanager
    def taken(self, size: int) -> Iterator[None]:
        """Hold `size` bytes, or all where it is more than there are, for the block."""
        size = min(size, self.limit)
        with self.changed:
            self.changed.wait_for(lambda: self.free >= size)
            self.free -= size
        try:
            yield
        finally:
            with self.changed:
                self.free += size
                self.changed.notify_all()


class Progress:
    """How far the stream is: a line rewritten in place on a terminal, elsewhere one now and then."""

    def __init__(self, total: int, terminal: TextIO | None):
        """Start the clock.

        Args:
            total: Bytes to come.
            terminal: Where to write; None for nowhere.
        """
        self.total, self.terminal = total, terminal
        self.done = 0
        self.started = self.last = time.monotonic()
        self.rewritten = bool(terminal and terminal.isatty())
        self.lock = threading.Lock()

    def add(self, size: int) -> None:
        """Count bytes that were written."""
        pause = SECONDS_BETWEEN_REWRITES if self.rewritten else SECONDS_BETWEEN_LINES
        with self.lock:
            self.done += size
            now = time.monotonic()
            if self.terminal and (now - self.last >= pause):
                self.last = now
                start, end = ("\r\x1b[K", "") if self.rewritten else ("", "\n")
                self.terminal.write(f"{start}  {self}{end}")
                self.terminal.flush()

    def __enter__(self) -> "Progress":
        """Count for the block."""
        return self

    def __exit__(self, *error: object) -> None:
        """Leave the terminal's line as it was before, for what is said next."""
        if self.terminal and self.rewritten:
            self.terminal.write("\r\x1b[K")
            self.terminal.flush()

    def __str__(self) -> str:
        """Done, total, rate and time left."""
        rate = self.done / max(time.monotonic() - self.started, 1e-9)
        left = f", {duration((self.total - self.done) / rate)} left" if rate else ""
        done, total = readable_bytes(self.done), readable_bytes(self.total)
        return f"{done} of {total}, {rate / 1e9:.2f} GB/s{left}"
