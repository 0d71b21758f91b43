"""A small training from a model of its own, stage by stage as the workflow runs them."""

import json
import shutil
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from commands import ROOT, run_script, write_config
from megaqwen.checkpoints import TRACKER
from megaqwen.config import load_config
from megaqwen.config.rank_options import ranks_of_layout
from megaqwen.layout import Layout
from megaqwen.provenance import read_json
from megaqwen.training.metrics import read_metrics

OPTIONS: dict[str, Any] = {
    "seq_length": 64,
    "micro_batch_size": 2,
    "global_batch_size": 4,
    "train_iters": 4,
    "lr": 2.0e-3,
    "min_lr": 1.0e-4,
    "lr_decay_style": "cosine",
    "lr_warmup_iters": 1,
    "weight_decay": 0.1,
    "clip_grad": 1.0,
    "seed": 1234,
    "bf16": False,
    "save_interval": 2,
    "eval_interval": 4,
    "eval_iters": 1,
    "log_interval": 1,
}

BUCKETS: dict[str, Any] = {
    "use_distributed_optimizer": True,
    "overlap_grad_reduce": True,
    "overlap_param_gather": True,
    "ddp_bucket_size": 20_000,
}
"""Several buckets of gradients, as a large model has them, and padding between them, as some have it."""


def script(name: str, *words: object, environment: Mapping[str, str] | None = None) -> None:
    """Run a script of the project; what it printed is the message when it fails."""
    process = run_script(name, *words, environment=environment)
    assert process.returncode == 0, process.stdout + process.stderr


@dataclass(frozen=True, kw_only=True)
class Workspace:
    """A model, its Megatron checkpoint and its tokenized corpus."""

    directory: Path
    architecture: str = "qwen3"
    """Of the tiny model."""
    kind: str = "pretrain"
    """Of the data, which lies in the folder `data`, or `conversations` for sft."""

    @property
    def data(self) -> Path:
        """The tokenized corpus."""
        return self.directory / ("data" if self.kind == "pretrain" else "conversations")

    def config(self, name: str, options: Mapping[str, Any], **sections: Any) -> Path:
        """Write a config whose section train is OPTIONS and `options`; `sections` are laid over.

        None leaves one of OPTIONS out.
        """
        train = {key: value for key, value in {**OPTIONS, **options}.items() if value is not None}
        corpus = {
            "name": "lines",
            "source": "files",
            "files": [str(self.directory / "lines.jsonl")],
            "text_field": "text",
            "weight": 1.0,
        }
        data = {"kind": self.kind, "corpora": [corpus], "split": [60, 20, 20]}
        data |= sections.pop("data", {})
        path = self.directory / f"{name}.yaml"
        model = {"source": "tiny", "architecture": self.architecture, "seed": 1234}
        return write_config(path, data=data, train=train, model=model, **sections)

    def preprocess(self) -> None:
        """Tokenize the corpus as it is."""
        config = self.config("preprocess", {})
        words = ("--config", config, "--model", self.directory / "model" / "hf")
        script("preprocess.py", *words, "--output", self.data)

    def launch_words(
        self,
        name: str,
        ranks: int,
        options: Mapping[str, Any],
        program: Path = ROOT / "scripts" / "train.py",
        **sections: Any,
    ) -> list[str]:
        """The words after launch.py that train, or resume, in the directory `name`."""
        output = self.directory / name
        config = self.config(name, options, **sections)
        checkpoints = output / "checkpoints" / Layout(config=load_config(config)).checkpoints.name
        words = (
            *("--launcher", "torchrun", "--ranks-per-node", ranks),
            *("--log", self.directory / f"{name}.log"),
            *("--checkpoints", checkpoints),
            *("--trained-from", self.directory / "megatron" / "manifest.json"),
            *("--trained-from", self.data / "manifest.json", program),
            *("--config", config, "--model", self.directory / "model" / "hf"),
            *("--checkpoint", self.directory / "megatron" / "checkpoint"),
            *("--data", self.data, "--output", output),
        )
        return [str(word) for word in words]

    def train(
        self,
        name: str,
        ranks: int,
        options: Mapping[str, Any],
        environment: Mapping[str, str] | None = None,
        **sections: Any,
    ) -> Path:
        """Train, or resume; the directory with metrics.jsonl and the checkpoints."""
        words = self.launch_words(name, ranks, options, **sections)
        script("launch.py", *words, environment=environment)
        (checkpoints,) = (self.directory / name / "checkpoints").iterdir()
        return checkpoints

    def export(self, name: str, checkpoints: Path, options: Mapping[str, Any], dtype: str) -> Path:
        """Export what was trained to the directory `name`, and hold it against the gates."""
        config = self.config(name, options, export={"dtype": dtype})
        manifest = checkpoints.parents[1] / "manifest.json"
        exported = self.directory / name
        script(
            *("export.py", "--config", config, "--model", self.directory / "model" / "hf"),
            *("--checkpoint", checkpoints, "--train-manifest", manifest, "--output", exported),
        )
        verdict = exported / "parity.json"
        ranks = ranks_of_layout(load_config(config).train)
        script(
            *("launch.py", "--ranks-per-node", ranks, "--log", exported / "parity.log"),
            *(ROOT / "scripts" / "parity.py", "--config", config, "--crossing", "export"),
            *("--model", exported / "hf", "--checkpoint", checkpoints),
            *("--data", self.data, "--output", verdict),
            *("--checkpoint-manifest", manifest),
        )
        assert read_json(verdict)["results"]["verdict"] == "passed"
        return exported / "hf"

    def held_out_loss(
        self, trained: Path, model: Path, options: Mapping[str, Any], *cases: str
    ) -> dict[str, Any]:
        """What distributed/held_out_loss.py measures of a training in the directory `trained`.

        Args:
            trained: With the checkpoints.
            model: The Hugging Face directory that was exported from it.
            options: Of the training.
            cases: NAME:SEED:SAMPLES:POSITIONS each, see there.
        """
        words = {
            "config": self.config("held-out-loss", options),
            "model": model,
            "checkpoint": trained,
            "data": self.data,
            "train-manifest": trained.parents[1] / "manifest.json",
        }
        program = ROOT / "tests" / "distributed" / "held_out_loss.py"
        named = [str(word) for name, value in words.items() for word in (f"--{name}", value)]
        command = [sys.executable, str(program), *named, *cases]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
        return found


def prepare(directory: Path, architecture: str = "qwen3") -> Workspace:
    """The stages before training, run as the workflow runs them."""
    workspace = Workspace(directory=directory, architecture=architecture)
    write_lines(directory, 200)
    config = workspace.config("stages", {})
    model = directory / "model" / "hf"
    script("download.py", "--config", config, "--output", directory / "model")
    script(
        *("convert.py", "--config", config, "--model", model, "--output", directory / "megatron")
    )
    workspace.preprocess()
    return workspace


def write_lines(directory: Path, count: int) -> None:
    """The documents of the corpus."""
    with open(directory / "lines.jsonl", "w", encoding="utf-8") as stream:
        for number in range(count):
            words = " ".join(f"{number * factor % 97} is not {factor}" for factor in range(2, 12))
            stream.write(json.dumps({"text": f"Line {number}: {words}."}) + "\n")


def losses(checkpoints: Path) -> list[float]:
    return [row["loss"] for row in read_metrics(checkpoints / "metrics.jsonl") if "loss" in row]


def largest_difference(first: list[float], second: list[float]) -> float:
    return max(abs(a - b) for a, b in zip(first, second, strict=True))


def weights(workspace: Workspace, checkpoints: Path, iteration: int) -> dict[str, torch.Tensor]:
    """The weights of a checkpoint as the export writes them."""
    from megaqwen.weights import read_hf_tensors

    config = read_json(workspace.directory / "model" / "hf" / "config.json")
    return dict(read_hf_tensors(checkpoints, config, iteration=iteration))


def differing(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> list[str]:
    assert first.keys() == second.keys()
    return [name for name in first if not torch.equal(first[name], second[name])]


def forget_after(checkpoints: Path, iteration: int) -> None:
    """Leave things as a kill does that came after this iteration's checkpoint."""
    for directory in checkpoints.glob("iter_*"):
        if int(directory.name.removeprefix("iter_")) > iteration:
            shutil.rmtree(directory)
    (checkpoints / TRACKER).write_text(str(iteration))
    (checkpoints.parents[1] / "manifest.json").unlink()


def forget_last_evaluation(checkpoints: Path) -> None:
    """Leave things as a kill does that came after the last save and before the last evaluation."""
    (checkpoints.parents[1] / "manifest.json").unlink()
    metrics = checkpoints / "metrics.jsonl"
    records = metrics.read_text().splitlines(keepends=True)
    assert "test_loss" in records[-1]
    metrics.write_text("".join(records[:-1]))
