"""Time and memory of the bridge at real shapes, beside `cp -r` of the same bytes.

    uv run python tests/benchmarks/bridge.py 0.5B 1.5B 7B moe --directory DIRECTORY --drop-caches

Makes each model with random weights, then measures convert and export in turn with copies of what they
read. Convert also compares the model's files with their SHA-256, as after a download. With --drop-caches,
which only root may say, each finds nothing of its input in memory. A 7B takes 61 GB of disk.
"""

import argparse
import json
import math
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
sys.path[0:0] = [str(ROOT / "scripts"), str(ROOT / "tests")]

from megaqwen.environment import use_huge_pages  # noqa: E402

use_huge_pages()

import torch  # noqa: E402
from torch import Tensor  # noqa: E402

from megaqwen.architecture import read_architecture, tensor_shapes  # noqa: E402
from megaqwen.provenance import write_json  # noqa: E402
from megaqwen.sources.recorded import recorded_checks  # noqa: E402
from megaqwen.weights import convert_to_megatron, export_to_huggingface  # noqa: E402
from megaqwen.weights.safetensors_files import plan_files, write_file, write_index  # noqa: E402
from published import published_config  # noqa: E402

SHARD_BYTES = 4 * 10**9
SHAPES: dict[str, dict[str, Any]] = {
    **{size: published_config(f"Qwen2.5-{size}") for size in ("0.5B", "1.5B", "7B")},
    # The layers and experts of Qwen3-30B-A3B, a quarter as wide.
    "moe": {
        **published_config("Qwen3-30B-A3B"),
        "hidden_size": 512,
        "intermediate_size": 1536,
        "moe_intermediate_size": 192,
    },
}


def make_model(shape: str, directory: Path) -> None:
    """Write a model of random bfloat16 weights."""
    directory.mkdir(parents=True)
    (directory / "config.json").write_text(json.dumps(SHAPES[shape]))
    shapes = tensor_shapes(read_architecture(SHAPES[shape]))
    files = plan_files(shapes, dict.fromkeys(shapes, torch.bfloat16), SHARD_BYTES)
    noise = 0.02 * torch.randn(1_000_003).bfloat16()

    def weights(names: list[str]) -> Iterator[tuple[str, Tensor]]:
        for name in names:
            count = torch.Size(shapes[name]).numel()
            values = noise.repeat(count // len(noise) + 1)[:count].reshape(shapes[name])
            yield name, 1 + values if name.endswith("norm.weight") else values

    described = {
        name: write_file(directory / name, entries, weights(list(entries)))
        for name, entries in files.items()
    }
    if len(files) > 1:
        write_index(directory, files)
    manifest = {"stage": "download", "results": {"files": described}}
    write_json(directory.parent / "manifest.json", manifest)


def largest_tensor(shape: str) -> float:
    """GiB of the largest of Megatron's tensors, fc1 included."""
    shapes = tensor_shapes(read_architecture(SHAPES[shape]))
    sizes = {name: torch.Size(each).numel() * 2 for name, each in shapes.items()}
    fused = 2 * max(size for name, size in sizes.items() if name.endswith("gate_proj.weight"))
    return max(fused, *sizes.values()) / 2**30


def timed(command: list[str], drop_caches: bool) -> tuple[float, str]:
    """Seconds that a command takes, and what it prints."""
    os.sync()
    if drop_caches:
        Path("/proc/sys/vm/drop_caches").write_text("3")
    start = time.monotonic()
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return time.monotonic() - start, done.stdout


def copied(place: Path, source: str, drop_caches: bool) -> tuple[float, int]:
    """Seconds that `cp -r` takes, and the bytes of its files."""
    seconds, _ = timed(["cp", "-r", str(place / source), str(place / "copy")], drop_caches)
    size = sum(path.stat().st_size for path in (place / "copy").rglob("*") if path.is_file())
    shutil.rmtree(place / "copy")
    return seconds, size


def stage(direction: str, place: Path) -> None:
    """One direction in this process; prints its seconds and its peak memory in GiB."""
    start = time.monotonic()
    target = place / ("megatron" if direction == "convert" else "back")
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir()
    if direction == "convert":
        checks = recorded_checks(place / "hf", "download")
        convert_to_megatron(place / "hf", target, checks=checks)
    else:
        megatron = place / "megatron"
        export_to_huggingface(place / "hf", megatron, target, max_shard_bytes=SHARD_BYTES)
    seconds = time.monotonic() - start
    # Not getrusage's: that one begins with the parent's.
    peak = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    print(seconds, int(peak[1]) / 2**20 if peak else math.nan)


def measure(shape: str, directory: Path, pairs: int, drop_caches: bool) -> None:
    """Print a line for each direction of each pair."""
    place = directory / shape
    shutil.rmtree(place, ignore_errors=True)
    make_model(shape, place / "hf")
    bound = 2 + 3 * largest_tensor(shape)
    for pair in range(pairs):
        for direction, source in (("convert", "hf"), ("export", "megatron")):
            command = [sys.executable, __file__, "--stage", direction, "--directory", str(place)]
            if pair % 2:  # whoever comes second may find more in the host's cache
                copying, size = copied(place, source, drop_caches)
            seconds, peak = map(float, timed(command, drop_caches)[1].split()[-2:])
            if not pair % 2:
                copying, size = copied(place, source, drop_caches)
            print(
                f"{shape:5} {direction:8} {size / 1e9:6.2f} GB {seconds:6.1f} s"
                f" {size / seconds / 1e9:5.2f} GB/s, cp -r {copying:5.1f} s:"
                f" {copying / seconds:4.2f} of its speed; peak {peak:4.2f} GiB of {bound:5.2f}",
                flush=True,
            )
    shutil.rmtree(place)


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("shapes", nargs="*", choices=list(SHAPES), help="which models")
    parser.add_argument("--directory", type=Path, required=True, help="a disk with room")
    parser.add_argument("--pairs", type=int, default=2, help="repetitions (default: 2)")
    parser.add_argument("--drop-caches", action="store_true", help="empty the page cache (root)")
    parser.add_argument("--stage", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.stage:
        stage(arguments.stage, arguments.directory)
    for shape in arguments.shapes:
        measure(shape, arguments.directory, arguments.pairs, arguments.drop_caches)


if __name__ == "__main__":
    main()
