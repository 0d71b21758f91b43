"""Two models walk through the same texts side by side, a layer at a time, so that size is no limit.

The Hugging Face model walks twice, in float32 and in float64: how far the two are apart is what
rounding alone does, at every point, and the Megatron model may not be much further away. Where
transformers itself stays in float32, a rounding of float32 is the least that is allowed for.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from megaqwen.parity.comparing import (
    POSITIONS_AT_ONCE,
    Comparison,
    PointError,
    compare_logits,
    point_error,
)
from megaqwen.parity.points import IN_LAYER, Observations
from megaqwen.parity.routing import OtherChoices, Routing, choices_seen, compare_routing

EXACT, REFERENCE, OTHER = "float64", "float32", "megatron"


class Layers(Protocol):
    """A model that is called layer by layer."""

    layers: int

    def embed(self, texts: list[Tensor]) -> list[Tensor]:
        """[positions, hidden] embeddings of each text."""

    def layer(self, index: int, hidden: list[Tensor]) -> tuple[list[Tensor], Observations]:
        """What a layer makes of them, and what was seen within it."""

    def head(self) -> Any:
        """A context with the final norm and the logits' function."""


class FollowingLayers(Layers, Protocol):
    """One that can follow another model's choices of experts at ties."""

    def layer(
        self, index: int, hidden: list[Tensor], other: OtherChoices | None = None
    ) -> tuple[list[Tensor], Observations]:
        """Likewise; what was seen of the choices are its own."""


@dataclass(frozen=True, kw_only=True)
class Walk:
    """What was measured."""

    points: list[PointError]
    """In the order of the computation."""
    comparisons: list[Comparison]
    routing: list[Routing]


def walk(
    own: Mapping[str, FollowingLayers],
    other: Layers,
    texts: Mapping[str, Sequence[int]],
    tie: float,
    progress: Callable[[int, int], None] = lambda layer, layers: None,
) -> Walk:
    """Compare at every point of every layer, and the logits at every position.

    Args:
        own: EXACT and REFERENCE of Hugging Face.
        other: Of Megatron.
        texts: Token ids by the texts' names.
        tie: Two logits of the reference that differ by no more are equal but for rounding.
        progress: Told after each layer how many are done, and of how many.
    """
    names = list(texts)
    tokens = [torch.tensor(ids) for ids in texts.values()]
    points: list[PointError] = []
    routing: list[Routing] = []

    def compare(layer: int | None, point: str, found: Mapping[str, Sequence[Tensor]]) -> None:
        three = (found[name] for name in (EXACT, REFERENCE, OTHER))
        points.append(point_error(layer, point, names, *three))

    models: dict[str, Layers] = {**own, OTHER: other}
    hidden = {name: model.embed(tokens) for name, model in models.items()}
    compare(None, "embedding", hidden)
    layers = models[REFERENCE].layers
    for index in range(layers):
        seen = through_layer(own, other, index, hidden, tie)
        for point in IN_LAYER:
            if all(point in found[0] for found in seen.values()):
                compare(
                    index,
                    point,
                    {name: [text[point] for text in found] for name, found in seen.items()},
                )
        if "choices" in seen[REFERENCE][0]:
            routing.append(compare_routing(index, seen[REFERENCE], seen[OTHER], tie))
        compare(index, "out", hidden)
        progress(index + 1, layers)
    comparisons = compare_heads(models, hidden, dict(zip(names, tokens, strict=True)), compare, tie)
    return Walk(points=points, comparisons=comparisons, routing=routing)


def through_layer(
    own: Mapping[str, FollowingLayers],
    other: Layers,
    index: int,
    hidden: dict[str, list[Tensor]],
    tie: float,
) -> dict[str, Observations]:
    """Take the hidden states of all models through a layer, in which `own` follow `other` at ties.

    Args:
        own: Models of Hugging Face by their names.
        other: Of Megatron.
        index: The layer's.
        hidden: Of each text [positions, hidden], by the models' names; they are replaced.
        tie: Two logits of a router that differ by no more are equal but for rounding.

    Returns:
        What was seen within the layer, by the models' names.
    """
    seen = {}
    hidden[OTHER], seen[OTHER] = other.layer(index, hidden[OTHER])
    choices = choices_seen(seen[OTHER], tie)
    for name, model in own.items():
        hidden[name], seen[name] = model.layer(index, hidden[name], choices)
    return seen


def compare_heads(
    models: Mapping[str, Layers],
    hidden: Mapping[str, list[Tensor]],
    tokens: Mapping[str, Tensor],
    compare: Callable[[int | None, str, Mapping[str, Sequence[Tensor]]], None],
    tie: float,
) -> list[Comparison]:
    """Compare the final norms and, some positions at a time, the logits."""
    with ExitStack() as stack:
        heads = {name: stack.enter_context(model.head()) for name, model in models.items()}
        normed = {
            name: [norm(states) for states in hidden[name]] for name, (norm, _) in heads.items()
        }
        compare(None, "final norm", normed)

        def blocks(index: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
            for start in range(0, len(normed[REFERENCE][index]), POSITIONS_AT_ONCE):
                run = slice(start, start + POSITIONS_AT_ONCE)
                exact, reference, other = (
                    heads[name][1](normed[name][index][run]) for name in (EXACT, REFERENCE, OTHER)
                )
                yield exact, reference, other

        return [
            compare_logits(name, ids, blocks(index), tie)
            for index, (name, ids) in enumerate(tokens.items())
        ]
