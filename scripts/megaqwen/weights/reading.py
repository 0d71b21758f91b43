"""Reads a Megatron `torch_dist` checkpoint without Megatron, a GPU or ranks: one tensor at a time.

Whatever tensor, pipeline or data parallelism saved it: the checkpoint says which chunk of which tensor
lies where, and the chunks that a tensor needs are put together. Optimizer state is never touched.
"""

import pickle
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed._shard._utils import narrow_tensor_by_index
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, TensorStorageMetadata
from torch.distributed.checkpoint.planner import ReadItem
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from megaqwen.checkpoints import TRACKER, damage, is_finished, iteration_name, tracked_iteration
from megaqwen.errors import InputError
from megaqwen.provenance import make_again
from megaqwen.weights.mapping import Transfer
from megaqwen.weights.saved_tensors import read_saved_tensor
from megaqwen.weights.writing import RELEASE


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
        found = directory / (
            latest if latest == RELEASE else iteration_name(tracked_iteration(directory))
        )
    if not is_finished(found):
        saved = sorted(path.parent.name for path in directory.glob("*/.metadata"))
        raise InputError(
            f"{found}: there is no whole torch_dist checkpoint; saved: {', '.join(saved) or 'none'}"
        )
    # Checksums are looked at where tensors are read: torch keeps one for each.
    if wrong := damage(found, "sizes"):
        raise InputError(
            f"{found} is damaged: {'; '.join(wrong)}. To train it again from the newest whole"
            f" checkpoint before it: {make_again('train')}"
        )
    return found


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
        self.chunks_by_position: dict[str, dict[tuple[int, ...], list[ChunkStorageMetadata]]] = {}

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

    def dtype(self, transfer: Transfer) -> torch.dtype:
        """The dtype that the checkpoint has a transfer's tensor in."""
        dtype: torch.dtype = self.tensors[self.locate(transfer)[0]].properties.dtype
        return dtype

    def chunks(self, key: str, axes: int) -> dict[tuple[int, ...], list[ChunkStorageMetadata]]:
        """A key's chunks by their position on the leading axes, of layers and experts.

        A model with many experts has many thousands: none of them is looked at twice.
        """
        if key not in self.chunks_by_position:
            by_position: dict[tuple[int, ...], list[ChunkStorageMetadata]] = {}
            for chunk in self.tensors[key].chunks:
                spans = zip(chunk.offsets[:axes], chunk.sizes[:axes], strict=True)
                for position in product(*(range(start, start + size) for start, size in spans)):
                    by_position.setdefault(position, []).append(chunk)
            self.chunks_by_position[key] = by_position
        return self.chunks_by_position[key]

    def read(self, transfer: Transfer) -> Tensor:
        """Megatron's tensor of one transfer, in the checkpoint's dtype."""
        key, box = self.locate(transfer)
        axes = len(box.sizes) - len(transfer.shape)
        chunks = self.chunks(key, axes).get(tuple(box.offsets[:axes]), [])
        stored = replace(self.tensors[key], chunks=chunks)
        destination = torch.empty(box.sizes, dtype=stored.properties.dtype)
        items = create_read_items_for_chunk_list(key, stored, [box])
        if sum(item.lengths.numel() for item in items) != destination.numel():
            raise InputError(
                f"{self.checkpoint}: parts of {key} are missing: it was not saved whole"
            )
        for item in items:
            self.read_item(item, chunks[item.storage_index.index or 0], destination)
        return destination.reshape(transfer.shape)

    def read_item(self, item: ReadItem, chunk: ChunkStorageMetadata, destination: Tensor) -> None:
        """Read what a read item wants of a chunk to where it belongs in `destination`."""
        place = self.reader.storage_data[item.storage_index]
        part = narrow_tensor_by_index(destination, item.dest_offsets, item.lengths)
        direct = item.lengths == chunk.sizes and part.is_contiguous()
        target = part if direct else torch.empty(chunk.sizes, dtype=destination.dtype)
        file = self.checkpoint / place.relative_path
        try:
            with open(file, "rb", buffering=0) as stream:
                found = read_saved_tensor(
                    stream, place.offset, place.length, destination.dtype, target
                )
        except (OSError, EOFError, ValueError, RuntimeError, pickle.UnpicklingError) as error:
            raise InputError(
                f"{file}: {item.storage_index.fqn} cannot be read: damaged or truncated ({error})"
            ) from error
        if found is not part:
            part.copy_(narrow_tensor_by_index(found, item.storage_offsets, item.lengths))
