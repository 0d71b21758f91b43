"""Which experts the routers choose in the two models, and what is done where they differ by chance.

Two experts at the edge of the choice, whose logits differ by less than rounding, are a tie: either may be
chosen, and either makes another hidden state of the position, from which no other gate could recover. So
transformers' model follows: at a tie it takes Megatron's choice, with its own weights for it, and what
comes after is compared as everywhere else. A choice that no tie explains is not followed.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

Routes = dict[int, Tensor]
"""[sequences, positions, chosen] experts of a batch, by the layers that have experts."""


@dataclass(frozen=True, kw_only=True)
class Routing:
    """Which experts a layer's router chose in the two models."""

    layer: int
    choices: int
    """Tokens times experts per token."""
    differences: int
    """Choices that differ, where no tie explains it."""
    ties: int
    """Choices that differ between experts whose logits are equal but for rounding."""
    reference_counts: list[int]
    """The tokens of each expert in the Hugging Face model, had it not followed."""
    counts: list[int]
    """The same in the Megatron model."""

    @property
    def largest_count_difference(self) -> int:
        """Of the tokens of one expert."""
        pairs = zip(self.reference_counts, self.counts, strict=True)
        return max(abs(one - two) for one, two in pairs)


def compare_routing(
    layer: int,
    reference: Sequence[Mapping[str, Tensor]],
    other: Sequence[Mapping[str, Tensor]],
    tie: float,
) -> Routing:
    """Compare the experts that were chosen for each token.

    Args:
        layer: The layer's number.
        reference: Of each text, router [positions, experts] logits and choices [positions, chosen].
        other: Of each text, choices [positions, chosen].
        tie: Two of the reference's logits that differ by no more are equal but for rounding.
    """
    differences = ties = choices = 0
    counts = []
    for one, two in zip(reference, other, strict=True):
        differ, tied = differing(one["router"], one["choices"], two["choices"], tie)
        differences += int(differ[~tied].sum())
        ties += int(differ[tied].sum())
        choices += one["choices"].numel()
        counts.append(
            torch.stack([masked(one["router"], each["choices"]).sum(dim=0) for each in (one, two)])
        )
    reference_counts, other_counts = torch.stack(counts).sum(dim=0).tolist()
    return Routing(
        layer=layer,
        choices=choices,
        differences=differences,
        ties=ties,
        reference_counts=reference_counts,
        counts=other_counts,
    )


def differing(logits: Tensor, own: Tensor, other: Tensor, tie: float) -> tuple[Tensor, Tensor]:
    """Where two choices of experts differ, and where that is a tie.

    Args:
        logits: [positions, experts] of the model whose choice is `own`.
        own: [positions, chosen] experts.
        other: [positions, chosen] experts of another model.
        tie: Two logits that differ by no more are equal but for rounding.

    Returns:
        [positions] how many experts only the other chose, and [positions] whether each of them might
        have been chosen here for each that was.
    """
    logits = logits.double()
    mine, theirs = masked(logits, own), masked(logits, other)
    best_left_out = logits.masked_fill(~mine | theirs, -torch.inf).amax(dim=1)
    least_taken = logits.masked_fill(~theirs | mine, torch.inf).amin(dim=1)
    return (theirs & ~mine).sum(dim=1), best_left_out - least_taken <= tie


def masked(logits: Tensor, choices: Tensor) -> Tensor:
    """[positions, experts] whether an expert is among the [positions, chosen]."""
    return torch.zeros_like(logits, dtype=torch.bool).scatter(1, choices, True)


@dataclass(frozen=True, kw_only=True)
class OtherChoices:
    """Another model's choices in a layer, to be followed at ties."""

    choices: Sequence[Tensor]
    """[positions, chosen] of each call of the layer."""
    tie: float
    """As for `differing`."""


@contextmanager
def following(router: nn.Module, other: OtherChoices) -> Iterator[None]:
    """Within it, one of transformers' routers takes the other model's choice where that is a tie."""
    rest: Iterator[Tensor] = iter(other.choices)

    def follow(module: Any, args: Any, output: tuple[Tensor, Tensor, Tensor]) -> Any:
        logits, weights, own = output
        theirs = next(rest)
        differ, tied = differing(logits.detach(), own, theirs, other.tie)
        rows = ((differ > 0) & tied)[:, None]
        taken = torch.where(rows, theirs, own)
        return logits, torch.where(rows, weights_of(module, logits, taken), weights), taken

    hook = router.register_forward_hook(follow)
    try:
        yield
    finally:
        hook.remove()


def same_routes(one: Routes, other: Routes) -> bool:
    """Whether the same experts were chosen everywhere."""
    same = (torch.equal(one[layer], other[layer]) for layer in one.keys() & other.keys())
    return one.keys() == other.keys() and all(same)


def weights_of(router: Any, logits: Tensor, chosen: Tensor) -> Tensor:
    """[positions, chosen] by how much each expert counts, as transformers' Qwen routers have it."""
    weights = logits.softmax(dim=-1, dtype=torch.float).gather(1, chosen)
    if router.norm_topk_prob:
        weights = weights / weights.sum(dim=-1, keepdim=True)
    return weights.to(logits.dtype)


def choices_seen(seen: Iterable[Mapping[str, Tensor]], tie: float) -> OtherChoices | None:
    """What was observed of a layer's router, to be followed; None where it has none."""
    found = [text["choices"] for text in seen if "choices" in text]
    return OtherChoices(choices=found, tie=tie) if found else None
