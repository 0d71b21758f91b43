"""The two directions, each a stream over the same plan of transfers."""

import math
import time
from collections import Counter
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TextIO

import torch
from torch import Tensor

from megaqwen.architecture import (
    Architecture,
    megatron_options,
    read_architecture,
    tensor_shapes,
)
from megaqwen.errors import InputError
from megaqwen.sources.verify import check_architecture, has_weights
from megaqwen.weights.huggingface import HuggingFaceWeights
from megaqwen.weights.mapping import Transfer, plan_transfers
from megaqwen.weights.reading import MegatronWeights, find_checkpoint
from megaqwen.weights.safetensors_files import Entry, plan_files, write_file, write_index
from megaqwen.weights.workers import (
    LEAST_MEMORY,
    Flusher,
    MemoryBudget,
    Progress,
    run_all,
    usual_workers,
)
from megaqwen.weights.writing import write_checkpoint

FLUSH_BYTES = 500 * 10**6


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
    files: dict[Path, dict[str, Any]]
    """Bytes and SHA-256 of the files that were digested while they were written."""

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


def convert_to_megatron(
    model: Path,
    directory: Path,
    *,
    checks: Sequence[Callable[[], None]] = (),
    workers: int | None = None,
    terminal: TextIO | None = None,
) -> Streamed:
    """Convert a Hugging Face model directory to a Megatron checkpoint.

    Args:
        model: The Hugging Face directory.
        directory: An existing, empty directory: what Megatron's --pretrained-checkpoint takes.
        checks: Done by the workers beside the conversion, which fails with the first that does.
        workers: Threads; None for as many as there are cores, up to 8.
        terminal: Where to say how far it is.

    Raises:
        InputError: The model is not supported, or its files do not hold what config.json describes,
            or are damaged.
    """
    started = time.monotonic()
    weights, transfers = checked_model(model)
    written, files = write_checkpoint(
        directory,
        transfers,
        weights.dtypes,
        weights.read,
        megatron_options(weights.config),
        workers=workers or usual_workers(),
        terminal=terminal,
        checks=checks,
    )
    shapes = tensor_shapes(read_architecture(weights.config))
    return streamed(shapes, weights.dtypes, written, started, files)


def checked_model(model: Path) -> tuple[HuggingFaceWeights, list[Transfer]]:
    """A model's weights, found to be what config.json describes, and the plan of their transfers."""
    weights = HuggingFaceWeights(model)
    qwen = read_architecture(weights.config)
    weights.check(qwen)
    return weights, plan_transfers(qwen)


def dry_run(
    model: Path, checkpoint: Path | None = None, iteration: int | None = None
) -> Iterator[str]:
    """What becomes of each tensor, a line each with names, shapes and transform, and a sum of it all.

    config.json alone says it. Of weights and of a checkpoint, where they are there, the headers are
    held against it; no tensor is read.

    Raises:
        InputError: The model is not supported, or weights or checkpoint are of another one.
    """
    check_architecture(model / "config.json")
    weights = HuggingFaceWeights(model)
    qwen = read_architecture(weights.config)
    if has_weights(model):
        weights.check(qwen)
    transfers = plan_transfers(qwen)
    if checkpoint:
        checked_checkpoint(checkpoint, qwen, iteration)
    yield from map(str, transfers)
    shapes = tensor_shapes(qwen).values()
    parameters = sum(math.prod(shape) for shape in shapes)
    yield (
        f"{len(shapes):,} tensors of Hugging Face <-> {len(transfers):,} of Megatron,"
        f" {parameters:,} parameters"
    )


def checked_checkpoint(
    checkpoint: Path,
    qwen: Architecture,
    iteration: int | None,
) -> tuple[MegatronWeights, list[Transfer]]:
    """A checkpoint's weights, found to be of this model, and the plan of their transfers."""
    transfers = plan_transfers(qwen)
    saved = MegatronWeights(find_checkpoint(checkpoint, iteration))
    saved.check(transfers)
    return saved, transfers


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
    saved, transfers = checked_checkpoint(checkpoint, read_architecture(hf_config), iteration)
    for transfer in transfers:
        parts = transfer.transform.split(saved.read(transfer))
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
    checks: Sequence[Callable[[], None]] = (),
    workers: int | None = None,
    terminal: TextIO | None = None,
) -> Streamed:
    """Write a Megatron checkpoint's weights as safetensors files.

    Args:
        model: The Hugging Face directory that the training started from.
        checkpoint: As in `read_hf_tensors`.
        directory: An existing directory to write model.safetensors or its shards and index to.
        iteration: Which checkpoint; None for the latest.
        dtype: Of all tensors; None keeps the dtype that each has in `model`.
        max_shard_bytes: Largest file; a larger tensor gets a file of its own.
        checks: Done by the workers beside the export, which fails with the first that does.
        workers: Threads, each of which writes one file at a time; None for as many as there are
            cores, up to 8.
        terminal: Where to say how far it is.

    Raises:
        InputError: The checkpoint is not there or not of this model; or the tensors of `model` have
            several dtypes, in which a trained one would be rounded.
    """
    started = time.monotonic()
    source = HuggingFaceWeights(model)
    qwen = read_architecture(source.config)
    saved, transfers = checked_checkpoint(checkpoint, qwen, iteration)
    shapes = tensor_shapes(qwen)
    dtypes = {name: dtype or source.dtypes[name] for name in shapes}
    several = len(set(dtypes.values())) > 1
    files = plan_files(shapes, dtypes, max_shard_bytes)
    total = sum(entry.bytes for entries in files.values() for entry in entries.values())
    memory = {transfer: memory_to_read(transfer, saved) for transfer in transfers}
    budget = MemoryBudget(max(LEAST_MEMORY, *memory.values()))

    def tensors(entries: Mapping[str, Entry]) -> Generator[tuple[str, Tensor]]:
        for transfer in transfers:
            if entries.keys().isdisjoint(transfer.huggingface):
                continue
            with budget.taken(memory[transfer]):
                parts = transfer.transform.split(saved.read(transfer))
                for name, tensor in zip(transfer.huggingface, parts, strict=True):
                    if name in entries and several:
                        yield name, exactly(tensor, dtypes[name], f"{model}: {name}")
                    elif name in entries:
                        yield name, tensor.to(dtypes[name])

    def task(file: str) -> dict[str, Any]:
        since_flush = 0

        def wrote(size: int) -> None:
            nonlocal since_flush
            since_flush += size
            if since_flush > FLUSH_BYTES:  # a large file's end should not wait for all of it
                flusher.add(directory / file)
                since_flush = 0
            progress.add(size)

        # Closed, so that a file that cannot be written gives back the memory others wait for.
        with closing(tensors(files[file])) as stream:
            facts = write_file(directory / file, files[file], stream, wrote)
        flusher.add(directory / file)
        return facts

    with Progress(total, terminal) as progress, Flusher() as flusher:
        tasks = [partial(task, file) for file in files]
        described = run_all(tasks, workers or usual_workers(), beside=checks)
    if len(files) > 1:
        write_index(directory, files)
    known = {directory / file: facts for file, facts in zip(files, described, strict=True)}
    return streamed(shapes, dtypes, total, started, known)


def exactly(tensor: Tensor, dtype: torch.dtype, name: str) -> Tensor:
    """A tensor in another dtype that has all of its values; InputError where that rounds one.

    What one dtype of a whole model rounds, parity rounds in Megatron's model as well; of several it
    could not tell a rounding from a mistake.
    """
    found = tensor.to(dtype)
    if bool(((found.to(tensor.dtype) != tensor) & ~tensor.isnan()).any()):
        raise InputError(
            f"{name} is {str(dtype)[6:]} there, which would round what training made of it, and other"
            " tensors have another dtype: choose one for all under export.dtype, float32 or bfloat16"
        )
    return found


def memory_to_read(transfer: Transfer, saved: MegatronWeights) -> int:
    """Bytes that a transfer takes on its way out: as it is stored, put together, and split."""
    size = torch.Size(transfer.shape).numel() * saved.dtype(transfer).itemsize
    return (2 if len(transfer.huggingface) == 1 else 3) * size


def streamed(
    shapes: Mapping[str, tuple[int, ...]],
    dtypes: Mapping[str, torch.dtype],
    written: int,
    started: float,
    files: dict[Path, dict[str, Any]],
) -> Streamed:
    """The account of a stream that began at `started`, in seconds of the monotonic clock."""
    words = Counter(str(dtypes[name]).removeprefix("torch.") for name in shapes)
    return Streamed(
        tensors=len(shapes),
        parameters=sum(torch.Size(shape).numel() for shape in shapes.values()),
        bytes=written,
        dtypes=dict(words),
        seconds=time.monotonic() - started,
        files=files,
    )
