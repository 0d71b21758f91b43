"""The parts of a corpus put together: .bin and .idx, and the corpus's card.

How many parts there were does not show. The parts are read from one end to the other, so that memory
does not grow with them; deduplication alone takes a byte for each document.
"""

import itertools
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy
from numpy.typing import NDArray

from megaqwen.config.sections import Corpus
from megaqwen.data.chat import END, START
from megaqwen.data.deduplication import first_occurrences
from megaqwen.data.files import corpus_files
from megaqwen.data.joining import join, join_kept, kept_chunks, with_suffix
from megaqwen.data.parts import SUFFIXES, TARGETS, TOKENS, written_suffixes
from megaqwen.data.pieces import file_states
from megaqwen.data.readers import too_many_bad
from megaqwen.data.statistics import length_figures, unigram_entropy
from megaqwen.data.tokenization import ChatTokenizer, DocumentTokenizer
from megaqwen.data.writing import file_chunks, token_type, write_index
from megaqwen.errors import InputError
from megaqwen.provenance import read_json, sha256_file
from megaqwen.words import counted, readable_bytes

SAMPLE_TOKENS = 40
SAMPLE_TOKENS_OF_CONVERSATION = 160
SUMMED = (
    *("documents", "empty_documents", "short_documents", "bad_documents"),
    *("characters", "bytes", "tokens"),
)

logger = logging.getLogger("megaqwen.data")


def merge_parts(
    corpus: Corpus, tokenizer: DocumentTokenizer, parts: Sequence[Path], directory: Path
) -> tuple[dict[str, Any], dict[Path, dict[str, Any]]]:
    """Write NAME.bin and NAME.idx of a corpus, and of conversations their targets, from its parts' files.

    Args:
        corpus: The corpus.
        tokenizer: What the parts were tokenized with.
        parts: The directories of the parts, in order; their files of this corpus are removed when
            `directory` is one of them.
        directory: Where the files go.

    Returns:
        The corpus's card, and bytes and digest of the files.

    Raises:
        InputError: No document has any text, too many cannot be used, a part is damaged, or a file has
            changed since it was read.
    """
    prefixes = [part / corpus.name for part in parts]
    facts = [read_json(with_suffix(prefix, ".part.json")) for prefix in prefixes]
    check_states(corpus, facts)
    totals = {name: sum(fact[name] for fact in facts) for name in SUMMED}
    check_totals(corpus, totals, facts)
    types = dict(zip(written_suffixes(tokenizer), dtypes(tokenizer), strict=False))
    loaded = (numpy.load(with_suffix(prefix, ".counts.npy")) for prefix in prefixes)
    token_counts = sum(map(numpy.atleast_2d, loaded))
    check_files(corpus.name, prefixes, facts, types)
    length_files = [with_suffix(prefix, ".lengths") for prefix in prefixes]
    check_lengths(corpus.name, totals, file_chunks(length_files, numpy.int32))
    keep = None
    if corpus.deduplicate:
        keep = first_occurrences([with_suffix(prefix, ".documents") for prefix in prefixes])
    target = directory / corpus.name
    known = {}
    if keep is not None and not keep.all():
        known = join_kept(prefixes, target, types, keep, totals, token_counts)
    else:
        for suffix in types:
            known[with_suffix(target, suffix)] = (
                facts[0]["files"][suffix]
                if prefixes == [target]
                else join(
                    [with_suffix(prefix, suffix) for prefix in prefixes],
                    with_suffix(target, suffix),
                )
            )

    def lengths() -> Iterator[NDArray[numpy.int32]]:
        return kept_chunks(length_files, numpy.int32, keep)

    documents = totals["documents"]
    for suffix, dtype in types.items():
        index = with_suffix(target, suffix).with_suffix(".idx")
        known[index] = write_index(index, dtype, documents, lengths)
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
        "distinct_tokens": int(numpy.count_nonzero(token_counts[0])),
        **turn_figures(tokenizer, token_counts),
        **length_figures(documents, lengths),
        "unigram_entropy": unigram_entropy(token_counts[-1]),
        "dtype": types[TOKENS].name,
        "engine": engine_of([fact["engine"] for fact in facts]),
        "sample": sample_of(target, types, tokenizer, int(next(lengths())[0])),
        "sources": describe_sources(corpus, facts),
    }
    for prefix in prefixes:
        if prefix.parent == directory:
            for suffix in SUFFIXES:
                with_suffix(prefix, suffix).unlink()
    logger.info("%s", summary(corpus.name, card))
    return card, known


def dtypes(tokenizer: DocumentTokenizer) -> list[numpy.dtype[Any]]:
    """The types of a token and of a target on disk."""
    return [token_type(tokenizer.vocabulary_size), numpy.dtype(numpy.uint8)]


def turn_figures(
    tokenizer: DocumentTokenizer, token_counts: NDArray[numpy.int64]
) -> dict[str, int]:
    """Of conversations: their turns as rendered, the assistant's, and the tokens that are trained on."""
    if not isinstance(tokenizer, ChatTokenizer):
        return {}
    every, targets = token_counts
    return {
        "turns": int(every[tokenizer.special_ids[START]]),
        "assistant_turns": int(targets[tokenizer.special_ids[END]]),
        "target_tokens": int(targets.sum()),
    }


def sample_of(
    target: Path,
    types: Mapping[str, numpy.dtype[Any]],
    tokenizer: DocumentTokenizer,
    length: int,
) -> str | list[dict[str, Any]]:
    """The beginning of the first document, decoded; of a conversation, in pieces that are targets or not.

    Args:
        target: The corpus's files, without the extension.
        types: Of what is in them, by the ends of their names.
        tokenizer: The model's.
        length: The tokens of the first document.
    """
    size = min(length, SAMPLE_TOKENS if TARGETS not in types else SAMPLE_TOKENS_OF_CONVERSATION)
    ids, *flags = (
        numpy.memmap(with_suffix(target, suffix), dtype, "r")[:size]
        for suffix, dtype in types.items()
    )
    if not flags:
        return tokenizer.decode(ids.tolist())
    (changes,) = numpy.nonzero(numpy.diff(flags[0]))
    bounds = [0, *(changes + 1).tolist(), size]
    return [
        {"text": tokenizer.decode(ids[a:b].tolist()), "target": bool(flags[0][a])}
        for a, b in itertools.pairwise(bounds)
    ]


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


def check_files(
    corpus: str,
    prefixes: Sequence[Path],
    facts: Sequence[Mapping[str, Any]],
    suffixes: Iterable[str],
) -> None:
    """InputError unless each part's files are as long as they were written: a node may have lost some."""
    for prefix, fact in zip(prefixes, facts, strict=True):
        for suffix in suffixes:
            path, written = with_suffix(prefix, suffix), fact["files"][suffix]["bytes"]
            if (found := path.stat().st_size) != written:
                raise InputError(
                    f"corpus {corpus}: {path} has {found:,} bytes where {written:,} were written."
                    f" Remove {path.parent} and tokenize it again"
                )


def check_lengths(
    corpus: str, totals: Mapping[str, int], lengths: Iterable[NDArray[numpy.int32]]
) -> None:
    """InputError unless the documents' lengths, of which .idx is made, add up to the tokens in .bin."""
    documents = tokens = 0
    for chunk in lengths:
        documents += len(chunk)
        tokens += int(chunk.sum(dtype=numpy.int64))
    if (documents, tokens) != (totals["documents"], totals["tokens"]):
        raise InputError(
            f"corpus {corpus}: {totals['documents']:,} documents of {totals['tokens']:,} tokens were"
            f" written, but the lengths on disk are of {documents:,} and {tokens:,}: was the disk full?"
            " Tokenize it again"
        )


def engine_of(engines: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Name and reason of the engine of all parts; where they differ, of how many it was `tokenizers`."""
    slower = [engine for engine in engines if engine["reason"]]
    if len(slower) in (0, len(engines)):
        return engines[0]
    share = f"tokenizers for {len(slower)} of {counted(len(engines), 'shard')}"
    return {"name": "gigatoken and tokenizers", "reason": f"{share}: {slower[0]['reason']}"}


def check_states(corpus: Corpus, facts: list[dict[str, Any]]) -> None:
    """InputError where a part read other files than there are now: text would be doubled or left out."""
    now = file_states(corpus)
    for number, fact in enumerate(facts, start=1):
        then = fact["states"]
        changed = sorted(path for path in now.keys() | then if now.get(path) != then.get(path))
        if changed:
            raise InputError(
                f"corpus {corpus.name}: {changed[0]} has changed since shard {number} of {len(facts)} was"
                " read: tokenize all of them again (snakemake -R preprocess) when it stays as it is"
            )


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
