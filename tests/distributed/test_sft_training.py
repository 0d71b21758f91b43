"""SFT through Megatron's `pretrain`: packed conversations, and a mean over targets in every layout.

The masks are uneven on purpose: a mean of micro batches' or ranks' means would be another number.
"""

import shutil
from pathlib import Path
from typing import Any

import pytest

from commands import run_script
from conversation_files import random_conversations, run_packed_model, write_conversations
from megaqwen.provenance import read_json, write_json
from megaqwen.training.metrics import read_metrics
from small_models import MODELS
from workspace import (
    BUCKETS,
    Workspace,
    differing,
    forget_after,
    largest_difference,
    losses,
    weights,
)

pytestmark = pytest.mark.slow
OPTIONS = {"global_batch_size": 8, "micro_batch_size": 1}
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "micro-batch-4": (1, {"micro_batch_size": 4}),
    "data-parallel": (2, {"micro_batch_size": 1, **BUCKETS}),
    "data-parallel-micro-batch-4": (2, {"micro_batch_size": 4}),
    "pipeline": (2, {"micro_batch_size": 2, "pipeline_model_parallel_size": 2}),
    "tensor": (
        2,
        {"micro_batch_size": 2, "tensor_model_parallel_size": 2, "sequence_parallel": True},
    ),
}
LOSS_BOUND = 1e-3
WEIGHT_BOUND = 2e-4
"""A tenth of the learning rate: Adam makes a step of it of any gradient, however small."""


@pytest.fixture(scope="session")
def chats(workspace: Workspace) -> Workspace:
    """The workspace with 200 conversations of random ids, of very different shares of targets."""
    chats = Workspace(directory=workspace.directory, kind="sft")
    chats.data.mkdir()
    conversations = random_conversations(200, longest=64, vocabulary=2000)
    write_conversations(chats.data / "lines", conversations)
    manifest = read_json(workspace.data / "manifest.json")
    manifest["results"]["kind"] = "sft"
    manifest["results"]["corpora"]["lines"]["documents"] = 200
    write_json(chats.data / "manifest.json", manifest)
    return chats


@pytest.fixture(scope="session")
def one_rank(chats: Workspace) -> Path:
    return chats.train("sft-one-rank", 1, OPTIONS)


def test_the_manifest_tells_targets_and_packing(one_rank: Path) -> None:
    results = read_json(one_rank.parents[1] / "manifest.json")["results"]
    records = [each for each in read_metrics(one_rank / "metrics.jsonl") if "seconds" in each]
    counts = [each["target_tokens"] for each in records]
    assert results["target_tokens"] == sum(counts)
    assert results["tokens"] == 4 * 8 * 64
    facts = results["data"]["lines"]["train"]
    assert facts["packing_efficiency"] > 0.95
    # An epoch's share of targets is the run's, but for the shuffling.
    share = facts["target_tokens"] / (facts["packs"] * 64)
    assert abs(sum(counts) / results["tokens"] - share) < 0.1
    assert max(counts) > min(counts)
    log = (one_rank.parents[2] / "sft-one-rank.log.rank0.log").read_text()
    assert f"{facts['packs']:,} packs, {100 * facts['packing_efficiency']:.2f}% full" in log


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_have_one_curve_and_one_result(
    chats: Workspace, one_rank: Path, layout: str
) -> None:
    ranks, options = LAYOUTS[layout]
    trained = chats.train(f"sft-{layout}", ranks, {**OPTIONS, **options})
    difference = largest_difference(losses(trained), losses(one_rank))
    assert difference < LOSS_BOUND
    expected = weights(chats, one_rank, 4)
    apart = {
        name: float((value - expected[name]).abs().max())
        for name, value in weights(chats, trained, 4).items()
    }
    worst = max(apart, key=lambda name: apart[name])
    print(f"{layout}: losses {difference:.1e} apart, weights {apart[worst]:.1e} ({worst})")
    assert apart[worst] < WEIGHT_BOUND


def test_resuming_ends_in_the_same_bits(chats: Workspace, one_rank: Path) -> None:
    expected, curve = weights(chats, one_rank, 4), losses(one_rank)
    forget_after(one_rank, 2)
    shutil.rmtree(one_rank.parents[1] / "cache")  # the same packs are made again
    assert chats.train("sft-one-rank", 1, OPTIONS) == one_rank
    assert losses(one_rank) == curve
    assert differing(weights(chats, one_rank, 4), expected) == []


def test_the_exported_model_has_the_loss_that_training_logged(chats: Workspace) -> None:
    """Of each conversation by itself: training had them in packs, in micro batches of two ranks."""
    name = "sft-data-parallel-micro-batch-4"
    (trained,) = (chats.directory / name / "checkpoints").iterdir()
    options = {**OPTIONS, **LAYOUTS["data-parallel-micro-batch-4"][1]}
    exported = chats.export(f"{name}-hf", trained, options, "source")
    results = read_json(trained.parents[1] / "manifest.json")["results"]
    losses = results["evaluations"]["test"]["losses"]
    assert list(losses) == ["4", "5", "6", "7"]  # of the last rank
    assert len({targets for _, targets in losses.values()}) > 1
    cases = ("all:1234:8:64", "two:1234:2.5:64", "none:1234:0.05:64", "another seed:7:8:64")
    found = chats.held_out_loss(trained, exported, options, *cases)
    every, two, none, other = (found[case.split(":")[0]] for case in cases)
    assert every["measured"]["logged"] == results["test_loss"]
    assert two["measured"]["targets"] == sum(losses[index][1] for index in "45")
    for case in (every, two):
        assert case["gates"]["perplexity"]["passed"] and case["gates"]["trained loss"]["passed"]
        assert case["gates"]["trained loss"]["value"] < 5e-6
    assert set(none["gates"]) == {"perplexity"} and none["measured"]["targets"] > 0
    assert other["gates"]["perplexity"]["passed"] and not other["gates"]["trained loss"]["passed"]


@pytest.mark.parametrize(("found", "wanted"), [("pretrain", "sft"), ("sft", "pretrain")])
def test_data_of_another_kind_is_refused(
    workspace: Workspace, chats: Workspace, found: str, wanted: str
) -> None:
    of_kind = {"pretrain": workspace, "sft": chats}
    words = of_kind[wanted].launch_words(f"{found}-as-{wanted}", 1, {})
    words[words.index("--data") + 1] = str(of_kind[found].data)
    train = words[words.index("--config") :]
    done = run_script("train.py", *train)
    assert done.returncode == 2, done.stdout + done.stderr
    assert (
        f"preprocessed as data.kind {found}, and the config has data.kind {wanted}" in done.stdout
    )


def test_too_long_conversations_stop_a_run_that_does_not_say_what_to_do(chats: Workspace) -> None:
    words = chats.launch_words("sft-too-long", 1, {**OPTIONS, "seq_length": 32})
    done = run_script("train.py", *words[words.index("--config") :])
    assert done.returncode == 2, done.stdout + done.stderr
    assert "conversations are longer than train.seq_length 32" in done.stdout
    assert not (chats.directory / "sft-too-long").exists()


# A model that is given the same conversations one by one, and packed

YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
LENGTH = 96
"""Positions of a pack."""
SHAPES: dict[str, dict[str, Any]] = {
    "qwen3": MODELS["qwen3"],
    "qwen2-yarn": {**MODELS["qwen2"], "rope_scaling": YARN},
    "qwen3_moe": MODELS["qwen3_moe"],
}


def run_model(directory: Path, shape: str, **settings: Any) -> dict[str, Any]:
    """Losses and gradients; `settings` are those of run_packed_model."""
    facts = {**SHAPES[shape], "max_position_embeddings": 2 * LENGTH}
    given = {"facts": facts, "length": LENGTH, "bf16": False, **settings}
    return run_packed_model(directory, environment={"OMP_NUM_THREADS": "1"}, **given)


@pytest.fixture(scope="module")
def qwen3(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return run_model(tmp_path_factory.mktemp("packed"), "qwen3")


@pytest.mark.parametrize("shape", SHAPES)
def test_packed_is_as_one_by_one(qwen3: dict[str, Any], tmp_path: Path, shape: str) -> None:
    found = qwen3 if shape == "qwen3" else run_model(tmp_path, shape)
    alone, packed = found["alone"], found["packed"]
    assert len(alone["losses"]) == 7
    for one, other in zip(alone["losses"], packed["losses"], strict=True):
        assert abs(one - other) < 2e-6 * max(abs(one), 10)
    for name, values in alone["gradients"].items():
        largest = max(max(map(abs, values)), 1e-2)
        pairs = zip(values, packed["gradients"][name], strict=True)
        assert max(abs(a - b) for a, b in pairs) < 1e-5 * largest, name


def test_a_conversation_reaches_no_neighbour(qwen3: dict[str, Any], tmp_path: Path) -> None:
    before = qwen3["packed"]["losses"]
    after = run_model(tmp_path, "qwen3", change=1)["packed"]["losses"]
    changed = [number for number in range(7) if before[number] != after[number]]
    assert changed == [1]


def test_experts_are_balanced_over_tokens_and_weighed_by_targets(tmp_path: Path) -> None:
    """Padding counts for nothing, and the loss of few targets is not drowned."""
    found = run_model(tmp_path, "qwen3_moe", program="distributed/expert_losses.py")
    given, every, padded = (found[case] for case in ("as given", "all targets", "more padding"))
    assert given["targets"] == padded["targets"] < every["targets"]
    largest = max(map(abs, given["gradient"]))
    assert largest > 1e-3
    for one, padding, all_targets in zip(
        *(case["gradient"] for case in (given, padded, every)), strict=True
    ):
        assert abs(one - padding) < 1e-4 * largest
        share = given["targets"] / every["targets"]
        assert abs(one - all_targets * share) < 1e-4 * largest
