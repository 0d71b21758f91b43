"""Which of a training's checkpoints are whole, and which of them stay.

Below each iteration's directory `files.json` has the name and size of every file: written last, before
Megatron's tracker names the iteration. `checksums.rankN.json` follow with the CRC-32 of the files that a
rank wrote, made in the background while training goes on: a kill in between leaves the sizes to check by.

It imports no torch: the launcher decides with it, before any rank starts, what training resumes from.
"""

import contextlib
import shutil
import zlib
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from megaqwen.provenance import read_json, write_json, write_text

TRACKER = "latest_checkpointed_iteration.txt"
PREFIX = "iter_"
LAST_OF_MEGATRON = "metadata.json"
FILES = "files.json"
CHECKSUMS = "checksums.*.json"
DAMAGED, REMOVED = "damaged-", ".removed-"
BLOCK_BYTES = 8 << 20
THREADS = 8  # zlib lets other threads run while it computes

Verify = Literal["checksums", "sizes"]


def iteration_name(iteration: int) -> str:
    """Megatron's name for an iteration's directory."""
    return f"{PREFIX}{iteration:07d}"


def iterations(root: Path) -> list[int]:
    """The iterations whose directories are there, whole or not, in order."""
    names = (path.name.removeprefix(PREFIX) for path in root.glob(f"{PREFIX}*") if path.is_dir())
    return sorted(int(name) for name in names if name.isdigit())


def tracked_iteration(root: Path) -> int:
    """The iteration that Megatron's tracker names; 0 where it names none."""
    with contextlib.suppress(FileNotFoundError, ValueError):
        return int((root / TRACKER).read_text(encoding="utf-8"))
    return 0


def crc32_of(path: Path) -> str:
    """The CRC-32 of a file's bytes, in hex."""
    checksum = 0
    with open(path, "rb", buffering=0) as stream:
        while block := stream.read(BLOCK_BYTES):
            checksum = zlib.crc32(block, checksum)
    return f"{checksum:08x}"


def write_sizes(directory: Path) -> None:
    """Record the names and sizes of an iteration's files, all of which are written."""
    sizes = {name: (directory / name).stat().st_size for name in megatron_files(directory)}
    write_json(directory / FILES, {"files": sizes})


def forget_save(directory: Path) -> None:
    """Remove what says that an iteration is whole: it is saved again, which may be cut short."""
    for path in (directory / FILES, directory / LAST_OF_MEGATRON, *directory.glob(CHECKSUMS)):
        path.unlink(missing_ok=True)


def megatron_files(directory: Path) -> list[str]:
    """The names of the files that Megatron wrote; ours are still being written while this is asked."""
    names = (path.name for path in directory.iterdir() if path.is_file())
    return sorted(
        name
        for name in names
        if (name != FILES and not name.startswith((".", "checksums."))) or name == ".metadata"
    )


def write_checksums(directory: Path, writer: str, names: Iterable[str]) -> None:
    """Record the CRC-32 of the files that one writer, such as rank3, wrote."""
    checksums = {name: crc32_of(directory / name) for name in names}
    write_json(directory / f"checksums.{writer}.json", {"crc32": checksums})


def is_finished(directory: Path) -> bool:
    """Whether Megatron wrote all of it: else a kill or a full disk cut the save short."""
    last = directory / LAST_OF_MEGATRON
    # A full disk leaves an empty one.
    return last.is_file() and last.stat().st_size > 0 and (directory / ".metadata").is_file()


def damage(directory: Path, verify: Verify) -> list[str]:
    """What is wrong with the files of a finished checkpoint, each by its name; [] of a whole one.

    Without `files.json`, as another program's checkpoints are, nothing can be held against them.
    """
    if not (directory / FILES).is_file():
        return []
    try:
        sizes = dict(read_json(directory / FILES)["files"])
    except (ValueError, KeyError, TypeError):
        return [f"{FILES} cannot be read"]
    wrong = []
    for name, size in sizes.items():
        path = directory / name
        if not path.is_file():
            wrong.append(f"{name} is missing")
        elif (found := path.stat().st_size) != size:
            wrong.append(f"{name} has {found:,} of its {size:,} bytes")
    return wrong or (wrong_checksums(directory) if verify == "checksums" else [])


def wrong_checksums(directory: Path) -> list[str]:
    """The files whose bytes are not those that were written."""
    recorded: dict[str, str] = {}
    for path in sorted(directory.glob(CHECKSUMS)):
        try:
            recorded |= read_json(path)["crc32"]
        except (ValueError, KeyError, TypeError):
            return [f"{path.name} cannot be read"]

    def check(name: str) -> str | None:
        try:
            found = crc32_of(directory / name)
        except OSError as error:
            return f"{name} cannot be read: {error.strerror}"
        if found != recorded[name]:
            return f"{name} has CRC-32 {found}, {recorded[name]} was written"
        return None

    with ThreadPoolExecutor(THREADS) as threads:
        return [wrong for wrong in threads.map(check, recorded) if wrong]


@dataclass(kw_only=True)
class Prepared:
    """What training finds after `prepare`."""

    iteration: int
    """It resumes after this one; 0: it starts from the converted weights."""
    said: list[str] = field(default_factory=list)
    """What was found wrong and what became of it."""


def prepare(root: Path, verify: Verify = "checksums") -> Prepared:
    """Leave the newest whole checkpoint as the one that training resumes from.

    What a save cut short left is removed, a damaged checkpoint is set aside under another name, and
    Megatron's tracker corrected. Call it while no other process writes there.
    """
    prepared = Prepared(iteration=0)
    for leftover in root.glob(f"{REMOVED}*"):
        shutil.rmtree(leftover, ignore_errors=True)
    for iteration in reversed(iterations(root)):
        directory = root / iteration_name(iteration)
        if not is_finished(directory):
            prepared.said.append(f"removing {directory}, which is not complete")
            remove(directory)
        elif wrong := damage(directory, verify):
            aside = set_aside(directory)
            prepared.said.append(
                f"the checkpoint of iteration {iteration} is damaged: {'; '.join(wrong)}."
                f" It is kept as {aside}, and not resumed from"
            )
        else:
            prepared.iteration = iteration
            break
    correct_tracker(root, prepared)
    return prepared


def correct_tracker(root: Path, prepared: Prepared) -> None:
    """Let Megatron's tracker name the iteration that was found whole."""
    tracker, tracked = root / TRACKER, tracked_iteration(root)
    if not prepared.iteration:
        if tracker.is_file():
            tracker.unlink()
            prepared.said.append(
                "no checkpoint is whole: training starts from the converted weights"
            )
    elif tracked != prepared.iteration:
        write_text(tracker, str(prepared.iteration))
        prepared.said.append(
            f"resuming from iteration {prepared.iteration}, the newest whole checkpoint"
            f" ({TRACKER} named {tracked or 'none'})"
        )


def set_aside(directory: Path) -> Path:
    """Give a damaged checkpoint a name that nothing reads; returns it."""
    number = 1
    while (aside := directory.with_name(f"{DAMAGED}{directory.name}-{number}")).exists():
        number += 1
    return directory.rename(aside)


def remove(directory: Path) -> None:
    """Remove a checkpoint: no kill leaves a part of it under its name."""
    leaving = directory.with_name(f"{REMOVED}{directory.name}")
    shutil.rmtree(leaving, ignore_errors=True)
    directory.rename(leaving)
    shutil.rmtree(leaving, ignore_errors=True)


def finished_iterations(root: Path) -> list[int]:
    """The iterations whose saves came to their end, in order."""
    return [each for each in iterations(root) if is_finished(root / iteration_name(each))]


def newest_finished(root: Path) -> int:
    """The newest iteration whose save came to its end; 0 where there is none."""
    return max(finished_iterations(root), default=0)


def beside(root: Path) -> str | None:
    """In words, how far another training of the run came; None where there is none."""
    places = [each for each in root.parent.glob("*") if each.is_dir() and each != root]
    reached, place = max(((newest_finished(each), each) for each in places), default=(0, root))
    if not reached:
        return None
    came = f"with other options or files one came to iteration {reached}: {place}"
    return f"this training starts anew; {came}"


def superfluous(saved: Iterable[int], *, keep_last: int, keep_every: int) -> list[int]:
    """The iterations whose checkpoints may go.

    Args:
        saved: All that are there and finished.
        keep_last: How many of the newest stay; 0: all.
        keep_every: Multiples of it stay as well; 0: no others.
    """
    older = sorted(saved)[:-keep_last] if keep_last else []
    return [each for each in older if not keep_every or each % keep_every]


def prune(root: Path, *, keep_last: int, keep_every: int) -> list[int]:
    """Remove the checkpoints that are superfluous now that another one is whole; returns them."""
    going = superfluous(finished_iterations(root), keep_last=keep_last, keep_every=keep_every)
    for iteration in going:
        remove(root / iteration_name(iteration))
    return going
