"""A rank whose GPU is not there, or cannot train, says so, and does not train on CPUs instead."""

import pytest
import torch

from megaqwen import environment
from megaqwen.environment import surroundings
from megaqwen.errors import InputError
from megaqwen.training import gpus
from megaqwen.training.gpus import check_gpus


@pytest.mark.parametrize("seen", [0, 7])
def test_fewer_gpus_than_ranks(seen: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Seven of eight are there, or none: as no machine is at will, torch's count is set."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: seen)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: seen > 0)
    monkeypatch.setattr(gpus, "has_transformer_engine", lambda: True)
    monkeypatch.setenv("LOCAL_RANK", "7")
    monkeypatch.setenv("MEGAQWEN_GPUS_PER_NODE", "0")
    if seen:  # that nobody asked for, but they are there: Megatron would take them
        with pytest.raises(InputError, match=r"ranks than the 7 .*ranks_per_node: 7.*tensor_model"):
            check_gpus()
    else:
        check_gpus()
    monkeypatch.setenv("MEGAQWEN_GPUS_PER_NODE", "8")
    with pytest.raises(InputError, match=f"8 GPUs .*torch sees {seen or 'none'}.*at least 580"):
        check_gpus()
    if seen:
        monkeypatch.setenv("LOCAL_RANK", "6")
        check_gpus()


def test_a_gpu_without_transformer_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where it was asked for, an error; else training is on CPUs, as if it was not there."""
    monkeypatch.setattr(environment, "DRIVER", ("/proc",))  # there is a driver
    for module in (environment, gpus):
        monkeypatch.setattr(module, "has_transformer_engine", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "is_available", environment.has_gpu)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert surroundings().no_gpu.startswith("there is no Transformer Engine: uv sync --extra gpu")
    monkeypatch.setenv("MEGAQWEN_GPUS_PER_NODE", "1")
    with pytest.raises(InputError, match=r"takes Transformer Engine.*uv sync --extra gpu, "):
        check_gpus()
    monkeypatch.setenv("MEGAQWEN_GPUS_PER_NODE", "0")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    check_gpus()
    assert not environment.has_gpu()
