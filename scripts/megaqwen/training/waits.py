"""How long ranks wait for data, and how far the slowest rank is behind the others.

Each rank times its forward steps; now and then one small exchange tells the rank that writes metrics.
The time is the host's: on a GPU a forward step's is that of launching it.
"""

import time
from collections.abc import Callable, Iterator
from statistics import median
from typing import Any

import torch

EVERY = 10  # iterations between two exchanges


class Waits:
    """This rank's seconds since the last exchange."""

    def __init__(self) -> None:
        self.data = self.forward = 0.0
        self.iterations = 0

    def timed(self, forward_step: Callable[..., Any]) -> Callable[..., Any]:
        """A forward step that is timed, its data apart."""

        def step(iterator: Any, *words: Any, **named: Any) -> Any:
            started, waited = time.perf_counter(), self.data
            timed = TimedIterator(iterator, self) if iterator is not None else None
            result = forward_step(timed, *words, **named)
            self.forward += time.perf_counter() - started - (self.data - waited)
            return result

        return step

    def exchange(self) -> dict[str, float]:
        """Figures of one iteration, by the mean since the last exchange; {} until it is time again.

        Every rank calls it after each iteration.
        """
        self.iterations += 1
        if self.iterations < EVERY:
            return {}
        mine = torch.tensor(
            [self.data / self.iterations, self.forward / self.iterations],
            device=torch.cuda.current_device(),
        )
        self.data = self.forward = 0.0
        self.iterations = 0
        ranks = [torch.empty_like(mine) for _ in range(torch.distributed.get_world_size())]
        torch.distributed.all_gather(ranks, mine)
        return slowest([(float(data), float(forward)) for data, forward in ranks])


def slowest(ranks: list[tuple[float, float]]) -> dict[str, float]:
    """What of all ranks' (data wait, forward) seconds is worth a line in metrics.jsonl."""
    data, forward = ([rank[place] for rank in ranks] for place in (0, 1))
    return {
        "data_wait_seconds": round(max(data), 4),
        "straggler_rank": forward.index(max(forward)),
        "straggler_seconds": round(max(forward) - median(forward), 4),
    }


class TimedIterator:
    """An iterator whose time counts as waiting for data."""

    def __init__(self, iterator: Iterator[Any], waits: Waits):
        """Stand in front of an iterator."""
        self.iterator, self.waits = iterator, waits

    def __iter__(self) -> "TimedIterator":
        """Itself."""
        return self

    def __next__(self) -> Any:
        """The next one."""
        started = time.perf_counter()
        try:
            return next(self.iterator)
        finally:
            self.waits.data += time.perf_counter() - started

    def __getattr__(self, name: str) -> Any:
        """Everything else is the iterator's."""
        return getattr(self.iterator, name)
