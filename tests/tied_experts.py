"""Experts that tie: two rows of a router are the same, and Megatron chooses between them otherwise.

No mistake: which of two equal logits is larger is decided by the last bit of a sum in some order.
"""

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

NEAR = 1e-5


def tie_experts(tensors: dict[str, Tensor], layer: int) -> None:
    """Give the first two experts of a layer the same logit, for every token."""
    router = tensors[f"model.layers.{layer}.mlp.gate.weight"].clone()
    router[1] = router[0]
    tensors[f"model.layers.{layer}.mlp.gate.weight"] = router


def tie_experts_of(directory: Path, layer: int) -> None:
    """The same in a model directory."""
    (file,) = directory.glob("*.safetensors")
    tensors = load_file(file)
    tie_experts(tensors, layer)
    save_file(tensors, file, metadata={"format": "pt"})


def choose_otherwise(router: Any) -> None:
    """Let one of Megatron's routers prefer by turns either expert of the tie, by the last bits."""
    routing = router.routing

    def otherwise(logits: Tensor, **named: Any) -> Any:
        first, second, rest = logits.detach().tensor_split([1, 2], dim=-1)
        up = torch.maximum(first, second)
        for _ in range(2):
            up = torch.nextafter(up, torch.full_like(up, torch.inf))
        turn = (torch.arange(len(logits)) % 2 == 0).view(-1, 1, 1)
        near = (first - second).abs() <= NEAR
        changed = [torch.where(near & turn, up, first), torch.where(near & ~turn, up, second)]
        if logits.dtype is torch.float32:
            logits = logits + (torch.cat([*changed, rest], dim=-1) - logits.detach())
        return routing(logits, **named)

    router.routing = otherwise
