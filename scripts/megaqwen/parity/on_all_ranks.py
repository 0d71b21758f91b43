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
from socket import gethostname
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
from megaqwen.machine import free_memory
from megaqwen.parity.affordable import (
    DTYPE_GATE,
    GRADIENTS,
    LAYOUT_GATE,
    ONE_RANK,
    TRAINED_TOKENS,
    TRAJECTORY,
    WHOLE_MODEL,
    Machine,
    Size,
    reasons_not_to,
)
from megaqwen.parity.batches import make_batches
from megaqwen.parity.fp8 import Fp8
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
    fp8: Fp8 | None = None
    """What it does to numbers."""
    outputs_on_gpu: list[Tensor] | None = None
    """Of `sampled`, likewise, by Transformer Engine on a GPU."""
    long: Tensor | None = None
    """[1, positions + 1] tokens, as long as training's or as there is time for."""
    long_on_gpu: list[Tensor] | None = None
    """Of `long`, likewise, at the positions of `compared_at`."""
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
    size: Size,
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
        size: The model's.
        texts: Token ids to make batches of; the last rank is asked.
        positions: The longest sequence.
        rounded_to: The dtype that the other model's weights are stored in, if it is narrower.
        with_steps: Before training; a trained model has its steps behind it.
    """
    ranks = torch.distributed.get_world_size()
    train: dict[str, Any] = dict(config.train)
    dtype = number_format(train)
    count = config.parity.trajectory_iterations if with_steps else 0
    reasons = reasons_not_to(config, size, shared_machine(), with_steps=with_steps)
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
        found |= under_layout(model_of, train, batches, reasons)
        if WHOLE_MODEL not in reasons and GRADIENTS not in reasons and ranks > 1:
            found["gradients"][ONE_RANK] = on_copies(model_of, batches[0])
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


def under_layout(
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
    return found


def on_copies(model_of: ModelOf, batch: Tensor) -> Gradients | None:
    """The gradients where every rank has a copy of the whole model; a function, so that it goes."""
    with model_of({}, batch) as model:
        return model.gradients(batch)


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


def shared_machine() -> Machine:
    """What the ranks of this job may take: one answer for all of them."""
    ranks = torch.distributed.get_world_size()
    told: list[Any] = [None] * ranks
    mine = (gethostname(), free_memory(), operations_per_second())
    torch.distributed.all_gather_object(told, mine)
    nodes, free, rates = zip(*told, strict=True)
    on_a_node = max(nodes.count(node) for node in nodes)
    return Machine(ranks=ranks, on_a_node=on_a_node, free=min(free), rate=min(rates))
