"""Every mistake fails the gate that it should, and the place of it is named."""

import json
from typing import Any

import pytest

from commands import run_benchmark
from megaqwen.config.tiny_shapes import tiny_hf_config
from sabotage import ALL, DENSE, EXPERTS, SABOTAGES, TIES, Sabotage

CASES = [
    (architecture, sabotage)
    for sabotage in SABOTAGES
    for architecture in ALL
    if sabotage.fits(tiny_hf_config(architecture))
]
Rows = dict[tuple[str, str], dict[str, Any]]

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Rows:
    """What was measured, by architecture and mistake."""
    directory = tmp_path_factory.mktemp("sabotage")
    run_benchmark("sabotage.py", "--directory", directory)
    found = json.loads((directory / "sabotage.json").read_text())
    return {(row["model"], row["mistake"]): row for row in found}


def failed(row: dict[str, Any]) -> list[str]:
    return [name for name, gate in row.get("gates", {}).items() if not gate["passed"]]


@pytest.mark.parametrize("architecture", ALL)
def test_a_healthy_model_passes(architecture: str, rows: Rows) -> None:
    row = rows[architecture, "healthy"]
    assert failed(row) == [] and row["first"] == ""
    assert 0.2 < row["gates"]["layers"]["value"] < 1.5
    assert ("experts" in row["gates"]) == architecture.endswith("moe")
    assert {"tensors", "tokenizer", "layers", "logits", "generation"} <= row["gates"].keys()


@pytest.mark.parametrize("architecture", EXPERTS)
def test_experts_that_tie_may_be_chosen_otherwise(architecture: str, rows: Rows) -> None:
    """Of all that follows from it nothing is beyond rounding."""
    row = rows[architecture, TIES.name]
    assert row["ties"] > 3 and rows[architecture, "healthy"]["ties"] == 0
    assert failed(row) == [] and row["gates"]["layers"]["value"] < 1.5


@pytest.mark.parametrize(
    ("architecture", "sabotage"),
    CASES,
    ids=[f"{architecture}: {sabotage.name}" for architecture, sabotage in CASES],
)
def test_a_mistake_fails_its_gate(architecture: str, sabotage: Sabotage, rows: Rows) -> None:
    row = rows[architecture, sabotage.name]
    if sabotage.gate == "refused":
        assert sabotage.says in row["refused"]
        return
    assert sabotage.gate in failed(row), row["gates"]
    assert row["point"] == sabotage.point, row["first"]
    if sabotage.point:
        assert row["first"] in row["gates"]["layers"]["detail"]
    assert row["cause"]


@pytest.mark.parametrize("architecture", DENSE)
def test_no_gate_on_logits_passes_a_mistake_that_is_everywhere(
    architecture: str, rows: Rows
) -> None:
    by_logits = {"logits", "mean logits", "argmax", "kl", "loss", "generation"}
    assert by_logits <= set(failed(rows[architecture, "gate and up swapped"]))


def test_there_are_enough_mistakes() -> None:
    """As many as the documentation says: at least twenty that differ."""
    assert len({sabotage.name for sabotage in SABOTAGES}) >= 30
