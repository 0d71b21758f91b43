"""What the machine has left."""

from pathlib import Path

import psutil

CGROUPS = Path("/sys/fs/cgroup")


def free_memory(membership: Path = Path("/proc/self/cgroup"), cgroups: Path = CGROUPS) -> int:
    """Bytes that this process may still take: of the machine's, and of its cgroup's.

    A Slurm job and a container have a cgroup (v2) with a limit of its own; files that it caches do not
    count, since they give way.

    Args:
        membership: Where Linux tells a process its cgroup.
        cgroups: Where the cgroups are mounted.
    """
    free = int(psutil.virtual_memory().available)
    lines = membership.read_text().splitlines() if membership.is_file() else []
    (path,) = [line.removeprefix("0::/") for line in lines if line.startswith("0::/")] or [""]
    for directory in (cgroups / path, *(cgroups / path).parents):
        limit = directory / "memory.max"
        if not limit.is_file() or (most := limit.read_text().strip()) == "max":
            continue
        statistics = dict(
            line.split() for line in (directory / "memory.stat").read_text().splitlines()
        )
        used = int((directory / "memory.current").read_text()) - int(statistics["file"])
        free = min(free, int(most) - used)
    return free
