"""The card of a corpus: how much text it is, how it tokenizes, and what a trivial model scores."""

from collections.abc import Sequence
from typing import Any

import numpy
from numpy.typing import NDArray


class CorpusStatistics:
    """Counts over a corpus, gathered document by document in memory of the vocabulary's size."""

    def __init__(self, vocabulary_size: int):
        """Start with nothing.

        Args:
            vocabulary_size: Number of different ids.
        """
        self.token_counts = numpy.zeros(vocabulary_size, numpy.int64)
        self.documents = 0
        self.empty_documents = 0
        self.characters = 0
        self.bytes = 0
        self.tokens = 0

    def add(self, texts: Sequence[str], documents: Sequence[NDArray[numpy.int32]]) -> None:
        """Count documents: their texts, and their token ids with the end of document."""
        ids = numpy.concatenate(documents)
        self.token_counts += numpy.bincount(ids, minlength=len(self.token_counts))
        self.documents += len(texts)
        self.characters += sum(map(len, texts))
        self.bytes += sum(map(utf8_bytes, texts))
        self.tokens += len(ids)

    def card(self, lengths: Sequence[int]) -> dict[str, Any]:
        """The card's figures; `tokens` and lengths count the end of each document as a token.

        Args:
            lengths: The tokens of each document.
        """
        return {
            "documents": self.documents,
            "empty_documents_skipped": self.empty_documents,
            "characters": self.characters,
            "bytes": self.bytes,
            "tokens": self.tokens,
            "tokens_per_byte": round(self.tokens / self.bytes, 6),
            "distinct_tokens": int(numpy.count_nonzero(self.token_counts)),
            "median_document_tokens": float(numpy.median(lengths)),
            "longest_document_tokens": max(lengths),
            "unigram_entropy": unigram_entropy(self.token_counts),
        }


def unigram_entropy(counts: NDArray[numpy.int64]) -> float:
    """-sum p ln p, in nats a token: the loss of a model that knows only how frequent tokens are.

    Args:
        counts: How often each id occurs, of shape [vocabulary]; not all zero.
    """
    present = counts[counts > 0]
    shares = present / present.sum()
    return float(max(0.0, -(shares * numpy.log(shares)).sum()))


def utf8_bytes(text: str) -> int:
    """The length of a text in UTF-8."""
    return len(text) if text.isascii() else len(text.encode())
