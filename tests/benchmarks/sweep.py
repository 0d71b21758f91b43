"""A sweep on the Slurm profile: seconds of a dry run and of scheduling, and calls to Slurm's tools.

    uv run python tests/benchmarks/sweep.py
    uv run python tests/benchmarks/sweep.py --runs 50 --single

Slurm is tests/workflow/fake_slurm.py, whose jobs end at once: what is measured is Snakemake, its plugin
and this workflow. --single submits each job by itself instead of in arrays.
"""

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path

import yaml

TESTS = Path(__file__).parents[1]
sys.path[:0] = [str(TESTS), str(TESTS / "workflow"), str(TESTS.parent / "scripts")]

import fake_slurm  # noqa: E402  the tests'
from checkout import Checkout, copy_repository, overlay, put_stubs, put_transformer_engine  # noqa: E402

RUN = "results/runs/{run}"
REPORT = ("report.html", "parity.html", "versions.html", "loss.svg", "rates.svg", "config.yaml")
REPORT += ("parity_convert.svg", "parity_export.svg", "verification.yaml")
OUTPUTS = {
    "convert": ["results/shared/megatron/{megatron}/manifest.json"],
    "preprocess": ["results/shared/data/{data}/manifest.json"],
    "parity_gate": ["results/shared/gates/{gate}/parity.json"],
    "parity_convert": [f"{RUN}/parity/convert/parity.json"],
    "train": [f"{RUN}/train/manifest.json"],
    "export": [f"{RUN}/export/manifest.json"],
    "parity_export": [f"{RUN}/parity/export/parity.json"],
    "report": [f"{RUN}/export/hf/README.md", f"{RUN}/export/hf/verification.yaml"]
    + [f"{RUN}/report/{name}" for name in REPORT],
}
KEYS = {"convert": "megatron", "preprocess": "data", "parity_gate": "gate"}
for rule, files in OUTPUTS.items():
    own = KEYS.get(rule)
    logs = f"results/sweeps/large/logs/{rule}.{{{own}}}" if own else f"{RUN}/logs/{rule}"
    files.append(f"{logs}.benchmark.tsv")
SEEDS = 5


def prepare(directory: Path, runs: int, single: bool) -> Checkout:
    """A clone with a sweep of so many runs, whose stages do nothing."""
    checkout = copy_repository(directory / "megaqwen")
    put_stubs(checkout)
    (checkout.directory / "outputs.json").write_text(json.dumps(OUTPUTS))
    rates = [round(1e-3 + number * 1e-5, 6) for number in range(runs // SEEDS)]
    grid = {"train.lr": rates, "train.seed": list(range(1, SEEDS + 1))}
    train = {"micro_batch_size": 1}
    overlay(checkout, "sweep.yaml", run="large", sweep={"grid": grid}, train=train)
    path = checkout.directory / "profiles" / "slurm" / "config.yaml"
    profile = yaml.safe_load(path.read_text())
    profile["slurm-init-seconds-before-status-checks"] = 5
    if single:
        del profile["slurm-array-jobs"]
    path.write_text(yaml.safe_dump(profile))
    return checkout


def timed(checkout: Checkout, *words: str, **environment: str) -> float:
    """Seconds of a Snakemake that has to end well."""
    start = time.monotonic()
    done = checkout.snakemake(*words, "--configfile", "sweep.yaml", environment=environment)
    if done.returncode:
        raise SystemExit(done.stdout[-8000:])
    return time.monotonic() - start


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--runs", type=int, default=200, help=f"a multiple of {SEEDS}")
    parser.add_argument("--single", action="store_true", help="no job arrays")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        checkout = prepare(Path(name), arguments.runs, arguments.single)
        dry = timed(checkout, "--profile", "slurm", "all", "-n", "--quiet", "rules")
        print(f"{arguments.runs} runs: dry run {dry:.1f} s", flush=True)
        slurm = fake_slurm.install(Path(name) / "slurm")
        slurm |= put_transformer_engine(Path(name) / "packages")
        slurm[fake_slurm.OUTPUTS] = str(checkout.directory / "outputs.json")
        seconds = timed(checkout, "--profile", "slurm", "all", **slurm)
        print(f"all jobs submitted, noticed and ended in {seconds:.1f} s, by calls of")
        for tool, number in sorted(fake_slurm.calls(slurm).items()):
            print(f"  {tool:9} {number}")
        again = timed(checkout, "--profile", "slurm", "all")
        print(f"nothing to do: {again:.1f} s")


if __name__ == "__main__":
    main()
