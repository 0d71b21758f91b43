"""Time and memory of the parity stage at a real shape, whose weights need not fit the memory in float32.

    uv run python tests/benchmarks/parity.py 7B --directory DIRECTORY [--minutes 10]

Makes the model with random weights, converts it, tokenizes the built-in corpus, and runs the stage as the
workflow does after convert, under the embedded default's layout on one rank. Printed are the verdict, the
gates, what was not measured and why, the stage's seconds and its peak memory, from its own manifest. A 7B
takes 31 GB of disk.
"""

import argparse
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
sys.path[0:0] = [str(ROOT / "scripts"), str(ROOT / "tests")]

from bridge import SHAPES, make_model  # noqa: E402

from commands import write_config  # noqa: E402
from megaqwen.provenance import read_json  # noqa: E402
from megaqwen.sources.tokenizer import train_tokenizer  # noqa: E402

ONE_RANK = {
    "seq_length": 256,
    "micro_batch_size": 1,
    "global_batch_size": 1,
    "train_iters": 10,
    "lr": 1e-4,
    "bf16": True,
    "save_interval": 10,
    "eval_interval": 10,
    "eval_iters": 1,
}


def run_stage(name: str, *words: object) -> None:
    """One of the stages' commands, which says itself how far it is."""
    command = [sys.executable, str(ROOT / "scripts" / name), *map(str, words)]
    subprocess.run(command, check=True)


def prepare(shape: str, place: Path) -> None:
    """Everything that the stage reads; kept for another run."""
    model = place / "model" / "hf"
    make_model(shape, model)
    train_tokenizer(SHAPES[shape]["max_position_embeddings"]).save_pretrained(model)
    config = write_config(
        place / "preparing.yaml", model={"source": "path", "path": str(model)}, train=ONE_RANK
    )
    words = ("--config", config, "--model", model, "--output")
    run_stage("convert.py", *words, place / "megatron")
    run_stage("preprocess.py", *words, place / "data")


def measure(shape: str, directory: Path, minutes: float) -> dict[str, Any]:
    """The manifest of the stage."""
    place = directory / shape
    if not (place / "data" / "manifest.json").is_file():
        shutil.rmtree(place, ignore_errors=True)
        prepare(shape, place)
    config = write_config(
        place / "config.yaml",
        model={"source": "path", "path": str(place / "model" / "hf")},
        train=ONE_RANK,
        parity={"minutes": minutes},
    )
    run_stage(
        *("parity.py", "--config", config, "--crossing", "convert"),
        *("--model", place / "model" / "hf", "--checkpoint", place / "megatron" / "checkpoint"),
        *("--checkpoint-manifest", place / "megatron" / "manifest.json"),
        *("--data", place / "data", "--output", place / "parity" / "parity.json"),
        *("--log", place / "parity" / "log"),
    )
    found: dict[str, Any] = read_json(place / "parity" / "parity.json")
    return found


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("shape", choices=SHAPES)
    parser.add_argument("--directory", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=10, help="parity.minutes (default: 10)")
    arguments = parser.parse_args()
    manifest = measure(arguments.shape, arguments.directory, arguments.minutes)
    peak = manifest["peak_memory_bytes"] / 2**30
    print(f"{arguments.shape}: {manifest['seconds']:.0f} s, at most {peak:.2f} GiB of memory")
    print(f"seconds: {manifest['results']['seconds']}")


if __name__ == "__main__":
    main()
