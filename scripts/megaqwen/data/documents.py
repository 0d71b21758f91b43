"""Documents of pretraining: their texts with an end of document after each."""

import hashlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy
from numpy.typing import NDArray

from megaqwen.config.sections import Corpus
from megaqwen.data import streams
from megaqwen.data.engines import Engine
from megaqwen.data.pieces import Shard
from megaqwen.data.readers import Intake, corpus_texts
from megaqwen.data.threads import ahead, computing_threads
from megaqwen.data.tokenization import DocumentTokenizer
from megaqwen.data.work import DOCUMENT, Counts, Encoded, in_order
from megaqwen.data.writing import token_type, with_ends


@dataclass(kw_only=True)
class Batch:
    """Some documents on their way."""

    texts: list[str]
    documents: list[bytes]
    """The texts in UTF-8."""
    records: NDArray[Any] | None
    """Their entries in PREFIX.documents."""


def encode_documents(
    corpus: Corpus,
    tokenizer: DocumentTokenizer,
    engine: Engine,
    intake: Intake,
    shard: Shard,
    counts: Counts,
) -> Iterator[Encoded]:
    """The documents of a shard; those without text, or too short, are left out and counted."""
    dtype = token_type(tokenizer.vocabulary_size)

    def encode(batch: Batch) -> Encoded:
        tokens = engine.encode(batch.texts, batch.documents)
        return Encoded(
            ids=with_ends(tokens.ids, tokens.lengths, tokenizer.end_of_document, dtype),
            lengths=(tokens.lengths + 1).astype(numpy.int32),
            characters=sum(map(len, batch.texts)),
            bytes=sum(map(len, batch.documents)),
            records=batch.records,
        )

    at_once = computing_threads() + 1
    with ThreadPoolExecutor(at_once) as pool:
        batches = ahead(read_batches(corpus, intake, shard, counts))
        for _, encoded in in_order(pool, encode, batches, at_once):
            yield encoded


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
    records = document_records(texts, documents) if deduplicate else None
    return Batch(texts=texts, documents=documents, records=records)


def document_records(texts: list[str], documents: list[bytes]) -> NDArray[Any]:
    """What deduplication knows of documents, of shape [documents].

    Args:
        texts: Their texts.
        documents: The same in UTF-8.
    """
    digests = b"".join(hashlib.blake2b(each, digest_size=16).digest() for each in documents)
    records = numpy.empty(len(documents), DOCUMENT)
    records["high"], records["low"] = numpy.frombuffer(digests, "<u8").reshape(-1, 2).T
    records["bytes"] = [len(each) for each in documents]
    records["characters"] = [len(text) for text in texts]
    return records
