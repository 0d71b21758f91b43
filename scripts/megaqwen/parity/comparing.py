"""What is measured where two models compute the same thing: differences, and what rounding explains."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

POSITIONS_AT_ONCE = 64
ROUNDING = torch.finfo(torch.float32).eps / 2
SAMPLED = 200
"""Pairs of logits kept of each text, for a plot."""


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Two models' logits of one text, compared at every position."""

    text: str
    """The text's name."""
    positions: int
    max_difference: float
    mean_difference: float
    null: float
    """The largest difference of the Hugging Face model's own float32 logits from its float64 ones."""
    worst_position: int
    argmax_differences: int
    """Positions whose likeliest token differs, where no tie explains it."""
    ties: int
    """Positions whose likeliest token differs, of two that the reference holds equal but for rounding."""
    max_kl: float
    reference_loss: float
    """Mean cross entropy of the next token in nats, of the Hugging Face model."""
    loss: float
    """The same of the Megatron model."""
    by_position: list[float] = field(repr=False)
    """The largest difference at each position."""
    pairs: list[tuple[float, float]] = field(repr=False)
    """Some logits of the reference and of the Megatron model."""


def compare_logits(
    name: str,
    tokens: Tensor,
    blocks: Iterable[tuple[Tensor, Tensor, Tensor]],
    tie: float,
) -> Comparison:
    """Compare logits at all positions of a text.

    Args:
        name: The text's name.
        tokens: [positions] token ids.
        blocks: Runs of positions: logits of the Hugging Face model in float64, of the same in float32
            and of the Megatron model, each [run, vocabulary].
        tie: Two logits of the reference that differ by no more are equal but for rounding.
    """
    worst, means, nulls, kls, likeliest, ties = [], [], [], [], 0, 0
    losses: list[Tensor] = []
    reference_losses: list[Tensor] = []
    pairs: list[tuple[float, float]] = []
    start = 0
    for exact, reference, logits in blocks:
        stop = start + len(reference)
        exact, reference, logits = exact.double(), reference.double(), logits.double()
        difference = (reference - logits).abs()
        worst.append(difference.amax(dim=-1))
        means.append(difference.mean(dim=-1))
        nulls.append((exact - reference).abs().amax(dim=-1))
        log_p, log_q = reference.log_softmax(dim=-1), logits.log_softmax(dim=-1)
        kls.append((log_p.exp() * (log_p - log_q)).sum(dim=-1))
        top, chosen = reference.argmax(dim=-1), logits.argmax(dim=-1)
        gap = (reference.gather(1, top[:, None]) - reference.gather(1, chosen[:, None]))[:, 0]
        likeliest += int((gap > tie).sum())
        ties += int(((top != chosen) & (gap <= tie)).sum())
        targets = tokens[start + 1 : stop + 1, None]
        reference_losses.append(-log_p[: len(targets)].gather(1, targets)[:, 0])
        losses.append(-log_q[: len(targets)].gather(1, targets)[:, 0])
        if not pairs:
            some = torch.linspace(0, reference.numel() - 1, SAMPLED).long()
            pairs = list(
                zip(
                    reference.flatten()[some].tolist(),
                    logits.flatten()[some].tolist(),
                    strict=True,
                )
            )
        start = stop
    by_position = torch.cat(worst)
    return Comparison(
        text=name,
        positions=len(tokens),
        max_difference=float(by_position.max()),
        mean_difference=float(torch.cat(means).mean()),
        null=float(torch.cat(nulls).max()),
        worst_position=int(by_position.argmax()),
        argmax_differences=likeliest,
        ties=ties,
        max_kl=float(torch.cat(kls).max()),
        reference_loss=float(torch.cat(reference_losses).mean()),
        loss=float(torch.cat(losses).mean()),
        by_position=by_position.tolist(),
        pairs=pairs,
    )


@dataclass(frozen=True, kw_only=True)
class PointError:
    """How far the Megatron model is from the Hugging Face model at one point of the network."""

    layer: int | None
    """None outside the layers."""
    point: str
    error: float
    """Mean over all positions of |Megatron - Hugging Face| / |Hugging Face|, Euclidean norms."""
    null: float
    """The same of the Hugging Face model in float32 and in float64: what rounding alone does."""
    worst_text: str
    worst_position: int

    @property
    def ratio(self) -> float:
        """The error in units of what rounding does."""
        return in_units(self.error, self.null)

    def __str__(self) -> str:
        """For a person."""
        place = self.point if self.layer is None else f"layer {self.layer} {self.point}"
        return f"{place} (worst in {self.worst_text} at position {self.worst_position})"


def point_error(
    layer: int | None,
    point: str,
    names: Sequence[str],
    exact: Sequence[Tensor],
    reference: Sequence[Tensor],
    other: Sequence[Tensor],
) -> PointError:
    """Compare what three models have at a point, for each text a [positions, width]."""
    errors = [relative(b, a) for a, b in zip(reference, other, strict=True)]
    nulls = [relative(b, a) for a, b in zip(exact, reference, strict=True)]
    worst = max(range(len(errors)), key=lambda index: nan_is_worst(float(errors[index].max())))
    return PointError(
        layer=layer,
        point=point,
        error=float(torch.cat(errors).mean()),
        null=float(torch.cat(nulls).mean()),
        worst_text=names[worst],
        worst_position=int(errors[worst].argmax()),
    )


def relative(other: Tensor, reference: Tensor) -> Tensor:
    """[positions] |other - reference| / |reference| of [positions, width], Euclidean norms."""
    other, reference = other.double(), reference.double()
    size = reference.norm(dim=-1).clamp_min(torch.finfo(torch.float32).tiny)
    return (other - reference).norm(dim=-1) / size


def in_units(error: float, null: float) -> float:
    """A relative error in units of what rounding does, which is at least half of float32's last place.

    transformers itself computes norms, the softmax and the router in float32, whatever the dtype of the
    model, so that its float64 may be nearer to its float32 than any other float32 can be.
    """
    return error / max(null, ROUNDING)


def nan_is_worst(value: float) -> float:
    """A key by which NaN, the surest sign of a mistake, counts as the largest value."""
    return float("inf") if value != value else value
