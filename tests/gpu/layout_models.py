"""The models that layouts.py trains: published shapes with few layers, random weights, converted.

They pass through the product's own stages (preprocess, convert), so that every layout starts from one
checkpoint and reads the same tokens. DIRECTORY gets data/, and for each shape hf/ and megatron/.
"""

import json
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from layout_plan import hf_config, small_config
from torch import Tensor

from commands import write_config
from megaqwen.architecture import read_architecture, tensor_shapes
from megaqwen.provenance import StageRecord, describe_files
from megaqwen.sources.tokenizer import train_tokenizer
from megaqwen.weights.safetensors_files import plan_files, write_file, write_index
from workspace import script

SPREAD = 0.02  # standard deviation of the weights, as initializer_range of Qwen
NOISE = 2**22 + 3
CORPORA = [{"name": "docs", "source": "builtin"}]
SPLIT = [98, 1, 1]
SHARD_BYTES = 2 * 10**9


@dataclass(frozen=True, kw_only=True)
class Models:
    """Where the models and the data lie."""

    directory: Path
    small: bool
    """Shrunk, for CPU ranks."""

    def hf(self, shape: str) -> Path:
        return self.directory / shape / "model" / "hf"

    def hf_config(self, shape: str) -> dict[str, Any]:
        return small_config(shape) if self.small else hf_config(shape)

    def config(self, path: Path, shape: str, train: dict[str, Any]) -> Path:
        """Write the config of a run on a shape."""
        model = {"source": "path", "path": str(self.hf(shape))}
        data = {"corpora": CORPORA, "split": SPLIT}
        return write_config(path, model=model, data=data, train=train, run=path.stem)

    def words(self, config: Path, shape: str, output: Path) -> list[str]:
        """The arguments of scripts/train.py."""
        place = self.directory
        words = (
            *("--config", config, "--model", self.hf(shape)),
            *("--checkpoint", place / shape / "megatron" / "checkpoint"),
            *("--data", place / "data", "--output", output),
        )
        return [str(word) for word in words]

    def make(self, shapes: Sequence[str]) -> None:
        """Everything that trainings of these shapes start from, but for what is there already."""
        for shape in shapes:
            self.hf(shape).mkdir(parents=True, exist_ok=True)
            facts = self.hf_config(shape)
            (self.hf(shape) / "config.json").write_text(json.dumps(facts))
            train_tokenizer(facts["max_position_embeddings"]).save_pretrained(self.hf(shape))
        missing = [each for each in shapes if not self.made(self.directory / each / "megatron")]
        with ThreadPoolExecutor() as pool:
            for done in [pool.submit(self.make_shape, shape) for shape in missing]:
                done.result()
        if not self.made(self.directory / "data"):
            self.preprocess(shapes[0])  # one tokenizer: one set of tokens for all

    @staticmethod
    def made(directory: Path) -> bool:
        """Whether a stage has finished there."""
        return (directory / "manifest.json").is_file()

    def make_shape(self, shape: str) -> None:
        """Weights, and what convert makes of them."""
        hf, record = self.hf(shape), StageRecord("download", {"model": shape})
        write_weights(hf, self.hf_config(shape))
        record.write(hf.parent / "manifest.json", inputs={}, results={"files": describe_files(hf)})
        config = self.config(self.directory / f"{shape}.yaml", shape, self.least())
        megatron = self.directory / shape / "megatron"
        script("convert.py", "--config", config, "--model", hf, "--output", megatron)

    def preprocess(self, shape: str) -> None:
        """Tokenize the text that every machine has."""
        config = self.config(self.directory / "data.yaml", shape, self.least())
        output = self.directory / "data"
        words = ("--config", config, "--model", self.hf(shape), "--output", output)
        script("preprocess.py", *words)

    @staticmethod
    def least() -> dict[str, Any]:
        """A section train that passes the config's checks where none is trained."""
        sizes = {"seq_length": 64, "micro_batch_size": 1, "global_batch_size": 1}
        return {**sizes, "train_iters": 1, "lr": 1.0e-4, "save_interval": 1}


def write_weights(directory: Path, facts: dict[str, Any]) -> None:
    """Random bfloat16 weights as Qwen's are at first: normal, and norms around 1.

    One long run of noise, of which each tensor takes the next stretch, since drawing billions of
    numbers would take minutes.
    """
    noise = torch.randn(NOISE, generator=torch.Generator().manual_seed(1234))
    shapes = tensor_shapes(read_architecture(facts))
    files = plan_files(shapes, dict.fromkeys(shapes, torch.bfloat16), SHARD_BYTES)
    used = 0

    def weights(names: list[str]) -> Iterator[tuple[str, Tensor]]:
        nonlocal used
        for name in names:
            size = torch.Size(shapes[name])
            stretch = noise.roll(-used)
            norm = name.endswith("norm.weight")
            stretch = (1 + 0.1 * stretch if norm else SPREAD * stretch).bfloat16()
            used = (used + size.numel()) % NOISE
            yield name, stretch.repeat(size.numel() // NOISE + 1)[: size.numel()].reshape(size)

    for name, entries in files.items():
        write_file(directory / name, entries, weights(list(entries)))
    if len(files) > 1:
        write_index(directory, files)
