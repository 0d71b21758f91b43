"""Make a run's report: one self-contained page with curves, parity tables, config and versions.

    python scripts/report.py --config RUN/config.yaml --run RUN --manifests MANIFEST... --output DIR \\
        --card RUN/export/hf/README.md

DIR gets report.html, verification.yaml (the gates of both crossings and how to measure them again; a copy
goes beside the model card), data.json (the data card: what each corpus has and how many epochs of it were
trained on) and, one file each, the parts of it that `snakemake --report` collects.
"""

import argparse
import html
import logging
import sys
from pathlib import Path

from megaqwen.config import load_config
from megaqwen.console import run_command, stage_parser
from megaqwen.provenance import existing, new_directory, read_json, write_json, write_text
from megaqwen.summary import resolved_yaml

logger = logging.getLogger("megaqwen.report")


def report(arguments: argparse.Namespace) -> None:
    """Run the stage."""
    config = load_config(arguments.config)
    manifests = [read_json(existing(path, "report")) for path in arguments.manifests]

    from megaqwen.report import figures, pages
    from megaqwen.report.attempts import attempts_section
    from megaqwen.report.card import model_card
    from megaqwen.report.data import data_card, data_section
    from megaqwen.report.verification import as_yaml, verification
    from megaqwen.training.attempts import read_attempts
    from megaqwen.training.metrics import read_metrics

    train = next(item for item in manifests if item["stage"] == "train")
    metrics = arguments.run / "train" / train["results"]["metrics"]
    records, attempts = read_metrics(metrics), read_attempts(metrics.parent)
    text = resolved_yaml(config)
    parity = pages.parity_tables(manifests)
    versions = pages.versions_table(manifests)
    stages = pages.stages_table(manifests)
    jobs = pages.jobs_table(manifests)
    verified = as_yaml(verification(manifests))
    with new_directory(arguments.output) as directory:
        loss = figures.loss_figure(records, train["results"]["unigram_entropy"])
        rates = figures.rates_figure(records)
        write_text(directory / "loss.svg", loss)
        write_text(directory / "rates.svg", rates)
        crossings = [item["results"] for item in manifests if item["stage"].startswith("parity")]
        drawn = {results["crossing"]: figures.parity_figure(results) for results in crossings}
        for crossing, figure in drawn.items():
            write_text(directory / f"parity_{crossing}.svg", figure)
        write_text(directory / "verification.yaml", verified)
        write_text(directory / "config.yaml", text)
        write_json(directory / "data.json", data_card(manifests))
        write_text(directory / "parity.html", pages.page("Parity", [("Parity", parity)]))
        write_text(directory / "versions.html", pages.page("Versions", [("Versions", versions)]))
        sections = [
            ("Summary", pages.summary_table(manifests)),
            ("Loss", loss),
            ("Learning rate, gradient norm, throughput", rates),
            ("Starts of the training", attempts_section(attempts, records)),
            ("Data", data_section(manifests)),
            ("Parity", parity),
            *((f"Parity after {crossing}", figure) for crossing, figure in drawn.items()),
            ("Verification card", f"<pre>{html.escape(verified)}</pre>"),
            ("Stages", stages),
            *([("Slurm jobs", jobs)] if jobs else []),
            ("Config", f"<pre>{html.escape(text)}</pre>"),
            ("Versions", versions),
        ]
        write_text(directory / "report.html", pages.page(f"Run {config.run}", sections))
    if arguments.card:
        write_text(arguments.card, model_card(config, manifests))
        write_text(arguments.card.with_name("verification.yaml"), verified)
    logger.info("report: %s", arguments.output / "report.html")


def main() -> int:
    """The command."""
    parser = stage_parser(__doc__)
    parser.add_argument("--run", type=Path, required=True, help="the run's directory")
    parser.add_argument("--manifests", type=Path, nargs="+", required=True)
    parser.add_argument("--output", type=Path, required=True, help="directory to make")
    parser.add_argument("--card", type=Path, help="the exported model's README.md, to be written")
    return run_command(report, parser)


if __name__ == "__main__":
    sys.exit(main())
