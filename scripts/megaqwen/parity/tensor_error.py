"""How far tensors are apart that two trainings should have alike: gradients, or what steps added."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megaqwen.parity.comparing import in_units, nan_is_worst, relative
from megaqwen.parity.reference import Tensors


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
    """Of the angle between Megatron's and float64's."""
    relative_norm: float
    """|Megatron| / |float64|."""

    @property
    def ratio(self) -> float:
        """The error in units of what rounding does."""
        return in_units(self.error, self.null)

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


def compare_tensors(exact: Tensors, reference: Tensors, other: Tensors) -> list[TensorError]:
    """Each tensor of `other`, in its order."""
    return [tensor_error(name, exact[name], reference[name], other[name]) for name in other]


def worst_of(errors: Sequence[TensorError]) -> TensorError:
    """The one that rounding explains least."""
    return max(errors, key=lambda each: nan_is_worst(each.ratio))


def first_on_the_way_back(errors: Sequence[TensorError], threshold: float) -> TensorError | None:
    """The first tensor beyond a threshold in the order in which gradients are computed.

    Args:
        errors: In the model's order, the embedding first.
        threshold: Of the ratio.
    """
    return next((each for each in reversed(errors) if not each.ratio <= threshold), None)
