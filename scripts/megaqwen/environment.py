"""The environment of the stages' shell commands."""

import os
import sys
from pathlib import Path


def put_this_python_first() -> None:
    """Let `python` in a shell command be this one, unless --sdm conda puts another before it."""
    os.environ["PATH"] = f"{Path(sys.executable).parent}:{os.environ.get('PATH', '')}"
