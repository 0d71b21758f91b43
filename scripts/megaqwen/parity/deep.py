"""The gates that take ranks: training's layout, its dtype, its gradients and steps of its optimizer.

All ranks measure Megatron's side in one start; the last one then holds it against transformers' model.
"""

import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
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
from megaqwen.parity.gathering import Gathered
from megaqwen.parity.ranks import MICRO_BATCH, Steps, model_options, ranked_model
from megaqwen.parity.reference import Recipe, recipe_of
from megaqwen.parity.texts import operations_per_second

logger = logging.getLogger("megaqwen.parity")

LAYOUT_GATE, DTYPE_GATE, GRADIENTS, TRAJECTORY = "layout", "dtype", "gradients", "trajectory"
ONE_RANK = "one tensor parallel rank"
BYTES = {LAYOUT_GATE: 12, GRADIENTS: 40, TRAJECTORY: 64}
"""Of memory for each parameter: Megatron's weights, gradients and moments, then transformers' in
float64 and float32."""
FREE_SHARE = 0.7


@dataclass(frozen=True, kw_only=True)
class FromRanks:
    """What Megatron's ranks computed, on the last of them."""

    ranks: int
    layout: dict[str, Any]
    """The options of training that lay out the model."""
    dtype: str
    batches: list[Tensor]
    """[sequences, positions + 1] tokens each."""
    logits: Tensor | None = None
    """Of the first batch in float32, [sequences, positions, vocabulary]."""
    logits_in_dtype: Tensor | None = None
    gradients: dict[str, Gathered] = field(default_factory=dict)
    """Of the first batch, by layout."""
    recipe: Recipe | None = None
    steps: Steps | None = None
    unmeasured: dict[str, str] = field(default_factory=dict)
    """Gates that were not measured, and why."""
    seconds: dict[str, float] = field(default_factory=dict)


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
    rank, ranks = torch.distributed.get_rank(), torch.distributed.get_world_size()
    last = rank == ranks - 1
    train: dict[str, Any] = dict(config.train)
    layout = taken(train, LAYOUT)
    dtype = number_format(train)
    count = config.parity.trajectory_iterations if with_steps else 0
    reasons = reasons_not_to(config, parameters, dtype, with_steps=with_steps)
    recipe = recipe_of(train, count)
    if isinstance(recipe, str):
        reasons.setdefault(TRAJECTORY, recipe)
    steps = count if TRAJECTORY not in reasons else 0
    batches = shared(
        lambda: make_batches(
            texts(), max(1, steps), MICRO_BATCH * max(2, ranks), positions, vocabulary
        )
    )
    common = {"moe_aux_loss_coeff": [0.0]} if architecture.get("num_experts") else {}
    shape = (len(batches[0]), batches[0].shape[1] - 1)
    seconds: dict[str, float] = {}
    found: dict[str, Any] = {"gradients": {}}

    def options(chosen: Mapping[str, Any]) -> dict[str, Any]:
        return model_options(architecture, checkpoint, vocabulary, {**chosen, **common}, shape)

    if LAYOUT_GATE not in reasons:
        started = time.perf_counter()
        chosen = layout | taken(train, OPTIMIZER, SCHEDULE)
        with ranked_model(options(chosen), rounded_to) as model:
            found["logits"] = model.logits(batches[0], vocabulary)
            if GRADIENTS not in reasons:
                found["gradients"]["training's layout"] = model.gradients(batches[0])
            if steps:
                found["steps"] = model.steps(batches)
        seconds["ranks"] = time.perf_counter() - started
        if ranks > 1 and GRADIENTS not in reasons:
            with ranked_model(options({}), rounded_to) as model:
                found["gradients"][ONE_RANK] = model.gradients(batches[0])
    if DTYPE_GATE not in reasons:
        with ranked_model(options(layout | taken(train, DTYPE, OPTIMIZER)), rounded_to) as model:
            found["logits_in_dtype"] = model.logits(batches[0], vocabulary)
    if not last:
        return None
    return FromRanks(
        ranks=ranks,
        layout=layout,
        dtype=dtype,
        batches=batches,
        recipe=recipe if isinstance(recipe, Recipe) else None,
        unmeasured=reasons,
        seconds=seconds,
        **found,
    )


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
    machine = [psutil.virtual_memory().available * FREE_SHARE, operations_per_second()]
    torch.distributed.broadcast_object_list(machine, src=0)  # one answer for all ranks
    free, rate = machine
    passes = {GRADIENTS: 15, TRAJECTORY: 12 * config.parity.trajectory_iterations}
    reasons = {}
    for gate, size in BYTES.items():
        minutes = passes.get(gate, 1) * 2 * parameters * MOST_TOKENS / rate / 60
        if parameters * size > free:
            reasons[gate] = (
                f"{parameters * size / 1e9:.0f} GB of memory are needed and {free / 1e9:.0f} GB"
                " may be used"
            )
        elif gate in passes and minutes > config.parity.minutes:
            reasons[gate] = f"it would take {minutes:.0f} minutes, more than parity.minutes"
    if LAYOUT_GATE in reasons:
        reasons[DTYPE_GATE] = reasons[LAYOUT_GATE]
    if dtype in ("fp8", "fp4"):
        reasons[DTYPE_GATE] = f"{dtype} needs a GPU, and parity runs on CPUs"
    if dtype == "float16":
        reasons[DTYPE_GATE] = "float16 with its loss scale is not among what parity measures"
    if dtype == "float32":
        reasons[DTYPE_GATE] = "training is in float32, which the other gates measure"
    if not config.parity.gradients:
        reasons[GRADIENTS] = "parity.gradients is false"
    if not with_steps:
        reasons[TRAJECTORY] = "measured before training"
    elif not config.parity.trajectory_iterations:
        reasons[TRAJECTORY] = "parity.trajectory_iterations is 0"
    if config.train.get("context_parallel_size", 1) != 1:
        reasons["context parallel"] = "it needs a GPU; the layout was measured without it"
    return reasons
