"""Say what each run is at, from the files below results/ alone: no Slurm, no network, no waiting.

    python scripts/status.py
    python scripts/status.py --results results my-run another-run

A line for each run: its stage and whether that runs, failed or waits, training's Slurm job, nodes,
iteration, loss and time left, and how long ago the stage last wrote something.
"""

import argparse
import sys
from pathlib import Path

from megaqwen.errors import InputError
from megaqwen.run_status import run_status, table


def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--results", type=Path, default=Path("results"))
    parser.add_argument("runs", nargs="*", help="names (default: every run)")
    arguments = parser.parse_args()
    directory = arguments.results / "runs"
    names = arguments.runs or sorted(path.parent.name for path in directory.glob("*/config.yaml"))
    try:
        sys.stdout.write(table([run_status(directory / name) for name in names]))
    except InputError as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
