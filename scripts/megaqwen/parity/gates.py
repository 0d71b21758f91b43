"""The gates: one statistic each, its threshold, and why that threshold.

| gate | statistic | threshold | reason |
|---|---|---|---|
| tensors | tensors that differ in dtype, shape or any bit | 0 | conversion copies and reorders |
| architecture | Megatron's options that differ between checkpoint and config.json | 0 | one model |
| logits | largest difference of two float32 logits | parity.max_logit_difference | rounding of sums |
| argmax | positions whose likeliest token differs | 0 | greedy decoding must not change |
| kl | largest KL divergence at one position, in nats | 1e-6 | 100 times what rounding gives |
| loss | difference of the mean losses, in nats per token | 1e-5 | perplexity to 5 digits |
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

KL_THRESHOLD = 1e-6
LOSS_THRESHOLD = 1e-5


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


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Two models' float32 logits of one text, compared at every position."""

    text: str
    """The text's name."""
    positions: int
    max_difference: float
    worst_position: int
    argmax_differences: int
    max_kl: float
    reference_loss: float
    """Mean cross entropy of the next token in nats, of the Hugging Face model."""
    loss: float
    """The same of the Megatron model."""


def compare_logits(name: str, tokens: Tensor, reference: Tensor, logits: Tensor) -> Comparison:
    """Compare logits at all positions of a text.

    Args:
        name: The text's name.
        tokens: [positions] token ids.
        reference: [positions, vocabulary] logits of the Hugging Face model.
        logits: [positions, vocabulary] logits of the Megatron model.
    """
    reference, logits = reference.double(), logits.double()
    difference = (reference - logits).abs().amax(dim=-1)
    log_p = reference.log_softmax(dim=-1)
    log_q = logits.log_softmax(dim=-1)
    kl = (log_p.exp() * (log_p - log_q)).sum(dim=-1)
    targets = tokens[1:, None]
    return Comparison(
        text=name,
        positions=len(tokens),
        max_difference=float(difference.max()),
        worst_position=int(difference.argmax()),
        argmax_differences=int((reference.argmax(dim=-1) != logits.argmax(dim=-1)).sum()),
        max_kl=float(kl.max()),
        reference_loss=float(-log_p[:-1].gather(1, targets).mean()),
        loss=float(-log_q[:-1].gather(1, targets).mean()),
    )


def forward_gates(comparisons: Sequence[Comparison], max_logit_difference: float) -> list[Gate]:
    """The gates on logits, over all texts."""

    def worst(field: str) -> tuple[float, str]:
        row = max(comparisons, key=lambda item: nan_is_worst(getattr(item, field)))
        place = f"worst in {row.text} at position {row.worst_position} of {row.positions}"
        return float(getattr(row, field)), place

    difference, where = worst("max_difference")
    kl, where_kl = worst("max_kl")
    argmax = sum(item.argmax_differences for item in comparisons)
    positions = sum(item.positions - 1 for item in comparisons)
    gap = sum((item.loss - item.reference_loss) * (item.positions - 1) for item in comparisons)
    return [
        Gate(
            name="logits",
            statistic="max |difference| in float32",
            value=difference,
            threshold=max_logit_difference,
            detail=where,
        ),
        Gate(
            name="argmax",
            statistic="positions with another likeliest token",
            value=argmax,
            threshold=0,
            detail=where,
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
            detail=where,
        ),
    ]


def nan_is_worst(value: float) -> float:
    """A key by which NaN, the surest sign of a mistake, counts as the largest value."""
    return float("inf") if value != value else value


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


def bits(tensor: Tensor) -> Tensor:
    """The bytes of a tensor, so that NaNs compare equal and -0 differs from 0."""
    return tensor.contiguous().reshape(-1).view(torch.uint8)
