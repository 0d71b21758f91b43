"""Which documents repeat an earlier one to the byte."""

from collections.abc import Sequence
from pathlib import Path

import numpy
from numpy.typing import NDArray

from megaqwen.data.work import DOCUMENT
from megaqwen.data.writing import file_chunks

AT_ONCE = 2**22  # documents that are sorted at once: 300 MB


def first_occurrences(files: Sequence[Path]) -> NDArray[numpy.bool_]:
    """Of documents with the same text (by 128 bits of BLAKE2b) the first.

    The files are read once for every 4 million documents; memory is a byte a document and what sorting
    4 million takes.

    Args:
        files: PREFIX.documents of the parts, in order.

    Returns:
        Whether each document is the first of its text, of shape [documents].
    """
    total = sum(path.stat().st_size for path in files) // DOCUMENT.itemsize
    keep = numpy.ones(total, numpy.bool_)
    passes = -(-total // AT_ONCE)
    for number in range(passes):
        found = [numpy.empty(0, numpy.int64)]
        high, low = [numpy.empty(0, numpy.uint64)], [numpy.empty(0, numpy.uint64)]
        first = 0
        for records in file_chunks(files, DOCUMENT):
            (mine,) = numpy.nonzero(records["high"] % passes == number)
            found.append(mine + first)
            high.append(records["high"][mine])
            low.append(records["low"][mine])
            first += len(records)
        again = repeated(numpy.concatenate(found), numpy.concatenate(high), numpy.concatenate(low))
        keep[again] = False
    return keep


def repeated(
    indices: NDArray[numpy.int64], high: NDArray[numpy.uint64], low: NDArray[numpy.uint64]
) -> NDArray[numpy.int64]:
    """The indices of documents whose digest an earlier one has; all of shape [documents]."""
    order = numpy.lexsort((indices, low, high))
    same = (high[order][1:] == high[order][:-1]) & (low[order][1:] == low[order][:-1])
    return indices[order][1:][same]
