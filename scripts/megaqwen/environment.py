"""The environment of the stages' shell commands."""

import os
import sys
from pathlib import Path


def put_this_python_first() -> None:
    """Let `python` in a shell command be this one, unless --sdm conda puts another before it."""
    os.environ["PATH"] = f"{Path(sys.executable).parent}:{os.environ.get('PATH', '')}"


def use_huge_pages() -> None:
    """Have torch, not yet imported, ask for huge pages: large tensors cost few page faults."""
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
