"""What download and convert recorded of the files that they left, and whether they are still those.

Nothing is recorded of a directory that a person gives to a command by hand, and nothing digested of a
training's checkpoints: theirs have a CRC-32 in each tensor.
"""

from collections.abc import Callable
from functools import partial
from pathlib import Path

from megaqwen.errors import InputError
from megaqwen.provenance import make_again, read_json, sha256_file


def stage_manifest(directory: Path, stage: str) -> Path | None:
    """The manifest beside a directory, if this stage left it there."""
    manifest = directory.parent / "manifest.json"
    try:
        ours = manifest.is_file() and read_json(manifest).get("stage") == stage
    except (ValueError, AttributeError):
        ours = False  # another program's file of that name
    return manifest if ours else None


def download_manifest(model: Path) -> dict[str, Path]:
    """Download's manifest as a stage's input, or nothing where download did not bring the model."""
    manifest = stage_manifest(model, "download")
    return {"model": manifest} if manifest else {}


def recorded_digests(directory: Path, stage: str) -> dict[Path, str]:
    """SHA-256 of the files of a stage's directory, as far as they were digested.

    Raises:
        InputError: The manifest is damaged.
    """
    manifest = stage_manifest(directory, stage)
    try:
        files = read_json(manifest)["results"]["files"] if manifest else {}
        return {directory / name: of["sha256"] for name, of in files.items() if "sha256" in of}
    except (KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{manifest} is damaged: {make_again(stage)}") from error


def check_digest(path: Path, digest: str, stage: str) -> None:
    """InputError unless a file is there and is what a stage recorded."""
    if not path.is_file():
        raise InputError(f"{path} is missing, which {stage} recorded: {make_again(stage)}")
    if sha256_file(path) != digest:
        raise InputError(
            f"{path} is damaged: its SHA-256 is not the one that {stage} recorded."
            f" To make it again: {make_again(stage)}"
        )


def recorded_checks(directory: Path, stage: str) -> list[Callable[[], None]]:
    """`check_digest` of each digested file of a stage's directory, ready to be called."""
    digests = recorded_digests(directory, stage)
    return [partial(check_digest, path, digest, stage) for path, digest in digests.items()]
