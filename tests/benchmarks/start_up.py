"""What a rank does until its first iteration, by the number of ranks: time, and calls to filesystems.

    uv run python tests/benchmarks/start_up.py --directory DIR
    uv run python tests/benchmarks/start_up.py --directory DIR --worlds 1 512 --calls

The first and the last rank of each number of ranks, on this machine one after the other; the others are
not there (start_up_rank.py). --calls counts by strace what is asked of filesystems: opened files, and
looks at names, of the run (model, checkpoint, data, output) and of everything else, such as imports.
"""

import argparse
import json
import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[2] / "scripts")]

from workspace import Workspace, prepare  # noqa: E402  a test's

RANK = Path(__file__).with_name("start_up_rank.py")
RANKS_PER_NODE = 8
OPENED = re.compile(r"\b(openat|open)\(")
CALL = re.compile(r'\b\w+\((?:AT_FDCWD, )?"([^"]+)"')


def words(workspace: Workspace, output: Path) -> list[str]:
    """Those of scripts/train.py."""
    options = {"global_batch_size": 512, "micro_batch_size": 1, "use_distributed_optimizer": True}
    launch = workspace.launch_words("start-up", 1, options)
    train = launch[launch.index(str(Path(__file__).parents[2] / "scripts" / "train.py")) + 1 :]
    train[train.index("--output") + 1] = str(output)
    return train


def start(
    workspace: Workspace, rank: int, world: int, calls: Path | None = None
) -> dict[str, float]:
    """Start one rank; its seconds by phase."""
    output = workspace.directory / f"world-{world}"
    strace = ["strace", "-f", "-qq", "-e", "trace=%file", "-o", str(calls)] if calls else []
    done = subprocess.run(
        [*strace, sys.executable, str(RANK), *words(workspace, output)],
        env={
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "RANK": str(rank),
            "WORLD_SIZE": str(world),
            "LOCAL_RANK": str(rank % RANKS_PER_NODE),
            "MASTER_ADDR": "localhost",
            "MASTER_PORT": "29500",
        },
        capture_output=True,
        text=True,
    )
    lines = [line for line in done.stdout.splitlines() if line.startswith('{"')]
    if done.returncode or not lines:
        raise SystemExit(f"rank {rank} of {world}:\n{done.stdout[-4000:]}{done.stderr[-4000:]}")
    seconds: dict[str, float] = json.loads(lines[-1])
    return seconds


def counted(calls: Path, directory: Path) -> Counter[str]:
    """Opened files and looks at names, of the run and of everything else."""
    found: Counter[str] = Counter()
    for line in calls.read_text(errors="replace").splitlines():
        if match := CALL.search(line):
            path = Path(match[1])
            own = "run" if path.is_relative_to(directory) else "else"
            found[f"{own} {'opened' if OPENED.search(line) else 'looked at'}"] += 1
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--directory", type=Path, required=True, help="for a tiny model and its data"
    )
    parser.add_argument("--worlds", type=int, nargs="+", default=[1, 8, 64, 512])
    parser.add_argument("--calls", action="store_true", help="count calls, by strace, not seconds")
    arguments = parser.parse_args()
    directory = arguments.directory.resolve()
    if (directory / "data").is_dir():
        workspace = Workspace(directory=directory)
    else:
        directory.mkdir(parents=True, exist_ok=True)
        workspace = prepare(directory)
    header: list[str] = []
    for world in arguments.worlds:
        for rank in sorted({0, world - 1}):
            if arguments.calls:
                trace = directory / "calls.txt"
                start(workspace, rank, world, trace)
                figures = {name: str(n) for name, n in sorted(counted(trace, directory).items())}
            else:
                seconds = start(workspace, rank, world)
                figures = {name: f"{each:.2f}" for name, each in seconds.items()}
            if not header:
                header = list(figures)
                print("ranks", "rank", *header, sep=" | ")
            print(world, rank, *(figures.get(name, "") for name in header), sep=" | ", flush=True)


if __name__ == "__main__":
    main()
