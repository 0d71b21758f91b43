"""Megatron's forward pass with Transformer Engine on one GPU, in a process of its own.

    python -m megaqwen.parity.gpu_process ASKED TOLD

ASKED is what megaqwen.parity.gpu writes. TOLD gets the outputs of the layers and the logits or, in words,
why they cannot be computed here. Any failure but a lack of memory ends it with a traceback.
"""

import importlib.util
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megaqwen.environment import prepare_gpu

BYTES = 5
"""Of a GPU's memory for each parameter: in bfloat16, and in FP8 both ways round, with its scales."""
LOOKS = 2
"""Of delayed scaling, whose first, if nothing was seen before, are of numbers that are too coarse."""
LEFT_FREE = 2**31
"""Bytes for activations, logits and what libraries take."""


def main() -> None:
    """The command."""
    prepare_gpu()  # before torch is imported
    import torch

    asked, told = map(Path, sys.argv[1:])
    request = torch.load(asked)
    torch.save(answer(request), told)


def answer(request: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of `Forwarded`, or {"unmeasured": why not}."""
    import torch

    if not on_gpu(request):
        join(request)
        return forward(request)
    if reason := cannot(request):
        return {"unmeasured": reason}
    try:
        join(request)
        return forward(request)
    except torch.OutOfMemoryError as error:
        return {"unmeasured": too_small(error)}


def too_small(error: Exception) -> str:
    """A lack of memory in a line."""
    return f"the GPU's memory is too small ({str(error).splitlines()[0].partition('. ')[0]})"


def on_gpu(request: Mapping[str, Any]) -> bool:
    """Whether it is asked of Transformer Engine."""
    return bool(request["options"]["transformer_impl"] == "transformer_engine")


def cannot(request: Mapping[str, Any]) -> str:
    """Why this machine cannot compute it; empty where it can."""
    import torch

    if not torch.cuda.is_available():
        return "torch finds no GPU that it may use"
    if importlib.util.find_spec("transformer_engine") is None:
        return "Transformer Engine is not installed"
    needed, free = request["parameters"] * BYTES + LEFT_FREE, torch.cuda.mem_get_info()[0]
    if needed > free:
        return (
            f"{needed / 1e9:.0f} GB of the GPU's memory are needed and {free / 1e9:.0f} GB are free"
        )
    options = request["options"]
    if options.get("fp8"):
        from transformer_engine.pytorch import quantization

        blockwise = options.get("fp8_recipe") == "blockwise"
        can, reason = (
            quantization.is_fp8_block_scaling_available(return_reason=True)
            if blockwise
            else quantization.is_fp8_available(return_reason=True)
        )
        if not can:
            return f"this GPU cannot compute so: {reason}"
    return ""


def join(request: Mapping[str, Any]) -> None:
    """Make this process Megatron's only rank, on the first of the GPUs that it sees."""
    import torch

    if on_gpu(request):
        from megaqwen.training import cpu_checkpoints, fused_kernels

        cpu_checkpoints.install()
        fused_kernels.install()
        torch.cuda.set_device(0)
        backend = "cuda:nccl,cpu:gloo"
    else:
        from megaqwen.training import cpu_emulation

        cpu_emulation.install()
        backend = "gloo"
    store = torch.distributed.TCPStore("127.0.0.1", 0, 1, is_master=True)  # on any free port
    torch.distributed.init_process_group(backend, store=store, rank=0, world_size=1)


def forward(request: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of `Forwarded`, in float32 in the CPU's memory."""
    import torch

    from megaqwen.config.combinations import fp8_recipe
    from megaqwen.parity.batches import compared_at
    from megaqwen.parity.ranked_model import ranked_model

    options, vocabulary, long = (request[name] for name in ("options", "vocabulary", "long"))
    delayed = fp8_recipe(options) == "delayed"
    with ranked_model(options, request["rounded_to"]) as model:

        def outputs(batch: torch.Tensor, at: torch.Tensor | slice = slice(None)) -> Any:
            for _ in range(LOOKS if delayed else 0):  # it scales by what it saw in the steps before
                model.look_at(batch)
            return model.forward(batch, vocabulary, at)

        found: dict[str, Any] = {"outputs": outputs(request["batch"])}
        if long is not None:
            try:
                found["long"] = outputs(long, compared_at(long))
            except torch.OutOfMemoryError as error:
                found["without_long"] = too_small(error)
        return found


if __name__ == "__main__":
    main()
