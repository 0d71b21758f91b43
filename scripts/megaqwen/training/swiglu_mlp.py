"""An MLP with SwiGLU within its matrix products, as one of Transformer Engine's fused operations.

Apart, the first product writes gate and up, and another kernel reads them again to write silu(gate) * up,
at the memory's limit; backward likewise. quack's products have both in registers when they are done. They
compute SwiGLU of the float32 sums, where a kernel apart has what bfloat16 left of them, and once more in
backward, so that it takes no memory between. Gate and up of each feature lie side by side; weights, their
order and their gradients are Megatron's. tests/gpu/README.md has what it gains.
"""

import importlib.util
import logging
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from transformer_engine.pytorch.cpu_offload import (
    is_cpu_offload_enabled,
    mark_activation_offload,
)
from transformer_engine.pytorch.ops import BasicLinear, FusedOperation, SwiGLU
from transformer_engine.pytorch.ops._common import (
    get_dummy_wgrads_for_params,
    is_quantized_tensor,
)
from transformer_engine.pytorch.ops.fuser import (
    OperationFuser,
    register_forward_backward_fusion,
)

TESTED = {"quack-kernels": "0.6.4", "nvidia-cutlass-dsl-libs-base": "4.6.2"}
"""With another compiler a kernel of others' was seen to return zeros, see tests/gpu/README.md."""
ALIGNED = 16
"""What weights' sizes are multiples of: gate and up then begin at the 16 bytes that TMA asks for."""

logger = logging.getLogger("megaqwen.training")


class SwiGLUMLP(FusedOperation):  # type: ignore[misc]
    """Linear, SwiGLU and linear, without biases; Transformer Engine describes the methods."""

    def __init__(self, first: Any, swiglu: Any, second: Any):
        super().__init__([first, swiglu, second])

    def fuser_forward(
        self, contexts: list[Any], inputs: torch.Tensor, **unused: Any
    ) -> tuple[torch.Tensor, list[tuple[()]]]:
        """[..., hidden] of [..., hidden]."""
        from quack.gemm_interface import gemm_gated

        of_first, _, of_second = contexts
        first, _, second = self.basic_ops
        flat = inputs.reshape(-1, inputs.shape[-1])
        gate_up, inner = gemm_gated(
            flat,
            first.weight.T,
            activation="swiglu",
            store_preact=of_first.requires_grad,
            tuned=False,  # of all that it would try, its default was the fastest or within 1%
            concat_layout=("B",),  # all gates and then all ups
        )
        output = second.op_forward(of_second, inner, None, None)
        if of_first.requires_grad:
            if is_cpu_offload_enabled():
                mark_activation_offload(flat, gate_up)
            of_first.save_for_backward(flat, gate_up)
            of_second.save_for_backward()
            of_second.input_requires_grad = False  # its gradient is part of the next product
        return output.view(inputs.shape), [(), (), ()]

    def fuser_backward(
        self, contexts: list[Any], d_output: torch.Tensor, **unused: Any
    ) -> tuple[torch.Tensor, list[Any], list[tuple[()]]]:
        """The inputs' gradient; and the weights', if they are not added to what Megatron has of them."""
        from quack.gemm_interface import gemm, gemm_add_inplace, gemm_dgated

        of_first, _, of_second = contexts
        first, _, second = self.basic_ops
        flat, gate_up = of_first.saved_tensors
        d_flat = d_output.reshape(-1, d_output.shape[-1])
        how = {"dynamic_scheduler": True, "tuned": False}
        d_gate_up, inner = gemm_dgated(d_flat, second.weight, gate_up, activation="swiglu", **how)
        of_second.saved_tensors = (inner, None)
        _, d_second = second.op_backward(of_second, d_flat)
        d_inputs = gemm(d_gate_up, first.weight, concat_layout=("B",), **how)
        if first._accumulate_into_main_grad:
            total = first.weight.main_grad.detach()
            gemm_add_inplace(d_gate_up.T, flat, total, concat_layout=("C", "out"), **how)
            d_first = get_dummy_wgrads_for_params([first.weight])
        else:
            d_first = [gemm(d_gate_up.T, flat, concat_layout=("out",), **how)]
        return d_inputs.view(d_output.shape), [d_first, (), d_second], [(), (), ()]


def install() -> None:
    """Let Transformer Engine's sequences use it: with quack, on GPUs that it was measured on."""
    if fuse in OperationFuser.forward_backward_fusion_functions:
        return
    if torch.cuda.get_device_capability() == (9, 0) and quack_is_known():
        register_forward_backward_fusion(fuse)


@cache
def quack_is_known() -> bool:
    """Whether it is there, and it and its compiler are those that were tested; else a warning says so."""
    if importlib.util.find_spec("quack") is None:
        return False
    there = {name: version_of(name) for name in TESTED}
    if there != TESTED:
        tested, found = (
            ", ".join(f"{name} {number}" for name, number in each.items())
            for each in (TESTED, there)
        )
        logger.warning(
            f"SwiGLU stays apart from the matrix products: they were tested with {tested}, not {found}"
        )
    return there == TESTED


def version_of(package: str) -> str:
    """Of what is installed, or none."""
    try:
        return version(package)
    except PackageNotFoundError:
        return "none"


def fuse(operations: list[Any], *, recipe: Any, **unused: Any) -> list[Any]:
    """A sequence's operations, with each three that can be one replaced.

    Args:
        operations: Transformer Engine's.
        recipe: Of FP8, which is left to Transformer Engine.
    """
    fused: list[Any] = []
    for operation in operations:
        fused.append(operation)
        if recipe is None and can_fuse(*fused[-3:]):
            fused[-3:] = [SwiGLUMLP(*fused[-3:])]
            say_once()
    return fused


@cache
def say_once() -> None:
    """That it is used; of a model the first MLP says it, as it first runs."""
    logger.info(
        "SwiGLU is within the MLPs' matrix products: quack-kernels %s", version_of("quack-kernels")
    )


def can_fuse(first: Any, swiglu: Any = None, second: Any = None) -> bool:
    """Whether it is bfloat16 on one rank, of sizes that can be loaded, and nothing else is asked for."""
    return (
        type(first) is type(second) is BasicLinear
        and type(swiglu) is SwiGLU
        and swiglu.glu_interleave_size is None
        and not swiglu.cache_quantized_input
        and all(
            linear.tensor_parallel_mode is None
            and linear.weight.dtype is torch.bfloat16
            and linear.weight.requires_grad
            and not any(size % ALIGNED for size in linear.weight.shape)
            and not is_quantized_tensor(linear.weight)
            # Of Megatron's FSDP, whose sums are begun anew, or are elsewhere.
            and not getattr(linear.weight, "overwrite_main_grad", False)
            and not hasattr(linear.weight, "__fsdp_param__")
            for linear in (first, second)
        )
    )
