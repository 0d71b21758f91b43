"""One corpus from text to tokens, in one go."""

from pathlib import Path
from typing import Any

from megaqwen.config.sections import Corpus
from megaqwen.data.merging import merge_parts
from megaqwen.data.parts import tokenize_part
from megaqwen.data.pieces import WHOLE
from megaqwen.data.tokenization import DocumentTokenizer


def tokenize_corpus(
    corpus: Corpus, tokenizer: DocumentTokenizer, directory: Path
) -> tuple[dict[str, Any], dict[Path, dict[str, Any]]]:
    """Write NAME.bin and NAME.idx of a corpus; see `tokenize_part` and `merge_parts`."""
    tokenize_part(corpus, tokenizer, directory, WHOLE)
    return merge_parts(corpus, tokenizer, [directory], directory)
