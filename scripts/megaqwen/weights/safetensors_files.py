"""Writes safetensors files tensor by tensor: the header first, then each tensor in its place.

The library's own writer wants all tensors of a file in memory. Here a file's tensors are known by name,
dtype and shape before the first of them is read, which is all that a header says.
"""

import json
import struct
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import torch
from torch import Tensor

from megaqwen.provenance import write_json
from megaqwen.sources.verify import INDEX_FILE, SINGLE_FILE
from megaqwen.weights.huggingface import SAFETENSORS_NAMES

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
    """Which tensors go into which file, in order, by transformers' names for the files."""
    groups: list[dict[str, Entry]] = [{}]
    size = 0
    for name, shape in shapes.items():
        entry = Entry(dtype=dtypes[name], shape=shape)
        if groups[-1] and size + entry.bytes > max_bytes:
            groups.append({})
            size = 0
        groups[-1][name] = entry
        size += entry.bytes
    if len(groups) == 1:
        return {SINGLE_FILE: groups[0]}
    count = len(groups)
    return {f"model-{i:05d}-of-{count:05d}.safetensors": group for i, group in enumerate(groups, 1)}


def write_files(directory: Path, files: Files, tensors: Iterable[tuple[str, Tensor]]) -> int:
    """Write all files, and the index where there are several.

    Args:
        directory: An existing directory.
        files: The plan, see `plan_files`.
        tensors: Every tensor of the plan, once. Tensors of one file should be neighbours.

    Returns:
        Bytes of the tensors.
    """
    place = {name: file for file, entries in files.items() for name in entries}
    stream = dict(write_headers(directory, files))
    for name, tensor in tensors:
        file, offset = stream.pop(name)
        entry = files[place[name]][name]
        if (tensor.dtype, tuple(tensor.shape)) != (entry.dtype, entry.shape):
            raise ValueError(f"{name} is {tensor.dtype} {list(tensor.shape)}, planned as {entry}")
        with open(file, "r+b") as output:
            output.seek(offset)
            write_tensor(output, tensor)
    if stream:
        raise ValueError(f"never given: {', '.join(stream)}")
    total = sum(entry.bytes for entries in files.values() for entry in entries.values())
    if len(files) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": place}
        write_json(directory / INDEX_FILE, index)
    return total


def write_headers(directory: Path, files: Files) -> Iterator[tuple[str, tuple[Path, int]]]:
    """Write each file's header; give each tensor's file and position, in bytes from the start."""
    for file, entries in files.items():
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
        with open(directory / file, "wb") as output:
            output.write(struct.pack("<Q", len(text)) + text)
            output.truncate(8 + len(text) + end)
        for name, offset in offsets.items():
            yield name, (directory / file, 8 + len(text) + offset)


def write_tensor(output: IO[bytes], tensor: Tensor) -> None:
    """A tensor's bytes, in row order and little endian as torch has them in memory."""
    output.write(memoryview(tensor.contiguous().reshape(-1).view(torch.uint8).numpy()))
