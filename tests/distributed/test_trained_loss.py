"""The loss that training logged is the exported model's, over the same samples; of no other model's."""

import shutil
from pathlib import Path

import pytest

from commands import run_script
from megaqwen.checkpoints import TRACKER
from megaqwen.provenance import read_json, sha256_file
from workspace import Workspace, script

TWO_RANKS = {"use_distributed_optimizer": True, "eval_iters": 2}
SAMPLES = 8  # of the last evaluation: two global batches of four


@pytest.fixture(scope="module")
def trained(workspace: Workspace) -> Path:
    return workspace.train("trained-loss", 2, TWO_RANKS)


@pytest.fixture(scope="module")
def exported(workspace: Workspace, trained: Path) -> Path:
    """The Hugging Face directory; its export passed the gates."""
    return workspace.export("trained-loss-hf", trained, TWO_RANKS, "source")


def test_the_manifest_tells_what_was_evaluated(trained: Path) -> None:
    results = read_json(trained.parents[1] / "manifest.json")["results"]
    validation, test = (results["evaluations"][kind] for kind in ("validation", "test"))
    assert validation["iteration"] == test["iteration"] == 4
    assert (test["loss"], test["first_sample"], test["samples"]) == (
        results["test_loss"],
        0,
        SAMPLES,
    )
    # One at iteration 4 within training, then this one after it.
    assert validation["first_sample"] == SAMPLES and validation["drawn"] == 2 * SAMPLES
    # The last of two ranks has the second two samples of every four.
    assert list(test["losses"]) == ["2", "3", "6", "7"]
    assert all(targets == 64 for _, targets in test["losses"].values())


def test_the_exported_model_has_the_loss_that_training_logged(
    workspace: Workspace, trained: Path, exported: Path
) -> None:
    found = workspace.held_out_loss(
        *(trained, exported, TWO_RANKS),
        *("all:1234:8:64", "two:1234:2.5:64", "none:1234:0.5:64", "too long:1234:8:48"),
    )
    logged = read_json(trained.parents[1] / "manifest.json")["results"]["test_loss"]
    for name, samples in (("all", SAMPLES), ("two", 2)):
        facts, gates = found[name]["measured"], found[name]["gates"]
        assert (facts["samples"], facts["targets"]) == (samples, samples * 64)
        assert set(gates) == {"perplexity", "trained loss"}
        assert all(gate["passed"] for gate in gates.values()), gates
        assert gates["trained loss"]["value"] < 5e-6
    assert found["all"]["measured"]["logged"] == logged
    assert found["two"]["measured"]["logged"] != logged  # of these two samples alone
    # Not one whole sample: the models are compared, and nothing is said of the training.
    assert set(found["none"]["gates"]) == {"perplexity"}
    assert "parity.minutes is enough for 32 of" in found["none"]["unmeasured"]["trained loss"]
    assert found["none"]["measured"]["targets"] == 32
    assert set(found["too long"]["gates"]) == {"perplexity"}
    assert "memory is enough for 48 of" in found["too long"]["unmeasured"]["trained loss"]
    assert found["too long"]["measured"]["targets"] == 48


def test_other_samples_have_another_loss(
    workspace: Workspace, trained: Path, exported: Path
) -> None:
    case = "another seed:7:8:64"
    gates = workspace.held_out_loss(trained, exported, TWO_RANKS, case)["another seed"]["gates"]
    assert gates["perplexity"]["passed"] and not gates["trained loss"]["passed"]
    assert gates["trained loss"]["value"] > 10 * gates["trained loss"]["threshold"]


@pytest.fixture(scope="module")
def stale(workspace: Workspace, trained: Path) -> Path:
    """With the checkpoints of the training, of which an earlier one counts as the latest; its export."""
    directory = workspace.directory / "stale"
    shutil.copytree(trained, directory / "checkpoints")
    (directory / "checkpoints" / TRACKER).write_text("2")
    script(
        *("export.py", "--config", workspace.config("trained-loss", TWO_RANKS)),
        *(
            "--checkpoint",
            directory / "checkpoints",
            "--model",
            workspace.directory / "model" / "hf",
        ),
        *(
            "--train-manifest",
            trained.parents[1] / "manifest.json",
            "--output",
            directory / "export",
        ),
    )
    return directory


def test_another_models_loss_is_found(workspace: Workspace, trained: Path, stale: Path) -> None:
    """The checkpoint of the last iteration held against the export of an earlier one."""
    hf = stale / "export" / "hf"
    found = workspace.held_out_loss(trained, hf, TWO_RANKS, "all:1234:8:64")["all"]["gates"]
    assert not found["perplexity"]["passed"] and not found["trained loss"]["passed"]
    assert found["perplexity"]["value"] > 10 * found["perplexity"]["threshold"]


def test_an_earlier_iteration_that_was_exported_is_found(
    workspace: Workspace, trained: Path, stale: Path, tmp_path: Path
) -> None:
    """Every other gate passes: it is one model on both sides, but not the one that was trained."""
    manifest = trained.parents[1] / "manifest.json"
    done = run_script(
        *("parity.py", "--config", workspace.config("trained-loss", TWO_RANKS)),
        *("--crossing", "export", "--model", stale / "export" / "hf"),
        *("--checkpoint", stale / "checkpoints", "--data", workspace.directory / "data"),
        *("--checkpoint-manifest", manifest),
        *("--output", tmp_path / "parity.json"),
    )
    assert done.returncode == 2, done.stdout + done.stderr
    failed = read_json(tmp_path / "failed.json")
    assert failed["inputs"]["checkpoint"]["sha256"] == sha256_file(manifest)
    gates = failed["results"]["gates"]
    assert [gate["name"] for gate in gates if not gate["passed"]] == ["trained loss"]
    assert "failed at trained loss." in done.stdout and "an earlier iteration" in done.stdout
