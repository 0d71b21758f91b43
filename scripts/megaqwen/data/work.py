"""What is encoded at once, and what comes of it: the same for documents and for conversations."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, Future
from dataclasses import dataclass, field
from typing import Any

import numpy
from numpy.typing import NDArray

# What deduplication knows of a document: 128 bits of its text's BLAKE2b, and its size.
DOCUMENT = numpy.dtype([("high", "<u8"), ("low", "<u8"), ("bytes", "<i8"), ("characters", "<i8")])


@dataclass(kw_only=True)
class Encoded:
    """The tokens of some documents, as they are written."""

    ids: NDArray[Any]
    """Of shape [tokens], ends of documents included."""
    targets: NDArray[numpy.uint8] | None = None
    """Of conversations: 1 where a token is trained on, of shape [tokens]."""
    lengths: NDArray[numpy.int32]
    """Of shape [documents]."""
    characters: int
    bytes: int
    records: NDArray[Any] | None
    """The documents' entries for deduplication, of shape [documents]."""

    def arrays(self) -> list[NDArray[Any]]:
        """What is written, in the order of the files that have it."""
        return [self.ids] if self.targets is None else [self.ids, self.targets]


@dataclass(kw_only=True)
class Counts:
    """What a part counts."""

    documents: int = 0
    empty_documents: int = 0
    short_documents: int = 0
    characters: int = 0
    bytes: int = 0
    tokens: int = 0
    token_counts: NDArray[numpy.int64] = field(
        default_factory=lambda: numpy.zeros((1, 0), numpy.int64)
    )
    """How often each id occurs, of shape [1, vocabulary]; with how often it is a target, [2, ...]."""


def in_order[Given, Made](
    pool: Executor, work: Callable[[Given], Made], items: Iterable[Given], at_once: int
) -> Iterator[tuple[Given, Made]]:
    """Items with what a pool makes of them, in order: the end of one leaves no core idle."""
    waiting: deque[tuple[Given, Future[Made]]] = deque()
    try:
        for item in items:
            waiting.append((item, pool.submit(work, item)))
            if len(waiting) == at_once:
                first, made = waiting.popleft()
                yield first, made.result()
        while waiting:
            first, made = waiting.popleft()
            yield first, made.result()
    finally:
        for _, made in waiting:
            made.cancel()
