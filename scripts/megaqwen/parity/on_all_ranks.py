"""The gates that take ranks: training's layout, its dtype, its gradients and steps of its optimizer.

All ranks measure Megatron's side in one start; the last one then adds what a GPU computes, if there is
one, and holds all of it against transformers' model.
"""

import logging
import time
from collections.abc import Callable, Container, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megaqwen.config import Config
from megaqwen.config.rank_options import (
    DTYPE,
    LAYOUT,
    OPTIMIZER,
    SCHEDULE,
    number_format,
    taken,
)
from megaqwen.parity.batches import MOST_TOKENS, make_batches
from megaqwen.parity.machine import free_memory
from megaqwen.parity.rank_outputs import expert_choices, to_last_rank
from megaqwen.parity.ranked_model import (
    MICRO_BATCH,
    Gradients,
    RankedModel,
    Steps,
    model_options,
    ranked_model,
)
from megaqwen.parity.reference import Recipe, recipe_of
from megaqwen.parity.routing import Routes
from megaqwen.parity.texts import operations_per_second
from megaqwen.provenance import peak_memory_bytes

logger = logging.getLogger("megaqwen.parity")

LAYOUT_GATE, DTYPE_GATE, GRADIENTS, TRAJECTORY = "layout", "dtype", "gradients", "trajectory"
GPU_GATE = "gpu"
ONE_RANK = "one tensor parallel rank"
BYTES = {LAYOUT_GATE: 12, DTYPE_GATE: 12, GRADIENTS: 40, TRAJECTORY: 64, GPU_GATE: 0}
"""Of memory for each parameter: Megatron's weights, gradients and moments, then transformers' in
float64 and float32."""
PASSES = {LAYOUT_GATE: 4, DTYPE_GATE: 12, GRADIENTS: 15, TRAJECTORY: 12, GPU_GATE: 8}
"""What they cost in forward passes of float32 over TRAINED_TOKENS; a trajectory, for each step.

Forward and backward are 3, and float64 counts twice: gradients are Megatron's under training's layout and
on one rank, transformers' in float32 and in float64. The dtype takes MOST_TOKENS, in three models, of
which the third may be on a GPU.
"""
FREE_SHARE = 0.7
"""Of the memory that is free, what the gates may take."""
TRAINED_TOKENS = MOST_TOKENS // 4
"""Of a batch that is trained on: forward and backward, and in float64 as well."""
SAMPLED = 16
"""Sequences of the comparison in training's dtype: of a few, chance would decide."""


@dataclass(frozen=True, kw_only=True)
class FromRanks:
    """What Megatron's ranks computed, on the last of them."""

    ranks: int
    layout: dict[str, Any]
    """The options of training that lay out the model."""
    dtype: str
    padding: int
    """Rows of the output head that stand for no token, which training's softmax runs over as well."""
    batches: list[Tensor]
    """[sequences, positions + 1] tokens each."""
    outputs: list[Tensor] | None = None
    """Of the first batch in float32: each layer's [sequences, positions, hidden], then the logits."""
    choices: Routes = field(default_factory=dict)
    """Of experts, where these outputs were computed."""
    sampled: Tensor | None = None
    """[sequences, positions + 1] tokens, more and shorter sequences, of the comparison in `dtype`."""
    outputs_in_dtype: list[Tensor] | None = None
    """Of `sampled`, likewise."""
    computes_in: str = ""
    """The dtype with the recipe of FP8, as THRESHOLDS in gpu.py has it."""
    outputs_on_gpu: list[Tensor] | None = None
    """Of `sampled`, likewise, by Transformer Engine on a GPU."""
    gradients: dict[str, Gradients] = field(default_factory=dict)
    """Of the first batch, by layout."""
    recipe: Recipe | None = None
    steps: Steps | None = None
    unmeasured: dict[str, str] = field(default_factory=dict)
    """Gates that were not measured, and why."""
    seconds: dict[str, float] = field(default_factory=dict)
    peak_memory: list[int] = field(default_factory=list)
    """The largest resident set of each rank in bytes."""


def measure_on_ranks(
    *,
    config: Config,
    checkpoint: Path,
    architecture: Mapping[str, Any],
    vocabulary: int,
    parameters: int,
    texts: Callable[[], list[list[int]]],
    positions: int,
    rounded_to: torch.dtype | None,
    with_steps: bool,
) -> FromRanks | None:
    """Everything that takes Megatron's ranks; None on all but the last.

    Args:
        config: The run's.
        checkpoint: The directory with latest_checkpointed_iteration.txt.
        architecture: What the checkpoint records of its model.
        vocabulary: Rows of the embedding that stand for tokens.
        parameters: Of the model.
        texts: Token ids to make batches of; the last rank is asked.
        positions: The longest sequence.
        rounded_to: The dtype that the other model's weights are stored in, if it is narrower.
        with_steps: Before training; a trained model has its steps behind it.
    """
    ranks = torch.distributed.get_world_size()
    train: dict[str, Any] = dict(config.train)
    dtype = number_format(train)
    count = config.parity.trajectory_iterations if with_steps else 0
    reasons = reasons_not_to(config, parameters, dtype, with_steps=with_steps)
    recipe = recipe_of(train, count)
    if isinstance(recipe, str):
        reasons.setdefault(TRAJECTORY, recipe)
    sequences = MICRO_BATCH * max(2, ranks)
    many = MICRO_BATCH * max(SAMPLED // MICRO_BATCH, ranks)

    def make() -> list[Tensor]:
        known = texts()
        found = make_batches(known, max(1, count), sequences, positions, vocabulary, TRAINED_TOKENS)
        return found + make_batches(known, 1, many, positions, vocabulary)

    *batches, sampled = shared(make)
    model_of = ModelOf(
        architecture=architecture,
        checkpoint=checkpoint,
        vocabulary=vocabulary,
        rounded_to=rounded_to,
    )
    found: dict[str, Any] = {}
    seconds: dict[str, float] = {}
    started = time.perf_counter()
    if LAYOUT_GATE not in reasons:
        found |= in_float32(model_of, train, batches, reasons)
        seconds["ranks"] = time.perf_counter() - started
    started = time.perf_counter()
    if DTYPE_GATE not in reasons:
        found["outputs_in_dtype"] = in_training_dtype(model_of, train, sampled)
        seconds["ranks in dtype"] = time.perf_counter() - started
    peaks = to_last_rank(peak_memory_bytes())
    if peaks is None:
        return None
    return FromRanks(
        ranks=ranks,
        layout=taken(train, LAYOUT),
        dtype=dtype,
        padding=-vocabulary % train.get("tensor_model_parallel_size", 1),
        batches=batches,
        sampled=sampled,
        recipe=recipe if isinstance(recipe, Recipe) else None,
        unmeasured=reasons,
        seconds=seconds,
        peak_memory=peaks,
        **found,
    )


@dataclass(frozen=True, kw_only=True)
class ModelOf:
    """Makes Megatron's model of the checkpoint; fields as in `measure_on_ranks`."""

    architecture: Mapping[str, Any]
    checkpoint: Path
    vocabulary: int
    rounded_to: torch.dtype | None

    def __call__(
        self, options: Mapping[str, Any], batch: Tensor
    ) -> AbstractContextManager[RankedModel]:
        """With some of training's options, for batches like this one."""
        # Routers have an auxiliary loss in training, which transformers' models have not.
        common = {"moe_aux_loss_coeff": [0.0]} if self.architecture.get("num_experts") else {}
        shape = (len(batch), batch.shape[1] - 1)
        chosen = {**options, **common}
        asked = model_options(self.architecture, self.checkpoint, self.vocabulary, chosen, shape)
        return ranked_model(asked, self.rounded_to)


def in_float32(
    model_of: ModelOf, train: Mapping[str, Any], batches: Sequence[Tensor], reasons: Container[str]
) -> dict[str, Any]:
    """Of `FromRanks` the outputs under training's layout and, but for reasons, gradients and steps."""
    found: dict[str, Any] = {"gradients": {}}
    first = batches[0]
    with model_of(taken(train, LAYOUT, OPTIMIZER, SCHEDULE), first) as model:
        with expert_choices(model.model) as found["choices"]:
            found["outputs"] = model.forward(first, model_of.vocabulary)
        if GRADIENTS not in reasons:
            found["gradients"]["training's layout"] = model.gradients(first)
        if TRAJECTORY not in reasons:
            found["steps"] = model.steps(batches)
    if torch.distributed.get_world_size() > 1 and GRADIENTS not in reasons:
        with model_of({}, first) as model:
            found["gradients"][ONE_RANK] = model.gradients(first)
    return found


def in_training_dtype(
    model_of: ModelOf, train: Mapping[str, Any], sampled: Tensor
) -> list[Tensor] | None:
    """Of `FromRanks` the outputs in the dtype that training computes in."""
    with model_of(taken(train, LAYOUT, DTYPE, OPTIMIZER), sampled) as model:
        return model.forward(sampled, model_of.vocabulary)


def shared(make: Callable[[], list[Tensor]]) -> list[Tensor]:
    """The last rank's batches, on every rank."""
    ranks = torch.distributed.get_world_size()
    found = [make() if torch.distributed.get_rank() == ranks - 1 else None]
    torch.distributed.broadcast_object_list(found, src=ranks - 1)
    return found[0] or []


def reasons_not_to(
    config: Config, parameters: int, dtype: str, *, with_steps: bool
) -> dict[str, str]:
    """The gates that are not measured, and why; the same on every rank."""
    machine = [free_memory() * FREE_SHARE, operations_per_second()]
    torch.distributed.broadcast_object_list(machine, src=0)  # one answer for all ranks
    free, rate = machine
    passes = {**PASSES, TRAJECTORY: PASSES[TRAJECTORY] * config.parity.trajectory_iterations}
    reasons = {}
    for gate, size in BYTES.items():
        minutes = passes[gate] * 2 * parameters * TRAINED_TOKENS / rate / 60
        if parameters * size > free:
            reasons[gate] = (
                f"{parameters * size / 1e9:.0f} GB of memory are needed and {free / 1e9:.0f} GB"
                " may be used"
            )
        elif minutes > config.parity.minutes:
            reasons[gate] = f"it would take {minutes:.2g} minutes, more than parity.minutes"
    if LAYOUT_GATE in reasons:  # whose model the others need as well
        on_cpu = [gate for gate in BYTES if gate != GPU_GATE]
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
    if torch.distributed.get_world_size() == 1 and {GRADIENTS, TRAJECTORY} <= reasons.keys():
        reasons.setdefault(LAYOUT_GATE, "training's layout is one rank, as that of the other gates")
    if config.train.get("context_parallel_size", 1) != 1:
        reasons["context parallel"] = "it needs a GPU; the layout was measured without it"
    return reasons
