"""What turns texts into token ids: gigatoken where it gives the same ids as `tokenizers`, or the latter.

gigatoken (https://github.com/marcelroed/gigatoken) is about a hundred times as fast. It is used for a
tokenizer that it supports after it gave the very ids of `tokenizers` for HARD_TEXTS and for texts at some
places of the corpus, and as long as it does so for excerpts of all that it encodes. Documents with
characters that Unicode got after version 15 are encoded by `tokenizers` in any case: the two libraries
have different tables of those.
"""

import functools
import json
import logging
import threading
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy
import psutil
from numpy.typing import NDArray

from megaqwen.data.hard_texts import HARD_TEXTS, around
from megaqwen.data.threads import computing_threads
from megaqwen.data.tokenization import DocumentTokenizer

CODE_POINTS = 0x110000
THREE_BYTES = 0xE0  # the first byte, in UTF-8, of what comes after U+07FF; before it nothing is new
FOUR_BYTES = 0xF0  # and of what comes after U+FFFF
BYTES_A_CACHE = 256 * 2**20  # of memory, for each thread, that gigatoken may remember words in
BATCHES_AT_FIRST = 32
EXCERPTS = (
    8  # of what is encoded at once, mostly one or two megabytes; of more, for each EXCERPTS_OF
)
EXCERPTS_OF = 2**21
CHECKED_AT_ONCE = 128
EXCERPT_CHARACTERS = 64  # so that `tokenizers` takes about a hundredth of the time

logger = logging.getLogger("megaqwen.data")


@dataclass(frozen=True, kw_only=True)
class Tokens:
    """The token ids of some documents, one after another, without ends of documents."""

    ids: NDArray[Any]
    """Of shape [tokens]."""
    lengths: NDArray[numpy.int64]
    """The tokens of each document, of shape [documents]."""


class Engine(Protocol):
    """Encodes batches of documents."""

    name: str
    """gigatoken or tokenizers."""
    reason: str | None
    """Why it is not the fast one."""

    def encode(self, texts: Sequence[str], documents: Sequence[bytes]) -> Tokens:
        """The ids of documents, given both as text and in UTF-8; several threads may ask at once."""


class TokenizersEngine:
    """Hugging Face's tokenizers: right by definition."""

    name = "tokenizers"

    def __init__(self, tokenizer: DocumentTokenizer, reason: str | None = None):
        """Encode with `tokenizer`."""
        self.tokenizer = tokenizer
        self.reason = reason

    def encode(self, texts: Sequence[str], documents: Sequence[bytes]) -> Tokens:
        """See Engine."""
        rows = self.tokenizer.ids(texts)
        lengths = numpy.fromiter(map(len, rows), numpy.int64, len(rows))
        ids = numpy.fromiter((id for row in rows for id in row), numpy.uint32, int(lengths.sum()))
        return Tokens(ids=ids, lengths=lengths)


class GigatokenEngine:
    """gigatoken, with a bound on the memory that it takes."""

    name = "gigatoken"
    reason: str | None = None

    def __init__(self, tokenizer: DocumentTokenizer):
        """Load it.

        Raises:
            Exception: Of any kind, where it does not support the tokenizer.
        """
        import gigatoken

        self.truth = tokenizer
        self.make = functools.partial(gigatoken.Tokenizer.from_json, without_specials(tokenizer))
        self.process = psutil.Process()
        self.watching = threading.Lock()
        self.renew()

    def renew(self) -> None:
        """Start with an empty cache: its own has no bound (issue 36 of gigatoken)."""
        self.tokenizer: Any = self.make()
        self.batches = self.memory_at_first = 0

    def encode(self, texts: Sequence[str], documents: Sequence[bytes]) -> Tokens:
        """See Engine."""
        tokens = self.encode_bytes(documents)
        with self.watching:
            memory = self.process.memory_info().rss
            self.batches += 1
            if self.batches <= BATCHES_AT_FIRST:  # the buffers of all threads are not there yet
                self.memory_at_first = memory
            elif memory - self.memory_at_first > BYTES_A_CACHE * computing_threads():
                self.renew()
        apart = with_new_characters(texts, documents)
        if not apart:
            return tokens
        rows = numpy.split(tokens.ids, numpy.cumsum(tokens.lengths)[:-1])
        right = self.truth.ids([texts[number] for number in apart])
        for number, ids in zip(apart, right, strict=True):
            rows[number] = numpy.array(ids, tokens.ids.dtype)
        lengths = numpy.fromiter(map(len, rows), numpy.int64, len(rows))
        return Tokens(ids=numpy.concatenate(rows), lengths=lengths)

    def encode_bytes(self, documents: Sequence[bytes]) -> Tokens:
        """gigatoken's own ids; the documents' memory is lent, not copied."""
        layout = self.tokenizer.encode_batch(documents).layout.to_ListOffsetArray64(True)
        offsets = numpy.asarray(layout.offsets)
        ids = numpy.asarray(layout.content.data)[: offsets[-1]]
        return Tokens(ids=ids, lengths=numpy.diff(offsets))


class Differs(Exception):
    """An engine is wrong about a text that is encoded: nothing that it made is to be used."""


class WatchedEngine:
    """An engine that is held against `tokenizers` while it works, at places all over what it encodes.

    Files that can only be read from their beginning, such as compressed ones, can be looked at in no
    other way.
    """

    reason: str | None = None

    def __init__(self, engine: Engine, truth: DocumentTokenizer):
        """Encode with `engine`."""
        self.name = engine.name
        self.engine = engine
        self.truth = truth
        self.lock = threading.Lock()
        self.unchecked: list[tuple[str, NDArray[Any]]] = []
        """Excerpts and the ids that they got: a call for many costs little more than one for few."""

    def encode(self, texts: Sequence[str], documents: Sequence[bytes]) -> Tokens:
        """See Engine.

        Raises:
            Differs: The engine gave other ids for an excerpt of these texts or of earlier ones.
        """
        pieces = excerpts(texts)
        tokens = self.engine.encode(
            [*texts, *pieces], [*documents, *(piece.encode() for piece in pieces)]
        )
        own = tokens.lengths[: len(texts)]
        of_texts = int(own.sum())
        own_memory = tokens.ids[of_texts:].copy()  # a view would keep the ids of all texts
        rows = rows_of(own_memory, tokens.lengths[len(texts) :])
        with self.lock:
            self.unchecked += zip(pieces, rows, strict=True)
            enough = len(self.unchecked) >= CHECKED_AT_ONCE
        if enough:
            self.check()
        return Tokens(ids=tokens.ids[:of_texts], lengths=own)

    def check(self) -> None:
        """Hold what was not yet held against `tokenizers`; call it when everything is encoded.

        Raises:
            Differs: The engine gave other ids for an excerpt.
        """
        with self.lock:
            unchecked, self.unchecked = self.unchecked, []
        pieces, rows = [piece for piece, _ in unchecked], [row for _, row in unchecked]
        if pieces and (difference := difference_from(self.truth, pieces, rows, self.name)):
            raise Differs(difference)


def excerpts(texts: Sequence[str]) -> list[str]:
    """Pieces of texts at even distances, the last one at their end: half a kilobyte of a megabyte."""
    ends = numpy.cumsum(numpy.fromiter(map(len, texts), numpy.int64, len(texts)))
    total = int(ends[-1]) if len(texts) else 0
    count = EXCERPTS * (1 + total // EXCERPTS_OF) if total else 0
    pieces = []
    for number in range(count):
        place = max(total * (number + 1) // count - 1, 0)
        text = texts[index := int(numpy.searchsorted(ends, place, side="right"))]
        start = place - (int(ends[index]) - len(text))
        start = max(min(start, len(text) - EXCERPT_CHARACTERS), 0)
        pieces.append(text[start : start + EXCERPT_CHARACTERS])
    return pieces


def choose_engine(tokenizer: DocumentTokenizer, corpus: str, sample: Sequence[str]) -> Engine:
    """gigatoken, watched, if it is right about every text, otherwise `tokenizers` with the reason.

    Args:
        tokenizer: The model's, set up for documents.
        corpus: The corpus's name, for the log.
        sample: Some of the corpus's texts.
    """
    reason = None
    try:
        engine: Engine = GigatokenEngine(tokenizer)
        texts = [*HARD_TEXTS, *around(tokenizer.added_tokens()), *filter(None, sample)]
        reason = first_difference(engine, tokenizer, texts)
    except ImportError as error:
        reason = f"gigatoken cannot be imported: {error}"
    except Exception as error:  # noqa: BLE001  what it does not support ends in exceptions of every kind
        reason = f"gigatoken does not support the tokenizer: {error}"
    return slower_engine(tokenizer, corpus, reason) if reason else WatchedEngine(engine, tokenizer)


def slower_engine(tokenizer: DocumentTokenizer, corpus: str, reason: str) -> Engine:
    """`tokenizers`, which is said in the log."""
    logger.warning("%s: tokenized with tokenizers, which is slower: %s", corpus, reason)
    return TokenizersEngine(tokenizer, reason)


def first_difference(
    engine: Engine, tokenizer: DocumentTokenizer, texts: Sequence[str]
) -> str | None:
    """Where an engine's ids are not those of `tokenizers`; None where they are the same."""
    tokens = engine.encode(texts, [text.encode() for text in texts])
    return difference_from(tokenizer, texts, rows_of(tokens.ids, tokens.lengths), engine.name)


def rows_of(ids: NDArray[Any], lengths: NDArray[Any]) -> list[NDArray[Any]]:
    """The ids of each document, of those of all one after the other."""
    return numpy.split(ids, numpy.cumsum(lengths)[:-1]) if len(lengths) else []


def difference_from(
    tokenizer: DocumentTokenizer, texts: Sequence[str], rows: Sequence[NDArray[Any]], name: str
) -> str | None:
    """Where the ids that an engine of some name gave for texts are not those of `tokenizers`."""
    for text, found, expected in zip(texts, rows, tokenizer.ids(texts), strict=True):
        if not numpy.array_equal(found, expected):
            pairs = zip(found.tolist(), expected, strict=False)
            same = next(
                (i for i, (a, b) in enumerate(pairs) if a != b), min(len(found), len(expected))
            )
            start = max(len(tokenizer.decode(expected[:same])) - 8, 0)
            return (
                f"{name} gives {found[same : same + 3].tolist()} and tokenizers "
                f"{expected[same : same + 3]} near {text[start : start + 24]!r}"
            )
    return None


def without_specials(tokenizer: DocumentTokenizer) -> str:
    """The tokenizer as JSON in which special tokens are no tokens: in a document they are text."""
    content = json.loads(tokenizer.backend.to_str())
    content["added_tokens"] = [each for each in content["added_tokens"] if not each["special"]]
    return json.dumps(content)


@functools.cache
def new_characters() -> NDArray[numpy.bool_]:
    """Which code points this Python's Unicode tables (15.0) do not have, of shape [code points]."""
    categories = (unicodedata.category(chr(point)) == "Cn" for point in range(CODE_POINTS))
    return numpy.fromiter(categories, numpy.bool_, CODE_POINTS)


def with_new_characters(texts: Sequence[str], documents: Sequence[bytes]) -> list[int]:
    """Which documents have a character of a Unicode version after 15.0."""
    candidates = [number for number, text in enumerate(texts) if not text.isascii()]
    if not has_new_characters(b"".join([documents[number] for number in candidates])):
        return []
    return [number for number in candidates if has_new_characters(documents[number])]


def has_new_characters(document: bytes) -> bool:
    """Whether a text in UTF-8 has a character of a Unicode version after 15.0."""
    octets = numpy.frombuffer(document, numpy.uint8)
    leads = numpy.greater_equal(octets, THREE_BYTES)
    if numpy.count_nonzero(leads) * 8 < len(document):  # a few quotation marks among Latin letters
        points = code_points(octets, numpy.flatnonzero(leads))
    else:
        points = numpy.frombuffer(document.decode().encode("utf-32-le"), numpy.uint32)
    return bool(new_characters().take(points).any())


def code_points(octets: NDArray[numpy.uint8], starts: NDArray[numpy.int64]) -> NDArray[Any]:
    """The code points of the characters of three or four bytes that begin at some positions."""

    def low_bits(positions: NDArray[numpy.int64], offset: int) -> NDArray[Any]:
        return octets[positions + offset].astype(numpy.uint32) & 0x3F

    leads = octets[starts].astype(numpy.uint32)
    points = (leads & 0x0F) << 12 | low_bits(starts, 1) << 6 | low_bits(starts, 2)
    of_four = leads >= FOUR_BYTES
    if of_four.any():
        far = starts[of_four]
        upper = (leads[of_four] & 0x07) << 18 | low_bits(far, 1) << 12
        points[of_four] = upper | low_bits(far, 2) << 6 | low_bits(far, 3)
    return points
