"""Convert a Hugging Face Qwen into a Megatron torch_dist checkpoint, one tensor at a time.

    python scripts/convert.py --config config/config.yaml --model HF_DIRECTORY --output DIRECTORY
    python scripts/convert.py --config config/config.yaml --model HF_DIRECTORY --dry-run

DIRECTORY gets checkpoint/, which Megatron loads under any tensor and pipeline parallelism, and
manifest.json. A dry run prints what becomes of each tensor, and reads no weights: of a model that is
not downloaded yet, config.json is enough.
"""

import argparse
import logging
import sys
from pathlib import Path

from megaqwen.architecture import megatron_options
from megaqwen.config import load_config
from megaqwen.console import add_workers, run_command, stage_parser
from megaqwen.environment import use_huge_pages
from megaqwen.errors import InputError
from megaqwen.layout import Layout
from megaqwen.provenance import StageRecord, describe_files, new_directory
from megaqwen.sources.recorded import download_manifest, recorded_checks
from megaqwen.sources.verify import verify_model_directory

logger = logging.getLogger("megaqwen.convert")


def convert(arguments: argparse.Namespace) -> None:
    """Run the stage."""
    config = load_config(arguments.config)
    record = StageRecord("convert", Layout(config=config).stage_config("convert"))
    if not arguments.output and not arguments.dry_run:
        raise InputError("say where to write: --output DIRECTORY, or --dry-run")
    if arguments.dry_run:
        from megaqwen.weights.bridge import dry_run

        for line in dry_run(arguments.model):
            logger.info("%s", line)
        return
    verify_model_directory(arguments.model)

    use_huge_pages()
    from megaqwen.weights import convert_to_megatron
    from megaqwen.weights.bridge import checked_model

    checkpoint = arguments.output / "checkpoint"
    with new_directory(checkpoint) as directory:
        streamed = convert_to_megatron(
            arguments.model,
            directory,
            checks=recorded_checks(arguments.model, "download"),
            workers=arguments.workers,
            terminal=arguments.terminal,
        )
        files = describe_files(directory, streamed.files)
    weights, _ = checked_model(arguments.model)
    record.write(
        arguments.output / "manifest.json",
        inputs=download_manifest(arguments.model),
        results={
            **streamed.facts(),
            "megatron_options": megatron_options(weights.config),
            "files": files,
        },
    )
    logger.info("%s", streamed)


def main() -> int:
    """The command."""
    parser = stage_parser(__doc__)
    parser.add_argument("--model", type=Path, required=True, help="Hugging Face directory")
    parser.add_argument("--output", type=Path, help="directory for checkpoint/ and manifest.json")
    parser.add_argument(
        "--dry-run", action="store_true", help="print each tensor's mapping and shapes"
    )
    add_workers(parser)
    return run_command(convert, parser)


if __name__ == "__main__":
    sys.exit(main())
