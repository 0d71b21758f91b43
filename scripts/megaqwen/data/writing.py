"""Token ids to Megatron's .bin and .idx, byte for byte as megatron-core's IndexedDatasetBuilder does it.

Its own builder imports torch, keeps every length in a Python list and takes one document at a time.
The layout is that of `_IndexWriter` in megatron/core/datasets/indexed_dataset.py, version 1.
"""

import contextlib
import io
import struct
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, cast

import numpy
from numpy.typing import DTypeLike, NDArray

from megaqwen.provenance import DigestingStream

HEADER = b"MMIDIDX\x00\x00"
VERSION = 1
TYPE_CODES = {
    numpy.dtype(numpy.uint8): 1,
    numpy.dtype(numpy.int32): 4,
    numpy.dtype(numpy.uint16): 8,
}
LARGEST_VOCABULARY_OF_2_BYTES = 65_500
BUFFER = 2**20
ENTRIES = 2**20  # of an index that are worked on at once

Chunks = Callable[[], Iterable[NDArray[numpy.int32]]]


def token_type(vocabulary_size: int) -> numpy.dtype[Any]:
    """The type of a token in .bin: that of Megatron's DType.optimal_dtype."""
    small = vocabulary_size < LARGEST_VOCABULARY_OF_2_BYTES
    return numpy.dtype(numpy.uint16 if small else numpy.int32)


@contextlib.contextmanager
def digested_file(path: Path) -> Iterator[tuple[io.BufferedWriter, DigestingStream]]:
    """A new file to write to, and the stream that knows its digest when the block has ended."""
    with open(path, "wb", buffering=0) as file:
        stream = DigestingStream(file)
        writer: io.BufferedWriter[Any] = io.BufferedWriter(cast(Any, stream), BUFFER)
        try:
            yield writer, stream
            writer.flush()
        finally:
            with contextlib.suppress(OSError, ValueError):  # a full disk is on its way already
                writer.detach()


def save_array(path: Path, array: NDArray[Any]) -> None:
    """Write a .npy file.

    To a plain file numpy writes by `tofile`, through a stream of its own: where the disk is full when
    that is closed, the end of the array is left out without an error.
    """
    with digested_file(path) as (writer, _):
        numpy.save(writer, array)


def with_ends(
    ids: NDArray[Any], lengths: NDArray[numpy.int64], end: int, dtype: DTypeLike
) -> NDArray[Any]:
    """Token ids of documents with the end of document after each.

    Args:
        ids: Of shape [tokens].
        lengths: The tokens of each document, of shape [documents].
        end: The id of the end of document.
        dtype: Of the result, of shape [tokens + documents].
    """
    ends = numpy.cumsum(lengths + 1) - 1
    is_token = numpy.ones(len(ids) + len(lengths), numpy.bool_)
    is_token[ends] = False
    result = numpy.empty(len(is_token), dtype)
    result[is_token] = ids
    result[ends] = end
    return result


def write_index(
    path: Path, dtype: numpy.dtype[Any], documents: int, lengths: Chunks
) -> dict[str, Any]:
    """Write .idx, in which one document is one sequence, so that Megatron's split falls between them.

    Args:
        path: Where.
        dtype: Of the tokens in .bin.
        documents: How many there are.
        lengths: Gives the tokens of each document, in chunks; called more than once.

    Returns:
        The file's bytes and SHA-256.
    """
    with digested_file(path) as (writer, stream):
        writer.write(HEADER)
        writer.write(struct.pack("<QBQQ", VERSION, TYPE_CODES[dtype], documents, documents + 1))
        for chunk in lengths():
            writer.write(chunk.astype(numpy.int32).tobytes())
        position = 0
        for chunk in lengths():
            ends = position + numpy.cumsum(chunk, dtype=numpy.int64) * dtype.itemsize
            writer.write(numpy.concatenate([[position], ends[:-1]]).astype(numpy.int64).tobytes())
            position = int(ends[-1])
        for first in range(0, documents + 1, ENTRIES):
            last = min(first + ENTRIES, documents + 1)
            writer.write(numpy.arange(first, last, dtype=numpy.int64).tobytes())
    return stream.facts()


def file_chunks(paths: Iterable[Path], dtype: DTypeLike) -> Iterator[NDArray[Any]]:
    """The entries of binary files, one file after another, in chunks."""
    for path in paths:
        with open(path, "rb") as stream:
            while len(chunk := numpy.fromfile(stream, dtype, ENTRIES)):
                yield chunk
