"""The files of a corpus's parts one after another, with or without the duplicates in them."""

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy
from numpy.typing import NDArray

from megaqwen.data.parts import TOKENS
from megaqwen.data.work import DOCUMENT
from megaqwen.data.writing import digested_file, file_chunks

COPIED = 2**24  # bytes that are copied at once


def with_suffix(prefix: Path, suffix: str) -> Path:
    """A part's file; a corpus's name may have dots."""
    return prefix.with_name(prefix.name + suffix)


def join(files: Iterable[Path], target: Path) -> dict[str, Any]:
    """Files one after another; bytes and digest of the whole."""
    with digested_file(target) as (writer, stream):
        for path in files:
            with open(path, "rb", buffering=0) as source:
                while block := source.read(COPIED):
                    writer.write(block)
    return stream.facts()


def join_kept(
    prefixes: Sequence[Path],
    target: Path,
    types: Mapping[str, numpy.dtype[Any]],
    keep: NDArray[numpy.bool_],
    totals: dict[str, int],
    token_counts: NDArray[numpy.int64],
) -> dict[Path, dict[str, Any]]:
    """`join` of all of a corpus's files without the duplicates, which are taken out of what was counted.

    Args:
        prefixes: The parts.
        target: The corpus's files, without the extension; they may be those of the only part.
        types: Of what is in them, by the ends of their names.
        keep: Which documents stay, of shape [documents].
        totals: Documents, characters, bytes and tokens of all of them; changed.
        token_counts: How often each id occurs, and is a target; changed.

    Returns:
        Bytes and digest of each file.
    """
    partial = {suffix: target.with_name(f".{target.name}{suffix}.kept") for suffix in types}
    with ExitStack() as files:
        outputs = [files.enter_context(digested_file(path)) for path in partial.values()]
        first = 0
        for prefix in prefixes:
            with ExitStack() as inputs:
                sources = [
                    inputs.enter_context(open(with_suffix(prefix, suffix), "rb", buffering=0))
                    for suffix in types
                ]
                for lengths in file_chunks([with_suffix(prefix, ".lengths")], numpy.int32):
                    kept = keep[first : first + len(lengths)]
                    first += len(lengths)
                    for stays, tokens in runs(kept, lengths):
                        for size in blocks(tokens, COPIED // types[TOKENS].itemsize):
                            read = zip(sources, types.values(), strict=True)
                            arrays = [numpy.fromfile(source, dtype, size) for source, dtype in read]
                            if stays:
                                for (writer, _), array in zip(outputs, arrays, strict=True):
                                    writer.write(array.data)
                            else:
                                uncount(token_counts, *arrays)
                                totals["tokens"] -= size
    first = 0
    for records in file_chunks(
        [with_suffix(prefix, ".documents") for prefix in prefixes], DOCUMENT
    ):
        gone = records[~keep[first : first + len(records)]]
        totals["documents"] -= len(gone)
        totals["bytes"] -= int(gone["bytes"].sum())
        totals["characters"] -= int(gone["characters"].sum())
        first += len(records)
    for suffix, path in partial.items():
        path.replace(with_suffix(target, suffix))
    streams = zip(types, outputs, strict=True)
    return {with_suffix(target, suffix): stream.facts() for suffix, (_, stream) in streams}


def uncount(
    token_counts: NDArray[numpy.int64],
    ids: NDArray[Any],
    targets: NDArray[numpy.uint8] | None = None,
) -> None:
    """Take tokens out of what was counted."""
    size = token_counts.shape[1]
    token_counts[0] -= numpy.bincount(ids, minlength=size)
    if targets is not None:
        token_counts[1] -= numpy.bincount(ids[targets.view(numpy.bool_)], minlength=size)


def runs(keep: NDArray[numpy.bool_], lengths: NDArray[numpy.int32]) -> Iterator[tuple[bool, int]]:
    """Neighbours that all stay or all go: which of the two, and how many tokens they have."""
    (changes,) = numpy.nonzero(numpy.diff(keep))
    bounds = [0, *(changes + 1).tolist(), len(keep)]
    ends = numpy.concatenate([[0], numpy.cumsum(lengths, dtype=numpy.int64)])
    for start, stop in itertools.pairwise(bounds):
        yield bool(keep[start]), int(ends[stop] - ends[start])


def blocks(total: int, size: int) -> Iterator[int]:
    """`total` in pieces of `size`, the last one smaller."""
    for first in range(0, total, size):
        yield min(size, total - first)


def kept_chunks(
    files: Iterable[Path], dtype: Any, keep: NDArray[numpy.bool_] | None
) -> Iterator[NDArray[Any]]:
    """The entries of documents that stay, in chunks that are not empty."""
    first = 0
    for chunk in file_chunks(files, dtype):
        kept = chunk if keep is None else chunk[keep[first : first + len(chunk)]]
        first += len(chunk)
        if len(kept):
            yield kept
