"""Filesystems for checkpoints, mounted in the cluster alone, with the room that a scenario leaves."""

import shutil
from pathlib import Path
from typing import Protocol

from cluster import Cluster

IMAGE_BYTES = 1 << 30


class Disk(Protocol):
    """A filesystem."""

    message: str
    """The system's, when there is no room left."""

    def leave(self, kilobytes: int) -> None:
        """Let it have room for so much beside what it holds."""


class SmallDisk:
    """In memory."""

    message = "No space left on device"

    def __init__(self, cluster: Cluster, directory: Path, kilobytes: int):
        """Mount it."""
        self.cluster, self.directory = cluster, directory
        directory.mkdir(parents=True, exist_ok=True)
        cluster.run("mount", "-t", "tmpfs", "-o", f"size={kilobytes}k", "tmpfs", directory)

    def leave(self, kilobytes: int) -> None:
        """By its size."""
        words = ("df", "--output=used", "--block-size=1K", self.directory)
        held = int(self.cluster.run(*words).split()[-1])
        size = f"remount,size={held + kilobytes}k"
        self.cluster.run("mount", "-o", size, self.directory)


class Quota:
    """On btrfs, whose quotas hold for root as well."""

    message = "Disk quota exceeded"

    def __init__(self, cluster: Cluster, directory: Path, image: Path):
        """Mount it; an AssertionError where there is no device for that."""
        self.cluster, self.directory = cluster, directory
        directory.mkdir(parents=True)
        with open(image, "wb") as stream:
            stream.truncate(IMAGE_BYTES)
        cluster.run("mkfs.btrfs", "--quiet", image)
        cluster.run("mount", "-o", "loop", image, directory)
        cluster.run("btrfs", "quota", "enable", directory)

    def leave(self, kilobytes: int) -> None:
        """By a limit on what it may hold."""
        self.cluster.run("btrfs", "filesystem", "sync", self.directory)
        shown = self.cluster.run("btrfs", "qgroup", "show", "--raw", self.directory)
        (held,) = (line.split()[1] for line in shown.splitlines() if line.startswith("0/5 "))
        limit = int(held) + kilobytes * 1024
        self.cluster.run("btrfs", "qgroup", "limit", limit, self.directory)


def quota(cluster: Cluster, directory: Path, image: Path) -> Disk:
    """A quota, or where none can be had a small disk."""
    if shutil.which("mkfs.btrfs", path="/usr/sbin:/sbin"):
        try:
            return Quota(cluster, directory, image)
        except AssertionError:
            pass
    return SmallDisk(cluster, directory, IMAGE_BYTES // 1024)
