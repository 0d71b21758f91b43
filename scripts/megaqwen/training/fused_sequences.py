"""Lets Megatron's layers of fused operations wait for the parameters that they use.

With overlap_param_gather the hook before a module's forward waits until its parameters are gathered. A
layer that Transformer Engine runs as one sequence calls none of its modules. Megatron 0.19.2 has it take
their hooks over at its first forward, when none is registered: the first iteration gathers by itself.
Training registers no other hooks on these modules; such would not run.
"""

from typing import Any

from torch import nn


def install() -> None:
    """Let each such layer look its modules' hooks up whenever it runs; needs Transformer Engine."""
    from megatron.core.extensions.transformer_engine import TEFusedMLP

    TEFusedMLP._register_hooks_on_fused_impl = wait_for_parameters


def wait_for_parameters(layer: nn.Module, sequence: nn.Module) -> None:
    """Before the forward of `sequence`, run what the modules of `layer` have before theirs."""

    def wait(*unused: Any) -> None:
        for module in layer.modules():
            for hook in module._forward_pre_hooks.values():
                hook(module, ())

    sequence.register_forward_pre_hook(wait)
