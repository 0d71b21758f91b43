"""The records of a corpus of conversations, a few megabytes at a time, as they lie in its files.

A block is parsed by whoever renders it, which may be another process; it can name each of its records.
"""

import io
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import msgspec
import pyarrow
from pyarrow import ipc

from megaqwen.config.sections import BuiltinCorpus, Corpus
from megaqwen.data import streams
from megaqwen.data.builtin import builtin_conversations
from megaqwen.data.columns import arrow_rows, parquet_rows
from megaqwen.data.conversations import COLUMNS, FIELDS
from megaqwen.data.pieces import WHOLE, Shard, corpus_pieces
from megaqwen.data.readers import Intake, jsonl_lines
from megaqwen.data.records import UNREADABLE, choices, not_utf8, parse_record
from megaqwen.errors import InputError

Record = Mapping[str, Any]

DECODER: Any = msgspec.json.Decoder(dict[str, Any])


class Block(Protocol):
    """Some records."""

    def where(self, index: int) -> str:
        """Names the record with an index, from 0."""

    def records(self) -> Iterator[tuple[int, Record | InputError]]:
        """The records with their indices; an error where there is none."""


@dataclass(kw_only=True)
class LinesBlock:
    """Lines of JSON; blank ones are passed over."""

    lines: streams.Lines

    def where(self, index: int) -> str:
        """See Block."""
        return self.lines.where(index)

    def records(self) -> Iterator[tuple[int, Record | InputError]]:
        """See Block."""
        for index, line in enumerate(self.lines.content.split(b"\n")):
            if not line.strip():
                continue
            try:
                record: Record | InputError = DECODER.decode(line)
            except UNREADABLE:
                try:  # Python's parser has the say: it takes NaN, and tells well what is wrong
                    record = parse_record(line, streams.Place(where=self.where, index=index))
                except InputError as error:
                    record = error
            yield index, record


@dataclass(kw_only=True)
class RowsBlock:
    """Rows of a table."""

    path: Path
    first: int
    """The number of the first row, from 0."""
    stream: bytes
    """The rows as an Arrow stream: a slice by itself would drag its whole table along."""

    def where(self, index: int) -> str:
        """See Block."""
        return f"{self.path}: row {self.first + index + 1}"

    def records(self) -> Iterator[tuple[int, Record | InputError]]:
        """See Block."""
        table = ipc.open_stream(self.stream).read_all()
        try:
            rows: Iterable[Record | InputError] = table.to_pylist()
        except UnicodeDecodeError:  # nobody says of which row
            rows = (self.row(table, index) for index in range(len(table)))
        for index, row in enumerate(rows):
            yield index, row if isinstance(row, InputError) else without_nulls(row)

    def row(self, table: pyarrow.Table, index: int) -> Record | InputError:
        """One row by itself, or that its text is not UTF-8."""
        try:
            (row,) = table.slice(index, 1).to_pylist()
        except UnicodeDecodeError as error:
            return not_utf8(self.where(index), error)
        return row


@dataclass(kw_only=True)
class BuiltinBlock:
    """Built-in conversations."""

    given: Sequence[Record]

    def where(self, index: int) -> str:
        """See Block."""
        return f"built-in conversation {index + 1}"

    def records(self) -> Iterator[tuple[int, Record | InputError]]:
        """See Block."""
        yield from enumerate(self.given)


def corpus_blocks(
    corpus: Corpus, intake: Intake, shard: Shard = WHOLE, size: int | None = None
) -> Iterator[Block]:
    """The records of a shard of a corpus of conversations in their order.

    Args:
        corpus: The corpus; the built-in one is all in the first shard.
        intake: Gets the digests of the files that are read whole.
        shard: Which part.
        size: About how many bytes of JSON lines are in a block.

    Raises:
        InputError: A file is missing, damaged or not in its format, or cannot hold conversations.
    """
    if isinstance(corpus, BuiltinCorpus):
        if shard.index == 0:
            yield BuiltinBlock(given=builtin_conversations())
        return
    field = corpus.conversation_field

    def choose(schema: pyarrow.Schema, path: Path) -> list[str]:
        return conversation_columns(schema, field, path)

    for piece in corpus_pieces(corpus, shard):
        match piece.format:
            case "jsonl":
                for lines in jsonl_lines(piece, intake, size or streams.BLOCK):
                    yield LinesBlock(lines=lines)
            case "parquet":
                for row, batch in parquet_rows(piece.path, choose, piece.start, piece.stop):
                    yield rows_block(piece.path, row, batch)
            case "arrow":
                for row, batch in arrow_rows(piece.path, choose):
                    yield rows_block(piece.path, row, batch)
            case "text":
                raise InputError(
                    f"corpus {corpus.name}: {piece.path}: a text file holds no conversations, which"
                    " data.kind sft trains on: give JSON lines, Parquet or Arrow"
                )


def rows_block(path: Path, first: int, batch: pyarrow.RecordBatch) -> RowsBlock:
    """A block of rows that stands for itself."""
    sink = io.BytesIO()
    with ipc.new_stream(sink, batch.schema) as writer:
        writer.write_batch(batch)
    return RowsBlock(path=path, first=first, stream=sink.getvalue())


def conversation_columns(schema: pyarrow.Schema, field: str | None, path: Path) -> list[str]:
    """The columns of a table that are read; InputError where none of them holds messages."""
    wanted = (field, "system", "tools") if field else COLUMNS
    names = [name for name in wanted if name in schema.names]
    messages = [field] if field else [*FIELDS, "completion"]
    if not any(name in names for name in messages):
        what = repr(field) if field else "'messages', 'conversations' or 'prompt' and 'completion'"
        advice = choices("Columns", schema.names, field or "messages", "conversation_field")
        raise InputError(f"{path}: no column {what}. {advice}")
    return names


def without_nulls(value: Any) -> Any:
    """A row without the keys that a table has only since other rows have them."""
    if isinstance(value, dict):
        return {key: without_nulls(each) for key, each in value.items() if each is not None}
    return [without_nulls(each) for each in value] if isinstance(value, list) else value
