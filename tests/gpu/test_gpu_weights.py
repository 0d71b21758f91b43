"""The bridge beside Transformer Engine: its layers load what convert wrote, and FP8 comes back.

Skipped without a GPU: run `uv sync --extra gpu` and `uv run pytest tests/gpu` on a machine that has one.
"""

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from workspace import (
    Workspace,
    differing,
    forget_after,
    largest_difference,
    losses,
    prepare,
    weights,
)

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available(),
    reason="no GPU: run `uv sync --extra gpu && uv run pytest tests/gpu` on a machine that has one",
)
ON_CPU = {"CUDA_VISIBLE_DEVICES": ""}
LOSS_BOUND = {"qwen2": 1e-3, "qwen2_moe": 5e-3, "qwen3_moe": 5e-3}  # nats per token, float32
GROUPED = {"moe_grouped_gemm": True}
# The recipes of an H100: by tensor, by block, and by the amax of earlier iterations.
FP8: dict[str, dict[str, Any]] = {
    recipe: {"bf16": True, "fp8": "hybrid", "fp8_recipe": recipe}
    for recipe in ("tensorwise", "blockwise", "delayed")
}
WEIGHTS = {"fp8_param_gather": True, "use_distributed_optimizer": True}
FP8["weights-in-fp8"] = {**FP8["tensorwise"], **WEIGHTS}
FP8["blockwise-weights-in-fp8"] = {**FP8["blockwise"], **WEIGHTS}
FP8["delayed-weights-in-fp8"] = {**FP8["delayed"], **WEIGHTS}
FP8["grouped-experts-weights-in-fp8"] = {**FP8["weights-in-fp8"], **GROUPED}
FP8["grouped-experts-delayed"] = {**FP8["delayed"], **GROUPED}


@pytest.fixture(scope="module", params=LOSS_BOUND)
def other(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    return prepare(tmp_path_factory.mktemp(request.param), request.param)


@pytest.fixture(scope="module")
def fp8_models(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Workspace]:
    return cache(lambda name: prepare(tmp_path_factory.mktemp(name), name))


def test_layers_of_transformer_engine_load_it_and_follow_the_cpu(other: Workspace) -> None:
    """Experts one by one and in groups."""
    expected = losses(other.train("cpu", 1, {}, ON_CPU))
    kinds: dict[str, dict[str, Any]] = {"sequential": {}}
    if other.architecture.endswith("_moe"):
        kinds["grouped"] = GROUPED
    for kind, options in kinds.items():
        trained = other.train(kind, 1, options)
        difference = largest_difference(losses(trained), expected)
        print(f"{other.architecture} {kind}, float32 on GPU against CPU: {difference:.2e} nats")
        assert difference < LOSS_BOUND[other.architecture]
        other.export(f"export-{kind}", trained, options, "source")


@pytest.fixture(scope="module", params=FP8)
def in_fp8(
    request: pytest.FixtureRequest, fp8_models: Callable[[str], Workspace]
) -> tuple[str, Workspace, Path]:
    kind: str = request.param
    model = fp8_models("qwen3_moe" if kind.startswith("grouped-experts") else "qwen3")
    return kind, model, model.train(kind, 1, FP8[kind])


def test_what_was_trained_in_fp8_is_exported(in_fp8: tuple[str, Workspace, Path]) -> None:
    kind, model, trained = in_fp8
    print(f"{kind}: losses {losses(trained)}")
    first, last = (weights(model, trained, iteration) for iteration in (2, 4))
    assert {tensor.dtype for tensor in last.values()} == {torch.bfloat16}
    assert differing(first, last)
    # A tensor in FP8 has no more than 256 values, times one scale; the embedding is not in FP8.
    values = len(last["model.layers.0.self_attn.o_proj.weight"].unique())
    assert (values <= 256) == ("fp8_param_gather" in FP8[kind])
    assert len(last["model.embed_tokens.weight"].unique()) > 256
    model.export(f"export-{kind}", trained, FP8[kind], "source")


def test_training_in_fp8_resumes_in_the_same_bits(in_fp8: tuple[str, Workspace, Path]) -> None:
    """With the scales of delayed scaling, which are of the iterations before."""
    kind, model, trained = in_fp8
    expected, curve = weights(model, trained, 4), losses(trained)
    forget_after(trained, 2)
    model.train(kind, 1, FP8[kind])
    log = (model.directory / f"{kind}.log.rank0.log").read_text()
    assert "resuming after iteration 2" in log
    assert losses(trained) == curve
    assert differing(weights(model, trained, 4), expected) == []
