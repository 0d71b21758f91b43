"""scripts/parity.py as the workflow runs it: what passes, and that each mistake fails by its name."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from commands import options, run_script, write_config
from megaqwen.config import load_config
from megaqwen.parity.texts import tokenized_texts
from megaqwen.provenance import read_json, write_json
from megaqwen.weights import convert_to_megatron
from workspace import OPTIONS, Workspace

LAYER = "model.layers.2"
TEXTS = ["The quick brown fox.", "今天天气很好。"]
Tensors = dict[str, torch.Tensor]
OVER_RANKS = ("layout", "gradients", "trajectory", "losses", "copies")
GATES = {
    "tensors": 0,
    "architecture": 0,
    "tokenizer": 0,
    "layers": 2,
    "logits": 1e-4,
    "mean logits": 2.5e-5,
    "argmax": 0,
    "kl": 1e-6,
    "loss": 1e-5,
    "generation": 0,
    "perplexity": 1e-5,
    "layout": 2,
    "gradients": 10,
    "trajectory": 10,
    "losses": None,  # by the plain loop's own rounding
    "copies": 0,
}
GATES_ON_ONE_RANK = [name for name in GATES if name not in OVER_RANKS]


class Crossing:
    """A model directory and the Megatron checkpoint that was made of it, before a mistake."""

    def __init__(self, directory: Path, model: Path, checkpoint: Path, data: Path):
        self.directory = directory
        self.model = directory / "model" / "hf"
        shutil.copytree(model, self.model)
        write_json(directory / "model" / "manifest.json", {})
        self.crossing = "convert"
        self.checkpoint = checkpoint
        self.data = data
        self.output = directory / "parity" / "parity.json"
        write_json(self.output, {"results": {"verdict": "passed"}})  # of an earlier run
        self.configure(gradients=False, trajectory_iterations=0)

    def configure(self, **trained: Any) -> None:
        """Write the config; `trained` is what the parity section says of gradients and steps."""
        texts = {"texts": TEXTS, "held_out_documents": 2, "max_tokens": 40}
        self.config = write_config(
            self.directory / "config.yaml",
            data={"corpora": [{"name": "lines", "source": "builtin"}], "split": [60, 20, 20]},
            parity=texts | trained,
            train={**OPTIONS, "lr_warmup_iters": 0},
        )

    def change(self, change: Callable[[Tensors], object]) -> None:
        """Change tensors of the model directory."""
        tensors = load_file(self.model / "model.safetensors")
        change(tensors)
        save_file(tensors, self.model / "model.safetensors", metadata={"format": "pt"})

    def run(self) -> tuple[int, str]:
        """Exit code, and what was printed."""
        words = options(
            config=self.config,
            crossing=self.crossing,
            model=self.model,
            checkpoint=self.checkpoint,
            data=self.data,
            output=self.output,
            log=self.output.with_name("log"),
        )
        done = run_script("parity.py", *words)
        return done.returncode, done.stdout + done.stderr

    def failure(self) -> tuple[str, dict[str, dict[str, Any]]]:
        """What a run says that fails as it should: its message, and the failed gates."""
        code, text = self.run()
        assert code == 2, text
        assert not self.output.exists(), "an earlier verdict would stand for this one"
        found = read_json(self.output.with_name("failed.json"))["results"]
        assert found["verdict"] == "failed" and "Traceback" not in text
        assert [gate["name"] for gate in found["gates"]] == GATES_ON_ONE_RANK
        (message,) = (line for line in text.splitlines() if "error:" in line)
        assert "failed.json" in message
        return message, {gate["name"]: gate for gate in found["gates"] if not gate["passed"]}


@pytest.fixture
def qwen3(tmp_path: Path, workspace: Workspace) -> Crossing:
    stages = workspace.directory
    return Crossing(tmp_path, stages / "model/hf", stages / "megatron/checkpoint", stages / "data")


@pytest.fixture
def qwen2(tmp_path: Path, workspace: Workspace, tiny_qwen2: Path) -> Crossing:
    checkpoint = tmp_path / "checkpoint"
    checkpoint.mkdir()
    convert_to_megatron(tiny_qwen2, checkpoint)
    return Crossing(tmp_path, tiny_qwen2, checkpoint, workspace.directory / "data")


def test_a_healthy_model_passes_with_every_figure(qwen3: Crossing) -> None:
    write_json(qwen3.output.with_name("failed.json"), {})
    qwen3.configure()
    code, text = qwen3.run()
    assert code == 0, text
    assert not qwen3.output.with_name("failed.json").exists()
    manifest = read_json(qwen3.output)
    assert (manifest["stage"], set(manifest["inputs"])) == ("parity_convert", {"model"})
    assert manifest["command"][:3] == ["parity.py", "--config", str(qwen3.config)]
    found = manifest["results"]
    assert (found["crossing"], found["verdict"]) == ("convert", "passed")
    bounds = {gate["name"]: gate["threshold"] for gate in found["gates"]}
    assert 0 < bounds["losses"] < 1e-4
    assert {**bounds, "losses": None} == GATES
    assert list(found["unmeasured"]) == ["dtype"]
    assert "not measured: dtype: training is in float32" in text
    for gate in found["gates"]:
        assert gate["passed"] and 0 <= gate["value"] <= gate["threshold"]
        assert f"passed {gate['name']}: {gate['statistic']} " in text
    texts = ["given text 1", "given text 2", "chat", "lines 1", "lines 2"]
    continued = [f"{name} continued" for name in texts[:4]]
    assert [row["text"] for row in found["texts"]] == [*texts, "full length", *continued]
    assert list(found["continuations"]) == continued
    assert all(len(ids) <= 16 + 8 for ids in found["continuations"].values())
    assert [row["point"] for row in found["layers"]][:3] == [
        "embedding",
        "attention in",
        "attention out",
    ]
    assert found["layers"][-1]["point"] == "final norm" and found["seconds"]["forward"] > 0
    assert found["positions"] == sum(row["positions"] for row in found["texts"])
    assert 7 < found["texts"][3]["loss"] < 9  # about log(2560): the model is random
    assert found["texts"][3]["positions"] == 40
    assert found["texts"][5]["positions"] == OPTIONS["seq_length"] > 40
    held_out = found["perplexity"]
    assert (held_out["kind"], held_out["samples"], held_out["targets"]) == ("test", 4, 4 * 64)
    assert 7 < held_out["reference_loss"] < 9 and held_out["logged"] is None


def test_a_corpus_may_have_any_name(qwen3: Crossing, tmp_path: Path) -> None:
    for kind in ("bin", "idx"):
        shutil.copyfile(qwen3.data / f"lines.{kind}", tmp_path / f"text.{kind}")
    corpora = {"corpora": [{"name": "text", "source": "builtin"}]}
    config = load_config(qwen3.config, {"data": corpora})
    found = tokenized_texts(qwen3.model, tmp_path, config, 40, 64)
    names = ["given text 1", "given text 2", "chat", "text 1", "text 2", "full length"]
    assert list(found) == names


def test_one_flipped_bit_fails_at_its_tensor(qwen3: Crossing) -> None:
    name = f"{LAYER}.mlp.down_proj.weight"

    def flip(tensors: Tensors) -> None:
        tensors[name].view(torch.int32)[3, 5] ^= 1

    qwen3.change(flip)
    message, failed = qwen3.failure()
    assert list(failed) == ["tensors"]
    assert failed["tensors"]["value"] == 1
    place = f"of 46 tensors; the first that differs: {name} (1 of 98,304 elements, by at most "
    assert place in failed["tensors"]["detail"] and place in message
    assert "failed at tensors." in message and "the weight mapping" in message


def test_another_rope_base_fails_though_all_tensors_are_equal(qwen3: Crossing) -> None:
    path = qwen3.model / "config.json"
    config = json.loads(path.read_text())
    config.pop("rope_parameters", None)
    path.write_text(json.dumps({**config, "rope_theta": 10000.0}))
    message, failed = qwen3.failure()
    assert "tensors" not in failed
    assert {"architecture", "logits"} <= failed.keys()
    place = "rotary_base is 1000000 in the checkpoint and 10000 by config.json"
    assert failed["architecture"]["detail"] == place and place in message
    assert failed["logits"]["value"] > 1e-3
    assert " at position " in failed["logits"]["detail"]


def test_a_dropped_bias_fails_both_ways(qwen2: Crossing) -> None:
    name = f"{LAYER}.self_attn.k_proj.bias"
    qwen2.change(lambda tensors: tensors.update({name: torch.zeros_like(tensors[name])}))
    message, failed = qwen2.failure()
    assert {"tensors", "logits"} <= failed.keys() and "architecture" not in failed
    assert f"{name} (64 of 64 elements, by at most 0." in message


def test_a_bias_that_is_not_in_the_file_is_named(qwen2: Crossing) -> None:
    name = f"{LAYER}.self_attn.k_proj.bias"
    qwen2.change(lambda tensors: tensors.pop(name))
    code, text = qwen2.run()
    assert code == 2, text
    assert f"{name}: missing" in text and "Traceback" not in text
    assert not qwen2.output.exists()


def test_what_an_export_in_bfloat16_rounds_is_no_mistake(qwen3: Crossing) -> None:
    def round_all(tensors: Tensors) -> None:
        tensors.update({name: tensor.bfloat16() for name, tensor in tensors.items()})

    qwen3.crossing = "export"
    qwen3.change(round_all)
    code, text = qwen3.run()
    assert code == 0, text
    assert read_json(qwen3.output)["results"]["verdict"] == "passed"
    # One more rounding than the export's own is one.
    qwen3.change(lambda tensors: tensors["model.norm.weight"].mul_(1.0 + 2**-7))
    assert "tensors" in qwen3.failure()[1]
