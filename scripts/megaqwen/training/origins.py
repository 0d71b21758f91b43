"""What a training was started from: where that changed, its checkpoints are those of another training.

Their directory is named after the config, which is the same when a corpus's files or a model's change in
place. What was made of them says whether they did, by digests: a model that was only copied or touched is
converted again to the same files. It is the launcher that decides, before any rank starts: no torch is
imported here.
"""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from megaqwen.provenance import read_json, write_json
from megaqwen.training import lease

RECORD = "trained-from.json"
ASIDE = "before-"


def set_apart(directory: Path, manifests: Iterable[Path]) -> str:
    """Move what a training from other files left in a directory into a folder below it.

    What was there before such records were kept stays: nothing can be held against it.

    Args:
        directory: Of a training's checkpoints; no other process writes there.
        manifests: Of the stages that made what is trained from.

    Returns:
        What changed and what became of it, for a person; empty where nothing did.
    """
    made = {record["stage"]: record["results"]["files"] for record in map(read_json, manifests)}
    record, said = directory / RECORD, ""
    known = read_json(record) if record.is_file() else made
    changed = [
        f"{name} of {stage}"
        for stage, files in made.items()
        for name in differing(files, known.get(stage, files))
    ]
    if changed:
        aside = move_aside(directory)
        said = (
            f"what is trained from has changed ({', '.join(changed)}): training starts again. What the"
            f" earlier one left is kept in {aside}"
        )
    write_json(record, made)
    return said


def differing(files: Mapping[str, Any], known: Mapping[str, Any]) -> list[str]:
    """The names of the files that are in one of two stages' results, or not the same in both."""
    return [name for name in sorted({*files, *known}) if files.get(name) != known.get(name)]


def move_aside(directory: Path) -> Path:
    """Move all but the lease, and what was moved before, into a new folder; returns it.

    The record goes last: after a kill in between the rest is moved by the next start.
    """
    number = 1
    while (aside := directory / f"{ASIDE}{number}").exists():
        number += 1
    names = (path.name for path in directory.iterdir())
    moving = [name for name in names if not name.startswith(ASIDE) and lease.NAME not in name]
    aside.mkdir()
    for name in sorted(moving, key=RECORD.__eq__):
        (directory / name).rename(aside / name)
    return aside
