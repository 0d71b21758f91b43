"""One shard of a corpus from text to tokens, in files that `merging` puts together.

PREFIX.bin has the tokens as the corpus's .bin will have them; PREFIX.lengths each document's tokens;
PREFIX.counts.npy how often each id occurs; PREFIX.documents, for deduplication, a digest of each text;
PREFIX.part.json the rest. One thread reads, one writes, and several encode what lies between them.
"""

import hashlib
import logging
import time
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy
from numpy.typing import NDArray

from megaqwen.config.sections import Corpus, FilesCorpus
from megaqwen.data import streams
from megaqwen.data.engines import Engine, Tokens, choose_engine
from megaqwen.data.pieces import Shard
from megaqwen.data.readers import Intake, corpus_texts, sample_texts
from megaqwen.data.threads import ahead, computing_threads
from megaqwen.data.tokenization import DocumentTokenizer
from megaqwen.data.writing import digested_file, token_type, with_ends
from megaqwen.provenance import write_json
from megaqwen.words import readable_bytes

# What deduplication knows of a document: 128 bits of its text's BLAKE2b, and its size.
DOCUMENT = numpy.dtype([("high", "<u8"), ("low", "<u8"), ("bytes", "<i8"), ("characters", "<i8")])
SUFFIXES = (".lengths", ".counts.npy", ".documents", ".part.json")
SECONDS_BETWEEN_REPORTS = 5.0
COUNTED = 2**19  # tokens at once

logger = logging.getLogger("megaqwen.data")


@dataclass(kw_only=True)
class Batch:
    """Some documents on their way."""

    texts: list[str]
    documents: list[bytes]
    """The texts in UTF-8."""
    records: NDArray[Any] | None
    """Their entries in PREFIX.documents."""


@dataclass(kw_only=True)
class Counts:
    """What a part counts."""

    documents: int = 0
    empty_documents: int = 0
    short_documents: int = 0
    characters: int = 0
    bytes: int = 0
    tokens: int = 0
    token_counts: NDArray[numpy.int64] = field(default_factory=lambda: numpy.zeros(0, numpy.int64))


def tokenize_part(
    corpus: Corpus, tokenizer: DocumentTokenizer, directory: Path, shard: Shard
) -> None:
    """Write the files of a shard of a corpus, NAME.bin and so on; see the module's docstring.

    Documents of nothing but white space, or shorter than the corpus wants them, are left out and
    counted.

    Raises:
        InputError: A file is wrong.
    """
    engine = choose_engine(tokenizer, corpus.name, sample_texts(corpus))
    tolerated = corpus.max_bad_documents if isinstance(corpus, FilesCorpus) else 0
    intake = Intake(corpus.name, tolerated)
    counts = Counts(token_counts=numpy.zeros(tokenizer.vocabulary_size, numpy.int64))
    prefix = directory / corpus.name
    batches = ahead(read_batches(corpus, intake, shard, counts))
    encoded = ahead(encode_batches(batches, engine))
    with (
        digested_file(directory / f"{corpus.name}.bin") as (writer, stream),
        open(f"{prefix}.lengths", "wb") as lengths,
        open(f"{prefix}.documents", "wb") as documents,
    ):
        progress = Progress(corpus.name, counts)
        dtype = token_type(tokenizer.vocabulary_size)
        for batch, tokens in encoded:
            writer.write(
                with_ends(tokens.ids, tokens.lengths, tokenizer.end_of_document, dtype).data
            )
            (tokens.lengths + 1).astype(numpy.int32).tofile(lengths)
            if batch.records is not None:
                batch.records.tofile(documents)
            count(counts, batch, tokens, tokenizer.end_of_document)
            progress.report()
    numpy.save(f"{prefix}.counts.npy", counts.token_counts)
    figures = {key: value for key, value in vars(counts).items() if key != "token_counts"}
    facts = {
        **figures,
        "bad_documents": intake.bad,
        "bad_named": intake.named,
        "engine": {"name": engine.name, "reason": engine.reason},
        "digests": {str(path): digest for path, digest in intake.digests.items()},
        "bin": stream.facts(),
    }
    write_json(directory / f"{corpus.name}.part.json", facts)


def read_batches(corpus: Corpus, intake: Intake, shard: Shard, counts: Counts) -> Iterator[Batch]:
    """The documents of a shard that have text enough, a few megabytes at a time."""
    together: list[str] = []
    characters = 0
    for texts in corpus_texts(corpus, intake, shard):
        kept = [text for text in texts if text and not text.isspace()]
        long = [text for text in kept if len(text) >= corpus.min_characters]
        counts.empty_documents += len(texts) - len(kept)
        counts.short_documents += len(kept) - len(long)
        together += long
        characters += sum(map(len, long))
        if characters >= streams.BLOCK // 2:
            yield batch_of(together, corpus.deduplicate)
            together, characters = [], 0
    if together:
        yield batch_of(together, corpus.deduplicate)


def batch_of(texts: list[str], deduplicate: bool) -> Batch:
    """A batch of documents, with their entries for deduplication where that is asked for."""
    documents = [text.encode() for text in texts]
    records = None
    if deduplicate:
        digests = b"".join(hashlib.blake2b(each, digest_size=16).digest() for each in documents)
        records = numpy.empty(len(documents), DOCUMENT)
        records["high"], records["low"] = numpy.frombuffer(digests, "<u8").reshape(-1, 2).T
        records["bytes"] = [len(each) for each in documents]
        records["characters"] = [len(text) for text in texts]
    return Batch(texts=texts, documents=documents, records=records)


def encode_batches(batches: Iterable[Batch], engine: Engine) -> Iterator[tuple[Batch, Tokens]]:
    """Each batch with its tokens, in order: the end of one leaves no core idle, since another is on."""
    waiting: deque[tuple[Batch, Future[Tokens]]] = deque()
    at_once = computing_threads() + 1
    with ThreadPoolExecutor(at_once) as pool:
        for batch in batches:
            waiting.append((batch, pool.submit(engine.encode, batch.texts, batch.documents)))
            if len(waiting) == at_once:
                first, tokens = waiting.popleft()
                yield first, tokens.result()
        for first, tokens in waiting:
            yield first, tokens.result()


def count(counts: Counts, batch: Batch, tokens: Tokens, end_of_document: int) -> None:
    """Count a batch."""
    size = len(counts.token_counts)
    for first in range(0, len(tokens.ids), COUNTED):  # small enough for the processor's cache
        counts.token_counts += numpy.bincount(tokens.ids[first : first + COUNTED], minlength=size)
    counts.token_counts[end_of_document] += len(batch.texts)
    counts.documents += len(batch.texts)
    counts.characters += sum(map(len, batch.texts))
    counts.bytes += sum(map(len, batch.documents))
    counts.tokens += len(tokens.ids) + len(batch.texts)


class Progress:
    """Says every few seconds how far a corpus is and how fast it goes."""

    def __init__(self, name: str, counts: Counts):
        """Start the clock; `counts` is read at each report."""
        self.name = name
        self.counts = counts
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
            f"{self.counts.documents:,}",
            readable_bytes(self.counts.bytes),
            f"{self.counts.tokens:,}",
            self.counts.bytes / 1e6 / (now - self.started),
        )
