"""A stage of work in a thread of its own, a few items ahead of who takes them."""

import os
import queue
import threading
from collections.abc import Iterable, Iterator

ITEMS = 4  # that may wait: a bound on memory


def computing_threads() -> int:
    """How many threads encode: what gigatoken and tokenizers heed, or the cores of this process."""
    return int(os.environ.get("RAYON_NUM_THREADS", 0)) or len(os.sched_getaffinity(0))


def ahead[Item](items: Iterable[Item]) -> Iterator[Item]:
    """The items, made by another thread before they are asked for.

    An error of theirs comes out here. When the taker stops early, so does the thread.
    """
    waiting: queue.Queue[tuple[Item | None, BaseException | None, bool]] = queue.Queue(ITEMS)
    stopped = threading.Event()

    def put(item: Item | None, error: BaseException | None = None, *, end: bool = False) -> None:
        while not stopped.is_set():
            try:
                return waiting.put((item, error, end), timeout=0.1)
            except queue.Full:
                continue

    def work() -> None:
        try:
            for item in items:
                put(item)
                if stopped.is_set():
                    return
            put(None, end=True)
        except BaseException as error:  # noqa: BLE001  raised again by the taker
            put(None, error)

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    try:
        while True:
            item, error, end = waiting.get()
            if error:
                raise error
            if end:
                return
            yield item  # type: ignore[misc]
            del item
    finally:
        stopped.set()
        thread.join()
