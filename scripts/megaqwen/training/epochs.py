"""How often a run goes through each corpus: in training, and in all its validations and its test."""

from collections.abc import Sequence
from dataclasses import asdict
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
    totals = [sum(column) for column in zip(*corpora.weights, strict=True)]
    found = []
    for prefix, weights, split in zip(
        corpora.prefixes, corpora.weights, corpora.splits, strict=True
    ):
        dataset = IndexedDataset(str(prefix))  # its arrays live as long as it does
        parts = split_documents(len(dataset), split)
        facts = {}
        for name, part, weight, total, wanted in zip(
            SPLITS, parts, weights, totals, samples, strict=True
        ):
            if weight and wanted:
                lengths = dataset.sequence_lengths[part.start : part.stop]
                tokens = int(lengths.sum(dtype=numpy.int64))
                drawn = wanted * weight / total
                facts[name] = {
                    "documents": len(part),
                    "tokens": tokens,
                    "samples": round(drawn),
                    "epochs": drawn * sequence_length / tokens,
                }
        found.append(facts)
    return found


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
    totals = [sum(column) for column in zip(*corpora.weights, strict=True)]
    found = []
    for prefix, weights, split in zip(
        corpora.prefixes, corpora.weights, corpora.splits, strict=True
    ):
        files = ConversationFiles(prefix)
        parts = split_documents(len(files), split)
        facts = {}
        for name, part, weight, total, wanted in zip(
            SPLITS, parts, weights, totals, samples, strict=True
        ):
            if weight and wanted:
                packs = stored_packs(
                    files,
                    part,
                    sequence_length,
                    too_long=too_long,
                    seed=corpora.seed,
                    cache=corpora.cache,
                )
                drawn = wanted * weight / total
                counts = {"samples": round(drawn), "epochs": drawn / len(packs)}
                facts[name] = {**asdict(packs.facts), **counts}
        found.append(facts)
    return found
