"""Export a Megatron checkpoint to a Hugging Face directory, one tensor at a time.

    python scripts/export.py --config config/config.yaml --model HF_DIRECTORY \\
        --checkpoint CHECKPOINTS --output DIRECTORY

CHECKPOINTS is what Megatron saved to; --iteration takes an earlier one than the latest. DIRECTORY gets
hf/ (safetensors, config.json and tokenizer of HF_DIRECTORY, from which the training started) and
manifest.json. --dry-run prints what becomes of each tensor, and reads no weights.
"""

import argparse
import logging
import shutil
import sys
from pathlib import Path

from megaqwen.config import load_config
from megaqwen.console import add_workers, run_command, stage_parser
from megaqwen.environment import use_huge_pages
from megaqwen.errors import InputError
from megaqwen.layout import Layout
from megaqwen.provenance import StageRecord, describe_files, new_directory, read_json, write_json
from megaqwen.sources.recorded import download_manifest, recorded_checks

logger = logging.getLogger("megaqwen.export")

COPIED = (
    "config.json",
    "generation_config.json",
    "tokenizer*",
    "vocab.json",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template*",
    "LICENSE*",
)
DTYPE_KEYS = ("dtype", "torch_dtype")  # transformers 5's name in config.json, and the earlier one


def export(arguments: argparse.Namespace) -> None:
    """Run the stage."""
    config = load_config(arguments.config)
    record = StageRecord("export", Layout(config=config).stage_config("export"))
    if not arguments.output and not arguments.dry_run:
        raise InputError("say where to write: --output DIRECTORY, or --dry-run")

    use_huge_pages()
    import torch

    from megaqwen.weights import export_to_huggingface, find_checkpoint
    from megaqwen.weights.bridge import dry_run

    saved = find_checkpoint(arguments.checkpoint, arguments.iteration)
    if arguments.dry_run:
        for line in dry_run(arguments.model, arguments.checkpoint, arguments.iteration):
            logger.info("%s", line)
        return
    dtype = None if config.export.dtype == "source" else config.export.dtype
    with new_directory(arguments.output / "hf") as directory:
        streamed = export_to_huggingface(
            arguments.model,
            arguments.checkpoint,
            directory,
            iteration=arguments.iteration,
            dtype=getattr(torch, dtype) if dtype else None,
            max_shard_bytes=int(config.export.max_shard_gigabytes * 1e9),
            checks=recorded_checks(arguments.checkpoint, "convert"),
            workers=arguments.workers,
            terminal=arguments.terminal,
        )
        copy_companions(arguments.model, directory, dtype)
        files = describe_files(directory, streamed.files)
    inputs = download_manifest(arguments.model)
    if arguments.train_manifest:
        inputs["train"] = arguments.train_manifest
    record.write(
        arguments.output / "manifest.json",
        inputs=inputs,
        results={**streamed.facts(), "checkpoint": saved.name, "files": files},
    )
    logger.info("%s: %s", saved.name, streamed)


def copy_companions(model: Path, directory: Path, dtype: str | None) -> None:
    """Copy what a model directory has beside its weights; only a new dtype changes config.json."""
    for pattern in COPIED:
        for path in sorted(model.glob(pattern)):
            if path.is_dir():
                shutil.copytree(path, directory / path.name)
            else:
                shutil.copyfile(path, directory / path.name)
    if dtype:
        config = read_json(directory / "config.json")
        keys = [key for key in DTYPE_KEYS if key in config] or [DTYPE_KEYS[0]]
        write_json(directory / "config.json", {**config, **dict.fromkeys(keys, dtype)})


def main() -> int:
    """The command."""
    parser = stage_parser(__doc__)
    parser.add_argument(
        "--model", type=Path, required=True, help="Hugging Face directory it started from"
    )
    parser.add_argument("--checkpoint", type=Path, required=True, help="training's checkpoints")
    parser.add_argument("--iteration", type=int, help="which one (default: the latest)")
    parser.add_argument("--train-manifest", type=Path, help="training's manifest, to be recorded")
    parser.add_argument("--output", type=Path, help="directory for hf/ and manifest.json")
    parser.add_argument(
        "--dry-run", action="store_true", help="print each tensor's mapping and shapes"
    )
    add_workers(parser)
    return run_command(export, parser)


if __name__ == "__main__":
    sys.exit(main())
