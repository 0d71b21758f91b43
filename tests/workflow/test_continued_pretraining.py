"""The shipped experiment for continued pretraining, as it stands, through the whole DAG."""

from pathlib import Path

import pytest
from checkout import Checkout, run_tuning

from commands import ROOT
from megaqwen.training.metrics import read_metrics

RUN = "continued-pretraining"
WORDS = ("all", "--configfile", "config/experiments/continued-pretraining.yaml")

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory, tiny_qwen3: Path) -> Checkout:
    """A clone in which there is a model where the default run exports one, and what continues it."""
    return run_tuning(tmp_path_factory.mktemp("continued"), tiny_qwen3, *WORDS)


def test_training_learns(checkout: Checkout) -> None:
    train = checkout.results(RUN, "train/manifest.json")["results"]
    assert train["last_loss"] < train["first_loss"] - 1
    metrics = checkout.directory / "results/runs/continued-pretraining/train" / train["metrics"]
    validated = [each for each in read_metrics(metrics) if "validation_loss" in each]
    assert [each["iteration"] for each in validated] == [20, 40]
    assert train["test_loss"] is not None


def test_the_data_card_tells_what_was_drawn(checkout: Checkout) -> None:
    corpora = checkout.results(RUN, "report/data.json")["corpora"]
    drawn = {name: card["drawn"] for name, card in corpora.items()}
    assert {name: set(each) for name, each in drawn.items()} == {
        "code": {"train", "valid"},
        "python-docs": {"train"},
        "rules": {"test"},
    }
    assert [drawn[name]["train"]["samples"] for name in ("code", "python-docs")] == [240, 80]
    files = 1 + len(list((ROOT / "rules").glob("*.smk")))  # the Snakefile first
    assert drawn["rules"]["test"]["documents"] == corpora["rules"]["documents"] == files
    assert corpora["code"]["short_documents_skipped"] > 0
    for card in corpora.values():
        for facts in card["drawn"].values():
            assert facts["epochs"] == pytest.approx(facts["samples"] * 256 / facts["tokens"])
    page = checkout.directory / "results/runs/continued-pretraining/report/report.html"
    assert f"{drawn['code']['train']['epochs']:.3g}</td>" in page.read_text(encoding="utf-8")


def test_nothing_is_left_to_do(checkout: Checkout) -> None:
    assert checkout.plan(*WORDS) == set()
