"""Reads a Megatron `torch_dist` checkpoint without Megatron, a GPU or ranks: one tensor at a time.

Whatever tensor, pipeline or data parallelism saved it: the checkpoint says which chunk of which tensor
lies where, and the chunks that a tensor needs are put together. Optimizer state is never touched.
"""

import pickle
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, TensorStorageMetadata
from torch.distributed.checkpoint.planner import LoadPlan, ReadItem
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from megaqwen.errors import InputError
from megaqwen.weights.mapping import Transfer
from megaqwen.weights.writing import RELEASE, TRACKER


def find_checkpoint(directory: Path, iteration: int | None = None) -> Path:
    """The directory of one iteration, or of a release, below what Megatron's --save names.

    Args:
        directory: The directory that holds latest_checkpointed_iteration.txt.
        iteration: Which one; None for the latest.

    Raises:
        InputError: There is no such checkpoint, or it is not whole.
    """
    tracker = directory / TRACKER
    if iteration is not None:
        found = directory / iteration_name(iteration)
    elif not tracker.is_file():
        raise InputError(f"{directory}: no checkpoint was saved there ({TRACKER} is missing)")
    else:
        latest = tracker.read_text(encoding="utf-8").strip()
        found = directory / (latest if latest == RELEASE else iteration_name(int(latest)))
    if not (found / ".metadata").is_file() or not (found / "metadata.json").is_file():
        saved = sorted(path.parent.name for path in directory.glob("*/.metadata"))
        raise InputError(
            f"{found}: there is no whole torch_dist checkpoint; saved: {', '.join(saved) or 'none'}"
        )
    return found


def iteration_name(iteration: int) -> str:
    """Megatron's name for an iteration's directory."""
    return f"iter_{iteration:07d}"


class OneTensor(DefaultLoadPlanner):
    """Puts everything that is read into one tensor."""

    def __init__(self, destination: Tensor):
        super().__init__()
        self.destination = destination

    def resolve_tensor(self, read_item: ReadItem) -> Tensor:
        """The part of the destination that a read item fills."""
        part = self.destination
        for axis, (offset, length) in enumerate(
            zip(read_item.dest_offsets, read_item.lengths, strict=True)
        ):
            part = part.narrow(axis, offset, length)
        return part

    def commit_tensor(self, read_item: ReadItem, tensor: Tensor) -> None:
        """It was filled in place."""


class MegatronWeights:
    """The model's tensors in one saved checkpoint."""

    def __init__(self, checkpoint: Path):
        """Read the checkpoint's table of contents.

        Args:
            checkpoint: An iteration's directory, see `find_checkpoint`.
        """
        self.checkpoint = checkpoint
        self.reader = FileSystemReader(checkpoint)
        try:
            metadata = self.reader.read_metadata()
        except (pickle.UnpicklingError, EOFError, AttributeError) as error:
            raise InputError(f"{checkpoint / '.metadata'} cannot be read: {error}") from error
        self.reader.set_up_storage_reader(metadata, is_coordinator=True)
        self.tensors: dict[str, Any] = metadata.state_dict_metadata

    def locate(self, transfer: Transfer) -> tuple[str, ChunkStorageMetadata]:
        """The key that holds a transfer's tensor, and the box of it that is the transfer's.

        Raises:
            InputError: The checkpoint has no such tensor, or it has another shape.
        """
        place = next((each for each in transfer.places if each.key in self.tensors), None)
        place = place or transfer.places[0]
        key, expected = place.key, (*place.lengths, *transfer.shape)
        box = ChunkStorageMetadata(
            offsets=torch.Size([*place.position, *(0 for _ in transfer.shape)]),
            sizes=torch.Size([*(1 for _ in place.position), *transfer.shape]),
        )
        stored = self.tensors.get(key)
        if not isinstance(stored, TensorStorageMetadata):
            raise InputError(
                f"{self.checkpoint}: {transfer.key} is missing: the checkpoint is not of this model"
            )
        fits = tuple(stored.size) == expected
        if transfer.row.padded:
            fits = stored.size[0] >= expected[0] and tuple(stored.size[1:]) == expected[1:]
        if not fits:
            raise InputError(
                f"{self.checkpoint}: {key} has shape {list(stored.size)}, but by config.json it is"
                f" {list(expected)}: the checkpoint is not of this model"
            )
        return key, box

    def check(self, transfers: list[Transfer]) -> None:
        """InputError unless the checkpoint holds all transfers and no other tensor of the model."""
        keys = {self.locate(transfer)[0] for transfer in transfers}
        keys |= {place.key for transfer in transfers for place in transfer.copies}
        model = {
            key
            for key, stored in self.tensors.items()
            if isinstance(stored, TensorStorageMetadata)
            and key.startswith(("embedding.", "decoder.", "output_layer."))
        }
        if unexpected := sorted(model - keys):
            raise InputError(
                f"{self.checkpoint}: {', '.join(unexpected)}: not part of the model that"
                " config.json describes"
            )

    def read(self, transfer: Transfer) -> Tensor:
        """Megatron's tensor of one transfer, in the checkpoint's dtype."""
        key, box = self.locate(transfer)
        stored = self.tensors[key]
        destination = torch.empty(box.sizes, dtype=stored.properties.dtype)
        items = create_read_items_for_chunk_list(key, stored, [box])
        if sum(item.lengths.numel() for item in items) != destination.numel():
            raise InputError(
                f"{self.checkpoint}: parts of {key} are missing: it was not saved whole"
            )
        self.reader.read_data(LoadPlan(items), OneTensor(destination)).wait()
        return destination.reshape(transfer.shape)
