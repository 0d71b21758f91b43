"""Token ids to Megatron's .bin and .idx, through megatron-core's own builder."""

import contextlib
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy
from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder
from numpy.typing import NDArray


class DocumentWriter:
    """Appends documents to PREFIX.bin; PREFIX.idx follows when the `with` block ends well.

    One document is one sequence of the dataset, so Megatron's split falls between documents.
    """

    def __init__(self, prefix: Path, vocabulary_size: int):
        """Open PREFIX.bin.

        Args:
            prefix: Path without .bin and .idx; the name may have dots.
            vocabulary_size: Number of different ids; it decides on 2 or 4 bytes a token.
        """
        self.prefix = prefix
        self.dtype = DType.optimal_dtype(vocabulary_size)
        self.builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=self.dtype)

    def add(self, ids: NDArray[numpy.int32]) -> None:
        """Append one document, of shape [tokens], its end-of-document token included."""
        self.builder.add_document(ids, [len(ids)])

    @property
    def lengths(self) -> list[int]:
        """The tokens of each document so far."""
        lengths: list[int] = self.builder.sequence_lengths
        return lengths

    def __enter__(self) -> Self:
        """Itself."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Close PREFIX.bin; write PREFIX.idx unless there was an error."""
        if error is None:
            self.builder.finalize(f"{self.prefix}.idx")
            return
        with contextlib.suppress(OSError):  # a full disk is the error that is on its way already
            self.builder.data_file.close()
