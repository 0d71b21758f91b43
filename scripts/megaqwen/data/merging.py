"""The parts of a corpus put together: .bin and .idx, and the corpus's card.

How many parts there were does not show. The parts are read from one end to the other, so that memory
does not grow with them; deduplication alone takes a byte for each document.
"""

import itertools
import logging
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy
from numpy.typing import NDArray

from megaqwen.config.sections import Corpus
from megaqwen.data.deduplication import first_occurrences
from megaqwen.data.files import corpus_files
from megaqwen.data.parts import DOCUMENT, SUFFIXES
from megaqwen.data.readers import too_many_bad
from megaqwen.data.statistics import length_figures, unigram_entropy
from megaqwen.data.tokenization import DocumentTokenizer
from megaqwen.data.writing import digested_file, file_chunks, token_type, write_index
from megaqwen.errors import InputError
from megaqwen.provenance import read_json, sha256_file
from megaqwen.words import counted, readable_bytes

COPIED = 2**24  # bytes that are copied at once
SAMPLE_TOKENS = 40
SUMMED = (
    *("documents", "empty_documents", "short_documents", "bad_documents"),
    *("characters", "bytes", "tokens"),
)

logger = logging.getLogger("megaqwen.data")


def merge_parts(
    corpus: Corpus, tokenizer: DocumentTokenizer, parts: Sequence[Path], directory: Path
) -> tuple[dict[str, Any], dict[Path, dict[str, Any]]]:
    """Write NAME.bin and NAME.idx of a corpus from its parts' files.

    Args:
        corpus: The corpus.
        tokenizer: What the parts were tokenized with.
        parts: The directories of the parts, in order; their files of this corpus are removed when
            `directory` is one of them.
        directory: Where the files go.

    Returns:
        The corpus's card, and bytes and digest of the two files.

    Raises:
        InputError: No document has any text, or too many cannot be used.
    """
    prefixes = [part / corpus.name for part in parts]
    facts = [read_json(with_suffix(prefix, ".part.json")) for prefix in prefixes]
    totals = {name: sum(fact[name] for fact in facts) for name in SUMMED}
    check_totals(corpus, totals, facts)
    dtype = token_type(tokenizer.vocabulary_size)
    token_counts = sum(numpy.load(with_suffix(prefix, ".counts.npy")) for prefix in prefixes)
    length_files = [with_suffix(prefix, ".lengths") for prefix in prefixes]
    target = with_suffix(directory / corpus.name, ".bin")
    keep = None
    if corpus.deduplicate:
        keep = first_occurrences([with_suffix(prefix, ".documents") for prefix in prefixes])
    if keep is not None and not keep.all():
        bin_facts = join_kept(prefixes, target, dtype, keep, totals, token_counts)
    elif prefixes == [directory / corpus.name]:
        bin_facts = facts[0]["bin"]
    else:
        bin_facts = join([with_suffix(prefix, ".bin") for prefix in prefixes], target)

    def lengths() -> Iterator[NDArray[numpy.int32]]:
        return kept_chunks(length_files, numpy.int32, keep)

    documents = totals["documents"]
    index = with_suffix(directory / corpus.name, ".idx")
    known = {target: bin_facts, index: write_index(index, dtype, documents, lengths)}
    first = numpy.memmap(target, dtype, "r")[: min(SAMPLE_TOKENS, int(next(lengths())[0]))].tolist()
    card = {
        "documents": documents,
        "empty_documents_skipped": totals["empty_documents"],
        "short_documents_skipped": totals["short_documents"],
        "bad_documents_skipped": totals["bad_documents"],
        "duplicate_documents_skipped": 0 if keep is None else int(len(keep) - keep.sum()),
        "characters": totals["characters"],
        "bytes": totals["bytes"],
        "tokens": totals["tokens"],
        "tokens_per_byte": round(totals["tokens"] / totals["bytes"], 6),
        "distinct_tokens": int(numpy.count_nonzero(token_counts)),
        **length_figures(documents, lengths),
        "unigram_entropy": unigram_entropy(token_counts),
        "dtype": dtype.name,
        "engine": facts[0]["engine"],
        "sample": tokenizer.decode(first),
        "sources": describe_sources(corpus, facts),
    }
    for prefix in prefixes:
        if prefix.parent == directory:
            for suffix in SUFFIXES:
                with_suffix(prefix, suffix).unlink()
    logger.info("%s", summary(corpus.name, card))
    return card, known


def check_totals(corpus: Corpus, totals: dict[str, int], facts: list[dict[str, Any]]) -> None:
    """InputError unless the parts together have text, and no more bad documents than tolerated."""
    tolerated = getattr(corpus, "max_bad_documents", 0)
    if totals["bad_documents"] > tolerated:
        raise too_many_bad(corpus.name, tolerated, [n for fact in facts for n in fact["bad_named"]])
    if not totals["documents"]:
        left_out = totals["empty_documents"] + totals["short_documents"] + totals["bad_documents"]
        raise InputError(
            f"corpus {corpus.name} is empty: {left_out} documents in "
            f"{len(corpus_files(corpus))} files, and none of them has any text"
            + (f" of {corpus.min_characters} characters" if corpus.min_characters else "")
        )


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
    prefixes: Iterable[Path],
    target: Path,
    dtype: numpy.dtype[Any],
    keep: NDArray[numpy.bool_],
    totals: dict[str, int],
    token_counts: NDArray[numpy.int64],
) -> dict[str, Any]:
    """`join` without the duplicates, which are taken out of what was counted.

    Args:
        prefixes: The parts.
        target: The corpus's .bin; it may be that of the only part.
        dtype: Of its tokens.
        keep: Which documents stay, of shape [documents].
        totals: Documents, characters, bytes and tokens of all of them; changed.
        token_counts: How often each id occurs in all of them, of shape [vocabulary]; changed.
    """
    partial = target.with_name(f".{target.name}.kept")
    first = 0
    with digested_file(partial) as (writer, stream):
        for prefix in prefixes:
            with open(with_suffix(prefix, ".bin"), "rb", buffering=0) as source:
                for lengths in file_chunks([with_suffix(prefix, ".lengths")], numpy.int32):
                    kept = keep[first : first + len(lengths)]
                    for stays, tokens in runs(kept, lengths):
                        for size in blocks(tokens, COPIED // dtype.itemsize):
                            ids = numpy.fromfile(source, dtype, size)
                            if stays:
                                writer.write(ids.data)
                            else:
                                counted_ids = numpy.bincount(ids, minlength=len(token_counts))
                                token_counts -= counted_ids
                                totals["tokens"] -= size
                    first += len(lengths)
    first = 0
    for records in file_chunks(
        [with_suffix(prefix, ".documents") for prefix in prefixes], DOCUMENT
    ):
        gone = records[~keep[first : first + len(records)]]
        totals["documents"] -= len(gone)
        totals["bytes"] -= int(gone["bytes"].sum())
        totals["characters"] -= int(gone["characters"].sum())
        first += len(records)
    partial.replace(target)
    return stream.facts()


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


def describe_sources(corpus: Corpus, facts: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A corpus's files: path, size and digest, which is known where one part read all of a file."""
    known = {path: digest for fact in facts for path, digest in fact["digests"].items()}
    return [
        {
            "path": str(path),
            "bytes": path.stat().st_size,
            "sha256": known.get(str(path)) or sha256_file(path),
        }
        for path in corpus_files(corpus)
    ]


def summary(name: str, card: dict[str, Any]) -> str:
    """A corpus's card in one line."""
    kinds = ("empty", "short", "bad", "duplicate")
    numbers = [(kind, card[f"{kind}_documents_skipped"]) for kind in kinds]
    left_out = [counted(number, f"{kind} document") for kind, number in numbers if number]
    return (
        f"{name}: {counted(card['documents'], 'document')}, {readable_bytes(card['bytes'])} -> "
        f"{counted(card['tokens'], 'token')} ({card['bytes'] / card['tokens']:.1f} bytes a token)"
        + (f"; {', '.join(left_out)} left out" if left_out else "")
    )
