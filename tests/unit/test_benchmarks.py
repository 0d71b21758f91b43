"""The benchmarks run, and the bounds that they measure hold at a real model's shape."""

import re
import subprocess
import sys
from pathlib import Path

from commands import ROOT


def test_the_bridge_at_half_a_billion_parameters(tmp_path: Path) -> None:
    script = ROOT / "tests" / "benchmarks" / "bridge.py"
    done = subprocess.run(
        [sys.executable, script, "0.5B", "--directory", tmp_path, "--pairs", "1"],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    peaks = re.findall(r"(convert|export) .* peak +([0-9.]+) GiB of +([0-9.]+)\n", done.stdout)
    assert [direction for direction, *_ in peaks] == ["convert", "export"], done.stdout
    assert all(float(peak) < float(bound) for _, peak, bound in peaks), done.stdout
    assert not list(tmp_path.glob("*/*"))
