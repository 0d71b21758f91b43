"""The text column of tables: Parquet files, and the Arrow files of a data set that was saved to disk."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pyarrow
from pyarrow import ipc, parquet

from megaqwen.data import streams
from megaqwen.data.records import Refuse, choices, not_utf8, usable
from megaqwen.errors import InputError

ROWS = 1024
BYTES_OF_ROWS = 4 * 2**20
ARROW_FILE_MAGIC = b"ARROW1"
END_OF_STREAM = b"\xff\xff\xff\xff\0\0\0\0"

Choose = Callable[[pyarrow.Schema, Path], list[str]]
Rows = tuple[int, pyarrow.RecordBatch]  # with the first one's number in its file, from 0


def row_group_positions(path: Path) -> list[int]:
    """Where each row group of a Parquet file begins, in bytes."""
    try:
        with parquet.ParquetFile(path) as table:
            metadata = table.metadata
            firsts = (metadata.row_group(i).column(0) for i in range(metadata.num_row_groups))
            return [
                min(filter(None, (column.dictionary_page_offset, column.data_page_offset)))
                for column in firsts
            ]
    except (pyarrow.ArrowException, OSError) as error:
        raise not_readable(path, "Parquet", error) from error


def parquet_texts(
    path: Path, column: str, start: int, stop: int | None, refuse: Refuse
) -> Iterator[list[str]]:
    """The texts of some row groups, of which only the text column is read, a few rows at a time."""
    for row, batch in parquet_rows(path, text_column(column), start, stop):
        yield texts_of_column(batch.column(0), column, path, row, refuse)


def parquet_rows(path: Path, choose: Choose, start: int, stop: int | None) -> Iterator[Rows]:
    """Some columns of some row groups, a few rows at a time, each time with the first one's number."""
    try:
        with parquet.ParquetFile(path, buffer_size=streams.BUFFER) as table:
            columns = choose(table.schema_arrow, path)
            metadata = table.metadata
            groups = list(range(metadata.num_row_groups))
            row = sum(metadata.row_group(group).num_rows for group in groups[:start])
            rows = rows_at_once(table, columns)
            chosen = groups[start:stop]
            for batch in table.iter_batches(batch_size=rows, row_groups=chosen, columns=columns):
                yield row, batch
                row += len(batch)
    except (pyarrow.ArrowException, OSError) as error:
        raise not_readable(path, "Parquet", error) from error


def rows_at_once(table: parquet.ParquetFile, columns: Sequence[str]) -> int:
    """How many rows are read at once: fewer where they are large."""
    metadata = table.metadata
    if not metadata.num_rows:
        return 1
    names = [metadata.schema.column(i).path for i in range(metadata.num_columns)]
    mine = [
        index
        for index, name in enumerate(names)
        if any(name == column or name.startswith(f"{column}.") for column in columns)
    ]
    groups = [metadata.row_group(i) for i in range(metadata.num_row_groups)]
    size = sum(group.column(index).total_uncompressed_size for group in groups for index in mine)
    return int(min(max(BYTES_OF_ROWS * metadata.num_rows // max(size, 1), 1), ROWS))


def arrow_texts(path: Path, column: str, refuse: Refuse) -> Iterator[list[str]]:
    """The texts of an Arrow file: a stream, as `datasets` saves it, or the file format."""
    for row, batch in arrow_rows(path, text_column(column)):
        yield texts_of_column(batch.column(0), column, path, row, refuse)


def arrow_rows(path: Path, choose: Choose) -> Iterator[Rows]:
    """Some columns of an Arrow file, a few rows at a time, each time with the first one's number."""
    try:
        with pyarrow.OSFile(str(path)) as source:
            is_file = source.read(len(ARROW_FILE_MAGIC)) == ARROW_FILE_MAGIC
            source.seek(0)
            row = 0
            for batch in arrow_batches(source, is_file, choose, path):
                for first in range(0, len(batch), ROWS):
                    part = batch.slice(first, ROWS)
                    yield row, part
                    row += len(part)
    except (pyarrow.ArrowException, OSError) as error:
        raise not_readable(path, "Arrow", error) from error


def arrow_batches(
    source: pyarrow.NativeFile, is_file: bool, choose: Choose, path: Path
) -> Iterator[pyarrow.RecordBatch]:
    """The chosen columns of each record batch.

    Raises:
        InputError: A stream lacks its end.
    """
    reader = ipc.open_file(source) if is_file else ipc.open_stream(source)
    columns = choose(reader.schema, path)
    if is_file:
        for number in range(reader.num_record_batches):
            yield reader.get_batch(number).select(columns)
    else:
        for batch in reader:
            yield batch.select(columns)
        check_end(source, path)


def check_end(source: pyarrow.NativeFile, path: Path) -> None:
    """InputError where a stream lacks its end: pyarrow reads one that was cut between two batches."""
    source.seek(max(source.size() - len(END_OF_STREAM), 0))
    if source.read() != END_OF_STREAM:
        raise InputError(
            f"{path}: an Arrow stream without its end, as of a writer that was killed: get it again"
        )


def text_column(column: str) -> Choose:
    """Chooses the one column that holds the texts, after checking it."""

    def choose(schema: pyarrow.Schema, path: Path) -> list[str]:
        check_column(schema, column, path)
        return [column]

    return choose


def texts_of_column(
    values: pyarrow.Array, column: str, path: Path, row: int, refuse: Refuse
) -> list[str]:
    """The texts of some rows, of which the first is the file's row `row`, from 0."""
    if pyarrow.types.is_dictionary(values.type):
        values = values.dictionary_decode()
    if pyarrow.types.is_string_view(values.type):
        values = values.cast(pyarrow.large_string())
    if not values.null_count:
        try:
            texts: list[str] = list(values.to_numpy(zero_copy_only=False))
            if max(map(len, texts), default=0) <= streams.LARGEST_DOCUMENT:
                return texts
        except (UnicodeDecodeError, pyarrow.ArrowException):  # one by one, bad text has its row
            pass
    texts = []
    for number, value in enumerate(values, start=row + 1):
        try:
            texts.append(text_of_value(value, column, f"{path}: row {number}"))
        except InputError as error:
            refuse(error)
    return texts


def text_of_value(value: pyarrow.Scalar, column: str, where: str) -> str:
    """The text of one row, checked."""
    try:
        text = value.as_py()
    except UnicodeDecodeError as error:
        raise not_utf8(where, error) from error
    if text is None:
        raise InputError(f"{where}: the column {column!r} is to be a string, found null")
    return usable(text, where)


def check_column(schema: pyarrow.Schema, column: str, path: Path) -> None:
    """InputError unless a table has the column once and it holds strings."""
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


def not_readable(path: Path, kind: str, error: Exception) -> InputError:
    """The error for a damaged table."""
    return InputError(f"{path}: not a readable {kind} file: {error}")
