"""How far a download is: one line every ten seconds."""

import contextlib
import logging
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from megaqwen.words import duration, readable_bytes

logger = logging.getLogger("megaqwen.download")

SECONDS_BETWEEN_LINES = 10.0


def bytes_on_disk(directory: Path) -> int:
    """Bytes of all files below a directory, counting what of a sparse file is really there."""
    total = 0
    for path in directory.rglob("*"):
        try:
            status = path.lstat()
        except FileNotFoundError:  # renamed meanwhile
            continue
        if path.is_file():
            total += min(status.st_size, status.st_blocks * 512)
    return total


@contextlib.contextmanager
def logged_progress(directory: Path, total: int) -> Iterator[None]:
    """While the block runs, log every ten seconds how much of `total` bytes lies in `directory`."""
    finished = threading.Event()
    thread = threading.Thread(target=watch, args=(directory, total, finished), daemon=True)
    thread.start()
    try:
        yield
    finally:
        finished.set()
        thread.join()


def watch(directory: Path, total: int, finished: threading.Event) -> None:
    """Log a line every ten seconds until `finished` is set."""
    start, present = time.monotonic(), bytes_on_disk(directory)
    while not finished.wait(SECONDS_BETWEEN_LINES):
        here = min(bytes_on_disk(directory), total)
        rate = max(here - present, 0) / (time.monotonic() - start)
        left = f", {duration((total - here) / rate)} left" if rate > 0 else ""
        logger.info(
            "%s of %s, %s/s%s",
            readable_bytes(here),
            readable_bytes(total),
            readable_bytes(rate),
            left,
        )
