"""What the ranks computed, held against transformers' model: see README.md beside this."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megaqwen.parity.comparing import PointError, nan_is_worst, point_error, relative
from megaqwen.parity.deep import GRADIENTS, TRAJECTORY, FromRanks
from megaqwen.parity.gates import Gate
from megaqwen.parity.gathering import Gathered
from megaqwen.parity.reference import Tensors, gradients_of, logits_of, train_plainly
from megaqwen.weights import HuggingFaceWeights
from megaqwen.weights.mapping import Transfer

LAYOUT_THRESHOLD = 2.0
DTYPE_THRESHOLD = 1.1
GRADIENT_THRESHOLD = 10.0
LOSSES_THRESHOLD = 4.0
WEIGHTS_THRESHOLD = 10.0
LEAST_LOSS_NULL = 1e-7
"""Of a loss of some nats in float32."""


@dataclass(frozen=True, kw_only=True)
class TensorError:
    """How far two tensors are apart that should be equal, such as two gradients of one weight."""

    name: str
    """Hugging Face's."""
    error: float
    """|Megatron - float64| / |float64|, Euclidean norms."""
    null: float
    """The same of transformers' float32: what rounding alone does."""
    cosine: float
    relative_norm: float
    """|Megatron| / |float64|."""

    @property
    def ratio(self) -> float:
        """The error in units of what rounding does; of two equal results 0."""
        if self.error == 0:
            return 0.0
        return self.error / self.null if self.null else float("inf")

    def __str__(self) -> str:
        """For a person."""
        return f"{self.name} (cosine {self.cosine:.9g}, norm {self.relative_norm:.6g} times)"


def tensor_error(name: str, exact: Tensor, reference: Tensor, other: Tensor) -> TensorError:
    """Compare a tensor as float64 has it with transformers' float32 and Megatron's."""
    exact, reference, other = (each.double().flatten() for each in (exact, reference, other))
    size, theirs = float(exact.norm()), float(other.norm())
    equal = size == 0 and theirs == 0
    return TensorError(
        name=name,
        error=float(relative(other[None], exact[None])[0]),
        null=float(relative(reference[None], exact[None])[0]),
        cosine=1.0 if equal else float(exact @ other) / (size * theirs or 1.0),
        relative_norm=1.0 if equal else theirs / (size or torch.finfo(torch.float32).tiny),
    )


@dataclass(kw_only=True)
class Deep:
    """The gates that take ranks, and the figures that they rest on."""

    ranks: FromRanks
    gates: list[Gate] = field(default_factory=list)
    logits: PointError | None = None
    dtype_ratios: list[float] = field(default_factory=list)
    """Of each sequence, Megatron's error in units of transformers' own, in training's dtype."""
    gradients: dict[str, list[TensorError]] = field(default_factory=dict)
    """By layout."""
    losses: dict[str, list[float]] = field(default_factory=dict)
    """Of the steps, in nats per token: megatron, float32, float64."""
    weights: list[TensorError] = field(default_factory=list)
    """What the steps added to each tensor."""
    copies: dict[str, float] = field(default_factory=dict)

    def facts(self) -> dict[str, Any]:
        """For parity.json."""

        def rows(errors: Sequence[TensorError]) -> list[dict[str, Any]]:
            return [{**asdict(each), "ratio": each.ratio} for each in errors]

        return {
            "ranks": self.ranks.ranks,
            "layout": self.ranks.layout,
            "dtype": self.ranks.dtype,
            "unmeasured": self.ranks.unmeasured,
            "peak_memory_bytes": self.ranks.peak_memory,
            "dtype_ratios": self.dtype_ratios,
            "gradients": {name: rows(errors) for name, errors in self.gradients.items()},
            "trajectory": {
                "losses": self.losses,
                "rates": self.ranks.steps.rates if self.ranks.steps else [],
                "weights": rows(self.weights),
            },
        }


def hold_against(
    ranks: FromRanks, directory: Path, weights: HuggingFaceWeights, transfers: Sequence[Transfer]
) -> Deep:
    """Compute transformers' side, and compare.

    Args:
        ranks: Megatron's side.
        directory: The Hugging Face model.
        weights: Its weights.
        transfers: The bridge's table for it.
    """
    deep = Deep(ranks=ranks)
    batch = ranks.batches[0]
    if ranks.logits is not None:
        reference = logits_of(weights, torch.float32, batch)
        hold_logits(deep, weights, reference)
    dtype_gate(deep, weights)
    if ranks.gradients:
        exact, rounded = (
            gradients_of(directory, dtype, batch) for dtype in (torch.float64, torch.float32)
        )
        for layout, gathered in ranks.gradients.items():
            found = gathered.by_huggingface_name(transfers)
            deep.gradients[layout] = compare_tensors(exact, rounded, found)
            note_copies(deep, f"gradients, {layout}", gathered)
        deep.gates.append(gradient_gate(deep.gradients))
    if ranks.steps and ranks.recipe:
        hold_steps(deep, directory, weights, transfers)
    if ranks.gradients or ranks.steps:
        deep.gates.append(copies_gate(deep.copies))
    if ranks.padding:
        deep.gates = [blame_padding(gate, ranks.padding) for gate in deep.gates]
    return deep


def blame_padding(gate: Gate, rows: int) -> Gate:
    """A gate on training that failed where Megatron pads the vocabulary: that is why."""
    if gate.passed or gate.name not in (GRADIENTS, TRAJECTORY, "losses"):
        return gate
    cause = (
        f"training's softmax runs over {rows} row(s) that pad the vocabulary:"
        " a tensor_model_parallel_size that divides it needs none"
    )
    return replace(gate, detail=f"{gate.detail}; {cause}")


def compare_tensors(exact: Tensors, reference: Tensors, other: Tensors) -> list[TensorError]:
    """Each tensor that the model has by its published name."""
    return [tensor_error(name, exact[name], reference[name], other[name]) for name in other]


def hold_logits(deep: Deep, weights: HuggingFaceWeights, reference: list[Tensor]) -> None:
    """The gate on the forward pass under training's layout, at all positions."""
    if deep.ranks.logits is None:
        return
    names = [f"sequence {number}" for number in range(1, len(reference) + 1)]
    exact = logits_of(weights, torch.float64, deep.ranks.batches[0])
    found = point_error(None, "logits", names, exact, reference, list(deep.ranks.logits))
    deep.logits = found
    deep.gates.append(
        Gate(
            name="layout",
            statistic=f"error of the logits on {deep.ranks.ranks} rank(s) in units of transformers'"
            " own rounding",
            value=found.ratio,
            threshold=LAYOUT_THRESHOLD,
            detail=f"worst in {found.worst_text} at position {found.worst_position}",
        )
    )


def dtype_gate(deep: Deep, weights: HuggingFaceWeights) -> None:
    """The gate on training's dtype: no worse than transformers in the same dtype.

    Which of the two is nearer to float32 at a position is chance, and how often differs from text to
    text: of each sequence the median position counts, and of all sequences the mean (of logarithms),
    less twice its standard error. A router that chooses another expert because of a rounding, as either
    model's does, is then one position among many.
    """
    ranks = deep.ranks
    if ranks.sampled is None or ranks.logits_in_dtype is None:
        return
    reference = logits_of(weights, torch.float32, ranks.sampled)
    own = logits_of(weights, getattr(torch, ranks.dtype), ranks.sampled)
    deep.dtype_ratios = [
        error_ratio(*logits) for logits in zip(reference, own, ranks.logits_in_dtype, strict=True)
    ]
    ratio, least = mean_and_least(deep.dtype_ratios)
    deep.gates.append(
        Gate(
            name="dtype",
            statistic=f"error of the logits in {ranks.dtype} against float32 in units of"
            " transformers' own, less what may be chance",
            value=least,
            threshold=DTYPE_THRESHOLD,
            detail=f"{ratio:.3g} times over {len(deep.dtype_ratios)} sequences, chance included",
        )
    )


def error_ratio(exact: Tensor, reference: Tensor, other: Tensor) -> float:
    """How many times the error of `reference` that of `other` is, at the median position.

    All three are [positions, vocabulary].
    """
    return float((relative(other, exact) / relative(reference, exact)).median())


def mean_and_least(ratios: Sequence[float]) -> tuple[float, float]:
    """The geometric mean, and what is left of it two standard errors below."""
    logarithms = torch.tensor(ratios, dtype=torch.float64).log()
    mean, error = logarithms.mean(), logarithms.std() / len(ratios) ** 0.5
    return float(mean.exp()), float((mean - 2 * error).exp())


def gradient_gate(gradients: Mapping[str, Sequence[TensorError]]) -> Gate:
    """The gate on the gradient of every tensor under every layout."""
    layout, worst = max(
        ((name, error) for name, errors in gradients.items() for error in errors),
        key=lambda pair: nan_is_worst(pair[1].ratio),
    )
    return Gate(
        name=GRADIENTS,
        statistic="largest error of a tensor's gradient in units of transformers' own rounding",
        value=worst.ratio,
        threshold=GRADIENT_THRESHOLD,
        detail=f"worst with {layout}: {worst}",
    )


def note_copies(deep: Deep, what: str, gathered: Gathered) -> None:
    """Remember where ranks disagree about a tensor that they both have."""
    deep.copies |= {f"{what}: {key}": apart for key, apart in gathered.copies.items()}


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
    deep: Deep, directory: Path, weights: HuggingFaceWeights, transfers: Sequence[Transfer]
) -> None:
    """The gates on the steps of the optimizer: losses on the way, and what the weights came to."""
    steps, recipe = deep.ranks.steps, deep.ranks.recipe
    if steps is None or recipe is None:
        return
    exact_losses, exact = train_plainly(directory, torch.float64, deep.ranks.batches, recipe)
    losses, reference = train_plainly(directory, torch.float32, deep.ranks.batches, recipe)
    found = steps.weights.by_huggingface_name(transfers)
    note_copies(deep, "weights", steps.weights)

    def added(tensors: Tensors) -> Tensors:
        return {name: tensors[name].double() - weights.read(name).double() for name in found}

    deep.weights = compare_tensors(added(exact), added(reference), added(found))
    deep.losses = {"megatron": steps.losses, "float32": losses, "float64": exact_losses}
    differences = [abs(a - b) for a, b in zip(steps.losses, exact_losses, strict=True)]
    null = max(abs(a - b) for a, b in zip(losses, exact_losses, strict=True))
    worst_step = max(range(len(differences)), key=lambda step: nan_is_worst(differences[step]))
    worst = max(deep.weights, key=lambda each: nan_is_worst(each.ratio))
    count = len(steps.losses)
    deep.gates += [
        Gate(
            name=TRAJECTORY,
            statistic=f"largest error of what {count} steps add to a tensor, in units of a plain"
            " loop's own rounding",
            value=worst.ratio,
            threshold=WEIGHTS_THRESHOLD,
            detail=f"worst: {worst}",
        ),
        Gate(
            name="losses",
            statistic=f"largest difference of {count} losses in nats per token",
            value=differences[worst_step],
            threshold=LOSSES_THRESHOLD * max(null, LEAST_LOSS_NULL),
            detail=f"worst before step {worst_step + 1}",
        ),
    ]
