"""The shipped verification cards are what is measured: the same gates and thresholds, values as large."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from commands import ROOT, run_benchmark
from megaqwen.config.tiny_shapes import TINY

FACTOR = 4.0
"""Between two machines: what rounding does depends on the order of sums."""


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with the cards as they are measured here and now."""
    directory = tmp_path_factory.mktemp("cards")
    run_benchmark("cards.py", "--directory", directory)
    return directory


def read(path: Path) -> dict[str, Any]:
    card: dict[str, Any] = yaml.safe_load(path.read_text())
    return card


def test_there_is_a_card_for_each_architecture() -> None:
    assert {path.stem for path in (ROOT / "cards").glob("*.yaml")} == set(TINY)


@pytest.mark.parametrize("architecture", TINY)
def test_a_shipped_card_is_what_is_measured(architecture: str, measured: Path) -> None:
    shipped, found = (read(path / f"{architecture}.yaml") for path in (ROOT / "cards", measured))
    assert shipped["verdict"] == found["verdict"] == "passed"
    assert shipped["model"] == found["model"]
    expected, crossing = (card["crossings"]["convert"] for card in (shipped, found))
    assert crossing["positions"] == expected["positions"]
    assert list(crossing["gates"]) == list(expected["gates"])
    assert ("experts" in crossing["gates"]) == architecture.endswith("moe")
    for name, gate in crossing["gates"].items():
        other = expected["gates"][name]
        for field in ("statistic", "at_most", "verdict"):
            assert gate[field] == other[field]
        assert other["value"] / FACTOR <= gate["value"] <= other["value"] * FACTOR, name
