"""A model repository on the Hugging Face Hub, downloaded at one commit.

Everything arrives in a hidden directory beside the final one, which survives an interruption. It is
given its name only when every file has the digest that the Hub states.
"""

import glob
import hashlib
import logging
import os
import shutil
import signal
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from huggingface_hub import HfApi, ModelInfo, constants, snapshot_download
from huggingface_hub.utils import disable_progress_bars

from megaqwen.errors import InputError
from megaqwen.provenance import publish_directory, sha256_file
from megaqwen.sources.hub_errors import TRY_AGAIN, clear_hub_errors, environment_token
from megaqwen.sources.hub_resume import UNFINISHED, finish_interrupted_files
from megaqwen.sources.progress import bytes_on_disk, logged_progress
from megaqwen.sources.verify import check_architecture, verify_model_directory
from megaqwen.words import readable_bytes

logger = logging.getLogger("megaqwen.download")

WANTED_SUFFIXES = (".safetensors", ".json", ".jinja")
WANTED_NAMES = ("merges.txt", "LICENSE")
FILES_AT_ONCE = 4
SPARE_BYTES = 10_000_000  # of free disk, beside the files


@dataclass(frozen=True, kw_only=True)
class HubFile:
    """What the Hub says of one file."""

    name: str
    bytes: int | None
    """None where a mirror does not say."""
    sha256: str | None
    """Of large files (LFS) only."""
    git_blob: str | None
    """Git's SHA-1 of the blob: what is known of a small file."""


@dataclass(frozen=True, kw_only=True)
class HubSnapshot:
    """What was downloaded."""

    commit: str
    files: dict[str, dict[str, Any]]
    """Bytes and SHA-256 by name."""


def download_model(repo_id: str, revision: str, directory: Path) -> HubSnapshot:
    """Download the model to `directory`, which an earlier, unfinished download may speed up.

    Args:
        repo_id: Owner and name.
        revision: Branch, tag or commit.
        directory: Gets config, weights (safetensors), tokenizer; replaced if it is there.

    Raises:
        InputError: Anything that the user can mend, from the repository's name to a full disk.
    """
    disable_progress_bars()
    if "HF_HUB_DISABLE_XET" not in os.environ:
        constants.HF_HUB_DISABLE_XET = True  # it begins again with a file that was interrupted
    token = environment_token() or False  # False: no token file of the client's either
    api = HfApi(token=token)
    partial = directory.with_name(f".{directory.name}.download")
    with clear_hub_errors(api, repo_id, revision):
        info = api.model_info(repo_id, revision=revision, files_metadata=True)
        commit = str(info.sha)
        files = wanted_files(info, repo_id)
        total = sum(file.bytes or 0 for file in files)
        logger.info("%s at %s: %s", repo_id, commit[:7], readable_bytes(total))
        prepare_partial(partial, directory, files)
        with kept_when_interrupted(partial), removed_when_worthless(partial):
            config = [file for file in files if file.name == "config.json"]
            fetch(repo_id, commit, config, partial, token)
            check_architecture(partial / "config.json")
            refuse_too_little_space(partial, total)
            with logged_progress(partial, total):
                finish_interrupted_files(
                    partial,
                    {file.sha256: file.name for file in files if file.sha256},
                    repo_id=repo_id,
                    commit=commit,
                    token=token,
                )
                fetch(repo_id, commit, files, partial, token)
    described = {file.name: check_file(partial / file.name, file, repo_id) for file in files}
    verify_model_directory(partial)
    shutil.rmtree(partial / ".cache")
    publish_directory(partial, directory)
    return HubSnapshot(commit=commit, files=described)


def wanted_files(info: ModelInfo, repo_id: str) -> list[HubFile]:
    """The files of a repository that a model needs: in its top folder, and no other weights."""
    files = [
        HubFile(
            name=sibling.rfilename,
            bytes=sibling.size,
            sha256=sibling.lfs.sha256 if sibling.lfs else None,
            git_blob=sibling.blob_id,
        )
        for sibling in info.siblings or []
        if "/" not in sibling.rfilename
        and (sibling.rfilename.endswith(WANTED_SUFFIXES) or sibling.rfilename in WANTED_NAMES)
    ]
    if not any(file.name == "config.json" for file in files):
        raise InputError(f"{repo_id} has no config.json: it is not a Hugging Face model repository")
    if not any(file.name.endswith(".safetensors") for file in files):
        raise InputError(f"{repo_id} has no safetensors weights, and others are not read")
    return files


def prepare_partial(partial: Path, directory: Path, files: list[HubFile]) -> None:
    """Make the hidden directory: from an earlier result of another commit where there is one.

    What the commit does not have is removed; the client judges whether the rest is still right.
    """
    if not partial.exists() and directory.is_dir() and not directory.is_symlink():
        directory.replace(partial)
    partial.mkdir(parents=True, exist_ok=True)
    expected = {file.name for file in files} | {".cache"}
    for path in partial.iterdir():
        if path.name not in expected:
            remove(path)


def remove(path: Path) -> None:
    """Remove a file or a directory."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()


def fetch(
    repo_id: str, commit: str, files: list[HubFile], partial: Path, token: str | bool
) -> None:
    """Download files that are not in `partial` yet."""
    snapshot_download(
        repo_id,
        revision=commit,
        local_dir=partial,
        allow_patterns=[glob.escape(file.name) for file in files],
        max_workers=FILES_AT_ONCE,
        token=token,
    )


@contextmanager
def kept_when_interrupted(partial: Path) -> Iterator[None]:
    """On Ctrl-C or when terminated, leave the process at once.

    The client's threads would first go on until their files are whole, or else delete what they
    have of them; left as it lies, it is resumed.
    """

    def leave(number: int, frame: FrameType | None) -> None:
        logger.error("interrupted: %s (%s)", TRY_AGAIN, partial)
        os._exit(128 + number)

    earlier = {number: signal.signal(number, leave) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in earlier.items():
            signal.signal(number, handler)


@contextmanager
def removed_when_worthless(partial: Path) -> Iterator[None]:
    """After an error, leave the hidden directory only where it has weights to go on with."""
    try:
        yield
    except BaseException:
        if not any(partial.glob("*.safetensors")) and not any(partial.glob(UNFINISHED)):
            shutil.rmtree(partial)
            with suppress(OSError):  # not empty
                partial.parent.rmdir()
        raise


def refuse_too_little_space(partial: Path, total: int) -> None:
    """InputError where the disk cannot take what is still to come."""
    missing = total - bytes_on_disk(partial) + SPARE_BYTES
    free = shutil.disk_usage(partial).free
    if missing > free:
        raise InputError(
            f"{partial.parent}: {readable_bytes(missing)} are needed and {readable_bytes(free)} are"
            f" free: free some space, or set `results` to another disk; {TRY_AGAIN}"
        )


def check_file(path: Path, file: HubFile, repo_id: str) -> dict[str, Any]:
    """Compare a file with what the Hub says of it.

    Returns:
        Its bytes and SHA-256, for the manifest.

    Raises:
        InputError: It differs. It is deleted, so that the next try fetches it again.
    """
    if not path.is_file():
        raise InputError(f"{repo_id}: {file.name} did not arrive; {TRY_AGAIN}")
    size = path.stat().st_size
    sha256 = sha256_file(path)
    expected, actual = (
        (file.sha256, sha256) if file.sha256 else (file.git_blob, git_blob_digest(path))
    )
    if (file.bytes is not None and size != file.bytes) or (expected and actual != expected):
        path.unlink()
        stated = "" if file.bytes is None else f"{file.bytes:,} bytes and "
        raise InputError(
            f"{repo_id}: {file.name} arrived damaged: {size:,} bytes with digest {actual}; the Hub"
            f" says {stated}{expected}. It was deleted: run the same command again"
        )
    return {"bytes": size, "sha256": sha256}


def git_blob_digest(path: Path) -> str:
    """Git's SHA-1 of a file as a blob, in hex."""
    content = path.read_bytes()
    return hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()
