"""One corpus from text to tokens: reader, tokenizer, writer and statistics put together."""

import logging
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from megatron.core.datasets.indexed_dataset import IndexedDataset

from megaqwen.config.sections import Corpus
from megaqwen.data.files import corpus_files
from megaqwen.data.readers import corpus_documents
from megaqwen.data.statistics import CorpusStatistics
from megaqwen.data.tokenization import DocumentTokenizer
from megaqwen.data.writing import DocumentWriter
from megaqwen.errors import InputError
from megaqwen.provenance import sha256_file
from megaqwen.words import counted, readable_bytes

BATCH_DOCUMENTS = 1024
BATCH_CHARACTERS = 2**22
SECONDS_BETWEEN_REPORTS = 5.0
SAMPLE_TOKENS = 40

logger = logging.getLogger("megaqwen.data")


def tokenize_corpus(
    corpus: Corpus, tokenizer: DocumentTokenizer, directory: Path
) -> dict[str, Any]:
    """Write NAME.bin and NAME.idx of a corpus.

    Documents of nothing but white space are left out and counted.

    Returns:
        The corpus's card: its figures, the files that it was read from, and a sample of it.

    Raises:
        InputError: A file is wrong, or no document has any text.
    """
    statistics = CorpusStatistics(tokenizer.vocabulary_size)
    progress = Progress(corpus.name, statistics)
    prefix = directory / corpus.name
    with DocumentWriter(prefix, tokenizer.vocabulary_size) as writer:
        texts = documents_with_text(corpus_documents(corpus), statistics)
        for batch in batches(texts):
            documents = tokenizer.encode(batch)
            for ids in documents:
                writer.add(ids)
            statistics.add(batch, documents)
            progress.report()
        if not statistics.documents:
            raise InputError(
                f"corpus {corpus.name} is empty: {statistics.empty_documents} documents in "
                f"{len(corpus_files(corpus))} files, and none of them has any text"
            )
    card = {
        **statistics.card(writer.lengths),
        "dtype": writer.dtype.__name__,
        "sample": tokenizer.decode(first_tokens(prefix, SAMPLE_TOKENS)),
        "sources": [describe_source(path) for path in corpus_files(corpus)],
    }
    logger.info("%s", summary(corpus.name, card))
    return card


def first_tokens(prefix: Path, count: int) -> list[int]:
    """The beginning of the first document, read back from the disk."""
    dataset = IndexedDataset(str(prefix))  # named: its memory map ends with it, under all views
    ids: list[int] = dataset[0][:count].tolist()
    return ids


def documents_with_text(texts: Iterable[str], statistics: CorpusStatistics) -> Iterator[str]:
    """The texts that are more than white space; the others are counted."""
    for text in texts:
        if text and not text.isspace():
            yield text
        else:
            statistics.empty_documents += 1


def batches(texts: Iterable[str]) -> Iterator[list[str]]:
    """Texts in lists that keep all cores busy and are small in memory, whatever their lengths."""
    batch: list[str] = []
    characters = 0
    for text in texts:
        batch.append(text)
        characters += len(text)
        if len(batch) >= BATCH_DOCUMENTS or characters >= BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


class Progress:
    """Says every few seconds how far a corpus is and how fast it goes."""

    def __init__(self, name: str, statistics: CorpusStatistics):
        """Start the clock; `statistics` is read at each report."""
        self.name = name
        self.statistics = statistics
        self.started = self.reported = time.monotonic()

    def report(self) -> None:
        """One line, if the last one is long enough ago."""
        now = time.monotonic()
        if now - self.reported < SECONDS_BETWEEN_REPORTS:
            return
        self.reported = now
        logger.info(
            "%s: %s documents, %s so far, %s tokens (%.1f MB/s)",
            self.name,
            f"{self.statistics.documents:,}",
            readable_bytes(self.statistics.bytes),
            f"{self.statistics.tokens:,}",
            self.statistics.bytes / 1e6 / (now - self.started),
        )


def describe_source(path: Path) -> dict[str, Any]:
    """A corpus file's path, size and digest."""
    return {"path": str(path), "bytes": path.stat().st_size, "sha256": sha256_file(path)}


def summary(name: str, card: dict[str, Any]) -> str:
    """A corpus's card in one line."""
    skipped = card["empty_documents_skipped"]
    return (
        f"{name}: {counted(card['documents'], 'document')}, {readable_bytes(card['bytes'])} -> "
        f"{counted(card['tokens'], 'token')} ({card['bytes'] / card['tokens']:.1f} bytes a token)"
        + (f"; {counted(skipped, 'empty document')} left out" if skipped else "")
    )
