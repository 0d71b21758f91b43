"""Which documents of a tokenized corpus are held out from training: Megatron's own arithmetic."""

from collections.abc import Mapping, Sequence
from decimal import Decimal
from pathlib import Path
from typing import Any

from megatron.core.datasets.blended_megatron_dataset_config import (
    convert_split_vector_to_split_matrix,
    parse_and_normalize_split,
)
from megatron.core.datasets.indexed_dataset import IndexedDataset
from megatron.core.datasets.utils import Split

from megaqwen.errors import InputError
from megaqwen.provenance import existing

SHARES = ("training", "validation", "test")


def split_argument(split: Sequence[float]) -> str:
    """The value of Megatron's --split, such as 96,2,2.

    Written without exponents, which Megatron's parser takes for two numbers.
    """
    return ",".join(format(Decimal(repr(share)), "f") for share in split)


def split_documents(documents: int, split: Sequence[float]) -> list[range]:
    """The document indices of the training, validation and test share.

    As in BlendedMegatronDatasetBuilder: each bound is rounded to the nearest document (half to
    even), so that a small corpus may have empty shares.

    Args:
        documents: How many documents the corpus has.
        split: Shares for training, validation and test, of any sum.
    """
    shares = parse_and_normalize_split(split_argument(split))
    bounds = convert_split_vector_to_split_matrix(shares)
    return [
        range(round(bound[0] * float(documents)), round(bound[1] * float(documents)))
        if bound
        else range(0)
        for bound in bounds
    ]


def check_shares(corpora: Mapping[str, tuple[int, Sequence[float]]]) -> None:
    """InputError where a share of a corpus has no document: Megatron would look for one forever.

    Args:
        corpora: By its name, how many documents each corpus has, and its split.
    """
    for corpus, (count, split) in corpora.items():
        parts = split_documents(count, split)
        for name, share, part in zip(SHARES, split, parts, strict=True):
            if share and not part:
                raise InputError(
                    f"corpus {corpus}: none of its {count} documents falls to {name} by the split"
                    f" {split_argument(split)}: give {name} a larger share or none at all (0), or"
                    " give the corpus more documents"
                )


def check_ends(prefix: Path, end_of_document: Mapping[str, Any]) -> None:
    """InputError unless the first and the last document end with the end that training knows.

    Otherwise training would take documents for one another's continuation, or a separator for text.

    Args:
        prefix: Path of the corpus's .bin and .idx, without the extension.
        end_of_document: Its token and its id.
    """
    dataset = IndexedDataset(str(prefix))
    for number in (0, len(dataset) - 1):
        last = int(dataset[number][-1])
        if last != end_of_document["id"]:
            raise InputError(
                f"{prefix}.bin: document {number} ends with the id {last}, not with"
                f" {end_of_document['token']} ({end_of_document['id']}), which its manifest gives"
                " as the end of a document: run preprocess again"
            )


def heldout_documents(
    prefix: Path, split: Sequence[float], count: int, *, end_of_document: bool = True
) -> list[list[int]]:
    """Token ids of the first documents of the test share, without their end-of-document token.

    Args:
        prefix: Path of the corpus's .bin and .idx, without the extension.
        split: Shares for training, validation and test.
        count: How many; fewer come where the test share has fewer.
        end_of_document: Whether documents have such a token; conversations have none.

    Raises:
        InputError: There are no such files.
    """
    if not count:
        return []
    existing(prefix.with_name(f"{prefix.name}.idx"), "preprocess")
    dataset = IndexedDataset(str(prefix))
    test = split_documents(len(dataset), split)[Split.test.value]
    end = -1 if end_of_document else None
    return [dataset[index][:end].tolist() for index in test[:count]]
