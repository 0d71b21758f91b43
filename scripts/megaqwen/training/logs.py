"""What the launcher says, and what it finds in the logs of its ranks."""

import contextlib
import re
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

FAILED = " ERROR "  # a record's level, as console.py formats it
SLURM = re.compile(r"(srun|slurmstepd\S*): error: ")  # how Slurm's own words on ranks begin
# In them, without cgroups and with: a rank took more memory than the job has.
NO_MEMORY = re.compile(r"exceeded .*memory limit|oom[_-]kill|out of memory", re.IGNORECASE)
MORE_MEMORY = (
    "it had no memory left: in the profile, mem_mb asks for more on each node; more nodes, or fewer"
    " ranks_per_node, leave more to each rank"
)


@dataclass(kw_only=True)
class LaunchLog:
    """LOG, and LOG.rankN.log of each rank: all starts append to them."""

    path: Path
    lengths: dict[Path, int] = field(default_factory=dict)
    """Of all of them when the ranks were started."""

    def say(self, text: str, level: str = "INFO") -> None:
        """Write a line to the terminal and to LOG, to each where it can be written to.

        On a full disk, and without its terminal, the launcher does what the words announce all the same.
        """
        with contextlib.suppress(OSError):
            sys.stderr.write(f"  {text}\n")
        moment = time.strftime("%Y-%m-%d %H:%M:%S")
        with contextlib.suppress(OSError), open(self.path, "a", encoding="utf-8") as stream:
            stream.write(f"{moment},000 {level} {text}\n")

    def ranks(self) -> list[Path]:
        """The ranks' logs that are there."""
        return sorted(self.path.parent.glob(f"{self.path.name}.rank*.log"))

    def start(self) -> None:
        """From here on the ranks of this start write."""
        paths = (path for path in (self.path, *self.ranks()) if path.is_file())
        self.lengths = {path: path.stat().st_size for path in paths}

    def lines(self, path: Path) -> list[str]:
        """What a log has since the start."""
        with open(path, encoding="utf-8", errors="replace") as stream:
            stream.seek(self.lengths.get(path, 0))
            return stream.read().splitlines()

    def errors(self) -> dict[Path, str]:
        """The last error of each rank since the start; empty where it logged none."""
        found = {}
        for path in self.ranks():
            lines = [line for line in self.lines(path) if FAILED in line]
            found[path] = lines[-1].split(FAILED, 1)[1] if lines else ""
        return found

    def slurm_errors(self) -> list[str]:
        """What Slurm says of the ranks since the start, a lack of memory first."""
        lines = [line for line in self.lines(self.path) if SLURM.match(line)]
        return sorted(lines, key=lambda line: not NO_MEMORY.search(line))

    def say_failure(self) -> None:
        """Say which rank failed and with what, unless the last one has said it on the terminal."""
        errors = self.errors()
        if errors and not list(errors.values())[-1]:
            for path, error in errors.items():
                self.say(f"{path.name}: {error or 'ended without a message'}")
        self.say(f"logs of the ranks: {self.path}.rank*.log")

    def reason(self) -> str:
        """The first error that any rank logged since the start, or else Slurm's words."""
        errors = (*self.errors().values(), *self.slurm_errors())
        error = next(filter(None, errors), "no rank left a message")
        return f"{error} ({MORE_MEMORY})" if NO_MEMORY.search(error) else error
