"""A model and corpora of one's own through the whole DAG, as a user does it with files.yaml."""

import gzip
import json
import os
import re
import shutil
from pathlib import Path
from pydoc_data.topics import topics

import pyarrow
import pyarrow.parquet
import pytest
import torch
import yaml
from checkout import Checkout, copy_repository
from transformers import AutoModelForCausalLM

from hub_server import REPO, Hub, serve

# A few iterations instead of a thousand; everything else is the experiment's own.
SMALL = {
    "train_iters": 6,
    "lr_warmup_iters": 2,
    "save_interval": 3,
    "eval_interval": 3,
    "eval_iters": 1,
    "seq_length": 256,
    "global_batch_size": 4,
}

pytestmark = pytest.mark.slow


def snakemake(checkout: Path, *words: str, **environment: str) -> str:
    """Run the workflow in a checkout; what it printed."""
    done = Checkout(checkout).snakemake("--profile", "local", *words, environment=environment)
    assert done.returncode == 0, done.stdout
    return done.stdout


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory, tiny_qwen2: Path) -> Path:
    """A clone beside a model and the corpora that files.yaml names."""
    checkout = copy_repository(tmp_path_factory.mktemp("checkout")).directory
    shutil.copytree(tiny_qwen2, checkout / "models" / "my-qwen")
    documents = list(topics.values())
    for name, opener, part in (
        ("a.jsonl", open, documents[:40]),
        ("b.jsonl.gz", gzip.open, documents[40:]),
    ):
        path = checkout / "data" / "articles" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        with opener(path, "wt", encoding="utf-8") as stream:
            stream.writelines(json.dumps({"text": document}) + "\n" for document in part)
    books = checkout / "data" / "books"
    books.mkdir()
    table = pyarrow.table({"content": [document.upper() for document in documents]})
    pyarrow.parquet.write_table(table, books / "books.parquet")
    (checkout / "small.yaml").write_text(yaml.safe_dump({"train": SMALL}))
    return checkout


@pytest.fixture(scope="module")
def words() -> list[str]:
    return ["all", "--configfile", "config/experiments/files.yaml", "small.yaml"]


@pytest.fixture(scope="module")
def printed(checkout: Path, words: list[str]) -> str:
    return snakemake(checkout, *words)


def test_the_run_says_its_verdicts_and_places(checkout: Path, printed: str) -> None:
    for crossing in ("convert", "export"):
        verdict = rf"parity after {crossing}: passed \(logits within [0-9.e-]+ at \d+ positions\)"
        assert re.search(verdict, printed)
    for place in ("report", "exported model", "checkpoint"):
        (path,) = re.findall(rf"^{place}: +(\S+)$", printed, re.MULTILINE)
        assert (checkout / path).exists()
    for stage in ("download", "convert", "preprocess", "train", "export", "report"):
        assert list(checkout.glob(f"results/**/logs/{stage}.log"))


def test_the_exported_model_generates(checkout: Path, printed: str) -> None:
    model = AutoModelForCausalLM.from_pretrained(checkout / "results/runs/my-files/export/hf")
    card = (checkout / "results/runs/my-files/export/hf/README.md").read_text(encoding="utf-8")
    assert "After export: passed" in card
    prompt = torch.arange(8)[None]
    assert model.generate(prompt, max_new_tokens=4, do_sample=False).shape == (1, 12)


def test_training_logged_to_tensorboard(checkout: Path, printed: str) -> None:
    (events,) = checkout.glob("results/runs/my-files/train/checkpoints/*/tensorboard/events*")
    assert b"lm loss" in events.read_bytes()


def test_a_second_run_has_nothing_to_do(checkout: Path, printed: str, words: list[str]) -> None:
    assert "Nothing to be done" in snakemake(checkout, *words)


def test_the_report_is_one_file(checkout: Path, printed: str, words: list[str]) -> None:
    snakemake(checkout, *words, "--report", "report.html")
    report = (checkout / "report.html").read_text(encoding="utf-8")
    for name in ("loss.svg", "rates.svg", "parity.html", "config.yaml", "versions.html"):
        assert name in report
    assert not re.search(r"""<(script|link|img)[^>]+(src|href)=["']https?://""", report)


def test_a_newer_shard_of_the_model_is_converted_again(
    checkout: Path, printed: str, words: list[str]
) -> None:
    os.utime(checkout / "models" / "my-qwen" / "model.safetensors")
    plan = snakemake(checkout, *words, "-n")
    assert "model.safetensors" in plan
    assert re.search(r"^convert +1$", plan, re.MULTILINE)


def test_only_download_needs_the_hub(tmp_path: Path, tiny_qwen3: Path) -> None:
    checkout = copy_repository(tmp_path / "checkout").directory
    overlay = {"model": {"source": "hub", "repo_id": REPO, "revision": "main"}}
    (checkout / "hub.yaml").write_text(yaml.safe_dump(overlay))
    words = ["--configfile", "config/experiments/hub.yaml", "hub.yaml"]
    commit = "c0ffee" + 34 * "0"
    files = {path.name: path.read_bytes() for path in tiny_qwen3.iterdir()}
    with serve(Hub(commits={commit: files}, branches={"main": commit})) as hub:
        places = {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home")}
        printed = snakemake(checkout, "download", *words, **places)
        assert f"{REPO} at {commit[:7]}" in printed
        asked = len(hub.requests)
        assert asked > 0
        printed = snakemake(checkout, "parity_convert", *words, **places)
        assert "parity after convert: passed" in printed
        assert len(hub.requests) == asked
    (manifest,) = checkout.glob("results/shared/models/*/manifest.json")
    assert json.loads(manifest.read_text())["results"]["commit"] == commit
