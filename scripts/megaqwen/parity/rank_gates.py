"""What the ranks computed, held against transformers' model: see README.md beside this."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megaqwen.parity.affordable import GRADIENTS, LAYOUT_GATE, TRAJECTORY
from megaqwen.parity.comparing import PointError, nan_is_worst, point_error
from megaqwen.parity.dtype_gates import hold_dtypes
from megaqwen.parity.gates import Gate, layers_gate
from megaqwen.parity.gathering import Gathered
from megaqwen.parity.on_all_ranks import FromRanks
from megaqwen.parity.reference import (
    Sequences,
    Tensors,
    gradients_of,
    outputs_of,
    train_plainly,
)
from megaqwen.parity.routing import Routes, same_routes
from megaqwen.parity.tensor_error import (
    TensorError,
    compare_tensors,
    first_on_the_way_back,
    worst_of,
)
from megaqwen.weights import HuggingFaceWeights
from megaqwen.weights.mapping import Transfer

GRADIENT_THRESHOLD = 10.0
TRAJECTORY_THRESHOLD = 10.0
LOSSES_NULLS = 4.0
"""Losses may differ by this many times what rounding does to those of the plain loop."""


@dataclass(kw_only=True)
class RankGates:
    """The gates that take ranks, and the figures that they rest on."""

    ranks: FromRanks
    tie: float
    """Two logits of a router that differ by no more are equal but for rounding."""
    gates: list[Gate] = field(default_factory=list)
    points: list[PointError] = field(default_factory=list)
    """Under training's layout: what each layer puts out, and the logits."""
    dtype_ratios: dict[str, list[float]] = field(default_factory=dict)
    """By gate, of each sequence: Megatron's error in training's dtype in units of transformers' own."""
    gradients: dict[str, list[TensorError]] = field(default_factory=dict)
    """By layout."""
    losses: dict[str, list[float]] = field(default_factory=dict)
    """Of the steps, in nats per token: megatron, float32, float64."""
    added: list[TensorError] = field(default_factory=list)
    """What the steps added to each tensor."""
    copies: dict[str, float] = field(default_factory=dict)
    """The largest difference of copies, of each tensor of which ranks have copies that differ."""

    def facts(self) -> dict[str, Any]:
        """For parity.json."""

        def rows(errors: Sequence[TensorError | PointError]) -> list[dict[str, Any]]:
            return [{**asdict(each), "ratio": each.ratio} for each in errors]

        return {
            "ranks": self.ranks.ranks,
            "layout": self.ranks.layout,
            "dtype": self.ranks.dtype,
            "peak_memory_bytes": self.ranks.peak_memory,
            "layers": rows(self.points),
            "dtype_ratios": self.dtype_ratios,
            "gradients": {name: rows(errors) for name, errors in self.gradients.items()},
            "trajectory": {
                "losses": self.losses,
                "rates": self.ranks.steps.rates if self.ranks.steps else [],
                "added": rows(self.added),
            },
            "copies": self.copies,
        }


def hold_against(
    ranks: FromRanks,
    directory: Path,
    weights: HuggingFaceWeights,
    transfers: Sequence[Transfer],
    tie: float,
) -> RankGates:
    """Compute transformers' side, which follows Megatron's experts at ties, and compare.

    Args:
        ranks: Megatron's side.
        directory: The Hugging Face model.
        weights: Its weights.
        transfers: The bridge's table for it.
        tie: Two logits of a router that differ by no more are equal but for rounding.
    """
    held = RankGates(ranks=ranks, tie=tie)
    hold_layout(held, weights)
    gates, held.dtype_ratios = hold_dtypes(ranks, weights)
    held.gates += gates
    hold_gradients(held, directory, transfers)
    hold_steps(held, directory, weights, transfers)
    if ranks.gradients or ranks.steps:
        held.gates.append(copies_gate(held.copies))
    if ranks.padding:
        held.gates = [blame_padding(gate, ranks.padding) for gate in held.gates]
    return held


def blame_padding(gate: Gate, rows: int) -> Gate:
    """A gate on training that failed where Megatron pads the vocabulary: that is why."""
    if gate.passed or gate.name not in (GRADIENTS, TRAJECTORY, "losses"):
        return gate
    cause = (
        f"training's softmax runs over {rows} row(s) that pad the vocabulary:"
        " a tensor_model_parallel_size that divides it needs none"
    )
    return replace(gate, detail=f"{gate.detail}; {cause}")


def hold_layout(held: RankGates, weights: HuggingFaceWeights) -> None:
    """The gate on the forward pass under training's layout: every layer, and all logits."""
    ranks = held.ranks
    if ranks.outputs is None:
        return
    exact, reference = (
        outputs_of(weights, dtype, ranks.batches[0], ranks.choices, held.tie)
        for dtype in (torch.float64, torch.float32)
    )
    held.points = compare_outputs(exact, reference, ranks.outputs)
    statistic = f"on {ranks.ranks} rank(s), largest error of a layer or of the logits"
    held.gates.append(
        replace(
            layers_gate(held.points),
            name=LAYOUT_GATE,
            statistic=f"{statistic} in units of transformers' own rounding",
        )
    )


def compare_outputs(
    exact: Sequence[Sequences], reference: Sequence[Sequences], other: Sequence[Tensor]
) -> list[PointError]:
    """What each layer puts out, and the logits: transformers' in float64 and float32, and Megatron's."""
    names = [f"sequence {number}" for number in range(1, len(other[0]) + 1)]
    points = [*((layer, "out") for layer in range(len(other) - 1)), (None, "logits")]
    return [
        point_error(*point, names, *three)
        for point, *three in zip(points, exact, reference, map(list, other), strict=True)
    ]


def hold_gradients(held: RankGates, directory: Path, transfers: Sequence[Transfer]) -> None:
    """The gate on the gradient of every tensor under every layout."""
    ranks = held.ranks
    if not ranks.gradients:
        return
    exact: Tensors = {}
    rounded: Tensors = {}
    followed: Routes | None = None
    for layout, gradients in ranks.gradients.items():
        if followed is None or not same_routes(followed, gradients.choices):
            followed = gradients.choices
            exact, rounded = (
                gradients_of(directory, dtype, ranks.batches[0], followed, held.tie)
                for dtype in (torch.float64, torch.float32)
            )
        found = gradients.gathered.by_huggingface_name(transfers)
        held.gradients[layout] = compare_tensors(exact, rounded, found)
        note_copies(held, f"gradients, {layout}", gradients.gathered)
    worst_by_layout = {name: worst_of(errors) for name, errors in held.gradients.items()}
    layout = max(worst_by_layout, key=lambda name: nan_is_worst(worst_by_layout[name].ratio))
    worst = worst_by_layout[layout]
    first = first_on_the_way_back(held.gradients[layout], GRADIENT_THRESHOLD) or worst
    held.gates.append(
        Gate(
            name=GRADIENTS,
            statistic="largest error of a tensor's gradient in units of transformers' own rounding",
            value=worst.ratio,
            threshold=GRADIENT_THRESHOLD,
            detail=f"with {layout}, the first on the way back: {first}; the worst: {worst}",
        )
    )


def note_copies(held: RankGates, what: str, gathered: Gathered) -> None:
    """Remember where ranks disagree about a tensor that they both have."""
    held.copies |= {f"{what}: {key}": apart for key, apart in gathered.copies.items()}


def copies_gate(copies: Mapping[str, float]) -> Gate:
    """The gate on what several ranks have copies of, such as norms."""
    worst = max(copies, key=lambda key: nan_is_worst(copies[key]), default="")
    return Gate(
        name="copies",
        statistic="tensors of which ranks have copies that differ",
        value=len(copies),
        threshold=0,
        detail=f"most in {worst}, by {copies[worst]:.3g}" if worst else "",
    )


def hold_steps(
    held: RankGates, directory: Path, weights: HuggingFaceWeights, transfers: Sequence[Transfer]
) -> None:
    """The gates on the steps of the optimizer: losses on the way, and what the weights came to."""
    steps, recipe, batches = held.ranks.steps, held.ranks.recipe, held.ranks.batches
    if steps is None or recipe is None:
        return
    (exact_losses, exact), (losses, reference) = (
        train_plainly(directory, dtype, batches, recipe, steps.choices, held.tie)
        for dtype in (torch.float64, torch.float32)
    )
    found = steps.weights.by_huggingface_name(transfers)
    note_copies(held, "weights", steps.weights)

    def added(tensors: Tensors) -> Tensors:
        return {name: tensors[name].double() - weights.read(name).double() for name in found}

    held.added = compare_tensors(added(exact), added(reference), added(found))
    held.losses = {"megatron": steps.losses, "float32": losses, "float64": exact_losses}
    worst, count = worst_of(held.added), len(steps.losses)
    held.gates += [
        Gate(
            name=TRAJECTORY,
            statistic=f"largest error of what {count} steps add to a tensor, in units of a plain"
            " loop's own rounding",
            value=worst.ratio,
            threshold=TRAJECTORY_THRESHOLD,
            detail=f"the worst: {worst}",
        ),
        losses_gate(steps.losses, losses, exact_losses),
    ]


def losses_gate(found: Sequence[float], reference: Sequence[float], exact: Sequence[float]) -> Gate:
    """The gate on the losses before each step: Megatron's, and the plain loop's two."""
    differences = [abs(a - b) for a, b in zip(found, exact, strict=True)]
    null = max(abs(a - b) for a, b in zip(reference, exact, strict=True))
    # By chance the plain loop's float32 may be nearer than a float32 of this size can be relied upon.
    least = torch.finfo(torch.float32).eps * max(exact)
    worst = max(range(len(differences)), key=lambda step: nan_is_worst(differences[step]))
    return Gate(
        name="losses",
        statistic=f"largest difference of {len(found)} losses in nats per token",
        value=differences[worst],
        threshold=LOSSES_NULLS * max(null, least),
        detail=f"the worst before step {worst + 1}",
    )
