"""Batches of one length, made of the texts that are compared."""

from itertools import chain, cycle, islice

import torch
from torch import Tensor

MOST_LOGITS = 2**27
"""Of one batch: half a gigabyte in float32."""
MOST_TOKENS = 1024
MULTIPLE = 16
"""Tensor parallel ranks share out the positions."""


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
