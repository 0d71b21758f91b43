"""The gates on training's dtype: Megatron's error in it, in units of transformers' own."""

import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from megaqwen.parity.affordable import DTYPE_GATE, GPU_GATE, LONG
from megaqwen.parity.batches import PARTS, compared_at
from megaqwen.parity.comparing import nan_is_worst, relative
from megaqwen.parity.gates import Gate
from megaqwen.parity.gpu import THRESHOLDS
from megaqwen.parity.on_all_ranks import FromRanks
from megaqwen.parity.reference import Sequences, outputs_of
from megaqwen.weights import HuggingFaceWeights

DTYPE_THRESHOLD = THRESHOLDS["bfloat16"]
DEVIATIONS = 1.4826
"""A normal distribution's standard deviation in units of its median deviation."""
WORST = 3.0
"""How many times the threshold one sequence may have, or a part of the long one."""


def hold_dtypes(
    ranks: FromRanks, weights: HuggingFaceWeights
) -> tuple[list[Gate], dict[str, list[float]]]:
    """The gates on what ranks computed in training's dtype on CPUs, and on what a GPU did.

    No worse than transformers in the same dtype; in FP8, which it has not, with its products rounded as
    fp8.py does.

    Returns:
        The gates, and by gate the ratio of each sequence.
    """
    measured = {DTYPE_GATE: ranks.outputs_in_dtype, GPU_GATE: ranks.outputs_on_gpu}
    if ranks.sampled is None or not any(measured.values()):
        return [], {}
    exact = outputs_of(weights, torch.float32, ranks.sampled)
    own = outputs_of(weights, torch.bfloat16, ranks.sampled, fp8=ranks.fp8)
    gates, by_gate = [], {}
    for name, outputs in measured.items():
        if outputs is None:
            continue
        gpu = name == GPU_GATE
        dtype = ranks.computes_in if gpu else ranks.dtype
        threshold = THRESHOLDS[dtype]
        parts = long_ratios(ranks, weights) if gpu else []
        gate, by_gate[name] = hold_dtype(
            name, f"{dtype} on a GPU" if gpu else dtype, threshold, exact, own, outputs, parts
        )
        if parts:
            by_gate[LONG] = parts[-1]
        gates.append(gate)
    return gates, by_gate


def long_ratios(ranks: FromRanks, weights: HuggingFaceWeights) -> list[list[float]]:
    """Of each part of the long sequence, at each point: a kernel may be wrong of what lies far back."""
    if ranks.long is None or ranks.long_on_gpu is None:
        return []
    at = compared_at(ranks.long)
    exact = outputs_of(weights, torch.float32, ranks.long, at=at)
    own = outputs_of(weights, torch.bfloat16, ranks.long, at=at, fp8=ranks.fp8)
    return part_ratios(exact, own, ranks.long_on_gpu)


def part_ratios(
    exact: Sequence[Sequences], own: Sequence[Sequences], outputs: Sequence[Tensor]
) -> list[list[float]]:
    """`ratios_at_points` of a batch's only sequence, each part of it as if it were one."""
    return ratios_at_points(
        *([point[0].chunk(PARTS) for point in each] for each in (exact, own, outputs))
    )


def ratios_at_points(
    exact: Iterable[Iterable[Tensor]],
    own: Iterable[Iterable[Tensor]],
    outputs: Iterable[Iterable[Tensor]],
) -> list[list[float]]:
    """`error_ratio` of each sequence, at each point; arguments as of `hold_dtype`."""
    return [
        [error_ratio(*three) for three in zip(*point, strict=True)]
        for point in zip(exact, own, outputs, strict=True)
    ]


def hold_dtype(
    name: str,
    dtype: str,
    threshold: float,
    exact: Sequence[Sequences],
    own: Sequence[Sequences],
    outputs: Sequence[Tensor],
    parts: Sequence[Sequence[float]] = (),
) -> tuple[Gate, list[float]]:
    """One of them, and the ratio of each sequence.

    Which of the two models is nearer to float32 at a position is chance, and how often differs from text
    to text: of each sequence the median position counts, and of all sequences the mean (of logarithms),
    less twice its standard error. A router that chooses another expert because of a rounding, as either
    model's does, is then one position among many.

    Args:
        name: The gate's.
        dtype: What Megatron computed in, in words.
        threshold: The most that the ratio may be.
        exact: transformers' in float32, of each layer and then of the logits.
        own: The same in bfloat16, or with products in FP8.
        outputs: Megatron's, likewise.
        parts: Of each point the ratios of parts of a long sequence, of which the worst counts.
    """
    ratios = ratios_at_points(exact, own, outputs)
    of_long = parts or [()] * len(ratios)
    held = [mean_and_least(*point) for point in zip(ratios, of_long, strict=True)]
    beyond = [not least <= threshold for _, least in held[:-1]]
    ratio, least = held[-1]
    first = ""
    if any(beyond):
        first = f"; the first beyond it: layer {beyond.index(True)}"
    elif not least <= threshold:
        first = "; the first beyond it: the head"
    long = (
        f", {max(parts[-1], key=nan_is_worst):.3g} of the worst part of a long one" if parts else ""
    )
    unit = "" if dtype.startswith("bfloat16") else " with its products rounded so"
    gate = Gate(
        name=name,
        statistic=f"error of the logits in {dtype} against float32 in units of transformers' own"
        f"{unit}, less what may be chance, over {len(ratios[-1])} x {exact[-1][0].shape[0]} tokens",
        value=least,
        threshold=threshold,
        detail=f"{ratio:.3g} times, chance included, {max(ratios[-1]):.3g} of the worst sequence"
        f"{long}{first}",
    )
    return gate, ratios[-1]


def error_ratio(exact: Tensor, reference: Tensor, other: Tensor) -> float:
    """How many times the error of `reference` that of `other` is, at the median position.

    All three are [positions, width].
    """
    return float((relative(other, exact) / relative(reference, exact)).median())


def mean_and_least(ratios: Sequence[float], parts: Sequence[float] = ()) -> tuple[float, float]:
    """The geometric mean of sequences' ratios, and what is left of it when chance is taken off.

    That is two standard errors, by the median deviation, which a few wrong sequences do not widen; and
    no less than the worst one's share that a healthy model's does not reach, of sequences and parts.
    """
    logarithms = torch.tensor(ratios, dtype=torch.float64).log()
    mean = logarithms.mean()
    deviation = (logarithms - logarithms.quantile(0.5)).abs().quantile(0.5)
    least = mean - 2 * DEVIATIONS * deviation / len(ratios) ** 0.5
    worst = torch.tensor([*ratios, *parts], dtype=torch.float64).log().max() - math.log(WORST)
    return float(mean.exp()), float(torch.maximum(least, worst).exp())
