"""A copy of the tokenized data on each node's own disk, which the ranks of the node read.

One rank of a node copies and the others wait for it, by a lock on the node's disk: no rank of another
node takes part, and two trainings on one node share a copy of the same data. A copy is known by its
digests, so that one that is left is used again; the last rank that leaves removes it. A corpus keeps its
own path as its name: samples and their order are the same with a copy and without.
"""

import contextlib
import dataclasses
import fcntl
import hashlib
import logging
import os
import shutil
import socket
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy

from megaqwen.config.sections import Scratch
from megaqwen.errors import InputError, is_disk_full
from megaqwen.provenance import digest, temporary_sibling
from megaqwen.words import readable_bytes

logger = logging.getLogger("megaqwen.training")

BLOCK = 8 << 20  # bytes copied and digested at a time
WHOLE = "whole"  # a file that says so of a copy
INDICES = "indices"
SPARE = 64 << 20  # bytes that are left free beside the data


@dataclass(frozen=True, kw_only=True)
class Copy:
    """This node's copy of some data, while its lock is held."""

    data: Path
    """The directory that was copied: preprocess's."""
    directory: Path
    """The copy: the files of the data, and the indices that training made of them."""

    def of_indices(self, dataset: Any, cache: Path) -> None:
        """Let a dataset of Megatron's, and those that it draws from, read their indices here as well.

        Args:
            dataset: None where this rank reads none. Arrays that were just built are in memory, and stay.
            cache: Where the indices were built.
        """
        for name, value in list(vars(dataset).items()) if dataset is not None else ():
            setattr(dataset, name, self.of_value(value, cache.resolve()))
        for inner in getattr(dataset, "datasets", []):
            self.of_indices(inner, cache)

    def of_value(self, value: Any, cache: Path) -> Any:
        """An array, or a dataclass that has some: those that are mapped from the cache, mapped here."""
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            fields = {each.name: getattr(value, each.name) for each in dataclasses.fields(value)}
            mapped = {name: self.of_value(array, cache) for name, array in fields.items()}
            differ = {name: array for name, array in mapped.items() if array is not fields[name]}
            return dataclasses.replace(value, **differ) if differ else value
        if not isinstance(value, numpy.memmap):
            return value
        file = Path(str(value.filename)).resolve()
        in_cache = file.is_relative_to(cache)
        return numpy.load(self.index(file, cache), mmap_mode="r") if in_cache else value

    def index(self, file: Path, cache: Path) -> Path:
        """This node's copy of an index, made by the first rank that asks for it."""
        copy = self.directory / INDICES / cache.name / file.relative_to(cache)
        copy.parent.mkdir(parents=True, exist_ok=True)
        with open(copy.with_name(f"{copy.name}.lock"), "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not copy.is_file() or changed(file, copy):
                check_space(self.directory, file.stat().st_size)
                partial = temporary_sibling(copy)
                shutil.copy2(file, partial)
                partial.replace(copy)
        return copy


def changed(file: Path, copy: Path) -> bool:
    """Whether a file is another one than when it was copied."""
    ours, theirs = copy.stat(), file.stat()
    return (ours.st_size, ours.st_mtime_ns) != (theirs.st_size, theirs.st_mtime_ns)


@contextlib.contextmanager
def copied(
    settings: Scratch, data: Path, files: Mapping[str, Mapping[str, Any]], names: Iterable[str]
) -> Iterator[Copy | None]:
    """Hold this node's copy of the data; None where the config asks for none.

    Args:
        settings: The config's section.
        data: Preprocess's directory.
        files: By their names, the size and the digest that its manifest has of each.
        names: Of the corpora that are trained on.

    Raises:
        InputError: The directory is not there, too full, or what came out is not what the manifest says.
    """
    if not settings.directory:
        yield None
        return
    wanted = {file: facts for file, facts in sorted(files.items()) if corpus_of(file) in set(names)}
    directory = place(settings.directory) / f"megaqwen-{digest(wanted)}"
    lock = held(directory, data, wanted)
    try:
        yield Copy(data=data, directory=directory)
    finally:
        if settings.keep:
            lock.close()
        else:
            leave(lock, directory)


def corpus_of(file: str) -> str:
    """The corpus that one of preprocess's files is of."""
    name = file.removesuffix(".bin").removesuffix(".idx")
    return name.removesuffix(".targets")


def place(directory: str) -> Path:
    """scratch.directory on this node, where its variables are set."""
    expanded = os.path.expandvars(directory)
    host = socket.gethostname()
    if "$" in expanded:
        raise InputError(
            f"scratch.directory is {directory}, and a variable in it is not set on {host}: name one that"
            " is, or a path"
        )
    path = Path(expanded).expanduser()
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(
            f"scratch.directory is {directory}, and {path} cannot be made on {host}: {error.strerror}"
        ) from error
    if not os.access(path, os.W_OK | os.X_OK):
        raise InputError(
            f"scratch.directory is {directory}, and {path} on {host} cannot be written to"
        )
    return path


def held(directory: Path, data: Path, files: Mapping[str, Mapping[str, Any]]) -> Any:
    """The shared lock on a whole copy; makes the copy where no other rank of the node did."""
    path = lock_of(directory)
    while True:
        lock = open(path, "w")  # noqa: SIM115  held until the training ends
        fcntl.flock(lock, fcntl.LOCK_SH)
        if not removed(lock, path):
            break
        lock.close()  # the last rank of an earlier training took it along
    with open(making_lock_of(directory), "w") as making:
        fcntl.flock(making, fcntl.LOCK_EX)  # the others wait here for the one that copies
        if not is_whole(directory, files):
            make_copy(directory, data, files)
    return lock


def is_whole(directory: Path, files: Mapping[str, Mapping[str, Any]]) -> bool:
    """Whether a copy that was left came to its end, and its files are still there in their sizes."""
    if not (directory / WHOLE).is_file():
        return False
    with contextlib.suppress(FileNotFoundError):
        return all(
            (directory / name).stat().st_size == facts["bytes"] for name, facts in files.items()
        )
    return False


def lock_of(directory: Path) -> Path:
    """The file whose lock all ranks share that read a copy."""
    return directory.with_name(f"{directory.name}.lock")


def making_lock_of(directory: Path) -> Path:
    """The file whose lock the rank has that makes a copy."""
    return directory.with_name(f"{directory.name}.making")


def removed(lock: Any, path: Path) -> bool:
    """Whether the file of a lock is not the one at its path any more."""
    with contextlib.suppress(FileNotFoundError):
        return os.fstat(lock.fileno()).st_ino != path.stat().st_ino
    return True


def leave(lock: Any, directory: Path) -> None:
    """Give the lock back, and remove the copy where no other rank of the node has it."""
    fcntl.flock(lock, fcntl.LOCK_UN)  # first, or two that leave at once would both stay
    with contextlib.suppress(BlockingIOError):
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if not removed(lock, lock_of(directory)):
            shutil.rmtree(directory, ignore_errors=True)
            making_lock_of(directory).unlink(missing_ok=True)
            lock_of(directory).unlink(missing_ok=True)
    lock.close()


def make_copy(directory: Path, data: Path, files: Mapping[str, Mapping[str, Any]]) -> None:
    """Copy the files, and hold each against its digest while it is read."""
    shutil.rmtree(directory, ignore_errors=True)  # what a kill left
    size = sum(facts["bytes"] for facts in files.values())
    check_space(directory.parent, size)
    logger.info("copying %s of data to %s", readable_bytes(size), directory)
    directory.mkdir()
    try:
        for name, facts in files.items():
            copy_file(data / name, directory / name, facts["sha256"])
    except OSError as error:
        shutil.rmtree(directory, ignore_errors=True)
        if is_disk_full(error):
            raise no_space(directory.parent, size) from error
        raise
    except InputError:
        shutil.rmtree(directory, ignore_errors=True)
        raise
    sync(directory)
    (directory / WHOLE).touch()


def sync(directory: Path) -> None:
    """Have the disk keep the names in a directory, whatever happens to the machine."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def copy_file(source: Path, target: Path, sha256: str) -> None:
    """Copy a file to the disk itself; InputError where it is not the one that has the digest."""
    found = hashlib.sha256()
    with open(source, "rb", buffering=0) as reader, open(target, "wb", buffering=0) as writer:
        while block := reader.read(BLOCK):
            found.update(block)
            writer.write(block)
        os.fsync(writer.fileno())
    if found.hexdigest() != sha256:
        raise InputError(
            f"{source} is not the file that its manifest.json names: run preprocess again"
        )


def check_space(directory: Path, size: int) -> None:
    """InputError unless a directory's disk has room for so many bytes."""
    if shutil.disk_usage(directory).free < size + SPARE:
        raise no_space(directory, size)


def no_space(directory: Path, size: int) -> InputError:
    """The data does not fit."""
    free = readable_bytes(shutil.disk_usage(directory).free)
    return InputError(
        f"scratch.directory {directory} on {socket.gethostname()} has {free} free, and"
        f" {readable_bytes(size)} of data are to be copied there: name a larger disk, or leave it out"
    )
