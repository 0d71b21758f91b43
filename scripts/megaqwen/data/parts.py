"""One shard of a corpus from text to tokens, in files that `merging` puts together.

PREFIX.bin has the tokens as the corpus's .bin will have them; of conversations PREFIX.targets.bin which
of them are trained on; PREFIX.lengths each document's tokens; PREFIX.counts.npy how often each id
occurs; PREFIX.documents, for deduplication, a digest of each text; PREFIX.part.json the rest. One thread
reads, one writes, and several encode what lies between them.
"""

import logging
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import numpy

from megaqwen.config.sections import Corpus, FilesCorpus
from megaqwen.data.chats import encode_conversations, sample_turns
from megaqwen.data.documents import encode_documents
from megaqwen.data.engines import Differs, Engine, WatchedEngine, choose_engine, slower_engine
from megaqwen.data.pieces import Shard, file_states
from megaqwen.data.readers import Intake, sample_texts
from megaqwen.data.threads import ahead
from megaqwen.data.tokenization import ChatTokenizer, DocumentTokenizer
from megaqwen.data.work import Counts, Encoded
from megaqwen.data.writing import digested_file, save_array
from megaqwen.provenance import write_json
from megaqwen.words import readable_bytes

TOKENS, TARGETS = ".bin", ".targets.bin"
SUFFIXES = (".lengths", ".counts.npy", ".documents", ".part.json")
SECONDS_BETWEEN_REPORTS = 5.0
COUNTED = 2**19  # tokens at once

logger = logging.getLogger("megaqwen.data")


def tokenize_part(
    corpus: Corpus, tokenizer: DocumentTokenizer, directory: Path, shard: Shard
) -> None:
    """Write the files of a shard of a corpus, NAME.bin and so on; see the module's docstring.

    A tokenizer with a chat template reads conversations, another one documents. Documents of nothing
    but white space, or shorter than the corpus wants them, are left out and counted. Where the engine
    turns out to be wrong about a text, `tokenizers` does the shard again.

    Raises:
        InputError: A file is wrong.
    """
    engine = engine_for(corpus, tokenizer)
    try:
        tokenize_with(engine, corpus, tokenizer, directory, shard)
    except Differs as difference:
        slower = slower_engine(tokenizer, corpus.name, f"{difference} (found on the way)")
        tokenize_with(slower, corpus, tokenizer, directory, shard)


def tokenize_with(
    engine: Engine, corpus: Corpus, tokenizer: DocumentTokenizer, directory: Path, shard: Shard
) -> None:
    """`tokenize_part` by one engine; files that are there are written anew."""
    states = file_states(corpus)
    tolerated = corpus.max_bad_documents if isinstance(corpus, FilesCorpus) else 0
    intake = Intake(corpus.name, tolerated)
    suffixes = written_suffixes(tokenizer)
    rows = numpy.zeros((len(suffixes), tokenizer.vocabulary_size), numpy.int64)
    counts = Counts(token_counts=rows)
    encoded = work_on(corpus, tokenizer, engine, intake, shard, counts)
    prefix = directory / corpus.name
    with ExitStack() as files:
        outputs = [
            files.enter_context(digested_file(directory / f"{corpus.name}{suffix}"))
            for suffix in suffixes
        ]
        lengths = files.enter_context(open(f"{prefix}.lengths", "wb"))
        documents = files.enter_context(open(f"{prefix}.documents", "wb"))
        progress = Progress(corpus.name, counts)
        for each in ahead(encoded):
            for (writer, _), array in zip(outputs, each.arrays(), strict=True):
                writer.write(array.data)
            # Not tofile, which says nothing of a full disk: see save_array.
            lengths.write(each.lengths.tobytes())
            if each.records is not None:
                documents.write(each.records.tobytes())
            count(counts, each)
            progress.report()
    if isinstance(engine, WatchedEngine):
        engine.check()
    save_array(Path(f"{prefix}.counts.npy"), counts.token_counts)
    figures = {key: value for key, value in vars(counts).items() if key != "token_counts"}
    facts = {
        **figures,
        "bad_documents": intake.bad,
        "bad_named": intake.named,
        "engine": {"name": engine.name, "reason": engine.reason},
        "states": states,
        "digests": {str(path): digest for path, digest in intake.digests.items()},
        "files": {
            suffix: stream.facts() for suffix, (_, stream) in zip(suffixes, outputs, strict=True)
        },
    }
    write_json(directory / f"{corpus.name}.part.json", facts)


def written_suffixes(tokenizer: DocumentTokenizer) -> list[str]:
    """The names' ends of the files that a corpus's tokens, and targets, are in."""
    return [TOKENS, TARGETS] if isinstance(tokenizer, ChatTokenizer) else [TOKENS]


def engine_for(corpus: Corpus, tokenizer: DocumentTokenizer) -> Engine:
    """The engine that suits a corpus."""
    if isinstance(tokenizer, ChatTokenizer):
        return choose_engine(tokenizer, corpus.name, sample_turns(corpus, tokenizer))
    return choose_engine(tokenizer, corpus.name, sample_texts(corpus))


def work_on(
    corpus: Corpus,
    tokenizer: DocumentTokenizer,
    engine: Engine,
    intake: Intake,
    shard: Shard,
    counts: Counts,
) -> Iterator[Encoded]:
    """What an engine makes of the shard."""
    if isinstance(tokenizer, ChatTokenizer):
        return encode_conversations(corpus, tokenizer, engine, intake, shard, counts)
    return encode_documents(corpus, tokenizer, engine, intake, shard, counts)


def count(counts: Counts, encoded: Encoded) -> None:
    """Count what is written."""
    all_of, *of_targets = counts.token_counts
    for first in range(0, len(encoded.ids), COUNTED):  # small enough for the processor's cache
        ids = encoded.ids[first : first + COUNTED]
        all_of += numpy.bincount(ids, minlength=len(all_of))
        if encoded.targets is not None:
            chosen = ids[encoded.targets[first : first + COUNTED].view(numpy.bool_)]
            of_targets[0] += numpy.bincount(chosen, minlength=len(all_of))
    counts.documents += len(encoded.lengths)
    counts.characters += encoded.characters
    counts.bytes += encoded.bytes
    counts.tokens += len(encoded.ids)


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
