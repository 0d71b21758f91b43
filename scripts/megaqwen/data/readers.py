"""The documents of a corpus, or of a shard of it, as lists of texts: a few megabytes at a time.

However large the corpus is, no more of it is in memory. What is wrong with a document ends as one
InputError that names the file and the line or row, or is counted where the config tolerates some.
"""

import logging
from collections.abc import Callable, Iterator
from pathlib import Path

from megaqwen.config.sections import BuiltinCorpus, Corpus
from megaqwen.data import streams
from megaqwen.data.builtin import builtin_documents
from megaqwen.data.columns import arrow_texts, parquet_texts
from megaqwen.data.pieces import WHOLE, Piece, Shard, corpus_pieces
from megaqwen.data.records import LineParser, not_utf8
from megaqwen.data.streams import DigestedFile, Lines, line_blocks, open_unpacked
from megaqwen.errors import InputError
from megaqwen.words import counted

NAMED = 5  # of the documents that cannot be used, in one message
SAMPLE_PLACES = 16
SAMPLE_CHARACTERS = 2**16  # at each place

logger = logging.getLogger("megaqwen.data")


class Intake:
    """What is noted while a corpus is read: documents that cannot be used, and the files' digests."""

    def __init__(self, corpus: str, tolerated: int = 0):
        """Start with nothing.

        Args:
            corpus: Its name, for messages.
            tolerated: How many documents may be left out since they cannot be used.
        """
        self.corpus = corpus
        self.tolerated = tolerated
        self.bad = 0
        self.named: list[str] = []
        self.digests: dict[Path, str] = {}

    def refuse(self, error: InputError) -> None:
        """Count a document that cannot be used, and log it; InputError when it is one too many."""
        if not self.tolerated:
            raise error
        self.bad += 1
        if len(self.named) < NAMED:
            self.named.append(str(error))
        if self.bad > self.tolerated:
            raise too_many_bad(self.corpus, self.tolerated, self.named)
        logger.warning("%s: left out: %s", self.corpus, error)


class Unnoted(Intake):
    """Passes over what cannot be used: who reads the corpus itself will say so."""

    def refuse(self, error: InputError) -> None:
        """Nothing."""


def too_many_bad(corpus: str, tolerated: int, named: list[str]) -> InputError:
    """The error when more documents are unusable than the config tolerates."""
    return InputError(
        f"corpus {corpus}: more than {counted(tolerated, 'document')} cannot be used, which is what "
        "max_bad_documents allows. The first of them:\n"
        + "\n".join(f"    {each}" for each in named)
    )


def corpus_documents(corpus: Corpus) -> Iterator[str]:
    """The texts of a corpus one by one; see `corpus_texts`."""
    for texts in corpus_texts(corpus, Intake(corpus.name)):
        yield from texts


def corpus_texts(
    corpus: Corpus, intake: Intake, shard: Shard = WHOLE, block: int | None = None
) -> Iterator[list[str]]:
    """The texts of a shard of a corpus in their order, empty ones included.

    Args:
        corpus: The corpus; the built-in one is all in the first shard.
        intake: Gets the digests of the files that are read whole, and what cannot be used.
        shard: Which part.
        block: About how many bytes of JSON lines are read at once.

    Raises:
        InputError: A file is missing, damaged or not in its format, or a text cannot be used.
    """
    if isinstance(corpus, BuiltinCorpus):
        if shard.index == 0:
            yield list(builtin_documents())
        return
    for piece in corpus_pieces(corpus, shard):
        match piece.format:
            case "jsonl":
                yield from jsonl_texts(piece, corpus.text_field, intake, block or streams.BLOCK)
            case "text":
                yield text_document(piece.path, intake)
            case "parquet":
                span = (piece.start, piece.stop)
                yield from parquet_texts(piece.path, corpus.text_field, *span, intake.refuse)
            case "arrow":
                yield from arrow_texts(piece.path, corpus.text_field, intake.refuse)


def sample_texts(corpus: Corpus) -> list[str]:
    """The first texts at places all over a corpus, long ones cut: about a megabyte at most."""
    return list(
        sample_of(lambda shard, size: corpus_texts(corpus, Unnoted(corpus.name), shard, size))
    )


def sample_of(read: Callable[[Shard, int], Iterator[list[str]]]) -> Iterator[str]:
    """The first texts at places all over what can be read, long ones cut.

    Args:
        read: Gives the texts of a shard in lists, the first one of about so many bytes.
    """
    for index in range(SAMPLE_PLACES):
        left = SAMPLE_CHARACTERS
        for text in next(read(Shard(index=index, count=SAMPLE_PLACES), left), []):
            yield text[:left]
            left -= len(text[:left])
            if not left:
                break


def jsonl_texts(piece: Piece, text_field: str, intake: Intake, size: int) -> Iterator[list[str]]:
    """One document a line: the text field of its JSON object. Blank lines are passed over."""
    parser = LineParser(text_field)
    for lines in jsonl_lines(piece, intake, size):
        yield parser.texts(lines.content, lines.where, intake.refuse)


def jsonl_lines(piece: Piece, intake: Intake, size: int) -> Iterator[Lines]:
    """Blocks of lines; the digest of a file that was read whole is noted."""
    path = piece.path
    with DigestedFile(path) as file, open_unpacked(path, file) as stream:
        number: int | None = None if piece.start else 1  # of the block's first line, when known
        for position, content in line_blocks(stream, path, piece.start, piece.stop, size):
            lines = Lines(path=path, position=position, content=content, first=number)
            yield lines
            if lines.first is not None:
                number = lines.first + content.count(b"\n")
        if piece.whole:
            intake.digests[path] = file.digest()


def text_document(path: Path, intake: Intake) -> list[str]:
    """The whole of a text file, as one document; none where it cannot be used."""
    with DigestedFile(path) as file, open_unpacked(path, file) as stream:
        content = stream.read(streams.LARGEST_DOCUMENT + 1)
        if len(content) > streams.LARGEST_DOCUMENT:
            raise streams.too_large(str(path))
        intake.digests[path] = file.digest()
    try:
        return [content.removeprefix(streams.BYTE_ORDER_MARK).decode()]
    except UnicodeDecodeError as error:
        intake.refuse(not_utf8(f"{path}:{content.count(b'\n', 0, error.start) + 1}", error))
        return []
