"""What is changed of a checkpoint saved without a GPU, so that it loads on one."""

import pytest
import torch
from megatron.core.dist_checkpointing.mapping import ShardedObject

from megaqwen.training.cpu_checkpoints import complete_groups, drop_absent, steps_to_groups


def extra(key: str) -> ShardedObject:
    return ShardedObject(key, None, (1,), (0,))


def test_only_extra_states_that_were_not_saved_are_dropped() -> None:
    request = {
        "model": {
            "norm._extra_state": extra("decoder.norm._extra_state"),
            "qkv._extra_state": extra("decoder.qkv._extra_state"),
            "router.state": extra("decoder.router.state"),
            "weight": "a tensor that is not there either",
        },
        "rng_state": extra("rng_state"),
    }
    drop_absent(request, {"decoder.qkv._extra_state"})
    assert list(request["model"]) == ["qkv._extra_state", "router.state", "weight"]
    assert "rng_state" in request


def trained_adamw(steps: list[int]) -> dict:
    weights = [torch.nn.Parameter(torch.ones(2)) for _ in steps]
    optimizer = torch.optim.AdamW(weights)
    for weight, count in zip(weights, steps, strict=True):
        for _ in range(count):
            optimizer.zero_grad()
            weight.grad = torch.ones(2)
            optimizer.step()
    return optimizer.state_dict()


def test_steps_move_to_the_groups() -> None:
    state = trained_adamw([3])
    steps_to_groups(state)
    assert state["param_groups"][0]["step"] == 3
    assert set(state["state"][0]) == {"exp_avg", "exp_avg_sq"}


def test_unequal_steps_are_no_state_of_megatron() -> None:
    with pytest.raises(ValueError, match=r"\[2, 3\]"):
        steps_to_groups(trained_adamw([2, 3]))


def test_a_group_gets_the_settings_that_only_the_loading_optimizer_has() -> None:
    saved = {"param_groups": [{"params": [0], "lr": 0.5}, {"params": [1], "lr": 0.25}]}
    own = [{"params": ["a"], "lr": 1.0, "bias_correction": True}] * 2
    complete_groups(saved, own)
    assert saved["param_groups"] == [
        {"params": [0], "lr": 0.5, "bias_correction": True},
        {"params": [1], "lr": 0.25, "bias_correction": True},
    ]
