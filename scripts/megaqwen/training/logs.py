"""What the launcher says, and what it finds in the logs of its ranks."""

import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

FAILED = " ERROR "  # a record's level, as console.py formats it


@dataclass(kw_only=True)
class LaunchLog:
    """LOG, and LOG.rankN.log of each rank: all starts append to them."""

    path: Path
    lengths: dict[Path, int] = field(default_factory=dict)
    """Of the ranks' logs when the ranks were started."""

    def say(self, text: str, level: str = "INFO") -> None:
        """Write a line to the terminal and to LOG."""
        sys.stderr.write(f"  {text}\n")
        moment = time.strftime("%Y-%m-%d %H:%M:%S")
        with open(self.path, "a", encoding="utf-8") as stream:
            stream.write(f"{moment},000 {level} {text}\n")

    def ranks(self) -> list[Path]:
        """The ranks' logs that are there."""
        return sorted(self.path.parent.glob(f"{self.path.name}.rank*.log"))

    def start(self) -> None:
        """From here on the ranks of this start write."""
        self.lengths = {path: path.stat().st_size for path in self.ranks()}

    def errors(self) -> dict[Path, str]:
        """The last error of each rank since the start; empty where it logged none."""
        found = {}
        for path in self.ranks():
            with open(path, encoding="utf-8", errors="replace") as stream:
                stream.seek(self.lengths.get(path, 0))
                lines = [line.rstrip("\n") for line in stream if FAILED in line]
            found[path] = lines[-1].split(FAILED, 1)[1] if lines else ""
        return found

    def say_failure(self) -> None:
        """Say which rank failed and with what, unless the last one has said it on the terminal."""
        errors = self.errors()
        if errors and not list(errors.values())[-1]:
            for path, error in errors.items():
                self.say(f"{path.name}: {error or 'ended without a message'}")
        self.say(f"logs of the ranks: {self.path}.rank*.log")

    def reason(self) -> str:
        """The first error that any rank logged since the start."""
        return next((error for error in self.errors().values() if error), "no rank left a message")
