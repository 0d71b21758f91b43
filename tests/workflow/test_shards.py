"""A shard whose process is killed, with the real stage: it alone is done again, and nothing shows."""

import json
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from pydoc_data.topics import topics

import psutil
import pytest
from checkout import COUNTED, Checkout, copy_repository, overlay

from commands import options, run_script
from megaqwen.provenance import sha256_file

pytestmark = pytest.mark.slow

SECONDS = 120


@pytest.fixture
def checkout(tmp_path: Path, tiny_qwen3: Path) -> Checkout:
    """A clone whose corpus is split into three shards."""
    checkout = copy_repository(tmp_path / "checkout")
    lines = [json.dumps({"text": text}) + "\n" for text in topics.values()]
    for number in range(3):
        file = checkout.directory / "data" / f"{number}.jsonl"
        file.parent.mkdir(exist_ok=True)
        file.write_text("".join(lines[number::3]) * 60, encoding="utf-8")
    corpus = {"name": "topics", "source": "files", "files": ["data/*.jsonl"]}
    model = {"source": "path", "path": str(tiny_qwen3)}
    overlay(checkout, "shards.yaml", model=model, data={"corpora": [corpus], "shards": 3})
    return checkout


def kill_shard(shards: Path, shard: str) -> None:
    """Kill the process that makes a shard as soon as some of the shard is on the disk."""
    end = time.monotonic() + SECONDS
    while time.monotonic() < end:
        if any(path.stat().st_size for path in shards.glob(f".{shard}.partial-*/*.bin")):
            for process in psutil.process_iter(["cmdline"]):
                words = process.info["cmdline"] or []
                if shard in words and "--shard" in words and "python" in words[0]:
                    process.kill()
                    return
        time.sleep(0.005)
    raise AssertionError(f"no process made {shard}")


def test_a_killed_shard_is_done_again_alone(checkout: Checkout) -> None:
    words = ("--profile", "local", "preprocess", "--configfile", "shards.yaml")
    command = [sys.executable, "-m", "snakemake", *words, "--keep-going"]
    printed = checkout.directory / "printed.txt"
    with open(printed, "w") as stream:
        running = subprocess.Popen(
            command, cwd=checkout.directory, stdout=stream, stderr=subprocess.STDOUT
        )
        try:
            data = checkout.directory / "results" / "shared" / "data"
            while not (found := list(data.glob("*.shards.json"))) and running.poll() is None:
                time.sleep(0.1)
            assert found, printed.read_text()
            name = found[0].name.removesuffix(".json")
            kill_shard(data / name, "2-of-3")
        finally:
            running.wait(SECONDS)
    assert running.returncode != 0, printed.read_text()
    shards = data / name
    assert [path.name for path in sorted(shards.glob("[0-9]*"))] == ["1-of-3", "3-of-3"]
    assert list(shards.glob(".2-of-3.partial-*")), "it was killed at work"
    assert not list(data.glob("*/manifest.json"))

    shutil.copytree(shards / "1-of-3", shards / "9-of-9")  # of an earlier plan
    done = checkout.snakemake(*words)
    assert done.returncode == 0, done.stdout
    ran = done.stdout.partition("Job stats:")[2].partition("total")[0]
    assert sorted(COUNTED.findall(ran)) == ["preprocess", "preprocess_shard"]
    assert re.search(r"^preprocess_shard +1$", ran, re.MULTILINE) and not shards.exists()
    (made,) = data.glob("*/manifest.json")

    model = next((checkout.directory / "results" / "shared" / "models").iterdir()) / "hf"
    config = checkout.directory / "results" / "runs" / "default" / "config.yaml"
    given = options(config=config, model=model, output=checkout.directory / "whole")
    (checkout.directory / "whole.shards" / ".1-of-3.partial-123").mkdir(parents=True)
    once = run_script("preprocess.py", *given, cwd=checkout.directory)
    assert once.returncode == 0, once.stdout
    assert not (checkout.directory / "whole.shards").exists()
    for file in ("topics.bin", "topics.idx", "card.json"):
        assert sha256_file(made.parent / file) == sha256_file(checkout.directory / "whole" / file)
