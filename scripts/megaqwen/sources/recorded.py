"""What download and convert recorded of the files that they left, and whether they are still those.

Nothing is recorded of a directory that a person gives to a command by hand, and nothing digested of a
training's checkpoints: theirs have a CRC-32 in each tensor.
"""

import threading
from collections.abc import Mapping
from pathlib import Path

from megaqwen.errors import InputError
from megaqwen.provenance import read_json, sha256_file


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


class RecordedFiles:
    """The files of a directory whose SHA-256 is known: each is read once, when it is asked for."""

    def __init__(self, directory: Path, digests: Mapping[str, str], stage: str):
        """Know these files.

        Args:
            directory: Where they lie.
            digests: SHA-256 by path below the directory.
            stage: What left them there, and would again.
        """
        self.digests = {directory / name: digest for name, digest in digests.items()}
        self.locks = {path: threading.Lock() for path in self.digests}
        self.checked: set[Path] = set()
        self.stage = stage

    def check(self, path: Path) -> None:
        """InputError where a file is not what was recorded; nothing where nothing was."""
        if path in self.checked or path not in self.digests:
            return
        with self.locks[path]:
            if path not in self.checked and sha256_file(path) != self.digests[path]:
                raise InputError(
                    f"{path} is damaged: its SHA-256 is not the one that {self.stage} recorded;"
                    f" remove it and run {self.stage} again"
                )
            self.checked.add(path)


def recorded_files(directory: Path, stage: str) -> RecordedFiles:
    """The files of a stage's directory, as far as they were digested.

    Raises:
        InputError: The manifest is damaged.
    """
    manifest = stage_manifest(directory, stage)
    try:
        files = read_json(manifest)["results"]["files"] if manifest else {}
        digests = {name: of["sha256"] for name, of in files.items() if "sha256" in of}
    except (KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{manifest} is damaged: run {stage} again") from error
    return RecordedFiles(directory, digests, stage)
