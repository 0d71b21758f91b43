"""Tokenized conversations on disk as preprocess writes them, without a tokenizer."""

from collections.abc import Sequence
from pathlib import Path

import numpy
import torch
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

Conversation = tuple[list[int], list[int]]


def random_conversations(
    count: int, longest: int, vocabulary: int = 250, seed: int = 1
) -> list[Conversation]:
    """Ids and targets; how many of a conversation's tokens are targets varies from one to most."""
    random = numpy.random.RandomState(seed)
    conversations = []
    for _ in range(count):
        length = int(random.randint(3, longest + 1))
        ids = random.randint(0, vocabulary, length)
        targets = random.random_sample(length) < random.random_sample()
        targets[0], targets[-1] = False, True
        conversations.append((ids.tolist(), targets.astype(int).tolist()))
    return conversations


def write_conversations(prefix: Path, conversations: Sequence[Conversation]) -> None:
    """NAME.bin and .idx with the ids, NAME.targets.bin and .idx with the targets."""
    columns = ((str(prefix), numpy.int32), (f"{prefix}.targets", numpy.uint8))
    for column, (path, dtype) in enumerate(columns):
        builder = IndexedDatasetBuilder(f"{path}.bin", dtype=dtype)
        for conversation in conversations:
            builder.add_item(torch.tensor(conversation[column]))
            builder.end_document()
        builder.finalize(f"{path}.idx")
