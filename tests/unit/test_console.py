"""The last words of a stage that was told to end."""

import os
import subprocess
import sys

import pytest

from commands import ROOT

ENDED = """
import argparse, signal
from megaqwen.console import run_command
stage = lambda arguments: signal.raise_signal(signal.SIGTERM)
parser = argparse.ArgumentParser()
parser.add_argument("--log")
raise SystemExit(run_command(stage, parser))
"""


@pytest.mark.parametrize("job", ["", "17"])
def test_a_job_whose_time_was_up_is_told_what_gives_more(job: str) -> None:
    variables = {name: value for name, value in os.environ.items() if name != "SLURM_JOB_ID"}
    done = subprocess.run(
        [sys.executable, "-c", ENDED],
        env={**variables, **({"SLURM_JOB_ID": job} if job else {})},
        cwd=ROOT / "scripts",
        capture_output=True,
        text=True,
    )
    assert done.returncode == 143
    assert done.stdout.startswith("  interrupted: nothing unfinished was kept")
    assert ("if the job's time was up, runtime in the profile" in done.stdout) == bool(job)
