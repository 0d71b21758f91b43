"""Tokenize the corpora of a config into Megatron's .bin and .idx, with the model's own tokenizer.

Every document is ended by <|endoftext|>. Text is only ever text: the characters of a special token in
a document are split like any others. The output directory gets, for each corpus, NAME.bin and
NAME.idx; card.json, which says what is in them (documents, tokens, bytes, lengths, unigram entropy in
nats a token, what was left out, a sample); and manifest.json. It appears under its name when all of it
is there.

With data.kind sft the documents are conversations, rendered by the model's chat template, without an end
of document. NAME.targets.bin and NAME.targets.idx say which of their tokens are trained on: those of the
assistant's turns, each with its <|im_end|>.

    python scripts/preprocess.py --config config/config.yaml --model MODEL/hf --output DATA

Several jobs can do it side by side; the result is the same to the byte:

    python scripts/preprocess.py --config config/config.yaml --model MODEL/hf --shard 1-of-2 --output A
    python scripts/preprocess.py --config config/config.yaml --model MODEL/hf --shard 2-of-2 --output B
    python scripts/preprocess.py --config config/config.yaml --model MODEL/hf \\
        --merge A/manifest.json B/manifest.json --output DATA
"""

import argparse
import contextlib
import gc
import logging
import os
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from megaqwen.config import load_config
from megaqwen.console import run_command, stage_parser
from megaqwen.data.files import corpus_files
from megaqwen.errors import InputError
from megaqwen.layout import Layout
from megaqwen.provenance import StageRecord, digest, existing, new_directory, read_json

logger = logging.getLogger("megaqwen.data")


def preprocess(arguments: argparse.Namespace) -> None:
    """Tokenize every corpus, or a shard of each, or merge shards; see the module's docstring."""
    config = load_config(arguments.config)
    stage = "preprocess_shard" if arguments.shard else "preprocess"
    record = StageRecord(stage, Layout(config=config).stage_config("preprocess"))
    model_manifest = find_model_manifest(arguments.model, arguments.model_manifest)
    for corpus in config.data.corpora:  # a missing file is told before the slow imports
        corpus_files(corpus)
    inputs = {"model": model_manifest}
    for number, manifest in enumerate(arguments.merge, start=1):
        inputs[f"shard {number}"] = existing(manifest, "preprocess")
    check_shards(arguments.merge, record.config)

    os.environ["HF_HUB_OFFLINE"] = "1"
    os.environ["TOKENIZERS_PARALLELISM"] = "true"
    from megaqwen.data.parts import tokenize_part
    from megaqwen.data.pieces import Shard
    from megaqwen.data.tokenization import (
        ChatTokenizer,
        DocumentTokenizer,
        tokenizer_digests,
    )
    from megaqwen.data.tokenize_corpus import tokenize_corpora

    kind = ChatTokenizer if config.data.kind == "sft" else DocumentTokenizer
    files = tokenizer_digests(arguments.model)
    check_tokenizer(arguments.merge, files)
    tokenizer = kind(arguments.model)
    gc.freeze()  # the libraries' objects stay: collecting garbage need not look at them again
    corpora = config.data.corpora
    with new_directory(arguments.output) as directory:
        if arguments.shard:
            index, count = arguments.shard
            for corpus in corpora:
                tokenize_part(corpus, tokenizer, directory, Shard(index=index - 1, count=count))
            results: dict[str, Any] = {"shard": index, "shards": count, "tokenizer": files}
        else:
            shards = [manifest.parent for manifest in arguments.merge]
            results = tokenize_corpora(corpora, tokenizer, directory, shards)
        record.write(directory / "manifest.json", inputs=inputs, results=results)
    if not arguments.shard:
        remove_shards(arguments.output, arguments.merge)
    logger.info("tokenized data: %s", arguments.output)


def remove_shards(output: Path, merged: Sequence[Path]) -> None:
    """Remove the shards of data that is there now: what was merged, and those of another number of them.

    Args:
        output: The data.
        merged: The manifests of the shards that it was made of.
    """
    for manifest in merged:
        shutil.rmtree(manifest.parent)
    own = Layout.shards_of(output)
    for shard in own.glob("*-of-*"):
        shutil.rmtree(shard)
    with contextlib.suppress(OSError):  # there is none, or something else is in it
        own.rmdir()


def check_shards(manifests: Sequence[Path], config: Mapping[str, Any]) -> None:
    """InputError unless these are the manifests of all shards of the config's corpora, in order."""
    for number, path in enumerate(manifests, start=1):
        wanted = f"{number}-of-{len(manifests)}"
        try:
            manifest = read_json(path)
            shard = f"{manifest['results']['shard']}-of-{manifest['results']['shards']}"
            made_with = manifest["config_digest"]
        except (ValueError, KeyError, TypeError) as error:
            raise InputError(
                f"--merge: {path} is not the manifest of a shard: make one with --shard {wanted}"
            ) from error
        if shard != wanted:
            raise InputError(
                f"--merge: {path} is of shard {shard}, in place {number} of {len(manifests)}:"
                " give the manifests of all shards, each once and in order"
            )
        if made_with != digest(config):
            raise InputError(
                f"--merge: {path} was made with another config: make it again with"
                f" --shard {wanted} and this one"
            )


def check_tokenizer(manifests: Sequence[Path], files: Mapping[str, str]) -> None:
    """InputError where a shard's manifest tells other digests of the tokenizer's files."""
    for path in manifests:
        results = read_json(path)["results"]
        if results.get("tokenizer", files) != files:
            raise InputError(
                f"--merge: {path} was made with another tokenizer than that of --model: make it again"
                f" with --shard {results['shard']}-of-{results['shards']} and this one"
            )


def find_model_manifest(model: Path, given: Path | None) -> Path:
    """The manifest of the stage that brought the model."""
    manifest = given or model.parent / "manifest.json"
    existing(model / "config.json", "download")
    if not manifest.is_file():
        raise InputError(
            f"there is no manifest {manifest} of the model: run `snakemake download` first, "
            "or name it with --model-manifest"
        )
    return manifest


def shard_of(text: str) -> tuple[int, int]:
    """Two numbers of INDEX-of-COUNT, as Snakemake's scattergather says it: 1 is the first."""
    index, count = map(int, text.split("-of-"))
    if not 1 <= index <= count:
        raise ValueError
    return index, count


shard_of.__name__ = "shard (such as 2-of-8)"  # as argparse words its error


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
    way = parser.add_mutually_exclusive_group()
    way.add_argument("--shard", type=shard_of, help="tokenize only this part, such as 2-of-8")
    way.add_argument(
        "--merge",
        type=Path,
        nargs="*",
        default=[],
        help="manifests of all shards, in order; the shards are removed",
    )
    return run_command(preprocess, parser)


if __name__ == "__main__":
    sys.exit(main())
