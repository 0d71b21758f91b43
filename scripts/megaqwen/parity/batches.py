"""Batches of one length, made of the texts that are compared."""

from itertools import chain, cycle, islice

import torch
from torch import Tensor

MOST_LOGITS = 2**27
"""Of one batch: half a gigabyte in float32."""
MOST_TOKENS = 1024
MULTIPLE = 16
"""Tensor parallel ranks share out the positions."""
PARTS, IN_PART = 4, 32
"""Of a sequence of training's length so many parts are compared, at so many positions each."""


def make_batches(
    texts: list[list[int]],
    count: int,
    sequences: int,
    positions: int,
    vocabulary: int,
    tokens: int = MOST_TOKENS,
) -> list[Tensor]:
    """`count` batches of [sequences, positions + 1] tokens, texts one after another.

    Args:
        texts: Token ids; from the last the first follows again.
        count: How many batches.
        sequences: In a batch.
        positions: The most in a sequence.
        vocabulary: Logits at a position, which bound how many positions there may be.
        tokens: The most in a batch.
    """
    most = min(tokens, MOST_LOGITS // vocabulary) // sequences
    length = max(MULTIPLE, min(positions, most) // MULTIPLE * MULTIPLE)
    read = islice(cycle(chain.from_iterable(texts)), count * sequences * (length + 1))
    return list(torch.tensor(list(read)).view(count, sequences, length + 1))


def long_batch(texts: list[list[int]], positions: int) -> Tensor:
    """[1, positions + 1] tokens, as `make_batches` takes them from the texts."""
    (batch,) = make_batches(texts, 1, 1, positions, vocabulary=1, tokens=positions)
    return batch


def compared_at(batch: Tensor) -> Tensor:
    """The positions at which a long batch is compared: spread from the first on, and all of the last."""
    last = batch.shape[1] - 1 - IN_PART
    spread = torch.linspace(0, last - 1, (PARTS - 1) * IN_PART).long()
    return torch.cat([spread, torch.arange(last, last + IN_PART)])
