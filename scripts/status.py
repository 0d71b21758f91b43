"""Say what each run is at, from the files below results/ alone: no Slurm, no network, no waiting.

    python scripts/status.py
    python scripts/status.py --results results my-run another-run

A line for each run: its stage and whether that runs, waits, failed or was told to stop, training's
Slurm job, nodes, iteration, loss and time left, and how long ago the stage last wrote something. The
exit status is 2 where there is no run, or a run's config cannot be read.
"""

import argparse
import sys
from pathlib import Path

from megaqwen.errors import InputError
from megaqwen.run_status import RunStatus, run_status, table


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
    if not names:
        sys.stderr.write(f"error: no run below {directory}: --results names a config's results\n")
        return 2
    rows, errors = [], []
    for name in names:
        try:
            rows.append(run_status(directory / name))
        except InputError as error:
            rows.append(RunStatus(run=name, stage="no config"))
            errors.append(f"error: {name}: {error}\n")
    sys.stdout.write(table(rows))
    sys.stderr.writelines(errors)
    return 2 if errors else 0


if __name__ == "__main__":
    sys.exit(main())
