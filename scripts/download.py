"""Bring a model to disk: from the Hugging Face Hub, from a directory, or a tiny one made here.

The output directory gets hf/ (config.json, safetensors, tokenizer) and, last, manifest.json, which
keeps the commit that a branch or tag meant at the time. No later stage uses the network.

A Hub download that is interrupted goes on when the same command is run again. A token for gated and
private models is read from HF_TOKEN, the Hub's address from HF_ENDPOINT. What is complete is not
fetched again: to follow a branch that has moved, remove manifest.json.

    python scripts/download.py --config config/config.yaml --output results/shared/models/KEY
"""

import argparse
import logging
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megaqwen.config import load_config
from megaqwen.config.sections import HubModel, Model, PathModel, TinyModel
from megaqwen.console import run_command, stage_parser
from megaqwen.errors import InputError
from megaqwen.layout import Layout
from megaqwen.provenance import StageRecord, describe_files, new_directory, read_json
from megaqwen.sources.local import describe_linked_files, link_model
from megaqwen.sources.verify import ModelDirectory, verify_model_directory
from megaqwen.words import readable_bytes

logger = logging.getLogger("megaqwen.download")


def download(arguments: argparse.Namespace) -> None:
    """Download, link or make the model; see the module's docstring."""
    config = load_config(arguments.config)
    record = StageRecord("download", Layout(config=config).stage_config("download"))
    hf = arguments.output / "hf"
    manifest = arguments.output / "manifest.json"
    results = completed_results(manifest, hf, record.config)
    if results and not isinstance(config.model, PathModel):
        logger.info("model: %s, already complete", describe(results))
        return
    manifest.unlink(missing_ok=True)
    facts = obtain(config.model, hf)
    results = {"hf": "hf", **facts, **model_facts(verify_model_directory(hf))}
    record.write(manifest, inputs={}, results=results)
    logger.info("model: %s", describe(results))


def completed_results(manifest: Path, hf: Path, config: Mapping[str, Any]) -> dict[str, Any] | None:
    """The results of an earlier run for the same config; None where a file is not as it was."""
    try:
        earlier = read_json(manifest)
        results: dict[str, Any] = earlier["results"]
        sizes = {name: file["bytes"] for name, file in results["files"].items()}
        if earlier["config"] != config or any(
            (hf / name).stat().st_size != size for name, size in sizes.items()
        ):
            return None
        verify_model_directory(hf)
    except (OSError, ValueError, KeyError, TypeError, InputError):
        return None
    return results


def obtain(model: Model, hf: Path) -> dict[str, Any]:
    """Bring the model to `hf`; what its source says of it, for the manifest."""
    match model:
        case TinyModel():
            logger.info("making a tiny %s", model.architecture)
            from megaqwen.sources.tiny import write_tiny_model

            with new_directory(hf) as directory:
                write_tiny_model(directory, model.architecture, model.seed)
            return {**model.model_dump(mode="json"), "files": describe_files(hf)}
        case HubModel():
            from megaqwen.sources.hub import download_model

            snapshot = download_model(model.repo_id, model.revision, hf)
            return {
                **model.model_dump(mode="json"),
                "commit": snapshot.commit,
                "files": snapshot.files,
            }
        case PathModel():
            source = Path(model.path).expanduser().absolute()
            link_model(source, hf)
            return {
                "source": "path",
                "path": str(source.resolve()),
                "files": describe_linked_files(source),
            }


def model_facts(model: ModelDirectory) -> dict[str, Any]:
    """What the manifest says of any model."""
    return {
        "model_type": model.model_type,
        "parameters": model.parameters,
        "dtypes": model.dtypes,
        "weight_bytes": model.weight_bytes,
    }


def describe(results: Mapping[str, Any]) -> str:
    """The model in a few words, for the terminal."""
    match results["source"]:
        case "tiny":
            name = f"tiny {results['architecture']} (seed {results['seed']})"
        case "hub":
            name = f"{results['repo_id']} at {results['commit'][:7]} ({results['revision']})"
        case _:
            name = results["path"]
    parameters = f"{results['parameters'] / 1e6:,.1f} M parameters"
    dtypes = " and ".join(sorted(results["dtypes"]))
    return f"{name}, {parameters} in {dtypes}, {readable_bytes(results['weight_bytes'])}"


def main() -> int:
    """Run the command."""
    parser = stage_parser(__doc__)
    parser.add_argument(
        "--output", type=Path, required=True, help="directory for hf/ and manifest.json"
    )
    return run_command(download, parser)


if __name__ == "__main__":
    sys.exit(main())
