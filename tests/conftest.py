"""Fixtures that several rooms' tests share."""

import os
import signal
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

# The tests start hundreds of processes: with it each would compile thousands of files again.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
# In the background of a script Ctrl-C is ignored, and so by all that is started from here.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

if TYPE_CHECKING:
    from workspace import Workspace


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files that take minutes first: what begins last keeps the other workers waiting."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: (item.path not in slow, item.path.parent.name == "unit"))


def tiny_model(tmp_path_factory: pytest.TempPathFactory, architecture: str) -> Path:
    from megaqwen.sources.tiny import write_tiny_model

    directory = tmp_path_factory.mktemp(f"tiny-{architecture}")
    write_tiny_model(directory, architecture, seed=1234)
    return directory


@pytest.fixture(scope="session")
def tiny_qwen3(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The Hugging Face directory of the tiny Qwen3; read it, never write to it."""
    return tiny_model(tmp_path_factory, "qwen3")


@pytest.fixture(scope="session")
def tiny_qwen2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The Hugging Face directory of the tiny Qwen2.5; read it, never write to it."""
    return tiny_model(tmp_path_factory, "qwen2")


@pytest.fixture(scope="session")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> "Workspace":
    """The stages before training, done once; read them, and write beside them only."""
    from workspace import prepare

    return prepare(tmp_path_factory.mktemp("workspace"))
