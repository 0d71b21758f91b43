"""Digests, atomic writes and the manifest that ends every stage.

A manifest is the only output that a stage declares to Snakemake. It is written last, so a directory
that has one is complete.
"""

import contextlib
import fcntl
import hashlib
import io
import json
import os
import platform
import resource
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Buffer, Iterator, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

from megaqwen.errors import InputError
from megaqwen.slurm_job import this_job

MANIFEST_FORMAT = 1
RECORDED_PACKAGES = (
    "snakemake",
    "megatron-core",
    "transformer-engine",
    "torch",
    "transformers",
    "tokenizers",
    "gigatoken",
    "huggingface_hub",
    "safetensors",
    "numpy",
    "pydantic",
)


def digest(value: Any) -> str:
    """The first 16 hex digits of the SHA-256 of `value` as canonical JSON (sorted keys, no spaces)."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def sha256_file(path: Path) -> str:
    """The SHA-256 of a file's bytes, in hex, read in blocks."""
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def make_again(stage: str) -> str:
    """The command that makes a stage's result anew, whatever is there; also in a sweep."""
    return f"snakemake --profile PROFILE all --forcerun {stage}"


def existing(path: Path, stage: str) -> Path:
    """`path`, or an InputError that names the stage which makes it, or what a link has lost."""
    if path.parent.is_symlink() and not path.parent.exists():
        raise InputError(
            f"{path.parent} links to {path.parent.readlink()}, which is gone: bring it back"
        )
    if not path.is_file():
        raise InputError(f"{path} is missing: run the stage that makes it ({make_again(stage)})")
    return path


def check_writable(directory: Path, *, named_by: str) -> None:
    """InputError unless a directory is there, or can be made, and can be written to.

    Args:
        directory: It need not be there yet.
        named_by: The config's key or the option that names it.
    """
    there = directory.absolute()
    while not there.exists() and there != there.parent:
        there = there.parent
    if not there.is_dir():
        raise InputError(f"{named_by} is {directory}, but {there} is a file: choose a directory")
    if not os.access(there, os.W_OK | os.X_OK):
        raise InputError(
            f"{named_by} is {directory}, but {there} cannot be written to: choose another directory"
        )


def temporary_sibling(path: Path) -> Path:
    """A name beside `path`, on the same filesystem, for what is not finished yet."""
    return path.with_name(f".{path.name}.partial-{os.getpid()}")


def write_text(path: Path, text: str) -> None:
    """Write a file so that it either has all of `text` or is as it was before."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = temporary_sibling(path)
    try:
        with open(partial, "w", encoding="utf-8") as stream:
            stream.write(text)
            stream.flush()
            os.fsync(stream.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def write_json(path: Path, value: Any) -> None:
    """`write_text` of `value` as indented JSON."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def read_json(path: Path) -> Any:
    """The value of a JSON file."""
    return json.loads(path.read_text(encoding="utf-8"))


def stands(manifest: Path, digest: str, **made_of: Path) -> bool:
    """Whether a stage's result is there, and is not that of another config or of other inputs.

    Args:
        manifest: Its own.
        digest: Of the config's part that the stage depends on.
        made_of: Manifests of the stages before it, as it names them; one that is gone says nothing.
    """
    if not manifest.is_file():
        return False
    found = read_json(manifest)
    inputs = found.get("inputs", {})
    return found.get("config_digest", digest) == digest and all(
        inputs[name]["sha256"] == sha256_file(path)
        for name, path in made_of.items()
        if name in inputs and path.is_file()
    )


def end_last_line(file: Path) -> None:
    """End a line that a kill cut short, so that the next one does not become part of it."""
    if file.is_file() and file.read_bytes()[-1:] not in (b"", b"\n"):
        with open(file, "a", encoding="utf-8") as stream:
            stream.write("\n")


@contextlib.contextmanager
def new_directory(path: Path) -> Iterator[Path]:
    """Fill a directory under a temporary name; it takes its real name when the block ends well.

    An earlier directory of that name is replaced. After an error nothing is left behind, and the
    earlier directory is untouched. What a killed process left is removed, and what another one of
    this machine is still filling is not: it holds a lock.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    for abandoned in path.parent.glob(f".{path.name}.partial-*"):
        with contextlib.suppress(FileNotFoundError), locked(abandoned) as is_ours:
            if is_ours:
                shutil.rmtree(abandoned)
    partial = temporary_sibling(path)
    partial.mkdir()
    try:
        with locked(partial):
            yield partial
            publish_directory(partial, path)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


@contextlib.contextmanager
def locked(directory: Path) -> Iterator[bool]:
    """Hold a directory's lock; False where another process does.

    A filesystem without locks of directories is as one where nobody holds any.
    """
    handle = os.open(directory, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        is_ours = True
    except OSError as error:
        is_ours = not isinstance(error, BlockingIOError)
    try:
        yield is_ours
    finally:
        os.close(handle)


def publish_directory(partial: Path, path: Path) -> None:
    """Give a finished directory its real name, replacing an earlier file, link or directory."""
    earlier = path.with_name(f".{path.name}.earlier-{os.getpid()}")
    if path.is_symlink() or path.exists():
        path.replace(earlier)
    partial.replace(path)
    if earlier.is_symlink() or earlier.is_file():
        earlier.unlink()
    else:
        shutil.rmtree(earlier, ignore_errors=True)


class DigestingStream(io.RawIOBase):
    """Writes to a file and digests on the way what it writes, so that it need not be read again.

    Small pieces should be put together by an io.BufferedWriter in front of it.
    """

    def __init__(self, stream: io.FileIO):
        """Write to `stream`, which is unbuffered and at its start."""
        super().__init__()
        self.stream = stream
        self.sha256 = hashlib.sha256()
        self.bytes = 0

    def writable(self) -> bool:
        """It is."""
        return True

    def tell(self) -> int:
        """Bytes so far."""
        return self.bytes

    def write(self, data: Buffer, /) -> int:
        """Write as much of `data` as the file takes at once."""
        written = self.stream.write(data)
        self.sha256.update(memoryview(data)[:written])
        self.bytes += written
        return written

    def facts(self) -> dict[str, Any]:
        """The file's entry in `describe_files`."""
        return {"bytes": self.bytes, "sha256": self.sha256.hexdigest()}


def describe_files(
    directory: Path, known: Mapping[Path, dict[str, Any]] | None = None
) -> dict[str, dict[str, Any]]:
    """Bytes and SHA-256 of every file below `directory`, by relative path, in sorted order.

    Args:
        directory: It and what is below it.
        known: Files that were described while they were written.
    """
    known = known or {}
    files = sorted(path for path in directory.rglob("*") if path.is_file())
    return {
        str(path.relative_to(directory)): known.get(path)
        or {"bytes": path.stat().st_size, "sha256": sha256_file(path)}
        for path in files
    }


class StageRecord:
    """What a stage did, gathered from its start and written as its manifest at its end."""

    def __init__(self, stage: str, config: Mapping[str, Any]):
        """Start the clock.

        Args:
            stage: The stage's name, as in `snakemake STAGE`.
            config: The config fields that the stage reads; `digest(config)` is its config digest.
        """
        self.stage = stage
        self.config = dict(config)
        self.started = time.time()
        # Now: Megatron is given its options as a command line, in the place of this one.
        self.command = [Path(sys.argv[0]).name, *sys.argv[1:]]

    def write(
        self,
        manifest: Path,
        *,
        inputs: Mapping[str, Path],
        results: Mapping[str, Any],
    ) -> None:
        """Write the manifest, atomically.

        Args:
            manifest: Where to write it.
            inputs: The small files (manifests) that the stage started from; their digests go in.
            results: The stage's own facts: paths relative to the manifest, counts, figures.
        """
        finished = time.time()
        write_json(
            manifest,
            {
                "format": MANIFEST_FORMAT,
                "stage": self.stage,
                "config": self.config,
                "config_digest": digest(self.config),
                "inputs": {
                    name: {"path": str(path), "sha256": sha256_file(path)}
                    for name, path in inputs.items()
                },
                "results": dict(results),
                "command": self.command,
                "versions": installed_versions(),
                "git": git_state(),
                "host": socket.gethostname(),
                "slurm_job": this_job(),
                "started": iso_time(self.started),
                "finished": iso_time(finished),
                "seconds": round(finished - self.started, 3),
                "peak_memory_bytes": peak_memory_bytes(),
            },
        )


def iso_time(seconds: float) -> str:
    """Seconds since the epoch as UTC in ISO 8601."""
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(seconds))


def peak_memory_bytes() -> int:
    """The largest resident set, in bytes, of this process or of one child that it waited for."""
    own = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    child = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
    return max(own, child) * 1024


def installed_versions() -> dict[str, str]:
    """Versions of Python and of the installed packages that can change a result."""
    versions = {"python": platform.python_version()}
    for package in RECORDED_PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[package] = metadata.version(package)
    return versions


def git_state() -> dict[str, Any] | None:
    """The commit of this repository and whether tracked files differ from it; None outside git."""
    repository = Path(__file__).resolve().parents[2]

    def git(*words: str) -> str:
        command = ["git", "-C", str(repository), *words]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        return {
            "commit": git("rev-parse", "HEAD"),
            "modified": bool(git("status", "--porcelain", "--untracked-files=no")),
        }
    except (OSError, subprocess.CalledProcessError):
        return None
