"""The documents of a corpus as a stream of texts: JSON lines, plain text and Parquet.

One document at a time is in memory (of Parquet one small batch), however large the corpus is. What
is wrong with a file ends as one InputError that names the file and the line or row.
"""

import difflib
import io
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, cast

import pyarrow
from pyarrow import parquet

from megaqwen.config.sections import BuiltinCorpus, Corpus
from megaqwen.data.builtin import builtin_documents
from megaqwen.data.files import compression_of, corpus_files, file_format
from megaqwen.errors import InputError

LARGEST_DOCUMENT = 256 * 2**20  # bytes; a bound on memory, and on a file that lacks its newlines
BLOCK = 2**20  # bytes
PARQUET_ROWS = 256
BYTE_ORDER_MARK = b"\xef\xbb\xbf"


def corpus_documents(corpus: Corpus) -> Iterator[str]:
    """The texts of a corpus in their order, empty ones included.

    Raises:
        InputError: A file is missing, damaged or not in its format, or a text cannot be used.
    """
    if isinstance(corpus, BuiltinCorpus):
        yield from builtin_documents()
        return
    for path in corpus_files(corpus):
        match file_format(path, corpus):
            case "jsonl":
                yield from jsonl_documents(path, corpus.text_field)
            case "text":
                yield text_document(path)
            case "parquet":
                yield from parquet_documents(path, corpus.text_field)


def jsonl_documents(path: Path, text_field: str) -> Iterator[str]:
    """One document a line: the text field of its JSON object. Blank lines are passed over."""
    for number, line in enumerate(lines(path), start=1):
        if line.strip():
            where = f"{path}:{number}"
            yield text_of_record(parse_record(line, where), text_field, where)


def parse_record(line: bytes, where: str) -> dict[str, Any]:
    """The JSON object of a line."""
    text = decode(line, where).rstrip("\r\n")
    try:
        record = json.loads(text)
    except (json.JSONDecodeError, RecursionError) as error:
        raise InputError(
            f"{where}: not JSON ({error}): one JSON object a line is expected, "
            f"found {excerpt(text)}"
        ) from error
    if not isinstance(record, dict):
        raise InputError(
            f"{where}: one JSON object a line is expected, found {json_type(record)}: "
            f"{excerpt(text)}"
        )
    return record


def text_of_record(record: dict[str, Any], text_field: str, where: str) -> str:
    """The text field of a JSON object, checked."""
    if text_field not in record:
        raise InputError(
            f"{where}: no field {text_field!r}. {choices('Fields', record, text_field)}"
        )
    text = record[text_field]
    if not isinstance(text, str):
        raise InputError(
            f"{where}: the field {text_field!r} is to be a string, found {json_type(text)}"
        )
    return usable(text, where)


def text_document(path: Path) -> str:
    """The whole of a text file, as one document."""
    with open_unpacked(path) as stream:
        content = stream.read(LARGEST_DOCUMENT + 1)
    if len(content) > LARGEST_DOCUMENT:
        raise too_large(str(path))
    try:
        return content.removeprefix(BYTE_ORDER_MARK).decode()
    except UnicodeDecodeError as error:
        raise not_utf8(f"{path}:{content.count(b'\n', 0, error.start) + 1}", error) from error


def parquet_documents(path: Path, column: str) -> Iterator[str]:
    """One document a row: the text column, which alone is read, in batches of rows."""
    try:
        with parquet.ParquetFile(path, buffer_size=BLOCK) as table:
            check_column(table.schema_arrow, column, path)
            row = 0
            for batch in table.iter_batches(batch_size=PARQUET_ROWS, columns=[column]):
                for value in batch.column(0):
                    row += 1
                    yield text_of_value(value, column, f"{path}: row {row}")
    except (pyarrow.ArrowException, OSError) as error:
        raise InputError(f"{path}: not a readable Parquet file: {error}") from error


def text_of_value(value: pyarrow.Scalar, column: str, where: str) -> str:
    """The text of one row of a Parquet column, checked."""
    try:
        text = value.as_py()
    except UnicodeDecodeError as error:
        raise not_utf8(where, error) from error
    if text is None:
        raise InputError(f"{where}: the column {column!r} is to be a string, found null")
    return usable(text, where)


def check_column(schema: pyarrow.Schema, column: str, path: Path) -> None:
    """InputError unless a Parquet file has the column once and it holds strings."""
    if schema.names.count(column) != 1:
        raise InputError(
            f"{path}: no column {column!r}. {choices('Columns', schema.names, column)}"
        )
    kind = schema.field(column).type
    if pyarrow.types.is_dictionary(kind):
        kind = kind.value_type
    strings = (
        pyarrow.types.is_string,
        pyarrow.types.is_large_string,
        pyarrow.types.is_string_view,
    )
    if not any(is_kind(kind) for is_kind in strings):
        raise InputError(f"{path}: the column {column!r} is to hold strings, found {kind}")


def lines(path: Path) -> Iterator[bytes]:
    """The lines of a file, unpacked, ended by \\n only, without a byte order mark."""
    with open_unpacked(path) as stream:
        number = 0
        while line := stream.readline(LARGEST_DOCUMENT + 1):
            number += 1
            if len(line) > LARGEST_DOCUMENT:
                raise too_large(f"{path}:{number}")
            yield line.removeprefix(BYTE_ORDER_MARK) if number == 1 else line


def open_unpacked(path: Path) -> BinaryIO:
    """A file's bytes, of .gz and .zst the unpacked ones; a damaged or cut file is an InputError."""
    compression = compression_of(path)
    if compression and path.stat().st_size == 0:
        raise InputError(f"{path}: 0 bytes, which is no {compression} file: get it again")
    source = pyarrow.input_stream(path, compression=compression)
    return cast(BinaryIO, io.BufferedReader(UnpackedStream(source, path), BLOCK))


class UnpackedStream(io.RawIOBase):
    """Arrow's stream as one of Python's, whose errors name the file."""

    def __init__(self, source: pyarrow.NativeFile, path: Path):
        self.source = source
        self.path = path

    def readable(self) -> bool:
        """True: what io.BufferedReader asks."""
        return True

    def readinto(self, buffer: Any) -> int:
        """Fill `buffer` with the next bytes; 0 at the end."""
        try:
            return int(self.source.readinto(buffer))
        except OSError as error:
            raise InputError(f"{self.path}: cannot be read: {error}: get it again") from error

    def close(self) -> None:
        """Close the file."""
        self.source.close()
        super().close()


def decode(line: bytes, where: str) -> str:
    """A line as text; InputError where it is not UTF-8."""
    try:
        return line.decode()
    except UnicodeDecodeError as error:
        raise not_utf8(where, error) from error


def usable(text: str, where: str) -> str:
    """`text`, unless it is too large or a JSON escape put half a surrogate pair in it."""
    if len(text) > LARGEST_DOCUMENT:
        raise too_large(where)
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise InputError(
                f"{where}: the text holds half a surrogate pair at character {error.start}, which "
                "UTF-8 cannot hold: repair the escape or leave the document out"
            ) from error
    return text


def not_utf8(where: str, error: UnicodeDecodeError) -> InputError:
    """The error for bytes that are not UTF-8."""
    found = error.object[error.start : error.start + 4].hex(" ")
    return InputError(f"{where}: not UTF-8 at these bytes: {found}. Convert the file to UTF-8")


def too_large(where: str) -> InputError:
    """The error for a document past the bound."""
    return InputError(
        f"{where}: a document of more than {LARGEST_DOCUMENT // 2**20} MiB: "
        "split it into several, one a line of a .jsonl file"
    )


def choices(kind: str, names: Iterable[str], wanted: str) -> str:
    """What there is instead of what was asked for, and what was perhaps meant."""
    known = list(names)
    close = difflib.get_close_matches(wanted, known, n=1)
    meant = f" Did you mean {close[0]!r}?" if close else ""
    return f"{kind} that it has: {', '.join(known) or 'none'}.{meant} Set text_field in the config"


def excerpt(text: str) -> str:
    """The beginning of a line, for a message."""
    return repr(text[:60]) + ("..." if len(text) > 60 else "")


def json_type(value: Any) -> str:
    """The name of a JSON value's type."""
    names = {dict: "an object", list: "an array", str: "a string", bool: "a boolean"}
    return "null" if value is None else names.get(type(value), "a number")
