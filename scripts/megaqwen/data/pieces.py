"""Which part of a corpus each shard reads.

A corpus is its files laid end to end. Of `n` shards the first has the first n-th of those bytes, and so
on. What cannot be cut belongs whole to the shard that has its first byte: a line of an uncompressed JSON
lines file, a row group of a Parquet file, and any other file. Only the sizes of the files and the footers
of Parquet files are looked at, so that a plan costs nothing and is the same wherever it is made.
"""

from dataclasses import dataclass
from pathlib import Path

from megaqwen.config.sections import Corpus, FilesCorpus
from megaqwen.data.files import Format, compression_of, corpus_files, file_format
from megaqwen.errors import InputError


@dataclass(frozen=True, kw_only=True)
class Shard:
    """One of several equal parts of every corpus; the default is all of it."""

    index: int = 0
    """From 0."""
    count: int = 1
    """How many there are."""

    def __post_init__(self) -> None:
        """Refuse a shard that there is not."""
        if not 0 <= self.index < self.count:
            raise InputError(f"there is no shard {self.index} of {self.count}: count from 0")

    def holds(self, position: int, total: int) -> bool:
        """Whether the byte at `position` of a corpus of `total` bytes is this shard's.

        What comes after the last byte (an empty file at the end) is the last shard's.
        """
        low, high = self.bounds(total)
        return low <= position < high or (position == total and self.index == self.count - 1)

    def bounds(self, total: int) -> tuple[int, int]:
        """The first byte of this shard and of the next one."""
        return total * self.index // self.count, total * (self.index + 1) // self.count


WHOLE = Shard()


@dataclass(frozen=True, kw_only=True)
class Piece:
    """What a shard reads of one file."""

    path: Path
    format: Format
    start: int = 0
    """Where its first line may begin, in bytes; of Parquet its first row group."""
    stop: int | None = None
    """Where no line begins any more, or the row group after its last; None is the end."""

    @property
    def whole(self) -> bool:
        """Whether it is all of the file."""
        return self.start == 0 and self.stop is None


def file_states(corpus: Corpus) -> dict[str, list[int]]:
    """Bytes and time of change (seconds) of each of a corpus's files, by path: shards are cut by them."""
    found = ((path, path.stat()) for path in corpus_files(corpus))
    return {str(path): [state.st_size, int(state.st_mtime)] for path, state in found}


def corpus_pieces(corpus: FilesCorpus, shard: Shard = WHOLE) -> list[Piece]:
    """What a shard reads of a corpus, in order."""
    files = [(path, file_format(path, corpus)) for path in corpus_files(corpus)]
    if shard == WHOLE:
        return [Piece(path=path, format=kind) for path, kind in files]
    sizes = [path.stat().st_size for path, _ in files]
    pieces, base, total = [], 0, sum(sizes)
    for (path, kind), size in zip(files, sizes, strict=True):
        piece = piece_of_file(path, kind, shard, base, size, total)
        if piece:
            pieces.append(piece)
        base += size
    return pieces


def piece_of_file(
    path: Path, kind: Format, shard: Shard, base: int, size: int, total: int
) -> Piece | None:
    """What a shard reads of a file that begins at byte `base` of its corpus."""
    cut = size > 0 and not compression_of(path)
    if cut and kind == "jsonl":
        low, high = (min(max(bound - base, 0), size) for bound in shard.bounds(total))
        stop = None if high == size else high
        return Piece(path=path, format=kind, start=low, stop=stop) if low < high else None
    if cut and kind == "parquet":
        from megaqwen.data.columns import row_group_positions

        first, next_first = shard.bounds(total)
        if base >= next_first or base + size <= first:
            return None
        if first <= base and base + size <= next_first:  # no need to look into it
            return Piece(path=path, format=kind)
        positions = row_group_positions(path)
        mine = [i for i, at in enumerate(positions) if shard.holds(base + at, total)]
        if positions and not mine:
            return None
        if len(mine) < len(positions):
            return Piece(path=path, format=kind, start=mine[0], stop=mine[-1] + 1)
        return Piece(path=path, format=kind)
    return Piece(path=path, format=kind) if shard.holds(base, total) else None
