"""Tokenize the corpora of a config into Megatron's .bin and .idx, with the model's own tokenizer.

Every document is ended by <|endoftext|>. Text is only ever text: the characters of a special token in
a document are split like any others. The output directory gets, for each corpus, NAME.bin and
NAME.idx; card.json, which says what is in them (documents, tokens, bytes, unigram entropy in nats a
token, a sample); and manifest.json. It appears under its name when all of it is there.

    python scripts/preprocess.py --config config/config.yaml --model MODEL/hf --output DATA
"""

import argparse
import logging
import os
import sys
from pathlib import Path

from megaqwen.config import load_config
from megaqwen.console import run_command, stage_parser
from megaqwen.data.files import corpus_files
from megaqwen.errors import InputError
from megaqwen.layout import Layout
from megaqwen.provenance import StageRecord, describe_files, new_directory, write_json

logger = logging.getLogger("megaqwen.data")


def preprocess(arguments: argparse.Namespace) -> None:
    """Tokenize every corpus; see the module's docstring."""
    config = load_config(arguments.config)
    record = StageRecord("preprocess", Layout(config=config).stage_config("preprocess"))
    model_manifest = find_model_manifest(arguments.model, arguments.model_manifest)
    for corpus in config.data.corpora:  # a missing file is told before the slow imports
        corpus_files(corpus)

    os.environ["HF_HUB_OFFLINE"] = "1"
    os.environ["TOKENIZERS_PARALLELISM"] = "true"
    from megaqwen.data.tokenization import DocumentTokenizer
    from megaqwen.data.tokenize_corpus import tokenize_corpus

    tokenizer = DocumentTokenizer(arguments.model)
    with new_directory(arguments.output) as directory:
        made = {
            corpus.name: tokenize_corpus(corpus, tokenizer, directory)
            for corpus in config.data.corpora
        }
        corpora = {name: card for name, (card, _) in made.items()}
        known = {path: facts for _, files in made.values() for path, facts in files.items()}
        card = {"tokenizer": tokenizer.describe(), "corpora": corpora}
        files = describe_files(directory, known)
        write_json(directory / "card.json", card)
        record.write(
            directory / "manifest.json",
            inputs={"model": model_manifest},
            results={**card, "files": files},
        )
    logger.info("tokenized data: %s", arguments.output)


def find_model_manifest(model: Path, given: Path | None) -> Path:
    """The manifest of the stage that brought the model."""
    manifest = given or model.parent / "manifest.json"
    if not model.is_dir():
        raise InputError(f"there is no model directory {model}: run `snakemake download` first")
    if not manifest.is_file():
        raise InputError(
            f"there is no manifest {manifest} of the model: run `snakemake download` first, "
            "or name it with --model-manifest"
        )
    return manifest


def main() -> int:
    """The command."""
    parser = stage_parser(__doc__)
    parser.add_argument(
        "--model", type=Path, required=True, help="Hugging Face directory with the tokenizer"
    )
    parser.add_argument(
        "--model-manifest",
        type=Path,
        help="manifest of the download stage (default: manifest.json beside the model's directory)",
    )
    parser.add_argument(
        "--output", type=Path, required=True, help="directory to make; an earlier one is replaced"
    )
    return run_command(preprocess, parser)


if __name__ == "__main__":
    sys.exit(main())
