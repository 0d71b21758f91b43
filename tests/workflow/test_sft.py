"""The shipped experiment for SFT, as it stands, through the whole DAG."""

from pathlib import Path

import pytest
from checkout import Checkout, run_tuning

from megaqwen.training.metrics import read_metrics

RUN = "sft"
WORDS = ("all", "--configfile", "config/experiments/sft.yaml")

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory, tiny_qwen3: Path) -> Checkout:
    """A clone in which there is a model where the default run exports one, and what tunes it."""
    return run_tuning(tmp_path_factory.mktemp("sft"), tiny_qwen3, *WORDS)


def test_training_learns(checkout: Checkout) -> None:
    train = checkout.results(RUN, "train/manifest.json")["results"]
    assert train["last_loss"] < train["first_loss"] - 1
    assert train["test_loss"] is not None
    metrics = checkout.directory / "results/runs/sft/train" / train["metrics"]
    counts = [each["target_tokens"] for each in read_metrics(metrics) if "seconds" in each]
    assert len(counts) == 40
    assert train["target_tokens"] == sum(counts) < train["tokens"]


def test_the_gates_compare_chats(checkout: Checkout) -> None:
    verdict = checkout.results(RUN, "parity/export/parity.json")["results"]
    assert verdict["verdict"] == "passed"
    assert {"perplexity", "trained loss"} <= {gate["name"] for gate in verdict["gates"]}
    texts = {text["text"] for text in verdict["texts"]}
    assert {"chat", "python-questions 1", "chat continued"} <= texts
    evaluated = checkout.results(RUN, "train/manifest.json")["results"]["evaluations"]["test"]
    measured = verdict["perplexity"]
    assert measured["logged"] == evaluated["loss"] and measured["kind"] == "test"
    # Of the assistant's turns alone.
    assert 0 < measured["targets"] < evaluated["samples"] * 256


def test_the_report_tells_targets_and_packing(checkout: Checkout) -> None:
    card = checkout.results(RUN, "report/data.json")["corpora"]["python-questions"]
    facts = card["drawn"]["train"]
    assert 0 < facts["target_tokens"] < facts["tokens"]
    page = (checkout.directory / "results/runs/sft/report/report.html").read_text(encoding="utf-8")
    assert f"{facts['packing_efficiency']:.2%}" in page


def test_nothing_is_left_to_do(checkout: Checkout) -> None:
    assert checkout.plan(*WORDS) == set()
