"""What export.py leaves beside the weights, and which iteration it takes."""

import json
import shutil
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM

from commands import options, run_script, write_config
from megaqwen.checkpoints import TRACKER, iteration_name

BESIDE = ("config.json", "generation_config.json", "LICENSE", "tokenizer.json")


@pytest.fixture(scope="module")
def model(tiny_qwen3: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with all that may lie in its directory."""
    copy = tmp_path_factory.mktemp("export") / "hf"
    shutil.copytree(tiny_qwen3, copy)
    (copy / "generation_config.json").write_text('{"temperature": 0.6}')
    (copy / "LICENSE").write_text("Apache-2.0")
    (copy / "notes.txt").write_text("nobody's")
    return copy


@pytest.fixture(scope="module")
def checkpoint(model: Path) -> Path:
    """Two iterations, both of convert's weights."""
    config = write_config(model.parent / "config.yaml")
    made = model.parent / "megatron"
    done = run_script("convert.py", *options(config=config, model=model, output=made))
    assert done.returncode == 0, done.stdout
    saved = model.parent / "checkpoints"
    for number in (1, 2):
        shutil.copytree(made / "checkpoint" / "release", saved / iteration_name(number))
    (saved / TRACKER).write_text("2")
    return saved


def exported(model: Path, checkpoint: Path, output: Path, *words: str, dtype: str) -> str:
    """Export there; the name of the checkpoint that was taken."""
    config = write_config(output.with_suffix(".yaml"), export={"dtype": dtype})
    given = options(config=config, model=model, checkpoint=checkpoint, output=output)
    done = run_script("export.py", *given, *words)
    assert done.returncode == 0, done.stdout
    return str(json.loads((output / "manifest.json").read_text())["results"]["checkpoint"])


def test_what_lies_beside_the_weights_comes_along(
    model: Path, checkpoint: Path, tmp_path: Path
) -> None:
    assert exported(model, checkpoint, tmp_path / "out", dtype="source") == iteration_name(2)
    hf = tmp_path / "out" / "hf"
    assert {name: (hf / name).read_bytes() for name in BESIDE} == {
        name: (model / name).read_bytes() for name in BESIDE
    }
    assert not (hf / "notes.txt").exists()


def test_another_dtype_is_that_of_config_json_and_another_iteration_is_taken(
    model: Path, checkpoint: Path, tmp_path: Path
) -> None:
    words = ("--iteration", "1")
    taken = exported(model, checkpoint, tmp_path / "out", *words, dtype="bfloat16")
    assert taken == iteration_name(1)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "hf")
    assert str(loaded.dtype) == "torch.bfloat16"
    config, earlier = (
        json.loads((place / "config.json").read_text())
        for place in (tmp_path / "out" / "hf", model)
    )
    changed = {name for name in config | earlier if config.get(name) != earlier.get(name)}
    assert changed <= {"dtype", "torch_dtype"} and changed
