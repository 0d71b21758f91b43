"""Where the two models can be looked at within a layer."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

Observed = dict[str, Tensor]
"""[positions, width] of one text at each point of a layer."""
Observations = list[Observed]
"""For each text."""

IN_LAYER = ("attention in", "attention out", "mlp in", "router", "mlp out")
"""In the order in which they are computed."""


@contextmanager
def observe(layer: nn.Module, points: Mapping[str, str]) -> Iterator[list[dict[str, Any]]]:
    """Keep what a layer's submodules put out, for each call of the layer.

    Args:
        layer: The layer.
        points: Path of the submodule below the layer of each point; one that is not there is left out.
    """
    seen: list[dict[str, Any]] = []
    hooks = [layer.register_forward_pre_hook(lambda module, args: seen.append({}))]
    modules = dict(layer.named_modules())

    def keep(point: str) -> Any:
        # A copy: Megatron adds the residual in place.
        return lambda module, args, output: seen[-1].__setitem__(point, copied(output))

    for point, path in points.items():
        if path in modules:
            hooks.append(modules[path].register_forward_hook(keep(point)))
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


def copied(output: Any) -> Any:
    """A module's output, a tensor or a tuple of tensors and others, in memory of its own."""
    if isinstance(output, tuple):
        return tuple(copied(each) for each in output)
    return output.clone() if isinstance(output, Tensor) else output
