"""Files and directories that appear whole or not at all."""

import subprocess
import sys
import time
from pathlib import Path

from commands import ROOT
from megaqwen.provenance import new_directory

FILL = """
import sys, time
from pathlib import Path
from megaqwen.provenance import new_directory
with new_directory(Path(sys.argv[1])) as directory:
    (directory / "mine").write_text("")
    time.sleep(60)
"""


def test_what_another_process_still_fills_stays_and_what_it_left_goes(tmp_path: Path) -> None:
    path = tmp_path / "made"
    words = [sys.executable, "-c", FILL, str(path)]
    other = subprocess.Popen(words, env={"PYTHONPATH": str(ROOT / "scripts")})
    while not (filled := list(tmp_path.glob(".made.partial-*/mine"))):
        assert other.poll() is None
        time.sleep(0.05)
    with new_directory(path):
        assert filled[0].exists()
    other.kill()
    other.wait()
    with new_directory(path) as directory:
        assert not filled[0].exists()
        (directory / "ours").write_text("")
    assert [each.name for each in tmp_path.iterdir()] == ["made"]
    assert (path / "ours").exists()
