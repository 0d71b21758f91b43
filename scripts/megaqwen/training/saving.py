"""What is done around each save of Megatron's, so that no kill and no second start costs more.

Before it the lease is looked at; after it, and before Megatron's tracker names it, the sizes of its files
are recorded; checksums follow, and older checkpoints go, in the background.
"""

import contextlib
import errno
import logging
import os
import queue
import tempfile
import threading
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.strategies import filesystem_async
from torch.distributed.checkpoint.api import CheckpointException

from megaqwen.checkpoints import (
    forget_save,
    megatron_files,
    prune,
    write_checksums,
    write_sizes,
)
from megaqwen.config.sections import Checkpoints
from megaqwen.errors import InputError, is_disk_full
from megaqwen.layout import LAYOUT_OPTIONS
from megaqwen.training import async_saving
from megaqwen.training.copy_beside import COPY
from megaqwen.training.cpu_checkpoints import saved_arguments
from megaqwen.training.lease import check_held, token_of_launcher

logger = logging.getLogger("megaqwen.training")

STOPPING_SECONDS = 60.0  # that checksums may take of a stopped training's time to leave
FULL = 16 << 20  # bytes that do not fit any more where a checkpoint took the last room
NAMES = {
    "tensor": "tensor_model_parallel_size",
    "pipeline": "pipeline_model_parallel_size",
    "context": "context_parallel_size",
    "expert": "expert_model_parallel_size",
    "data": "data_parallel_size",
    "micro batch": "micro_batch_size",
}


def changed_layout(checkpoints: Path, arguments: Namespace, resumed: int) -> str:
    """In words, what is laid out in another way than when the last checkpoint was saved."""
    saved = saved_arguments(checkpoints) if resumed else None
    others = sorted(LAYOUT_OPTIONS - set(NAMES.values()))
    changes = []
    for kind, name in (*NAMES.items(), *zip(others, others, strict=True)):
        now = getattr(arguments, name, None)
        if saved is not None and (then := getattr(saved, name, now)) != now:
            changes.append(f"{kind} {then} -> {now}")
    return ", ".join(changes)


def check_experts(checkpoints: Path, arguments: Namespace, resumed: int) -> None:
    """InputError where Megatron does not go on under another expert parallelism.

    With it experts have an optimizer of their own, and a single one does not load the states of two, nor
    the reverse. Of grouped experts Transformer Engine has the scales of delayed FP8 expert by expert, and
    Megatron-Core 0.19.2 shares them out kind by kind (`_split_extra_state`): among another number of
    experts they would be other products'.
    """
    name = "expert_model_parallel_size"
    saved = saved_arguments(checkpoints) if resumed and arguments.num_experts else None
    now, then = getattr(arguments, name), getattr(saved, name, None)
    if saved is None or then in (None, now):
        return
    lost = ""
    if 1 in (then, now) and not arguments.no_load_optim:
        lost = "Megatron does not load the optimizer's states"
    elif arguments.moe_grouped_gemm and scales_by_history(saved) and scales_by_history(arguments):
        lost = "the scales of delayed FP8 of grouped experts cannot be shared out anew"
    if lost:
        raise InputError(
            f"train.{name} was {then} when the checkpoint in {checkpoints} was saved, and is {now}:"
            f" {lost}. Keep {then}"
        )


def scales_by_history(arguments: Namespace) -> bool:
    """Whether training is in FP8 with delayed scaling."""
    return bool(getattr(arguments, "fp8", None)) and arguments.fp8_recipe == "delayed"


def write_without_a_process() -> None:
    """Take back the process that Megatron's writer starts for a queue, for saves that are waited for.

    Only a writer in another process needs it, that of async_save. It imports torch, once for each rank.
    """
    filesystem_async._results_queue = queue.Queue()


class Saving:
    """Stands around `dist_checkpointing.save` of one training."""

    def __init__(self, checkpoints: Path, settings: Checkpoints):
        """For the checkpoints below a directory, kept as `settings` say."""
        self.checkpoints = checkpoints
        self.settings = settings
        self.token = token_of_launcher()
        self.background: threading.Thread | None = None

    def install(self) -> None:
        """Put it in place; once in a process."""
        save = dist_checkpointing.save

        def guarded(state_dict: Any, checkpoint_dir: Any, *words: Any, **named: Any) -> Any:
            directory = Path(checkpoint_dir)
            self.begin(directory)
            with telling(directory):
                request = save(state_dict, checkpoint_dir, *words, **named)
            if request is None:
                self.end(directory)
            else:  # asynchronous: called on every rank before the tracker is written
                request.finalize_fns[:] = map(telling(directory), request.finalize_fns)
                request.add_finalize_fn(lambda: self.end(directory))
            return request

        dist_checkpointing.save = guarded

    def begin(self, directory: Path) -> None:
        """Stop where another start has the lease; rank 0's error ends all ranks of the job."""
        async_saving.wait_until_reserved()
        COPY.wait()  # of a save without an iteration since
        if torch.distributed.get_rank() == 0:
            check_held(self.checkpoints, self.token)
            forget_save(directory)

    def end(self, directory: Path) -> None:
        """All ranks have written: record it."""
        if torch.distributed.get_rank() == 0:
            write_sizes(directory)
        words = (directory, self.background)
        self.background = threading.Thread(target=self.follow, args=words, daemon=True)
        self.background.start()

    def follow(self, directory: Path, earlier: threading.Thread | None) -> None:
        """Checksums of this rank's files; on rank 0 also what is no longer needed goes.

        The earlier save's come first: nobody else waits for them, neither training nor the next save.
        """
        if earlier:
            earlier.join()
        rank = torch.distributed.get_rank()
        try:
            names = written_by(directory, rank)
            if names:
                write_checksums(directory, f"rank{rank}", names)
            if rank == 0:
                keep = self.settings
                prune(self.checkpoints, keep_last=keep.keep_last, keep_every=keep.keep_every)
        except OSError as error:  # the checkpoint is whole without
            logger.warning("checksums of %s were not recorded: %s", directory, error)

    def finish(self, seconds: float | None = None) -> None:
        """Wait for the background's work, for so many seconds at the most."""
        if self.background:
            self.background.join(seconds)
            self.background = None

    def finish_stopped(self) -> None:
        """Wait for it on all ranks before any of them leaves: the first one's end is the others'.

        A kill in between costs checksums, and no checkpoint.
        """
        if not self.background:
            return
        self.finish(STOPPING_SECONDS)
        with contextlib.suppress(RuntimeError):  # a rank that failed meanwhile says so itself
            torch.distributed.barrier()


@contextlib.contextmanager
def telling(directory: Path) -> Iterator[None]:
    """Around a save, or each of what ends one that was asynchronous: `what_failed` is raised."""
    try:
        yield
    except CheckpointException as error:
        raise what_failed(error, directory) from error


def what_failed(error: CheckpointException, directory: Path) -> Exception:
    """A failed save as an error that can be told: Megatron's writer keeps a full disk to itself."""
    try:
        # A disk's free space tells of no quota.
        with tempfile.TemporaryFile(dir=directory, buffering=0) as probe:
            probe.write(bytes(FULL))
            probe.write(b"0")  # the first one may have written a part
            os.fsync(probe.fileno())
    except OSError as refused:
        if is_disk_full(refused):
            words = os.strerror(refused.errno or errno.ENOSPC)
            return OSError(refused.errno, words, str(directory))
    return RuntimeError(f"{directory} was not saved: {error}")


def written_by(directory: Path, rank: int) -> list[str]:
    """The files of a checkpoint that a rank wrote; rank 0 also those that are not of one rank."""
    names = megatron_files(directory)
    own = [name for name in names if name.startswith(f"__{rank}_")]
    return own + [name for name in names if not name.startswith("__")] if rank == 0 else own
