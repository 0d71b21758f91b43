"""A model directory that is already on disk: checked and linked, never copied or changed."""

from pathlib import Path
from typing import Any

from megaqwen.provenance import publish_directory, temporary_sibling
from megaqwen.sources.verify import verify_model_directory

# Weights, their index, config.json and generation_config.json; the tokenizer with its chat template.
READ = ("*.safetensors", "*.json", "*.jinja", "merges.txt")


def files_that_are_read(directory: Path) -> list[Path]:
    """The files of a model directory on which later stages depend; none of one that is not there."""
    return sorted(path for pattern in READ for path in directory.glob(pattern))


def link_model(source: Path, link: Path) -> None:
    """Check `source` and make `link` an absolute symbolic link to it.

    Raises:
        InputError: `source` is not a whole model directory.
    """
    verify_model_directory(source)
    link.parent.mkdir(parents=True, exist_ok=True)
    partial = temporary_sibling(link)
    partial.unlink(missing_ok=True)
    partial.symlink_to(source.resolve(), target_is_directory=True)
    publish_directory(partial, link)


def describe_linked_files(directory: Path) -> dict[str, dict[str, Any]]:
    """Bytes and time of change (nanoseconds since the epoch) of the files directly in a directory.

    The weights may be large and on a slow disk: they are not read for a digest.
    """
    files = sorted(path for path in directory.iterdir() if path.is_file())
    return {
        path.name: {"bytes": path.stat().st_size, "modified_ns": path.stat().st_mtime_ns}
        for path in files
    }
