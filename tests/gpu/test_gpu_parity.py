"""The parity gate on what a GPU computes in training's dtype: healthy models pass it, mistakes do not.

Skipped without a GPU. All processes run beside each other: about two minutes on 16 cores. With -s the
ratio of every model and mistake is printed, of which megaqwen/parity/README.md has the extremes.
"""

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from gpu_mistakes import KERNEL, RECIPES

from commands import ROOT, options, write_config
from megaqwen.data.builtin import builtin_documents
from megaqwen.parity.gpu import THRESHOLDS
from megaqwen.provenance import read_json, write_json
from megaqwen.weights import convert_to_megatron
from trained_models import make_trained
from workspace import OPTIONS

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available(),
    reason="no GPU: run `uv sync --extra gpu && uv run pytest tests/gpu` on a machine that has one",
)
STEPS = 10
"""Of training before: in a random model nothing is as large as in a real one."""
FAIL = {
    "qwen3": (
        KERNEL,
        "gate and up swapped",
        "k and v swapped",
        "final norm left at ones",
        "embedding off by one row",
    ),
    "qwen3_moe": (
        KERNEL,
        "k and v swapped",
        "final norm left at ones",
        "embedding off by one row",
        "router rows shifted by one",
        "router renormalises, or does not",
    ),
}
HARDER = {
    "qwen3": (
        "rope base 10,000 for 1,000,000",
        "q and k norms swapped",
        "query heads dealt to the wrong groups",
        "norm epsilon 1e-5 for 1e-6, or the reverse",
    ),
    "qwen3_moe": (
        "gate and up of one expert swapped",
        "one expert in another's place",
        "rope base 10,000 for 1,000,000",
    ),
}
"""Of which only the figures are told: what they do to a tiny model may be less than what FP8 does."""
CASES = [(model, recipe) for model in FAIL for recipe in RECIPES]


@dataclass(frozen=True, kw_only=True)
class Started:
    """A process, and the file that it writes."""

    process: subprocess.Popen[bytes]
    output: Path

    @property
    def log(self) -> Path:
        """What it says."""
        return self.output.with_suffix(".log")

    def result(self) -> Any:
        """What it wrote, once it has ended well."""
        assert self.process.wait(timeout=600) == 0, self.log.read_text()[-20_000:]
        return read_json(self.output)


def start(output: Path, program: str, *words: object) -> Started:
    output.parent.mkdir(parents=True, exist_ok=True)
    with open(output.with_suffix(".log"), "w") as log:
        process = subprocess.Popen(
            [sys.executable, ROOT / program, *map(str, words)],
            env={**os.environ, "OMP_NUM_THREADS": "2", "TORCHINDUCTOR_COMPILE_THREADS": "1"},
            stdout=log,
            stderr=subprocess.STDOUT,
        )
    return Started(process=process, output=output)


Processes = dict[tuple[str, str, str], Started]


@pytest.fixture(scope="module")
def processes(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The parity stage of each model and recipe, and the mistakes of each."""
    directory = tmp_path_factory.mktemp("gpu-parity")
    found: Processes = {}
    texts = [text[:400] for text in islice(builtin_documents(), 20)]
    for name in FAIL:
        place = directory / name
        make_trained(place / "model" / "hf", name, STEPS, batch=1, length=128)
        write_json(place / "model" / "manifest.json", {})
        (place / "megatron").mkdir()
        convert_to_megatron(place / "model" / "hf", place / "megatron")
        for recipe in RECIPES:
            output = place / "mistakes" / f"{recipe.replace(' ', '-')}.json"
            model, copies = place / "model" / "hf", output.with_suffix("")
            mistakes = (*FAIL[name], *HARDER[name])
            words = (model, copies, recipe, output, *mistakes)
            found[name, recipe, "mistakes"] = start(output, "tests/gpu/gpu_mistakes.py", *words)
        for recipe, chosen in RECIPES.items():
            output = place / recipe.replace(" ", "-") / "parity.json"
            output.parent.mkdir(exist_ok=True)
            config = write_config(
                output.with_name("config.yaml"),
                model={"source": "tiny", "architecture": name},
                parity={
                    "texts": texts,
                    "held_out_documents": 0,
                    "gradients": False,
                    "trajectory_iterations": 0,
                },
                train={**OPTIONS, "lr_warmup_iters": 0, "seq_length": 512, **chosen},
            )
            words = options(
                config=config,
                crossing="convert",
                model=place / "model" / "hf",
                checkpoint=place / "megatron",
                data=place / "data",
                output=output,
            )
            found[name, recipe, "stage"] = start(output, "scripts/parity.py", *words)
    yield found
    for each in found.values():
        each.process.kill()


@pytest.mark.parametrize(("model", "recipe"), CASES)
def test_a_healthy_model_passes_the_stage(processes: Processes, model: str, recipe: str) -> None:
    found = processes[model, recipe, "stage"].result()["results"]
    (gate,) = (each for each in found["gates"] if each["name"] == "gpu")
    print(f"\n{model}: {recipe}: stage: {gate['value']:.3f} ({gate['detail'].partition(';')[0]})")
    assert gate["passed"] and f" in {recipe} on a GPU " in gate["statistic"]
    assert 0.5 < gate["value"] <= gate["threshold"] == THRESHOLDS[recipe]
    assert " of the worst part of a long one" in gate["detail"]
    assert "gpu" not in found["unmeasured"]
    assert ("dtype" in found["unmeasured"]) == recipe.startswith("fp8")


@pytest.mark.parametrize(("model", "recipe"), CASES)
def test_mistakes_fail(processes: Processes, model: str, recipe: str) -> None:
    rows = {row.pop("mistake"): row for row in processes[model, recipe, "mistakes"].result()}
    for name, row in rows.items():
        print(f"\n{model}: {recipe}: {name}: {json.dumps(row)}", end="")
    assert rows["healthy"]["passed"]
    assert [name for name in FAIL[model] if rows[name]["passed"]] == []
    assert "the first beyond it: layer 0" in rows[KERNEL]["detail"]
