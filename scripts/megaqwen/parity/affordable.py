"""Which of the gates over ranks are measured: what each takes of memory and time, and what there is.

Light: no Megatron and no ranks.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from megaqwen.architecture import read_architecture, tensor_shapes
from megaqwen.config import Config
from megaqwen.config.rank_options import number_format, ranks_of_copies
from megaqwen.parity.batches import IN_PART, MOST_TOKENS, MULTIPLE, PARTS

LAYOUT_GATE, DTYPE_GATE, GRADIENTS, TRAJECTORY = "layout", "dtype", "gradients", "trajectory"
GPU_GATE = "gpu"
LONG = "gpu, long"
"""No gate of its own, but a part of the gate on a GPU."""
ONE_RANK = "one tensor parallel rank"
WHOLE_MODEL = f"gradients with {ONE_RANK}"
"""No gate of its own, but a part of the gate on gradients."""

MODEL, MOMENTS, GATHERED = 12, 8, 4
"""Bytes for each parameter that a rank has, in float32: its weight, its gradient and what is read of the
checkpoint; Adam's two moments; and on the last rank, one set of whole tensors of all ranks."""
GRADIENTS_AFTERWARDS, TRAJECTORY_AFTERWARDS = 40, 64
"""Of the model, when Megatron's is gone: what was gathered, and transformers' in float64 and float32."""
PASSES = {
    LAYOUT_GATE: 4,
    DTYPE_GATE: 12,
    GRADIENTS: 12,
    WHOLE_MODEL: 3,
    TRAJECTORY: 12,
    GPU_GATE: 8,
}
"""What they cost in forward passes of float32 over TRAINED_TOKENS; a trajectory, for each step.

Forward and backward are 3, and float64 counts twice: gradients are Megatron's under training's layout and
on one rank, transformers' in float32 and in float64. The dtype takes MOST_TOKENS, in three models, of
which the third may be on a GPU.
"""
LONG_PASSES = 2
"""Of a long sequence: transformers' in float32, and in bfloat16 or FP8."""
ATTENTION = 28
"""For two positions and a channel of a head: 4 operations, at a seventh of the rate of large products."""
LONG_SHARE = 0.25
"""Of parity.minutes, what it may take beside the others."""
LEAST_LONG = 2 * PARTS * IN_PART
"""Positions, below which it is not longer than the others."""
FREE_SHARE = 0.7
"""Of the memory that is free, what the gates may take."""
TRAINED_TOKENS = MOST_TOKENS // 4
"""Of a batch that is trained on: forward and backward, and in float64 as well."""


@dataclass(frozen=True, kw_only=True)
class Size:
    """Of a model."""

    parameters: int
    in_experts: int = 0
    """How many of them are an expert's."""


@dataclass(frozen=True, kw_only=True)
class Machine:
    """What the ranks of a job have, the same on every rank."""

    ranks: int
    on_a_node: int
    """The most of them that share a node."""
    free: float
    """Bytes of memory that a node has left, where it has least."""
    rate: float
    """Operations in a second of the slowest rank, in products of float32 matrices."""


def bytes_needed(train: Mapping[str, Any], size: Size, machine: Machine) -> dict[str, float]:
    """What each gate takes of a node's memory at most.

    Args:
        train: Megatron's options.
        size: The model's.
        machine: Where it is measured.
    """
    of_model, of_experts = ranks_of_copies({**train, "context_parallel_size": 1})
    # Parameters on one rank, as if all had the same share.
    shared = (size.parameters - size.in_experts) / of_model + size.in_experts / of_experts
    laid_out, whole = machine.on_a_node * shared, size.parameters
    return {
        LAYOUT_GATE: MODEL * laid_out,
        DTYPE_GATE: MODEL * laid_out,
        GRADIENTS: max(MODEL * laid_out + GATHERED * whole, GRADIENTS_AFTERWARDS * whole),
        WHOLE_MODEL: MODEL * machine.on_a_node * whole + 2 * GATHERED * whole,
        TRAJECTORY: max(
            (MODEL + MOMENTS) * laid_out + 2 * GATHERED * whole, TRAJECTORY_AFTERWARDS * whole
        ),
        GPU_GATE: 0,
    }


def parameters_met(hf_config: Mapping[str, Any]) -> int:
    """Parameters that a token meets: of the experts only those that are chosen, of two embeddings one."""
    qwen = read_architecture(hf_config)
    share = qwen.experts.per_token / qwen.experts.count if qwen.experts else 1.0
    sizes = {name: math.prod(shape) for name, shape in tensor_shapes(qwen).items()}
    return round(sum(size * (share if ".experts." in name else 1) for name, size in sizes.items()))


def long_positions(
    config: Config, hf_config: Mapping[str, Any], rate: float, in_memory: int
) -> tuple[int, str]:
    """Of a sequence as long as training's, how much the gate on a GPU compares; and what shortens it.

    Args:
        config: The run's.
        hf_config: The model's config.json.
        rate: Operations in a second, in products of float32 matrices.
        in_memory: Positions for which there is memory.
    """
    longest = min(int(str(config.train["seq_length"])), hf_config["max_position_embeddings"])
    if longest < LEAST_LONG:
        return 0, ""
    qwen = read_architecture(hf_config)
    # Of PASSES of L positions: L (2 parameters + ATTENTION channels L).
    channels = ATTENTION * qwen.layers * qwen.heads * qwen.head_dim
    each = 2 * parameters_met(hf_config)
    most = LONG_SHARE * config.parity.minutes * 60 * rate / LONG_PASSES
    in_time = int((math.sqrt(each**2 + 4 * channels * most) - each) / (2 * channels))
    positions = min(longest, in_memory, in_time) // MULTIPLE * MULTIPLE
    if positions == longest // MULTIPLE * MULTIPLE:
        return positions, ""
    limit = "memory" if in_memory < in_time else "parity.minutes"
    words = f"{limit} is enough for {positions:,} of {longest:,} tokens in one sequence"
    return (positions, words) if positions >= LEAST_LONG else (0, words)


def reasons_not_to(
    config: Config, size: Size, machine: Machine, *, with_steps: bool
) -> dict[str, str]:
    """The gates that are not measured, and why; the same on every rank.

    Args:
        config: The run's.
        size: The model's.
        machine: Where it is measured.
        with_steps: Before training; a trained model has its steps behind it.
    """
    train: dict[str, Any] = dict(config.train)
    dtype = number_format(train)
    free = FREE_SHARE * machine.free
    passes = {**PASSES, TRAJECTORY: PASSES[TRAJECTORY] * config.parity.trajectory_iterations}
    reasons = {}
    for gate, needed in bytes_needed(train, size, machine).items():
        minutes = passes[gate] * 2 * size.parameters * TRAINED_TOKENS / machine.rate / 60
        if needed > free:
            reasons[gate] = (
                f"{needed / 1e9:.0f} GB of memory are needed and {free / 1e9:.0f} GB may be used"
            )
        elif minutes > config.parity.minutes:
            reasons[gate] = f"it would take {minutes:.2g} minutes, more than parity.minutes"
    if LAYOUT_GATE in reasons:  # whose model the others need as well
        on_cpu = [gate for gate in PASSES if gate != GPU_GATE]
        reasons = dict.fromkeys(on_cpu, reasons[LAYOUT_GATE]) | reasons
    if dtype in ("fp8", "fp4"):
        reasons[DTYPE_GATE] = f"{dtype} needs a GPU, and this gate is measured on CPUs"
    if dtype == "float16":
        reasons[DTYPE_GATE] = "float16 with its loss scale is not among what parity measures"
    if dtype == "float32":
        reasons[DTYPE_GATE] = "training is in float32, which the other gates measure"
    if dtype in ("float16", "float32"):
        reasons.pop(GPU_GATE, None)  # neither has such a gate
    if not config.parity.gradients:
        reasons[GRADIENTS] = "parity.gradients is false"
    if not with_steps:
        reasons[TRAJECTORY] = "measured before training"
    elif not config.parity.trajectory_iterations:
        reasons[TRAJECTORY] = "parity.trajectory_iterations is 0"
    if machine.ranks == 1 and {GRADIENTS, TRAJECTORY} <= reasons.keys():
        reasons.setdefault(LAYOUT_GATE, "training's layout is one rank, as that of the other gates")
    if machine.ranks == 1 or GRADIENTS in reasons:
        reasons.pop(WHOLE_MODEL, None)
    if train.get("context_parallel_size", 1) != 1:
        reasons["context parallel"] = "it needs a GPU; the layout was measured without it"
    return reasons
