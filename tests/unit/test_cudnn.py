"""One cuDNN in a process that trains on a GPU: torch's, unless there is another already."""

import os
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from commands import ROOT

FOUND = find_spec("nvidia.cudnn") if find_spec("nvidia") else None
pytestmark = pytest.mark.skipif(FOUND is None, reason="torch has no cuDNN of its own here")
PROGRAM = """
import ctypes, os, sys
for other in sys.argv[1:]:
    ctypes.CDLL(other)
from megaqwen.environment import loaded_libraries, use_cudnn_of_torch
use_cudnn_of_torch()
print(os.environ.get("CUDNN_HOME", ""), *sorted(loaded_libraries("libcudnn")), sep="\\n")
"""


def wheel() -> Path:
    assert FOUND and FOUND.submodule_search_locations
    return Path(os.path.realpath(next(iter(FOUND.submodule_search_locations))))


def loaded(*others: Path, home: str | None = None) -> tuple[str, list[str]]:
    """CUDNN_HOME and the cuDNN's files of a process that loaded `others` before."""
    environment = {key: value for key, value in os.environ.items() if key != "CUDNN_HOME"}
    environment |= {"PYTHONPATH": str(ROOT / "scripts")} | ({"CUDNN_HOME": home} if home else {})
    words = [sys.executable, "-c", PROGRAM, *map(str, others)]
    done = subprocess.run(words, env=environment, capture_output=True, text=True, check=True)
    found, *files = done.stdout.removesuffix("\n").split("\n")
    return found, files


def test_all_of_torchs_is_there_before_transformer_engine_looks_for_it() -> None:
    home, files = loaded()
    assert home == str(wheel())
    assert files == sorted(map(str, wheel().glob("lib/libcudnn*.so.*")))
    assert loaded(home=home) == (home, files)  # of a parent's process


def test_what_is_loaded_or_chosen_already_stays_alone(tmp_path: Path) -> None:
    other = Path(shutil.copy(wheel() / "lib" / "libcudnn.so.9", tmp_path))
    assert loaded(other) == ("", [str(other)])
    assert loaded(home="/opt/cudnn") == ("/opt/cudnn", [])
