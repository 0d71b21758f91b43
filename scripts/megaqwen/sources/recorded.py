"""What download recorded of a model: nothing of one that a person gives to a command by hand."""

from pathlib import Path

from megaqwen.errors import InputError
from megaqwen.provenance import read_json


def download_manifest(model: Path) -> dict[str, Path]:
    """Download's manifest as a stage's input, or nothing where download did not bring the model.

    Args:
        model: A model directory; the manifest is beside it.
    """
    manifest = model.parent / "manifest.json"
    try:
        ours = manifest.is_file() and read_json(manifest).get("stage") == "download"
    except (ValueError, AttributeError):
        ours = False  # another program's file of that name
    return {"model": manifest} if ours else {}


def recorded_digests(model: Path) -> dict[str, str]:
    """SHA-256 of the model's files by name, as far as they were digested: a path's are not.

    Raises:
        InputError: The manifest is damaged.
    """
    digests: dict[str, str] = {}
    for manifest in download_manifest(model).values():
        try:
            files = read_json(manifest)["results"]["files"]
            digests |= {name: of["sha256"] for name, of in files.items() if "sha256" in of}
        except (KeyError, TypeError, AttributeError) as error:
            raise InputError(f"{manifest} is damaged: run download again") from error
    return digests
