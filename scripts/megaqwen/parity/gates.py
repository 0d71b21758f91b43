"""The gates: one statistic each, its threshold, and why that threshold: see README.md beside this."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from megaqwen.parity.comparing import Comparison, PointError, nan_is_worst
from megaqwen.parity.routing import Routing

LAYER_THRESHOLD = 2.0
MEAN_THRESHOLD_SHARE = 0.25
KL_THRESHOLD = 1e-6
LOSS_THRESHOLD = 1e-5
NULLS = 4.0
"""A model of large logits may differ by this many times its own float32 rounding."""


@dataclass(frozen=True, kw_only=True)
class Gate:
    """What was measured at a gate."""

    name: str
    statistic: str
    value: float
    threshold: float
    detail: str = ""
    """Where the worst is, for a person who looks for the mistake."""

    @property
    def passed(self) -> bool:
        """Whether the value is within the threshold; a NaN is not."""
        return self.value <= self.threshold

    def facts(self) -> dict[str, Any]:
        """For parity.json."""
        return {**asdict(self), "passed": self.passed}

    def __str__(self) -> str:
        """For a person."""
        words = f"{self.name}: {self.statistic} {self.value:.3g} (at most {self.threshold:g})"
        return f"{words}, {self.detail}" if self.detail and not self.passed else words


def layers_gate(points: Sequence[PointError]) -> Gate:
    """The gate on every point of every layer, in units of what rounding alone does there."""
    worst = max(points, key=lambda point: nan_is_worst(point.ratio))
    first = first_divergence(points)
    return Gate(
        name="layers",
        statistic="largest error at a point in units of transformers' own rounding",
        value=worst.ratio,
        threshold=LAYER_THRESHOLD,
        detail=f"first beyond it: {first}" if first else str(worst),
    )


def first_divergence(points: Sequence[PointError]) -> PointError | None:
    """The first point, in the order of computation, that is further off than rounding explains."""
    return next((point for point in points if not point.ratio <= LAYER_THRESHOLD), None)


def forward_gates(comparisons: Sequence[Comparison], max_logit_difference: float) -> list[Gate]:
    """The gates on logits, over all texts."""

    def worst(field: str) -> tuple[float, str]:
        row = max(comparisons, key=lambda item: nan_is_worst(getattr(item, field)))
        place = f"worst in {row.text} at position {row.worst_position} of {row.positions}"
        return float(getattr(row, field)), place

    difference, where = worst("max_difference")
    mean, where_mean = worst("mean_difference")
    kl, where_kl = worst("max_kl")
    allowed = max(max_logit_difference, NULLS * max(item.null for item in comparisons))
    argmax = sum(item.argmax_differences for item in comparisons)
    most = max(comparisons, key=lambda item: item.argmax_differences)
    furthest = max(comparisons, key=lambda item: nan_is_worst(abs(item.loss - item.reference_loss)))
    positions = sum(item.positions - 1 for item in comparisons)
    gap = sum((item.loss - item.reference_loss) * (item.positions - 1) for item in comparisons)
    return [
        Gate(
            name="logits",
            statistic="max |difference| in float32",
            value=difference,
            threshold=allowed,
            detail=where,
        ),
        Gate(
            name="mean logits",
            statistic="mean |difference| in float32",
            value=mean,
            threshold=MEAN_THRESHOLD_SHARE * allowed,
            detail=where_mean,
        ),
        Gate(
            name="argmax",
            statistic="positions with another likeliest token",
            value=argmax,
            threshold=0,
            detail=f"most in {most.text}: {most.argmax_differences} of {most.positions}",
        ),
        Gate(
            name="kl",
            statistic="max KL divergence in nats",
            value=kl,
            threshold=KL_THRESHOLD,
            detail=where_kl,
        ),
        Gate(
            name="loss",
            statistic="difference of the mean losses in nats per token",
            value=abs(gap / positions),
            threshold=LOSS_THRESHOLD,
            detail=f"most in {furthest.text}: Megatron {furthest.loss:.6f}, transformers"
            f" {furthest.reference_loss:.6f}",
        ),
    ]


def generation_gate(comparisons: Sequence[Comparison]) -> Gate:
    """The gate on greedy generation, over texts that end with what the reference generated."""
    different = [item.text for item in comparisons if item.argmax_differences]
    return Gate(
        name="generation",
        statistic=f"of {len(comparisons)} greedy continuations, those that differ",
        value=len(different),
        threshold=0,
        detail=", ".join(different),
    )


def routing_gate(routing: Sequence[Routing]) -> Gate:
    """The gate on the experts that the routers choose."""
    worst = max(routing, key=lambda row: row.differences)
    return Gate(
        name="experts",
        statistic=f"of {sum(row.choices for row in routing):,} choices of experts, those that differ",
        value=sum(row.differences for row in routing),
        threshold=0,
        detail=f"most in layer {worst.layer}, where one expert's tokens are"
        f" {worst.largest_count_difference} more or fewer",
    )


def tensors_gate(read: Callable[[str], Tensor], streamed: Iterable[tuple[str, Tensor]]) -> Gate:
    """The gate on weights: every tensor is the same bits.

    Args:
        read: Gives the Hugging Face tensor of a name.
        streamed: Pairs of name and tensor that came back from Megatron's checkpoint.
    """
    different: dict[str, str] = {}
    seen = 0
    for name, tensor in streamed:
        seen += 1
        if how := difference(read(name), tensor):
            different[name] = how
    name, how = next(iter(different.items()), ("", ""))
    return Gate(
        name="tensors",
        statistic="tensors that differ in any bit",
        value=len(different),
        threshold=0,
        detail=f"of {seen} tensors; the first that differs: {name} ({how})" if different else "",
    )


def difference(expected: Tensor, found: Tensor) -> str:
    """How two tensors differ in their bits, for a person; nothing where they do not."""
    kinds = [f"{str(each.dtype)[6:]} {list(each.shape)}" for each in (found, expected)]
    if kinds[0] != kinds[1]:
        return f"{kinds[0]}, to be {kinds[1]}"
    width = expected.element_size()
    elements = (bits(expected) != bits(found)).reshape(-1, width).any(dim=1)
    if not elements.any():
        return ""
    largest = (expected.double() - found.double()).abs().max()
    return f"{int(elements.sum()):,} of {len(elements):,} elements, by at most {largest:.3g}"


def architecture_gate(recorded: Mapping[str, Any], described: Mapping[str, Any]) -> Gate:
    """The gate on what shapes a model beside its weights.

    Args:
        recorded: Megatron's options that the checkpoint records.
        described: Those that config.json comes to.
    """
    different = [name for name, value in described.items() if recorded[name] != value]
    return Gate(
        name="architecture",
        statistic="options that differ",
        value=len(different),
        threshold=0,
        detail=", ".join(
            f"{name} is {recorded[name]} in the checkpoint and {described[name]} by config.json"
            for name in different
        ),
    )


def tokenizer_gate(recorded: Mapping[str, str], found: Mapping[str, str]) -> Gate:
    """The gate on the files that turn text into tokens.

    Args:
        recorded: SHA-256 by file name, of the model whose tokenizer made the data.
        found: The same of the model that is compared.
    """
    names = sorted(recorded.keys() | found.keys())
    different = [name for name in names if recorded.get(name) != found.get(name)]
    return Gate(
        name="tokenizer",
        statistic="files of the tokenizer and chat template that differ",
        value=len(different),
        threshold=0,
        detail=", ".join(different),
    )


def bits(tensor: Tensor) -> Tensor:
    """The bytes of a tensor, so that NaNs compare equal and -0 differs from 0."""
    return tensor.contiguous().reshape(-1).view(torch.uint8)
