"""A corpus from text to tokens: in one go, or from shards that other jobs made."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megaqwen.config.sections import Corpus
from megaqwen.data.merging import merge_parts
from megaqwen.data.parts import tokenize_part
from megaqwen.data.pieces import WHOLE
from megaqwen.data.tokenization import ChatTokenizer, DocumentTokenizer
from megaqwen.provenance import describe_files, write_json


def tokenize_corpora(
    corpora: Sequence[Corpus], tokenizer: DocumentTokenizer, directory: Path, shards: Sequence[Path]
) -> dict[str, Any]:
    """Write NAME.bin and NAME.idx of each corpus, of conversations their targets, and card.json.

    Args:
        corpora: The corpora.
        tokenizer: The model's.
        directory: Where the files go.
        shards: The directories of all shards, in order; without any the corpora are read here.

    Returns:
        The manifest's results: the card, and the files with their digests.
    """
    cards: dict[str, Any] = {}
    known: dict[Path, dict[str, Any]] = {}
    for corpus in corpora:
        cards[corpus.name], written = tokenize_corpus(corpus, tokenizer, directory, shards)
        known |= written
    kind = "sft" if isinstance(tokenizer, ChatTokenizer) else "pretrain"
    card = {"kind": kind, "tokenizer": tokenizer.describe(), "corpora": cards}
    files = describe_files(directory, known)
    write_json(directory / "card.json", card)
    return {**card, "files": files}


def tokenize_corpus(
    corpus: Corpus, tokenizer: DocumentTokenizer, directory: Path, shards: Sequence[Path] = ()
) -> tuple[dict[str, Any], dict[Path, dict[str, Any]]]:
    """`tokenize_corpora` of one; its card, and bytes and digest of its files."""
    if not shards:
        tokenize_part(corpus, tokenizer, directory, WHOLE)
    return merge_parts(corpus, tokenizer, shards or [directory], directory)
