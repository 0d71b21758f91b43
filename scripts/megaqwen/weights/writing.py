"""Writes a Megatron `torch_dist` checkpoint without Megatron, a GPU or ranks: one tensor at a time.

The files are torch's own distributed checkpoint, written through its storage writer as if by several
ranks, each of which writes one file. Megatron adds three things to torch's format: a small JSON file,
an entry for what is no tensor (`common_state`), and empty entries for FP8 state.
"""

import io
from argparse import Namespace
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint import FileSystemWriter
from torch.distributed.checkpoint.default_planner import (
    DefaultSavePlanner,
    create_default_global_save_plan,
)
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

from megaqwen.provenance import write_json, write_text
from megaqwen.weights.mapping import Place, Transfer, extra_states

FILE_BYTES = 2 * 10**9
TRACKER = "latest_checkpointed_iteration.txt"
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


class Planner(DefaultSavePlanner):
    """Makes each tensor when the writer asks for it."""

    def __init__(self, make: Mapping[MetadataIndex, Callable[[], Tensor | io.BytesIO]]):
        super().__init__()
        self.make = make

    def resolve_data(self, write_item: WriteItem) -> Tensor | io.BytesIO:
        """What a write item holds."""
        return self.make[write_item.index]()


def write_checkpoint(
    directory: Path,
    transfers: Iterable[Transfer],
    dtypes: Mapping[str, torch.dtype],
    read: Callable[[str], Tensor],
    options: Mapping[str, Any],
    progress: Callable[[int], None] = lambda written: None,
) -> int:
    """Write all transfers as a release checkpoint.

    Args:
        directory: An existing, empty directory: what Megatron's --load takes.
        transfers: The plan, see `plan_transfers`.
        dtypes: The dtype of each Hugging Face tensor.
        read: Gives the Hugging Face tensor of a name.
        options: The model in Megatron's options, kept in the checkpoint where training keeps them.
        progress: Called with the tensor bytes written so far, after each file.

    Returns:
        Bytes of the tensors that were written.
    """
    transfers = list(transfers)
    key_dtypes = dtypes_by_key(transfers, dtypes)
    make: dict[MetadataIndex, Callable[[], Tensor | io.BytesIO]] = {}
    plans: list[SavePlan] = []
    for group in groups_by_size(transfers, key_dtypes):
        plans.append(SavePlan([]))
        for transfer in group:
            dtype = key_dtypes[transfer.key]
            for place in (transfer.places[0], *transfer.copies):
                item = tensor_item(transfer, place, dtype)
                make[item.index] = tensor_maker(transfer, place, dtype, read)
                plans[-1].items.append(item)
    plans.append(SavePlan([]))
    for name, value in objects(transfers, options).items():
        index = MetadataIndex(name)
        make[index] = object_maker(value)
        plans[-1].items.append(WriteItem(index=index, type=WriteItemType.BYTE_IO))

    writer = Writer(directory / RELEASE)
    writer.set_up_storage_writer(True)
    (directory / RELEASE).mkdir()
    plans, metadata = create_default_global_save_plan(plans)
    written, results = 0, []
    for plan in writer.prepare_global_plan(plans):
        results.append(writer.write_data(plan, Planner(make)).wait())
        written += sum(item_bytes(item) for item in plan.items)
        progress(written)
    writer.finish(metadata, results)
    write_json(directory / RELEASE / "metadata.json", FORMAT)
    write_text(directory / TRACKER, RELEASE)
    return written


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


def tensor_item(transfer: Transfer, place: Place, dtype: torch.dtype) -> WriteItem:
    """A transfer's part of a stacked tensor, or a whole tensor, as torch's writer knows it."""
    offsets = torch.Size([*place.position, *(0 for _ in transfer.shape)])
    return WriteItem(
        index=MetadataIndex(place.key, offsets),
        type=WriteItemType.SHARD,
        tensor_data=TensorWriteData(
            chunk=ChunkStorageMetadata(
                offsets=offsets,
                sizes=torch.Size([*(1 for _ in place.position), *transfer.shape]),
            ),
            properties=TensorProperties(dtype=dtype),
            size=torch.Size([*place.lengths, *transfer.shape]),
        ),
    )


def tensor_maker(
    transfer: Transfer, place: Place, dtype: torch.dtype, read: Callable[[str], Tensor]
) -> Callable[[], Tensor]:
    """What reads a transfer's parts and makes Megatron's tensor of them."""

    def make() -> Tensor:
        fused = transfer.transform.fuse([read(name).to(dtype) for name in transfer.huggingface])
        return fused.reshape(*(1 for _ in place.position), *transfer.shape)

    return make


def objects(transfers: Iterable[Transfer], options: Mapping[str, Any]) -> dict[str, Any]:
    """What is no tensor, by Megatron's keys of sharded objects."""
    extra = {place.object_key: None for place in extra_states(transfers)}
    common_state = {**COMMON_STATE, "args": Namespace(**options)}
    return {**extra, "common_state/shard_0_1": common_state}


def object_maker(value: Any) -> Callable[[], io.BytesIO]:
    """What serializes an object as Megatron does: a list of the one object."""

    def make() -> io.BytesIO:
        stream = io.BytesIO()
        torch.save([value], stream)
        return stream

    return make


def item_bytes(item: WriteItem) -> int:
    """Bytes of the tensor that an item writes; 0 for an object."""
    if item.tensor_data is None:
        return 0
    return item.tensor_data.chunk.sizes.numel() * item.tensor_data.properties.dtype.itemsize
