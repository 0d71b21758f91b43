"""Writes a Megatron `torch_dist` checkpoint without Megatron, a GPU or ranks: one tensor at a time.

The files are torch's own distributed checkpoint, as if several ranks had each written one file; here
workers take a file each, and how many there are changes nothing in the files. Megatron adds three
things to torch's format: a small JSON file, an entry for what is no tensor (`common_state`), and empty
entries for FP8 state.
"""

import io
from argparse import Namespace
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TextIO

import torch
from torch import Tensor
from torch.distributed.checkpoint import FileSystemWriter
from torch.distributed.checkpoint.default_planner import create_default_global_save_plan
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    MetadataIndex,
    TensorProperties,
)
from torch.distributed.checkpoint.planner import (
    SavePlan,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)
from torch.distributed.checkpoint.storage import WriteResult

from megaqwen.checkpoints import TRACKER
from megaqwen.provenance import DigestingStream, write_json, write_text
from megaqwen.weights.mapping import Place, Transfer, extra_states
from megaqwen.weights.workers import LEAST_MEMORY, Flusher, MemoryBudget, Progress, run_all

FILE_BYTES = 500 * 10**6  # enough files for the workers, few enough for the file system
BUFFER_BYTES = 2**20  # torch.save writes in many small pieces
RELEASE = "release"  # Megatron's word for a checkpoint that no training saved
FORMAT = {"sharded_backend": "torch_dist", "sharded_backend_version": 1}
# A lower version would make Megatron reorder query, key and value.
COMMON_STATE = {
    "checkpoint_version": 3.0,
    "iteration": 0,
    "content_metadata": {"singleton_local_shards": False, "chained_optim_avoid_prefix": True},
}


class Writer(FileSystemWriter):
    """torch's writer, which would otherwise record the path and a random id."""

    def storage_meta(self) -> None:
        """Nothing: the same weights give the same bytes, wherever they are written."""


@dataclass(frozen=True, kw_only=True)
class Item:
    """One write item of torch's, and what makes its content."""

    write_item: WriteItem
    make: Callable[[], Tensor | io.BytesIO]
    bytes: int = 0
    """Of the tensor; 0 for what is none."""
    memory: int = 0
    """Bytes that making it takes, its own included."""


def write_checkpoint(
    directory: Path,
    transfers: Iterable[Transfer],
    dtypes: Mapping[str, torch.dtype],
    read: Callable[[str], Tensor],
    options: Mapping[str, Any],
    *,
    workers: int = 1,
    terminal: TextIO | None = None,
    checks: Sequence[Callable[[], None]] = (),
) -> tuple[int, dict[Path, dict[str, Any]]]:
    """Write all transfers as a release checkpoint.

    Args:
        directory: An existing, empty directory: what Megatron's --load takes.
        transfers: The plan, see `plan_transfers`.
        dtypes: The dtype of each Hugging Face tensor.
        read: Gives the Hugging Face tensor of a name; called by several threads.
        options: The model in Megatron's options, kept in the checkpoint where training keeps them.
        workers: Threads, each of which writes one file at a time.
        terminal: Where to say how far it is.
        checks: Done by the workers beside the files.

    Returns:
        Bytes of the tensors that were written, and bytes and SHA-256 of their files.
    """
    transfers = list(transfers)
    key_dtypes = dtypes_by_key(transfers, dtypes)
    contents = [
        [
            tensor_item(transfer, place, key_dtypes[transfer.key], read)
            for transfer in group
            for place in (transfer.places[0], *transfer.copies)
        ]
        for group in groups_by_size(transfers, key_dtypes)
    ]
    contents.append([object_item(*each) for each in objects(transfers, options).items()])
    target = directory / RELEASE
    target.mkdir()
    files = {target / f"__{number}_0.distcp": items for number, items in enumerate(contents)}
    total = sum(item.bytes for items in contents for item in items)
    budget = MemoryBudget(max(LEAST_MEMORY, *(item.memory for items in contents for item in items)))

    def task(path: Path) -> tuple[list[WriteResult], dict[str, Any]]:
        written = write_file(path, files[path], budget, progress.add)
        flusher.add(path)
        return written

    checksums = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)  # it takes longer than the SHA-256 that we keep
    try:
        with Progress(total, terminal) as progress, Flusher() as flusher:
            written = run_all([partial(task, path) for path in files], workers, beside=checks)
    finally:
        torch.serialization.set_crc32_options(checksums)
    plans = [SavePlan([item.write_item for item in items]) for items in contents]
    _, metadata = create_default_global_save_plan(plans)
    writer = Writer(target)
    writer.set_up_storage_writer(True)
    writer.finish(metadata, [results for results, _ in written])
    write_json(target / "metadata.json", FORMAT)
    write_text(directory / TRACKER, RELEASE)
    described = {path: facts for path, (_, facts) in zip(files, written, strict=True)}
    return total, described


def write_file(
    path: Path, items: Iterable[Item], budget: MemoryBudget, progress: Callable[[int], None]
) -> tuple[list[WriteResult], dict[str, Any]]:
    """Write one file, item after item.

    Returns:
        Where in it each item lies, and its bytes and SHA-256.
    """
    results = []
    with open(path, "wb", buffering=0) as file:
        digesting = DigestingStream(file)
        stream = io.BufferedWriter(digesting, BUFFER_BYTES)
        for item in items:
            start = stream.tell()
            with budget.taken(item.memory):
                content = item.make()
                if isinstance(content, Tensor):
                    torch.save(content, stream)
                else:
                    stream.write(content.getbuffer())
                del content
            length = stream.tell() - start
            results.append(
                WriteResult(
                    index=item.write_item.index,
                    size_in_bytes=length,
                    storage_data=_StorageInfo(path.name, start, length),
                )
            )
            progress(item.bytes)
        stream.flush()
    return results, digesting.facts()


def dtypes_by_key(
    transfers: Iterable[Transfer], dtypes: Mapping[str, torch.dtype]
) -> dict[str, torch.dtype]:
    """The dtype of each of Megatron's tensors: the parts' own, or one that holds all of them exactly."""
    result: dict[str, torch.dtype] = {}
    for transfer in transfers:
        for name in transfer.huggingface:
            earlier = result.get(transfer.key, dtypes[name])
            result[transfer.key] = torch.promote_types(earlier, dtypes[name])
    return result


def groups_by_size(
    transfers: Iterable[Transfer], dtypes: Mapping[str, torch.dtype]
) -> Iterator[list[Transfer]]:
    """Transfers in order, as many a group as fill one file."""
    group: list[Transfer] = []
    size = 0
    for transfer in transfers:
        bytes_ = torch.Size(transfer.shape).numel() * dtypes[transfer.key].itemsize
        if group and size + bytes_ > FILE_BYTES:
            yield group
            group, size = [], 0
        group.append(transfer)
        size += bytes_
    yield group


def tensor_item(
    transfer: Transfer, place: Place, dtype: torch.dtype, read: Callable[[str], Tensor]
) -> Item:
    """A transfer's part of a stacked tensor, or a whole tensor."""
    offsets = torch.Size([*place.position, *(0 for _ in transfer.shape)])
    sizes = torch.Size([*(1 for _ in place.position), *transfer.shape])

    def make() -> Tensor:
        fused = transfer.transform.fuse([read(name).to(dtype) for name in transfer.huggingface])
        return fused.reshape(sizes)

    size = sizes.numel() * dtype.itemsize
    return Item(
        write_item=WriteItem(
            index=MetadataIndex(place.key, offsets),
            type=WriteItemType.SHARD,
            tensor_data=TensorWriteData(
                chunk=ChunkStorageMetadata(offsets=offsets, sizes=sizes),
                properties=TensorProperties(dtype=dtype),
                size=torch.Size([*place.lengths, *transfer.shape]),
            ),
        ),
        make=make,
        bytes=size,
        memory=size if len(transfer.huggingface) == 1 else 2 * size,
    )


def objects(transfers: Iterable[Transfer], options: Mapping[str, Any]) -> dict[str, Any]:
    """What is no tensor, by Megatron's keys of sharded objects."""
    extra = {place.object_key: None for place in extra_states(transfers)}
    common_state = {**COMMON_STATE, "args": Namespace(**options)}
    return {**extra, "common_state/shard_0_1": common_state}


def object_item(name: str, value: Any) -> Item:
    """What is no tensor, serialized as Megatron does: a list of the one object."""

    def make() -> io.BytesIO:
        stream = io.BytesIO()
        torch.save([value], stream)
        return stream

    write_item = WriteItem(index=MetadataIndex(name), type=WriteItemType.BYTE_IO)
    return Item(write_item=write_item, make=make)
