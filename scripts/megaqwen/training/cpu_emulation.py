"""Megatron on a machine without a GPU: the only place that gives `torch.cuda` a CPU meaning.

Megatron calls a set of `torch.cuda` names unconditionally and writes device="cuda" in places. `install`
gives those names a meaning on the CPU and reads a CUDA device as the CPU; no file and no object of
Megatron is changed, but for the two that `install_training` names. It refuses to load where there is
a GPU, so that a GPU run is untouched. Call it before Megatron is imported.

Found by tracing megatron-core 0.19.2 over gloo: each entry below is called by some training path.
"""

import contextlib
import os
import sys
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

CPU = torch.device("cpu")
GPU_PACKAGES = ("transformer_engine", "transformer_engine_torch", "apex", "amp_C")


def available() -> bool:
    """Whether this machine needs the emulation: it has no GPU that torch can use."""
    return not torch.cuda.is_available()


def is_cuda(device: Any) -> bool:
    """Whether a device argument (string or torch.device) names a CUDA device."""
    if isinstance(device, str):
        return device.startswith("cuda")
    return isinstance(device, torch.device) and device.type == "cuda"


class CudaMeansCpu(TorchFunctionMode):
    """Reads a CUDA device in any torch call as the CPU."""

    def __torch_function__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Change the device argument, then call `func`."""
        if kwargs and is_cuda(kwargs.get("device")):
            kwargs = {**kwargs, "device": CPU}
        if func is torch.Tensor.cuda:
            return args[0]
        if func is torch.Tensor.to and len(args) > 1 and is_cuda(args[1]):
            args = (args[0], CPU, *args[2:])
        if func is torch.Tensor.type and len(args) == 1 and not kwargs:
            # The optimizer sorts parameters by type() and knows torch.cuda.*Tensor only.
            return func(*args).replace("torch.", "torch.cuda.", 1)
        return func(*args, **(kwargs or {}))


class Stream:
    """A stream or an event: on the CPU everything is in order already."""

    cuda_stream = 0
    device = CPU

    def __init__(self, *args: Any, **kwargs: Any):
        """Accept what torch.cuda.Stream and torch.cuda.Event accept."""

    def nothing(self, *args: Any, **kwargs: Any) -> None:
        """There is nothing to wait for."""

    wait = record = synchronize = wait_stream = wait_event = nothing

    def record_event(self, *args: Any) -> "Stream":
        """An event that has happened."""
        return self

    def query(self) -> bool:
        """Whether all work is done: always."""
        return True

    def elapsed_time(self, other: "Stream") -> float:
        """Milliseconds between two events, which are not timed here."""
        return 0.0

    def __enter__(self) -> "Stream":
        """Make it the current stream."""
        return self

    def __exit__(self, *error: object) -> None:
        """Leave it."""

    def __eq__(self, other: object) -> bool:
        """All CPU streams are one."""
        return isinstance(other, Stream)

    def __hash__(self) -> int:
        """Equal streams have equal hashes."""
        return 0


class OneGenerator:
    """torch.cuda.default_generators: the CPU's generator, whatever the index.

    Megatron's RNG tracker forks "the CUDA generator": here dropout draws from the CPU's, so that
    the tracked state is the state that is used.
    """

    def __getitem__(self, index: int) -> torch.Generator:
        """The CPU's generator."""
        return torch.default_generator

    def __iter__(self) -> Iterator[torch.Generator]:
        """One device."""
        yield torch.default_generator


def rng_state(*args: Any, **kwargs: Any) -> torch.Tensor:
    """The CPU generator's state, whatever device is asked for."""
    return torch.get_rng_state()


def set_rng_state(state: torch.Tensor, *args: Any, **kwargs: Any) -> None:
    """Set the CPU generator's state, whatever device is named."""
    torch.set_rng_state(state)


DEVICE_PROPERTIES = SimpleNamespace(
    name="CPU", major=0, minor=0, total_memory=0, multi_processor_count=0, uuid="cpu"
)


def install() -> None:
    """Give `torch.cuda` its CPU meanings; once, and only where there is no GPU."""
    if not available():
        raise RuntimeError("CPU emulation refuses to load: this machine has a GPU")
    if isinstance(torch.cuda.default_generators, OneGenerator):
        return
    # Megatron takes Transformer Engine's and Apex's CUDA kernels wherever it can import them.
    absent: dict[str, Any] = dict.fromkeys(GPU_PACKAGES)
    sys.modules.update(absent)  # with None there, an import fails
    # Megatron's jit_fuser is torch.compile: with inductor on a CPU it costs a minute and gains nothing.
    # Disabled by the variable it still imports inductor, a third of what a rank's imports cost.
    os.environ.setdefault("TORCH_COMPILE_DISABLE", "1")
    torch.compile = not_compiled  # type: ignore[assignment]
    cuda: Any = torch.cuda
    cuda.current_device = lambda: CPU
    cuda.device_count = lambda: 1
    cuda.set_device = cuda.synchronize = cuda.empty_cache = lambda *args, **kwargs: None
    cuda.reset_peak_memory_stats = cuda.manual_seed_all = lambda *args, **kwargs: None
    cuda.current_stream = cuda.default_stream = lambda *args, **kwargs: Stream()
    cuda.stream = lambda stream: contextlib.nullcontext()
    cuda.Stream = cuda.Event = Stream
    cuda.get_rng_state = cuda.random.get_rng_state = rng_state
    cuda.set_rng_state = cuda.random.set_rng_state = set_rng_state
    cuda.manual_seed = lambda seed: torch.default_generator.manual_seed(seed)
    cuda._lazy_call = lambda callback, **kwargs: callback()
    cuda.default_generators = OneGenerator()
    cuda.get_device_properties = lambda *args: DEVICE_PROPERTIES
    cuda.get_device_capability = lambda *args: (0, 0)
    cuda.get_device_name = lambda *args: DEVICE_PROPERTIES.name
    for name in (
        "memory_allocated",
        "max_memory_allocated",
        "memory_reserved",
        "max_memory_reserved",
    ):
        setattr(cuda, name, lambda *args, **kwargs: 0)
    cuda.memory_stats = lambda *args, **kwargs: dict.fromkeys(MEMORY_STATISTICS, 0)
    cuda.mem_get_info = lambda *args: (0, 0)
    cuda.nvtx.range_push = cuda.nvtx.range_pop = lambda *args, **kwargs: None
    torch.distributed.all_to_all_single = all_to_all_single_with_lists(
        torch.distributed.all_to_all_single
    )
    CudaMeansCpu().__enter__()


def not_compiled(function: Any = None, **settings: Any) -> Any:
    """torch.compile that leaves a function, or what it decorates, as it is."""
    return function if function is not None else lambda decorated: decorated


MEMORY_STATISTICS = (
    "allocated_bytes.all.current",
    "allocated_bytes.all.peak",
    "allocated_bytes.all.allocated",
    "reserved_bytes.all.current",
    "reserved_bytes.all.peak",
    "active_bytes.all.peak",
    "allocation.all.current",
    "num_alloc_retries",
    "num_ooms",
)


def all_to_all_single_with_lists(original: Any) -> Any:
    """all_to_all_single that takes split sizes as tensors too.

    Megatron's token dispatcher turns them into lists only for tensors that are on a GPU.
    """

    def as_list(sizes: Any) -> Any:
        return sizes.tolist() if torch.is_tensor(sizes) else sizes

    def all_to_all_single(
        output: torch.Tensor,
        input: torch.Tensor,
        output_split_sizes: Any = None,
        input_split_sizes: Any = None,
        **kwargs: Any,
    ) -> Any:
        return original(
            output, input, as_list(output_split_sizes), as_list(input_split_sizes), **kwargs
        )

    return all_to_all_single


def install_training() -> None:
    """Let `megatron.training.pretrain` start without a GPU. Call it after `install`."""
    import functools

    from megatron.training import initialize, training

    allowed = functools.partial(initialize.initialize_megatron, allow_no_cuda=True)
    training.initialize_megatron = allowed
