"""Writes safetensors files tensor by tensor: the header first, then each tensor in its place.

The library's own writer wants all tensors of a file in memory. Here a file's tensors are known by name,
dtype and shape before the first of them is read, which is all that a header says.
"""

import json
import math
import struct
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megaqwen.provenance import DigestingStream, sha256_file, write_json
from megaqwen.sources.verify import INDEX_FILE, SINGLE_FILE
from megaqwen.weights.huggingface import SAFETENSORS_NAMES
from megaqwen.weights.saved_tensors import tensor_memory

HEADER_ALIGNMENT = 8  # bytes


@dataclass(frozen=True, kw_only=True)
class Entry:
    """A tensor of a file."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def bytes(self) -> int:
        """Its size."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize


Files = dict[str, dict[str, Entry]]


def plan_files(
    shapes: Mapping[str, tuple[int, ...]], dtypes: Mapping[str, torch.dtype], max_bytes: int
) -> Files:
    """Which tensors go into which file, in order, by transformers' names for the files.

    No more files than needed, and of about the same size, so that workers have as much to do.
    """
    entries = {name: Entry(dtype=dtypes[name], shape=shape) for name, shape in shapes.items()}
    total = sum(entry.bytes for entry in entries.values())
    even = total / math.ceil(total / max_bytes)
    groups: list[dict[str, Entry]] = [{}]
    size = 0
    for name, entry in entries.items():
        if groups[-1] and (size + entry.bytes > max_bytes or size >= even):
            groups.append({})
            size = 0
        groups[-1][name] = entry
        size += entry.bytes
    if len(groups) == 1:
        return {SINGLE_FILE: groups[0]}
    count = len(groups)
    return {f"model-{i:05d}-of-{count:05d}.safetensors": group for i, group in enumerate(groups, 1)}


def write_file(
    path: Path,
    entries: Mapping[str, Entry],
    tensors: Iterable[tuple[str, Tensor]],
    progress: Callable[[int], None] = lambda size: None,
) -> dict[str, Any]:
    """Write one file.

    Args:
        path: Its name.
        entries: Its tensors, see `plan_files`.
        tensors: Each of them once; in the file's order they are digested on the way.
        progress: Called with the bytes of each tensor that was written.

    Returns:
        The file's bytes and SHA-256.
    """
    header, offsets = file_header(entries)
    size = len(header) + sum(entry.bytes for entry in entries.values())
    in_order = True
    with open(path, "wb", buffering=0) as file:
        digesting = DigestingStream(file)
        write_all(digesting, memoryview(header))
        for name, tensor in tensors:
            entry, offset = entries[name], offsets.pop(name)
            if (tensor.dtype, tuple(tensor.shape)) != (entry.dtype, entry.shape):
                raise ValueError(f"{name} is {tensor.dtype} {list(tensor.shape)}, planned {entry}")
            in_order &= file.tell() == offset
            file.seek(offset)
            write_all(digesting, tensor_memory(tensor.contiguous()))
            progress(entry.bytes)
    if offsets:
        raise ValueError(f"never given: {', '.join(offsets)}")
    return digesting.facts() if in_order else {"bytes": size, "sha256": sha256_file(path)}


def write_all(stream: DigestingStream, data: memoryview) -> None:
    """Write all of `data`: a file takes 2 GiB at once, or what is left on the disk."""
    while data:
        data = data[stream.write(data) :]


def file_header(entries: Mapping[str, Entry]) -> tuple[bytes, dict[str, int]]:
    """A file's header, and each tensor's position in bytes from the start of the file."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offsets: dict[str, int] = {}
    end = 0
    # Wide dtypes first, so that each tensor starts at a multiple of its element's size.
    for name, entry in sorted(entries.items(), key=lambda item: -item[1].dtype.itemsize):
        offsets[name] = end
        end += entry.bytes
        header[name] = {
            "dtype": SAFETENSORS_NAMES[entry.dtype],
            "shape": list(entry.shape),
            "data_offsets": [offsets[name], end],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % HEADER_ALIGNMENT)
    start = struct.pack("<Q", len(text)) + text
    return start, {name: len(start) + offset for name, offset in offsets.items()}


def write_index(directory: Path, files: Files) -> None:
    """Write the index that says which tensor is in which of several files."""
    place = {name: file for file, entries in files.items() for name in entries}
    total = sum(entry.bytes for entries in files.values() for entry in entries.values())
    index = {"metadata": {"total_size": total}, "weight_map": place}
    write_json(directory / INDEX_FILE, index)
