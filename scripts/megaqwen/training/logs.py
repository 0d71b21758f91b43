"""What the launcher says, and what it finds in the logs of its ranks."""

import contextlib
import re
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

from megaqwen.errors import INTERRUPTED, STOPPED

RANK_LOG = re.compile(r"\.rank(\d+)\.log$")
ERROR = re.compile(r"(\d{4}-\d\d-\d\d [\d:,]+) ERROR (.*)")  # a record, as console.py formats it
SLURM = re.compile(r"(srun|slurmstepd\S*): error: ")  # how Slurm's own words on ranks begin
# In them, without cgroups and with: a rank took more memory than the job has.
NO_MEMORY = re.compile(r"exceeded .*memory limit|oom[_-]kill|out of memory", re.IGNORECASE)
MORE_MEMORY = (
    "it had no memory left: in the profile, mem_mb asks for more on each node; more nodes, or fewer"
    " ranks_per_node, leave more to each rank"
)


@dataclass(frozen=True, order=True)
class RankError:
    """The last error that a rank logged."""

    moment: str
    """When, as console.py writes it."""
    text: str


def rank_of(log: Path) -> int:
    """The rank whose log this is; -1 where it is none's."""
    found = RANK_LOG.search(log.name)
    return int(found[1]) if found else -1


@dataclass(kw_only=True)
class LaunchLog:
    """LOG, and LOG.rankN.log of each rank: all starts append to them."""

    path: Path
    count: int | None = None
    """How many ranks there are; None: as many as have a log."""
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
        """The ranks' logs that are there, in order; without those of ranks that an earlier start had."""
        found = self.path.parent.glob(f"{self.path.name}.rank*.log")
        return [
            log
            for rank, log in sorted((rank_of(log), log) for log in found)
            if self.count is None or rank < self.count
        ]

    def start(self) -> None:
        """From here on the ranks of this start write."""
        paths = (path for path in (self.path, *self.ranks()) if path.is_file())
        self.lengths = {path: path.stat().st_size for path in paths}

    def lines(self, path: Path) -> list[str]:
        """What a log has since the start."""
        with open(path, encoding="utf-8", errors="replace") as stream:
            stream.seek(self.lengths.get(path, 0))
            return stream.read().splitlines()

    def errors(self) -> dict[Path, RankError | None]:
        """The last error of each rank since the start; None where it logged none."""
        found: dict[Path, RankError | None] = {}
        for path in self.ranks():
            records = [record for line in self.lines(path) if (record := ERROR.match(line))]
            found[path] = RankError(*records[-1].groups()) if records else None
        return found

    def slurm_errors(self) -> list[str]:
        """What Slurm says of the ranks since the start, a lack of memory first."""
        lines = [line for line in self.lines(self.path) if SLURM.match(line)]
        return sorted(lines, key=lambda line: not NO_MEMORY.search(line))

    def say_failure(self) -> None:
        """Say which rank failed and with what, unless the last one has said it on the terminal."""
        errors = self.errors()
        *_, said = (None, *errors.values())
        if errors and (said is None or said.text.startswith(INTERRUPTED)):
            for path, error in errors.items():
                self.say(f"{path.name}: {error.text if error else 'ended without a message'}")
        self.say(f"logs of the ranks: {self.path}.rank*.log")

    def reason(self) -> str:
        """The error that came first of those that ranks logged since the start, or else Slurm's words.

        What ranks say that were told to end comes after: they all save together, or another one failed.
        """
        errors = [each.text for each in sorted(filter(None, self.errors().values()))]
        stopped = [text for text in errors if text.startswith(STOPPED)]
        interrupted = [text for text in errors if text.startswith(INTERRUPTED)]
        failed = [text for text in errors if text not in (*stopped, *interrupted)]
        found = (*failed, *stopped, *self.slurm_errors(), *interrupted, "no rank left a message")
        error = found[0]
        return f"{error} ({MORE_MEMORY})" if NO_MEMORY.search(error) else error
