"""How often a run goes through each corpus: in training, and in all its validations and its test."""

from collections.abc import Callable, Sequence, Sized
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy
from megatron.core.datasets.indexed_dataset import IndexedDataset

from megaqwen.config.sections import SPLITS
from megaqwen.data.splits import split_documents
from megaqwen.training.conversation_packs import stored_packs
from megaqwen.training.conversations import ConversationFiles
from megaqwen.training.datasets import Corpora

Planned = dict[str, dict[str, dict[str, Any]]]


def epochs(
    corpora: Corpora, samples: Sequence[int], sequence_length: int
) -> list[dict[str, dict[str, Any]]]:
    """Of each corpus, for each split that draws from it: documents, tokens, samples and epochs.

    An epoch is as many tokens as the corpus's share of that split has.

    Args:
        corpora: The run's.
        samples: How many the run takes of the training, validation and test split.
        sequence_length: Tokens of a sample.
    """

    def describe(dataset: IndexedDataset, part: range) -> tuple[dict[str, Any], float]:
        lengths = dataset.sequence_lengths[part.start : part.stop]
        tokens = int(lengths.sum(dtype=numpy.int64))
        return {"documents": len(part), "tokens": tokens}, tokens / sequence_length

    def read(prefix: Path) -> IndexedDataset:
        return IndexedDataset(str(corpora.files(prefix)))

    return drawn_parts(corpora, samples, read, describe)


def conversation_epochs(
    corpora: Corpora, samples: Sequence[int], sequence_length: int, too_long: str
) -> list[dict[str, dict[str, Any]]]:
    """`epochs` of conversations in packs, with how they were packed; an epoch is all packs once.

    Args:
        corpora: The run's.
        samples: How many the run takes of the training, validation and test split.
        sequence_length: Positions of a sample.
        too_long: data.too_long.
    """

    def describe(files: ConversationFiles, part: range) -> tuple[dict[str, Any], float]:
        packs = stored_packs(
            files, part, sequence_length, too_long=too_long, seed=corpora.seed, cache=corpora.cache
        )
        return asdict(packs.facts), len(packs)

    def read(prefix: Path) -> ConversationFiles:
        return ConversationFiles(prefix, corpora.files(prefix))

    return drawn_parts(corpora, samples, read, describe)


def drawn_parts[Files: Sized](
    corpora: Corpora,
    samples: Sequence[int],
    read: Callable[[Path], Files],
    describe: Callable[[Files, range], tuple[dict[str, Any], float]],
) -> list[dict[str, dict[str, Any]]]:
    """Of each corpus, for each split that draws from it: what `describe` says, samples and epochs.

    Args:
        corpora: The run's.
        samples: How many the run takes of the training, validation and test split.
        read: Opens a corpus by its prefix.
        describe: Facts of a split's documents, and how many samples an epoch of them is.
    """
    totals = [sum(column) for column in zip(*corpora.weights, strict=True)]
    found = []
    for prefix, weights, split in zip(
        corpora.prefixes, corpora.weights, corpora.splits, strict=True
    ):
        files = read(prefix)  # its arrays live as long as it does
        parts = split_documents(len(files), split)
        drawn = {}
        for name, part, weight, total, wanted in zip(
            SPLITS, parts, weights, totals, samples, strict=True
        ):
            if weight and wanted:
                facts, epoch = describe(files, part)
                taken = wanted * weight / total
                drawn[name] = {**facts, "samples": round(taken), "epochs": taken / epoch}
        found.append(drawn)
    return found
