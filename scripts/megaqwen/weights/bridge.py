"""The two directions, each a stream over the same plan of transfers."""

import logging
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megaqwen.architecture import megatron_options, read_architecture, tensor_shapes
from megaqwen.weights.huggingface import HuggingFaceWeights
from megaqwen.weights.mapping import Transfer, plan_transfers
from megaqwen.weights.reading import MegatronWeights, find_checkpoint
from megaqwen.weights.safetensors_files import plan_files, write_files
from megaqwen.weights.writing import write_checkpoint

logger = logging.getLogger("megaqwen.weights")

PROGRESS_BYTES = 4 * 10**9  # smaller models are done before a person asks


@dataclass(frozen=True, kw_only=True)
class Streamed:
    """What went over the bridge."""

    tensors: int
    """Hugging Face tensors."""
    parameters: int
    bytes: int
    """Bytes that were written as tensors."""
    dtypes: dict[str, int]
    """Hugging Face tensors by dtype."""
    seconds: float

    def facts(self) -> dict[str, Any]:
        """For a manifest."""
        return {
            "tensors": self.tensors,
            "parameters": self.parameters,
            "bytes": self.bytes,
            "dtypes": self.dtypes,
        }

    def __str__(self) -> str:
        """For a person."""
        speed = self.bytes / max(self.seconds, 1e-9) / 1e9
        return (
            f"{self.parameters:,} parameters in {self.tensors} tensors ({', '.join(self.dtypes)}),"
            f" {self.bytes / 1e9:.3f} GB in {self.seconds:.1f} s: {speed:.2f} GB/s"
        )


def convert_to_megatron(model: Path, directory: Path) -> Streamed:
    """Convert a Hugging Face model directory to a Megatron checkpoint.

    Args:
        model: The Hugging Face directory.
        directory: An existing, empty directory: what Megatron's --pretrained-checkpoint takes.

    Raises:
        InputError: The model is not supported, or its files do not hold what config.json describes.
    """
    started = time.monotonic()
    weights, transfers = checked_model(model)
    total = sum(
        weights.dtypes[name].itemsize * torch.Size(shape).numel()
        for transfer in transfers
        for name, shape in zip(transfer.huggingface, transfer.shapes, strict=True)
    )

    def progress(written: int) -> None:
        if total > PROGRESS_BYTES:
            logger.info("%.1f of %.1f GB written", written / 1e9, total / 1e9)

    options = megatron_options(weights.config)
    written = write_checkpoint(
        directory, transfers, weights.dtypes, weights.read, options, progress
    )
    shapes = tensor_shapes(read_architecture(weights.config))
    return streamed(shapes, weights.dtypes, written, started)


def checked_model(model: Path) -> tuple[HuggingFaceWeights, list[Transfer]]:
    """A model's weights, found to be what config.json describes, and the plan of their transfers."""
    weights = HuggingFaceWeights(model)
    qwen = read_architecture(weights.config)
    weights.check(qwen)
    return weights, plan_transfers(qwen)


def read_hf_tensors(
    checkpoint: Path,
    hf_config: Mapping[str, Any],
    *,
    iteration: int | None = None,
    dtypes: Mapping[str, torch.dtype] | None = None,
) -> Iterator[tuple[str, Tensor]]:
    """The tensors of a Megatron checkpoint as Hugging Face knows them, one transfer at a time.

    Args:
        checkpoint: What Megatron's --save or convert named: it holds
            latest_checkpointed_iteration.txt.
        hf_config: The model's config.json.
        iteration: Which checkpoint; None for the latest.
        dtypes: The dtype to give each tensor, by Hugging Face name; without one a tensor keeps the
            checkpoint's.

    Raises:
        InputError: There is no such checkpoint, or it is not of this model.
    """
    transfers = plan_transfers(read_architecture(hf_config))
    weights = MegatronWeights(find_checkpoint(checkpoint, iteration))
    weights.check(transfers)
    for transfer in transfers:
        parts = transfer.transform.split(weights.read(transfer))
        for name, tensor in zip(transfer.huggingface, parts, strict=True):
            yield name, tensor.to(dtypes[name]) if dtypes else tensor


def export_to_huggingface(
    model: Path,
    checkpoint: Path,
    directory: Path,
    *,
    iteration: int | None = None,
    dtype: torch.dtype | None = None,
    max_shard_bytes: int,
) -> Streamed:
    """Write a Megatron checkpoint's weights as safetensors files.

    Args:
        model: The Hugging Face directory that the training started from.
        checkpoint: As in `read_hf_tensors`.
        directory: An existing directory to write model.safetensors or its shards and index to.
        iteration: Which checkpoint; None for the latest.
        dtype: Of all tensors; None keeps the dtype that each has in `model`.
        max_shard_bytes: Largest file; a larger tensor gets a file of its own.

    Raises:
        InputError: The checkpoint is not there or not of this model.
    """
    started = time.monotonic()
    source = HuggingFaceWeights(model)
    qwen = read_architecture(source.config)
    shapes = tensor_shapes(qwen)
    dtypes = {name: dtype or source.dtypes[name] for name in shapes}
    files = plan_files(shapes, dtypes, max_shard_bytes)
    tensors = read_hf_tensors(checkpoint, source.config, iteration=iteration, dtypes=dtypes)
    written = write_files(directory, files, tensors)
    return streamed(shapes, dtypes, written, started)


def streamed(
    shapes: Mapping[str, tuple[int, ...]],
    dtypes: Mapping[str, torch.dtype],
    written: int,
    started: float,
) -> Streamed:
    """The account of a stream that began at `started`, in seconds of the monotonic clock."""
    words = Counter(str(dtypes[name]).removeprefix("torch.") for name in shapes)
    return Streamed(
        tensors=len(shapes),
        parameters=sum(torch.Size(shape).numel() for shape in shapes.values()),
        bytes=written,
        dtypes=dict(words),
        seconds=time.monotonic() - started,
    )
