"""Put the runs of a sweep beside each other: what each was given, its losses and its parity verdicts.

    python scripts/sweep.py --config results/sweeps/NAME/config.yaml --output results/sweeps/NAME

DIR gets sweep.html (a table and figures), sweep.csv (the table) and sweep.svg (the figures). Runs that
have not ended yet are in the table as well, so that it can be made at any time.
"""

import argparse
import logging
import sys
from pathlib import Path

from megaqwen.console import run_command, stage_parser
from megaqwen.errors import InputError
from megaqwen.provenance import write_text
from megaqwen.runs import read_runs
from megaqwen.sweep_table import as_csv, sweep_lines, sweep_rows

logger = logging.getLogger("megaqwen.sweep")


def sweep(arguments: argparse.Namespace) -> None:
    """Run the stage."""
    runs = read_runs(arguments.config)
    if not runs.is_sweep:
        raise InputError(f"{arguments.config} has no sweep: scripts/report.py reports one run")
    rows = sweep_rows(runs)

    from megaqwen.report.sweep import sweep_figure, sweep_page

    figure = sweep_figure(rows)
    write_text(arguments.output / "sweep.csv", as_csv(rows))
    write_text(arguments.output / "sweep.svg", figure or "<svg/>\n")
    write_text(arguments.output / "sweep.html", sweep_page(runs.name, rows, figure))
    for line in sweep_lines(runs):
        logger.info(line)


def main() -> int:
    """The command."""
    parser = stage_parser(__doc__)
    parser.add_argument("--output", type=Path, required=True, help="the sweep's directory")
    return run_command(sweep, parser)


if __name__ == "__main__":
    sys.exit(main())
