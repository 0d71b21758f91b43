"""Reads what torch.save wrote of one tensor straight into its place, and checks its CRC-32.

torch.load would first make a tensor of its own, and looks at no checksum. The format is a zip archive
of stored (not compressed) records: data.pkl, which says what the tensor is, and data/0, its bytes.
"""

import io
import pickle
import struct
import zlib
from collections import OrderedDict
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

END, END_SIGNATURE = struct.Struct("<4sHHHHIIH"), b"PK\5\6"
RECORD, RECORD_SIGNATURE = struct.Struct("<4sHHHHHHIIIHHHHHII"), b"PK\1\2"
LOCAL = struct.Struct("<4sHHHHHIIIHH")
TAIL_BYTES = 4096  # the archive's table of contents is shorter
STORAGES = {
    "FloatStorage": torch.float32,
    "BFloat16Storage": torch.bfloat16,
    "HalfStorage": torch.float16,
}
TOO_LARGE = 0xFFFFFFFF  # the record's figures are elsewhere, in zip64's fields


@dataclass(frozen=True, kw_only=True)
class Bytes:
    """Where a tensor's bytes are."""

    start: int
    """From the start of the file."""
    crc32: int
    """0 where the writer left it out."""


class LayoutUnpickler(pickle.Unpickler):
    """Reads data.pkl without making a tensor, or anything else."""

    def find_class(self, module: str, name: str) -> Any:
        """Only what a plain tensor is made of."""
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return lambda storage, offset, size, stride, *rest: (storage, offset, size, stride)
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        if module == "torch" and name.endswith("Storage"):
            return name
        raise pickle.UnpicklingError(f"{module}.{name} is not part of a plain tensor")

    def persistent_load(self, pid: Any) -> Any:
        """The storage's own description."""
        return pid


@lru_cache(maxsize=256)
def is_plain(pickled: bytes, dtype: torch.dtype, shape: tuple[int, ...]) -> bool:
    """Whether data.pkl describes a tensor whose bytes are the storage's, in row order."""
    try:
        (_, name, _, _, count), offset, size, stride = LayoutUnpickler(io.BytesIO(pickled)).load()
    except (pickle.UnpicklingError, ValueError, TypeError, EOFError):
        return False
    expected = torch.empty(shape, dtype=dtype, device="meta")
    return (
        STORAGES.get(name) == dtype
        and (offset, tuple(size), count) == (0, shape, expected.numel())
        and tuple(stride) == expected.stride()
    )


def find_bytes(
    stream: io.FileIO, offset: int, length: int, dtype: torch.dtype, shape: tuple[int, ...]
) -> Bytes | None:
    """Where a saved tensor's bytes are; None where it is not plain: then torch.load can read it.

    Args:
        stream: The file.
        offset: Where the archive begins in it.
        length: The archive's length.
        dtype: What the tensor must be.
        shape: Likewise.
    """
    tail = read_at(stream, offset + max(0, length - TAIL_BYTES), min(length, TAIL_BYTES))
    if len(tail) < END.size:
        return None
    signature, *_, count, _, directory, comment = END.unpack_from(tail, len(tail) - END.size)
    place = directory - (length - len(tail))
    if signature != END_SIGNATURE or comment or place < 0 or directory == TOO_LARGE:
        return None
    records: dict[bytes, tuple[int, int, int]] = {}
    for _ in range(count):
        if place + RECORD.size > len(tail):
            return None
        fields = RECORD.unpack_from(tail, place)
        signature, method, crc32, packed, size = fields[0], fields[4], *fields[7:10]
        name_bytes, extra_bytes, comment_bytes, header = *fields[10:13], fields[16]
        if signature != RECORD_SIGNATURE or method or packed != size or TOO_LARGE in (size, header):
            return None
        name = tail[place + RECORD.size : place + RECORD.size + name_bytes]
        records[name.partition(b"/")[2]] = (header, size, crc32)
        place += RECORD.size + name_bytes + extra_bytes + comment_bytes
    if not {b"data.pkl", b"data/0"} <= records.keys() or b"data/1" in records:
        return None
    header, size, _ = records[b"data.pkl"]
    pickled = read_at(stream, content_start(stream, offset + header), size)
    header, size, crc32 = records[b"data/0"]
    if not is_plain(pickled, dtype, shape) or size != torch.Size(shape).numel() * dtype.itemsize:
        return None
    return Bytes(start=content_start(stream, offset + header), crc32=crc32)


def content_start(stream: io.FileIO, header: int) -> int:
    """Where a record's content begins, after its own header and the padding in that."""
    fields = LOCAL.unpack(read_at(stream, header, LOCAL.size))
    return header + LOCAL.size + int(fields[-2]) + int(fields[-1])


def read_at(stream: io.FileIO, start: int, size: int) -> bytes:
    """Bytes of a file from one place; EOFError where it ends too early."""
    content = bytearray(size)
    read_exactly(stream, start, memoryview(content))
    return bytes(content)


def read_saved_tensor(
    stream: io.FileIO, offset: int, length: int, dtype: torch.dtype, target: Tensor
) -> Tensor:
    """Read a saved tensor, into `target` if that can be.

    Args:
        stream: The file, unbuffered.
        offset: Where torch.save began in it.
        length: How much it wrote, in bytes.
        dtype: The tensor's.
        target: A contiguous tensor of its shape and dtype.

    Returns:
        `target`, or another tensor where torch.load had to read it.

    Raises:
        EOFError: The file ends within it.
        ValueError: Its bytes are not those that the CRC-32 was made of.
    """
    found = find_bytes(stream, offset, length, dtype, tuple(target.shape))
    if found is None:
        tensor = torch.load(
            io.BytesIO(read_at(stream, offset, length)), map_location="cpu", weights_only=True
        )
        return tensor  # type: ignore[no-any-return]
    content = tensor_memory(target)
    read_exactly(stream, found.start, content)
    if found.crc32 and zlib.crc32(content) != found.crc32:
        raise ValueError("its bytes do not have the CRC-32 that was saved with them")
    return target


def tensor_memory(tensor: Tensor) -> memoryview:
    """A contiguous tensor's bytes, in row order and little endian, to read from or write to."""
    return memoryview(tensor.reshape(-1).view(torch.uint8).numpy())


def read_exactly(stream: io.FileIO, start: int, target: memoryview) -> None:
    """Fill `target` from one place of a file, which gives 2 GiB at once; EOFError where it ends."""
    stream.seek(start)
    while target:
        count = stream.readinto(target)
        if not count:
            raise EOFError("the file ends within it")
        target = target[count:]
