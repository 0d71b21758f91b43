"""What Megatron cannot do on a machine without a GPU, by its own options, and why.

Megatron refuses most of it as well, but only when every rank has started; some of it would run and be
wrong. What is not named here is held against one rank's losses:
tests/distributed/test_training_layouts.py.
"""

from collections.abc import Callable
from typing import Any

from megaqwen.config.combinations import VIRTUAL, Found, Train
from megaqwen.config.mistakes import Mistake, shown

Refused = Callable[[Any], bool]


def more_than_one(value: Any) -> bool:
    """A parallel size that is in use."""
    return bool(value > 1)


def other_than(*values: Any) -> Refused:
    """Whether an option has none of these values."""
    return lambda value: value not in values


TRANSFORMER_ENGINE = "is Transformer Engine's, which needs a GPU"
KERNEL = "is a kernel for GPUs"
NEEDS_A_GPU: dict[str, tuple[Refused, str]] = {
    "context_parallel_size": (
        more_than_one,
        "context parallelism is Transformer Engine's alone: Megatron's local attention has none."
        " Share the sequence by tensor_model_parallel_size with sequence_parallel, or leave it out",
    ),
    "fp8": (bool, TRANSFORMER_ENGINE),
    "fp4": (bool, TRANSFORMER_ENGINE),
    "fp16": (bool, "its scaling of the loss needs a GPU: use bf16"),
    "recompute_modules": (
        lambda modules: bool({"layernorm", "moe_act"} & set(modules)),
        "Megatron recomputes layernorm and moe_act with Transformer Engine alone: choose core_attn, mlp,"
        " moe or shared_experts",
    ),
    "use_precision_aware_optimizer": (bool, "needs Transformer Engine's FusedAdam"),
    "tp_comm_overlap": (bool, TRANSFORMER_ENGINE),
    "moe_grouped_gemm": (bool, KERNEL),
    "moe_permute_fusion": (bool, KERNEL),
    "moe_router_fusion": (bool, KERNEL),
    "moe_token_dispatcher_type": (
        other_than("allgather", "alltoall"),
        "sends by NVLink and RDMA: use alltoall or allgather",
    ),
    "cuda_graph_impl": (other_than("none"), "there are no CUDA graphs without CUDA"),
    "attention_backend": (other_than("auto", "local", "unfused"), KERNEL),
    "cross_entropy_fusion_impl": (other_than("native"), TRANSFORMER_ENGINE),
    "optimizer_cpu_offload": (bool, "the optimizer is on the CPU already"),
    "fine_grained_activation_offloading": (bool, "activations are on the CPU already"),
}


def cpu_mistakes(train: Train) -> list[Mistake]:
    """What of the options under `train` a machine without a GPU cannot do.

    Args:
        train: In canonical form, checked by `train_mistakes`.
    """
    found = [*unable(train), *wrong_over_gloo(train)]
    return [Mistake(("train", name), text) for name, text in found]


def unable(train: Train) -> Found:
    """What is made for GPUs."""
    for name, (refused, reason) in NEEDS_A_GPU.items():
        if name in train and refused(train[name]):
            yield name, f"{shown(train[name])} is given, but this machine has no GPU: {reason}"


def wrong_over_gloo(train: Train) -> Found:
    """Virtual stages whose sends are batched run over gloo, with wrong gradients."""
    virtual = [name for name in VIRTUAL if name in train]
    if virtual and train.get("overlap_p2p_comm") is False:
        text = "false is given, but this machine has no GPU: with virtual pipeline stages batched sends"
        yield "overlap_p2p_comm", f"{text} would compute wrong gradients over gloo. Leave it out"
