"""The card of a corpus: how much text it is, how it tokenizes, and what a trivial model scores.

Whatever the corpus's size, the memory that it takes is the vocabulary's.
"""

from collections.abc import Sequence
from typing import Any

import numpy
from numpy.typing import NDArray

from megaqwen.data.writing import Chunks

HALF = 16  # bits of a length


def length_figures(documents: int, lengths: Chunks) -> dict[str, Any]:
    """Median, largest and histogram of the documents' lengths.

    Args:
        documents: How many there are, at least one.
        lengths: Gives their tokens, in chunks; called more than once.
    """
    bits = numpy.zeros(2 * HALF, numpy.int64)
    for chunk in lengths():
        bits += numpy.bincount(numpy.frexp(chunk)[1], minlength=len(bits))
    low, high = order_statistics(lengths, [(documents - 1) // 2, documents // 2])
    (longest,) = order_statistics(lengths, [documents - 1])
    (used,) = numpy.nonzero(bits)
    return {
        "median_document_tokens": (low + high) / 2,
        "longest_document_tokens": longest,
        "length_histogram": [
            {"from": 2 ** (bit - 1), "below": 2**bit, "documents": int(bits[bit])}
            for bit in range(int(used[0]), int(used[-1]) + 1)
        ],
    }


def order_statistics(lengths: Chunks, ranks: Sequence[int]) -> list[int]:
    """The lengths at some ranks (from 0) in sorted order, by counting: first upper, then lower halves."""
    upper = numpy.zeros(2**HALF, numpy.int64)
    for chunk in lengths():
        upper += numpy.bincount(chunk >> HALF, minlength=len(upper))
    ends = numpy.cumsum(upper)
    found = []
    for rank in ranks:
        half = int(numpy.searchsorted(ends, rank, side="right"))
        lower = numpy.zeros(2**HALF, numpy.int64)
        for chunk in lengths():
            same = chunk[chunk >> HALF == half]
            lower += numpy.bincount(same & (2**HALF - 1), minlength=len(lower))
        before = int(ends[half] - upper[half])
        rest = int(numpy.searchsorted(numpy.cumsum(lower), rank - before, side="right"))
        found.append((half << HALF) + rest)
    return found


def unigram_entropy(counts: NDArray[numpy.int64]) -> float:
    """-sum p ln p, in nats a token: the loss of a model that knows only how frequent tokens are.

    Args:
        counts: How often each id occurs, of shape [vocabulary]; not all zero.
    """
    present = counts[counts > 0]
    shares = present / present.sum()
    return float(max(0.0, -(shares * numpy.log(shares)).sum()))
