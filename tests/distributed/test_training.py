"""The train stage, on one rank and on two data parallel ones over gloo: one curve, exact resumption.

In float32 the two differ by the order of sums alone: the first loss within 1e-4, the later ones within
1e-3. test_training_layouts.py has the other layouts, test_kills.py resumption from one layout to another.
"""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from torch.distributed.checkpoint import FileSystemReader

from commands import ROOT, options, run_script
from megaqwen.provenance import read_json, write_json
from megaqwen.training.metrics import read_metrics
from workspace import (
    BUCKETS,
    Workspace,
    differing,
    forget_after,
    losses,
    script,
    weights,
    write_lines,
)

FIRST_LOSS_BOUND, LOSS_BOUND = 1e-4, 1e-3  # nats per token
OFFLINE = {"WANDB_MODE": "offline"}
TRACKED = {"tracking": {"wandb_project": "qwen"}}
WITHOUT = """
import runpy, sys
sys.path.insert(0, "{scripts}")
from megaqwen.training import optimizer_states
{change}
runpy.run_path("{scripts}/train.py", run_name="__main__")
"""


def train_one_rank(workspace: Workspace) -> Path:
    return workspace.train("one-rank", 1, {}, OFFLINE, **TRACKED)


def train_data_parallel(workspace: Workspace) -> Path:
    return workspace.train("data-parallel", 2, BUCKETS)


@pytest.fixture(scope="module")
def one_rank(workspace: Workspace) -> Path:
    return train_one_rank(workspace)


@pytest.fixture(scope="module")
def data_parallel(workspace: Workspace) -> Path:
    return train_data_parallel(workspace)


def test_one_rank_learns(workspace: Workspace, one_rank: Path) -> None:
    curve = losses(one_rank)
    assert len(curve) == 4
    assert abs(curve[0] - 7.85) < 0.2  # log(2560): the model is random
    assert curve[-1] < curve[0] - 0.1
    whole = read_json(one_rank.parents[1] / "manifest.json")
    assert whole["command"][:2] == ["train.py", "--config"]  # not what Megatron is given
    manifest = whole["results"]
    assert (manifest["iteration"], manifest["tokens"]) == (4, 4 * 4 * 64)
    assert len(differing(*(weights(workspace, one_rank, step) for step in (2, 4)))) > 20


def test_two_ranks_train_alike(one_rank: Path, data_parallel: Path) -> None:
    expected, curve = losses(one_rank), losses(data_parallel)
    assert len(curve) == 4
    assert abs(curve[0] - expected[0]) < FIRST_LOSS_BOUND
    assert max(abs(a - b) for a, b in zip(expected, curve, strict=True)) < LOSS_BOUND


def test_a_validation_may_have_micro_batches_of_its_own(
    workspace: Workspace, one_rank: Path
) -> None:
    """Of two tensor parallel ranks one reads them, and the other has to know their size."""
    options = {"tensor_model_parallel_size": 2, "eval_micro_batch_size": 4}
    evaluated = workspace.train("own-micro-batch", 2, options)
    (expected,), (found,) = (
        [row["validation_loss"] for row in rows if "validation_loss" in row]
        for rows in (read_metrics(each / "metrics.jsonl") for each in (one_rank, evaluated))
    )
    assert abs(found - expected) < LOSS_BOUND


def test_a_copy_on_the_nodes_own_disk_changes_no_bit(
    workspace: Workspace, data_parallel: Path, tmp_path: Path
) -> None:
    """Made by one of two ranks."""
    scratch = {"directory": "$NODE_DISK/copies", "keep": True}
    place = {"NODE_DISK": str(tmp_path)}
    copied = workspace.train("on-scratch", 2, BUCKETS, place, scratch=scratch)
    assert losses(copied) == losses(data_parallel)
    assert differing(*(weights(workspace, run, 4) for run in (copied, data_parallel))) == []
    logs = [workspace.directory / f"on-scratch.log.rank{rank}.log" for rank in (0, 1)]
    assert sum(log.read_text().count("of data to ") for log in logs) == 1
    assert all("every node has its copy of the data" in log.read_text() for log in logs)
    (copy,) = (path for path in (tmp_path / "copies").iterdir() if path.is_dir())
    assert (copy / "lines.bin").read_bytes() == (workspace.data / "lines.bin").read_bytes()
    assert list((copy / "indices").rglob("*shuffle_index.npy"))


def test_the_tracker_has_the_curve(one_rank: Path) -> None:
    (file, *_) = sorted(one_rank.glob("wandb/offline-run-*/*.wandb"))
    content = file.read_bytes()
    assert [json.dumps(loss).encode() in content for loss in losses(one_rank)] == [True] * 4


@pytest.mark.parametrize(
    ("layout", "train", "last_rank"),
    [("one_rank", train_one_rank, 0), ("data_parallel", train_data_parallel, 1)],
    ids=["one rank", "data parallel"],
)
def test_resuming_ends_in_the_same_bits(
    request: pytest.FixtureRequest,
    workspace: Workspace,
    layout: str,
    train: Callable[[Workspace], Path],
    last_rank: int,
) -> None:
    straight: Path = request.getfixturevalue(layout)
    expected, curve = weights(workspace, straight, 4), losses(straight)
    forget_after(straight, 2)
    assert train(workspace) == straight
    name = straight.parents[1].name
    log = (workspace.directory / f"{name}.log.rank{last_rank}.log").read_text()
    assert "resuming after iteration 2" in log
    assert losses(straight) == curve
    assert differing(weights(workspace, straight, 4), expected) == []


def train_changed(workspace: Workspace, name: str, directory: Path, change: str) -> list[str]:
    """Train two ranks where optimizer_states is changed; the words that train them as it is."""
    program = directory / "train.py"
    program.write_text(WITHOUT.format(scripts=ROOT / "scripts", change=change))
    script("launch.py", *workspace.launch_words(name, 2, BUCKETS, program))
    return workspace.launch_words(name, 2, BUCKETS)


def ranks_with_states(checkpoints: Path, iteration: int) -> set[str]:
    """Those that wrote states of the optimizer."""
    stored = FileSystemReader(checkpoints / f"iter_{iteration:07}").read_metadata().storage_data
    return {
        info.relative_path.split("_")[2]
        for index, info in stored.items()
        if index.fqn.startswith("optimizer.state.")
    }


def test_a_checkpoint_with_states_of_other_parameters_is_refused(
    workspace: Workspace, tmp_path: Path
) -> None:
    """As Megatron saves it where padding lies between buckets."""
    change = "optimizer_states.unpadded = lambda places, buckets: places"
    words = train_changed(workspace, "mixed-up", tmp_path, change)
    (checkpoints,) = (workspace.directory / "mixed-up" / "checkpoints").iterdir()
    forget_after(checkpoints, 2)
    refused = run_script("launch.py", *words)
    assert refused.returncode == 1
    told = refused.stdout + refused.stderr
    assert told.count("the checkpoint's optimizer has other weights than its model in ") == 1
    assert "Traceback" not in told
    assert sorted(path.name for path in checkpoints.glob("iter_*")) == ["iter_0000002"]


@pytest.mark.parametrize("memory", ["free_gpu_memory", "free_memory"])
def test_what_does_not_fit_every_rank_is_gathered_by_one(
    workspace: Workspace, data_parallel: Path, tmp_path: Path, memory: str
) -> None:
    """It is one of the two that has no memory, which both have to know."""
    change = f"import os; optimizer_states.{memory} = lambda: 1e9 * int(os.environ['RANK'])"
    name = f"without-{memory}"
    train_changed(workspace, name, tmp_path, change)
    log = (workspace.directory / f"{name}.log.rank1.log").read_text()
    assert log.count("states on every rank: the first of each data parallel group does") == 1
    (checkpoints,) = (workspace.directory / name / "checkpoints").iterdir()
    for iteration in (2, 4):
        assert ranks_with_states(data_parallel, iteration) == {"0", "1"}
        assert ranks_with_states(checkpoints, iteration) == {"0"}
    forget_after(checkpoints, 2)
    workspace.train(name, 2, BUCKETS)
    assert losses(checkpoints) == losses(data_parallel)
    assert differing(*(weights(workspace, run, 4) for run in (checkpoints, data_parallel))) == []


def test_a_corpus_that_changed_in_place_is_trained_on_from_the_start(
    workspace: Workspace, one_rank: Path, tmp_path: Path
) -> None:
    """Under the same names, and so in the same directory and with the same indices in the cache."""
    other = Workspace(directory=tmp_path)
    for name in ("model", "megatron"):
        (tmp_path / name).symlink_to(workspace.directory / name)
    shutil.copytree(one_rank.parents[1], tmp_path / "one-rank")
    words = other.launch_words("one-rank", 1, {}, **TRACKED)
    checkpoints = Path(words[words.index("--checkpoints") + 1])
    (checkpoints.parent / one_rank.name).rename(checkpoints)
    write_lines(tmp_path, 40)
    other.preprocess()
    assert train_one_rank(other) == checkpoints
    log = (tmp_path / "one-rank.log").read_text()
    assert "(lines.bin of preprocess, lines.idx of preprocess): training starts again" in log
    kept = checkpoints / "before-1"
    assert losses(kept) == losses(one_rank) and (kept / "iter_0000004").is_dir()
    assert losses(checkpoints)[0] != losses(one_rank)[0] and len(losses(checkpoints)) == 4
    assert len(list((tmp_path / "one-rank" / "cache").iterdir())) == 2


def another_end(manifest: dict[str, Any]) -> None:
    manifest["results"]["tokenizer"]["end_of_document"] = {"token": "<|im_end|>", "id": 5}


def another_tokenizer(manifest: dict[str, Any]) -> None:
    manifest["results"]["tokenizer"]["files"]["tokenizer.json"] = "0" * 64


REFUSED: dict[str, tuple[list[float], Callable[[dict[str, Any]], None] | None, str]] = {
    "an empty share": (
        [99.9, 0.05, 0.05],
        None,
        "corpus lines: none of its 200 documents falls to validation",
    ),
    "another end of documents": ([60, 20, 20], another_end, "<|im_end|>"),
    "another tokenizer": ([60, 20, 20], another_tokenizer, "by another tokenizer than that of"),
}


@pytest.mark.parametrize("wrong", REFUSED)
def test_data_that_is_not_what_training_takes_is_refused_before_megatron_looks_at_it(
    workspace: Workspace, tmp_path: Path, wrong: str
) -> None:
    split, change, message = REFUSED[wrong]
    stages, data = workspace.directory, workspace.data
    if change:
        data = shutil.copytree(workspace.data, tmp_path / "data")
        manifest = read_json(data / "manifest.json")
        change(manifest)
        write_json(data / "manifest.json", manifest)
    words = options(
        config=workspace.config("refused", {}, data={"split": split}),
        model=stages / "model" / "hf",
        checkpoint=stages / "megatron" / "checkpoint",
        data=data,
        output=tmp_path / "refused",
    )
    done = run_script("train.py", *words)
    assert done.returncode == 2, done.stdout + done.stderr
    assert message in done.stdout
    assert not (tmp_path / "refused").exists()
