"""The bytes of a corpus's file: unpacked, digested on the way, and cut into blocks of whole lines."""

import hashlib
import io
import lzma
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, cast

import pyarrow

from megaqwen.data.files import compression_of
from megaqwen.errors import InputError

LARGEST_DOCUMENT = 256 * 2**20  # bytes; a bound on memory, and on a file that lacks its newlines
BLOCK = 2 * 2**20  # bytes of text that are worked on at once: they stay in the processor's cache
BUFFER = 2**20
TOO_LARGE_WINDOW = "Frame requires too much memory"  # in the words of the zstd library
BYTE_ORDER_MARK = b"\xef\xbb\xbf"


class DigestedFile(io.RawIOBase):
    """A file as it lies on the disk, whose digest is known when all of it was read."""

    def __init__(self, path: Path):
        """Open it."""
        super().__init__()
        self.stream = io.FileIO(path)
        self.sha256 = hashlib.sha256()

    def readable(self) -> bool:
        """It is."""
        return True

    def seekable(self) -> bool:
        """It is; but only what is read from the beginning on has the file's digest."""
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET, /) -> int:
        """Go to a position."""
        return self.stream.seek(offset, whence)

    def readinto(self, buffer: Any) -> int:
        """Fill `buffer` with the next bytes; 0 at the end."""
        count = self.stream.readinto(buffer)
        self.sha256.update(memoryview(buffer)[:count])
        return count

    def digest(self) -> str:
        """The SHA-256 of the whole file, in hex; reads what is left."""
        while self.read(BUFFER):
            pass
        return self.sha256.hexdigest()

    def close(self) -> None:
        """Close the file."""
        self.stream.close()
        super().close()


class XzSource:
    """The unpacked bytes of one or several xz streams in a file.

    lzma.open takes a later stream that does not begin as one for something else, and ends before it.
    """

    def __init__(self, file: DigestedFile):
        self.file = file
        self.decompressor = lzma.LZMADecompressor()
        self.packed = b""
        self.ended = False

    def readinto(self, buffer: Any) -> int:
        """Fill `buffer` with the next bytes; 0 at the end of the last stream."""
        while not self.ended:
            if self.decompressor.eof:
                self.packed = self.decompressor.unused_data
                self.ended = not self.next_stream()
                continue
            if self.decompressor.needs_input and not self.packed:
                self.packed = self.file.read(BUFFER)
                if not self.packed:
                    raise EOFError("it ends within a stream")
            data = self.decompressor.decompress(self.packed, max_length=len(buffer))
            self.packed = b""
            if data:
                buffer[: len(data)] = data
                return len(data)
        return 0

    def next_stream(self) -> bool:
        """Go to the next stream, past zeros in fours as the format has them; False where none follows."""
        zeros = 0
        while True:
            rest = self.packed.lstrip(b"\0")
            zeros += len(self.packed) - len(rest)
            self.packed = rest or self.file.read(BUFFER)
            if rest or not self.packed:
                break
        if zeros % 4:
            raise lzma.LZMAError(f"{zeros} zeros follow a stream, which are no multiple of 4")
        self.decompressor = lzma.LZMADecompressor()
        return bool(self.packed)


class UnpackedStream(io.RawIOBase):
    """The unpacked bytes of a compressed file; a damaged or cut one is an InputError."""

    def __init__(self, file: DigestedFile, path: Path):
        """Read from `file`, which `path` names."""
        super().__init__()
        self.path = path
        kind = compression_of(path)
        self.source: Any
        if kind == "xz":
            self.source = XzSource(file)
        else:
            self.source = pyarrow.CompressedInputStream(pyarrow.PythonFile(file, "r"), kind)

    def readable(self) -> bool:
        """It is."""
        return True

    def readinto(self, buffer: Any) -> int:
        """Fill `buffer` with the next bytes; 0 at the end."""
        try:
            return int(self.source.readinto(buffer))
        except (OSError, EOFError, lzma.LZMAError) as error:
            if TOO_LARGE_WINDOW in str(error):
                raise InputError(
                    f"{self.path}: it was packed with a larger window than is read, 128 MiB"
                    f" ({error}): unpack it, or pack it again without --long"
                ) from error
            raise InputError(f"{self.path}: cannot be read: {error}: get it again") from error


def open_unpacked(path: Path, file: DigestedFile) -> BinaryIO:
    """A stream of a file's text, unpacked where it is compressed."""
    if not compression_of(path):
        return cast(BinaryIO, io.BufferedReader(file, BUFFER))
    if path.stat().st_size == 0:
        kind = compression_of(path)
        raise InputError(f"{path}: 0 bytes, which is no {kind} file: get it again")
    return cast(BinaryIO, io.BufferedReader(UnpackedStream(file, path), BUFFER))


@dataclass(kw_only=True)
class Lines:
    """Some whole lines of a file."""

    path: Path
    position: int
    """Where they begin in what is unpacked, in bytes."""
    content: bytes
    first: int | None = None
    """The number of the first line, from 1; None where nobody has asked for it yet."""

    def where(self, index: int) -> str:
        """Names the line with an index, from 0."""
        if self.first is None:
            self.first = lines_before(self.path, self.position) + 1
        return f"{self.path}:{self.first + index}"


@dataclass(frozen=True, kw_only=True)
class Place:
    """A line's name for messages, found when one is written: that may take a pass over its file."""

    where: Callable[[int], str]
    """Names the line with an index, from 0."""
    index: int

    def __str__(self) -> str:
        """The name."""
        return self.where(self.index)


def line_blocks(
    stream: BinaryIO, path: Path, start: int, stop: int | None, size: int
) -> Iterator[tuple[int, bytes]]:
    """The lines that begin between two positions, in blocks of whole lines, each with its position.

    Args:
        stream: At its beginning; one that is to start further on can be sought in.
        path: Its name, for messages.
        start: Where the first line may begin, in bytes.
        stop: Where no line begins any more; None is the end.
        size: About how many bytes a block has.

    Raises:
        InputError: A line is longer than a document may be.
    """
    position = start
    if start:
        stream.seek(start - 1)
        position += skip_line(stream) - 1
    size = min(size, LARGEST_DOCUMENT)
    while stop is None or position < stop:
        block = stream.read(size if stop is None else min(size, stop - position))
        if not block:
            return
        if not block.endswith(b"\n"):
            block += stream.readline(LARGEST_DOCUMENT + 1)
        last = block.rfind(b"\n", 0, -1) + 1
        if len(block) - last > LARGEST_DOCUMENT:
            number = lines_before(path, position) + block.count(b"\n", 0, last) + 1
            raise too_large(f"{path}:{number}")
        yield position, block if position else block.removeprefix(BYTE_ORDER_MARK)
        position += len(block)


def skip_line(stream: BinaryIO) -> int:
    """Go to the beginning of the next line; the bytes that were passed over."""
    passed = 0
    while piece := stream.readline(BUFFER):
        passed += len(piece)
        if piece.endswith(b"\n"):
            break
    return passed


def lines_before(path: Path, position: int) -> int:
    """How many lines end before a position of a file: of a message's line number the beginning."""
    count = 0
    with DigestedFile(path) as file, open_unpacked(path, file) as stream:
        while position > 0 and (block := stream.read(min(BLOCK, position))):
            count += block.count(b"\n")
            position -= len(block)
    return count


def too_large(where: object) -> InputError:
    """The error for a document past the bound."""
    return InputError(
        f"{where}: a document of more than {LARGEST_DOCUMENT // 2**20} MiB: "
        "split it into several, one a line of a .jsonl file"
    )
