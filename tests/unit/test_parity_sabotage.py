"""Every mistake fails the gate that it should, and the place of it is named."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from commands import write_config
from conftest import tiny_model
from megaqwen.config import Config, load_config
from megaqwen.data.tokenization import tokenizer_digests
from megaqwen.training import cpu_emulation

if not cpu_emulation.available():
    pytest.skip("parity computes on the CPU", allow_module_level=True)
cpu_emulation.install()

from megaqwen.parity.gates import first_divergence
from megaqwen.parity.localization import likely_cause
from megaqwen.parity.measure import Measured, measure
from megaqwen.weights import convert_to_megatron
from sabotage import ALL, SABOTAGES, Sabotage, changed_model, sabotaged
from workspace import Workspace

CASES = [
    (architecture, sabotage) for sabotage in SABOTAGES for architecture in sabotage.architectures
]
Compare = Callable[[Path, Path, Path], Measured]


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {name: tiny_model(tmp_path_factory, name) for name in ALL}


@pytest.fixture(scope="session")
def config(tmp_path_factory: pytest.TempPathFactory) -> Config:
    path = write_config(
        tmp_path_factory.mktemp("config") / "config.yaml",
        data={"corpora": [{"name": "lines", "source": "builtin"}], "split": [60, 20, 20]},
        parity={
            "texts": ["The quick brown fox.", "今天天气很好。"],
            "held_out_documents": 1,
            "max_tokens": 48,
            "generated_tokens": 2,
        },
    )
    return load_config(path)


def compare(
    model: Path, converted: Path, checkpoint: Path, workspace: Workspace, config: Config, **more: Any
) -> Measured:
    checkpoint.mkdir()
    convert_to_megatron(converted, checkpoint)
    return measure(
        model=model,
        checkpoint=checkpoint,
        data=workspace.directory / "data",
        config=config,
        rounded=False,
        **more,
    )


@pytest.mark.parametrize("architecture", ALL)
def test_a_healthy_model_passes(
    architecture: str, models: dict[str, Path], tmp_path: Path, workspace: Workspace, config: Config
) -> None:
    model = models[architecture]
    found = compare(
        model,
        model,
        tmp_path / "checkpoint",
        workspace,
        config,
        tokenizer=tokenizer_digests(model),
    )
    assert [str(gate) for gate in found.failed] == []
    assert 0.2 < max(point.ratio for point in found.walk.points) < 1.5
    names = {gate.name for gate in found.gates}
    assert ("experts" in names) == architecture.endswith("moe")
    assert {"tensors", "tokenizer", "layers", "logits", "generation"} <= names


@pytest.mark.parametrize(
    ("architecture", "sabotage"),
    CASES,
    ids=[f"{architecture}: {sabotage.name}" for architecture, sabotage in CASES],
)
def test_a_mistake_fails_its_gate(
    architecture: str,
    sabotage: Sabotage,
    models: dict[str, Path],
    tmp_path: Path,
    workspace: Workspace,
    config: Config,
) -> None:
    model = models[architecture]
    converted = sabotaged(model, tmp_path / "converted", sabotage)
    if sabotage.files:
        model = Path(shutil.copytree(model, tmp_path / "model"))
        sabotage.files(model)
    with changed_model(sabotage.model):
        found = compare(
            model,
            converted,
            tmp_path / "checkpoint",
            workspace,
            config,
            tokenizer=tokenizer_digests(models[architecture]),
        )
    failed = {gate.name: gate for gate in found.failed}
    assert sabotage.gate in failed, [str(gate) for gate in found.gates]
    first = first_divergence(found.walk.points)
    assert (first.point if first else "") == sabotage.point
    if sabotage.point:
        assert "layers" in failed and f"{first}" in failed["layers"].detail
    assert likely_cause(found.gates, found.walk.points)
