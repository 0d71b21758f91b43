"""The parity stage at real shapes: how long it takes, and how much memory.

    uv run python tests/benchmarks/parity.py 0.5B 7B --directory DIRECTORY [--minutes 10] [--tokens 256]

Makes each model with random bfloat16 weights, converts it, and runs scripts/parity.py on it as the
workflow does. A 7B takes 31 GB of disk.
"""

import argparse
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from bridge import SHAPES, make_model

ROOT = Path(__file__).parents[2]
sys.path[0:0] = [str(ROOT / "scripts"), str(ROOT / "tests")]

from commands import options, write_config  # noqa: E402
from megaqwen.provenance import read_json, write_json  # noqa: E402
from megaqwen.sources.tokenizer import train_tokenizer  # noqa: E402

SCALE = 0.02
TEXTS = [
    "The quick brown fox jumps over the lazy dog. " * 40,
    "def mean(values):\n    return sum(values) / len(values)\n" * 25,
    "今天天气很好，我们去公园散步吧。" * 25,
]


def run(*command: object) -> None:
    """Run a command; what it printed is the message where it fails."""
    done = subprocess.run(
        [sys.executable, *map(str, command)], capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise SystemExit(done.stdout + done.stderr)


def measure(shape: str, directory: Path, minutes: float, tokens: int) -> dict[str, Any]:
    """The manifest of the stage."""
    place = directory / shape
    shutil.rmtree(place, ignore_errors=True)
    make_model(shape, place / "hf", SCALE)
    train_tokenizer(1024).save_pretrained(place / "hf")
    (place / "manifest.json").unlink()  # it does not know of the tokenizer
    write_json(place / "manifest.json", {"stage": "a benchmark"})
    run(Path(__file__).with_name("bridge.py"), "--stage", "convert", "--directory", place)
    config = write_config(
        place / "config.yaml",
        parity={
            "texts": TEXTS,
            "held_out_documents": 0,
            "max_tokens": tokens,
            "generated_tokens": 2,
            "minutes": minutes,
        },
    )
    output = place / "parity.json"
    words = {"crossing": "convert", "model": place / "hf", "checkpoint": place / "megatron"}
    words |= {"data": place, "output": output, "config": config, "log": place / "log"}
    run(ROOT / "scripts" / "parity.py", *options(**words))
    manifest: dict[str, Any] = read_json(output)
    shutil.rmtree(place)
    return manifest


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("shapes", nargs="+", choices=list(SHAPES), help="which models")
    parser.add_argument("--directory", type=Path, required=True, help="a disk with room")
    parser.add_argument("--minutes", type=float, default=10, help="the budget (default: 10)")
    parser.add_argument("--tokens", type=int, default=256, help="of a text (default: 256)")
    arguments = parser.parse_args()
    for shape in arguments.shapes:
        found = measure(shape, arguments.directory, arguments.minutes, arguments.tokens)
        results = found["results"]
        print(
            f"{shape:5} {results['verdict']} at {results['positions']} positions in"
            f" {found['seconds']:.0f} s ({json.dumps(results['seconds'])}), peak"
            f" {found['peak_memory_bytes'] / 2**30:.2f} GiB"
        )
        for gate in results["gates"]:
            print(
                f"      {gate['name']:12} {gate['value']:10.3g} of {gate['threshold']:g}",
                flush=True,
            )


if __name__ == "__main__":
    main()
