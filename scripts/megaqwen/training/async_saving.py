"""Asynchronous saves through page-locked memory, which take training no time for their copy.

Megatron's worker process copies each tensor from the GPU to fresh memory while training waits: at
1.4 GB/s on an H100's host, since every page is touched for the first time and the driver copies through
a buffer of its own. Here the worker keeps the memory from save to save and has the driver lock its
pages, which the GPU fills at 55 GB/s; it takes it while the first iterations run. It costs a rank as much
host memory as its share of a checkpoint. Training goes on while it is filled: see copy_beside.py.
That is all of a checkpoint but what the distributed optimizer gathers first: see `gathered_bytes`.
"""

import contextlib
import ctypes
import logging
import resource
import threading
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import accumulate
from typing import Any

import torch

from megaqwen.machine import free_memory
from megaqwen.training.copy_beside import COPY, watch_worker
from megaqwen.training.ranks import ranks_of_node

logger = logging.getLogger("megaqwen.training")

ALIGNMENT = 512  # bytes
PART = 64 << 20  # bytes that a thread touches at a time
THREADS = 8  # that touch new memory
SPARE = 1.25  # times as much memory has to be available as is locked
MORE = 1.02  # times as much as is reckoned: what is aligned, and what ranks share unevenly
RESERVING_SECONDS = 300
MASTER = 4  # bytes of an optimizer's own copy of a weight

# As Megatron plans a save: a file, its key, and its items as [(item, bytes)] and [(item, tensor)].
Bucket = tuple[Any, str, tuple[list[Any], list[Any]]]


def install() -> None:
    """Have Megatron's worker stage tensors by `stage`; call it on a GPU only."""
    from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync
    from megatron.training import get_args, training

    FileSystemWriterAsync.preload_tensors = staticmethod(stage)
    # A tensor of the host's takes two of them on its way to the worker, which starts with as many.
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(ValueError):  # where it is more than the kernel's own
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    set_up = training.setup_model_and_optimizer

    def set_up_and_reserve(*words: Any, **named: Any) -> Any:
        model, optimizer, schedule = set_up(*words, **named)
        arguments = get_args()
        # What is replayed waits for nothing, so that the copy is waited for where it is begun.
        COPY.install(beside=arguments.cuda_graph_impl == "none")
        reserve_for(model, optimizer, arguments)
        return model, optimizer, schedule

    training.setup_model_and_optimizer = set_up_and_reserve
    training.finalize_model_grads = COPY.before(training.finalize_model_grads)
    watch_worker()


def reserve_for(model: Iterable[torch.nn.Module], optimizer: Any, arguments: Any) -> None:
    """`reserve` what saves take; a training that is only evaluated has no optimizer and no save."""
    if not arguments.async_save or optimizer is None:
        return
    size = int(MORE * saved_bytes(model, optimizer, arguments))
    fits = is_kept(size, beside=gathered_bytes(model, arguments))
    if torch.distributed.is_initialized():
        torch.distributed.barrier()  # none takes its own before all of the node have looked
    if fits:
        reserve(size)


def is_kept(size: int, beside: int = 0) -> bool:
    """Whether the host has memory for each rank of this node to keep so many bytes; it says if not.

    Args:
        size: Bytes.
        beside: Bytes that a rank takes for the time of a save.
    """
    if free_memory() >= (SPARE * size + beside) * ranks_of_node():
        return True
    logger.warning(
        "the host has too little memory to keep %.1f GiB a rank for saving: saves take longer",
        size / 2**30,
    )
    return False


def saved_bytes(model: Iterable[torch.nn.Module], optimizer: Any, arguments: Any) -> int:
    """About how many bytes of a checkpoint this rank writes: weights, and Adam's state with its copy.

    Data parallel ranks share out what they all have; of a distributed optimizer each has its own part.
    """
    weights = sum(each.nbytes for chunk in model for each in chunk.parameters())
    moments = arguments.exp_avg_dtype.itemsize + arguments.exp_avg_sq_dtype.itemsize
    states = sum(
        each.numel() * (MASTER + moments)
        for group in optimizer.param_groups
        for each in group["params"]
    )
    ranks = arguments.data_parallel_size
    if arguments.use_distributed_optimizer:
        return weights // ranks + states
    return (weights + states) // ranks


def gathered_bytes(model: Iterable[torch.nn.Module], arguments: Any) -> int:
    """What the distributed optimizer gathers on the host of each rank while it plans a save.

    That is Adam's state and its copy in float32, of all weights that the rank has: Megatron's
    `get_parameter_state_dp_zero`. Training stands still for it; the weights alone are copied beside.
    """
    if not arguments.use_distributed_optimizer:
        return 0
    return 3 * MASTER * sum(each.numel() for chunk in model for each in chunk.parameters())


RESERVING: list[threading.Thread] = []


def reserve(size: int) -> None:
    """Have the worker take memory while training begins: at the first save it would be waited for.

    Args:
        size: Bytes that `is_kept` allows.
    """
    from megatron.core.dist_checkpointing.strategies.async_utils import (
        AsyncRequest,
        PersistentAsyncCaller,
    )

    requests, ended = (
        PersistentAsyncCaller._persistent_queue,
        PersistentAsyncCaller._persistent_comp_q,
    )
    if requests is None or ended is None:
        return
    requests.put(AsyncRequest(async_fn=grow, async_fn_args=(size,), finalize_fns=[]))
    # The worker tells that it is through: taken off here, or the first save would take it for its own.
    words = {"timeout": RESERVING_SECONDS}
    RESERVING.append(threading.Thread(target=ended.get, kwargs=words, daemon=True))
    RESERVING[-1].start()


def wait_until_reserved() -> None:
    """Before a save: the worker does one thing at a time."""
    while RESERVING:
        RESERVING.pop().join()


class Staging:
    """Host memory that is taken again at every save."""

    def __init__(self) -> None:
        self.memory = torch.empty(0, dtype=torch.uint8)

    def tensors(self, originals: Sequence[torch.Tensor]) -> list[torch.Tensor] | None:
        """A place for each, of its shape and dtype and with a storage of its own.

        torch.save writes the whole storage of a tensor. None where the host has too little memory.
        """
        begins = [0, *accumulate(aligned(original.nbytes) for original in originals)]
        size = begins.pop()
        if size > self.memory.nbytes:
            self.give_back()
            if not is_kept(size):
                return None
            self.grow(size)
        places = []
        for original, begin in zip(originals, begins, strict=True):
            if not original.nbytes:
                places.append(torch.empty(original.shape, dtype=original.dtype))
                continue
            buffer = memoryview(self.memory.numpy())[begin : begin + original.nbytes]
            places.append(torch.frombuffer(buffer, dtype=original.dtype).view(original.shape))
        return places

    def grow(self, size: int) -> None:
        """Have `size` bytes, which `is_kept` allows, where there are none."""
        self.memory = torch.empty(size, dtype=torch.uint8)
        touch(self.memory)
        self.lock(True)

    def give_back(self) -> None:
        """Have none."""
        self.lock(False)
        self.memory = torch.empty(0, dtype=torch.uint8)

    def lock(self, locked: bool) -> None:
        """Have the driver lock the pages, or release them."""
        if not self.memory.nbytes or not torch.cuda.is_available():
            return
        runtime = torch.cuda.cudart()
        if locked:
            runtime.cudaHostRegister(self.memory.data_ptr(), self.memory.nbytes, 0)
        else:
            runtime.cudaHostUnregister(self.memory.data_ptr())


def aligned(size: int) -> int:
    """So many bytes, and what it takes to the next multiple of ALIGNMENT."""
    return -(-size // ALIGNMENT) * ALIGNMENT


def touch(memory: torch.Tensor) -> None:
    """Have the kernel give out the pages, by several threads: one takes 0.4 s for a GiB."""
    size, start = memory.nbytes, memory.data_ptr()
    with ThreadPoolExecutor(THREADS) as pool:
        for begin in range(0, size, PART):
            pool.submit(ctypes.memset, start + begin, 0, min(PART, size - begin))


STAGING = Staging()


def grow(size: int) -> None:
    """What `reserve` has the worker do."""
    STAGING.grow(size)


def stage(write_buckets: list[Bucket], non_blocking: bool = True) -> list[Bucket]:
    """The same buckets with their tensors in the host's memory: what is written may not change."""
    originals = [tensor for *_, (_, tensors) in write_buckets for _, tensor in tensors]
    places = STAGING.tensors(originals)
    if places is None:
        places = [torch.empty(each.shape, dtype=each.dtype) for each in originals]
    for original, place in zip(originals, places, strict=True):
        place.copy_(original, non_blocking=non_blocking)
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    left = iter(places)
    return [
        (file, key, (data, [(item, next(left)) for item, _ in tensors]))
        for file, key, (data, tensors) in write_buckets
    ]
