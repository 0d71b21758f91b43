"""What a dry run of convert and export says, from config.json and headers alone."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from commands import ROOT, options, run_script
from megaqwen.errors import InputError
from megaqwen.weights import bridge, convert_to_megatron
from published import PUBLISHED

CONFIG = ROOT / "config" / "config.yaml"
QWEN3_30B = next(each for each in PUBLISHED if each.name == "Qwen3-30B-A3B")


def dry_run(script: str, **values: object) -> tuple[int, list[str]]:
    """The exit status, and the lines that it prints, without their indentation."""
    done = run_script(script, "--dry-run", *options(config=CONFIG, **values))
    return done.returncode, [line.strip() for line in done.stdout.splitlines()]


def only_config(directory: Path, **changes: Any) -> Path:
    """A model directory that holds nothing but config.json."""
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps({**QWEN3_30B.config, **changes}))
    return directory


def test_config_json_is_enough(tmp_path: Path) -> None:
    lines = list(bridge.dry_run(only_config(tmp_path / "model")))
    layers, experts = 48, 128
    assert len(lines) == 3 + layers * (7 + 2 * experts) + 1
    assert (
        "model.layers.47.mlp.experts.127.gate_proj.weight [768, 2048]"
        " + model.layers.47.mlp.experts.127.up_proj.weight [768, 2048]"
        " <-> decoder.layers.mlp.experts.experts.linear_fc1.weight[47][127] [1536, 2048] (gate_up)"
    ) in lines
    assert lines[-1].endswith(f" of Megatron, {QWEN3_30B.parameters:,} parameters")


def test_it_reads_no_weights(tiny_qwen3: Path, tmp_path: Path) -> None:
    """Export's mapping is convert's, though no byte of a tensor is left to be read."""
    model, checkpoint = tmp_path / "model", tmp_path / "megatron"
    shutil.copytree(tiny_qwen3, model)
    checkpoint.mkdir()
    convert_to_megatron(model, checkpoint)
    damaged = [model / "model.safetensors", *checkpoint.rglob("*.distcp")]
    for path in damaged:
        length = int.from_bytes(path.read_bytes()[:8], "little") + 8
        start = length if path.suffix == ".safetensors" else 0
        with open(path, "r+b") as stream:
            stream.seek(start)
            stream.write(bytes(path.stat().st_size - start))
    code, lines = dry_run("convert.py", model=model)
    assert code == 0
    assert (code, lines) == dry_run("export.py", model=model, checkpoint=checkpoint)
    assert lines[0].startswith("model.embed_tokens.weight [")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_hidden_layers": 0}, "num_hidden_layers"),
        ({"rope_scaling": {"rope_type": "longrope", "factor": 2.0}}, "longrope"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantiz"),
    ],
)
def test_what_cannot_be_mapped_is_refused(
    changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    model = only_config(tmp_path / "model", **changes)
    with pytest.raises(InputError, match=message) as refused:
        list(bridge.dry_run(model))
    assert str(model) in str(refused.value)


def test_weights_of_another_model_are_told(tiny_qwen3: Path, tmp_path: Path) -> None:
    model = Path(shutil.copytree(tiny_qwen3, tmp_path / "model"))
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "intermediate_size": 64}))
    with pytest.raises(InputError, match="has shape"):
        list(bridge.dry_run(model))
