"""Random architectures: every tensor crosses the bridge once, and comes back with every bit.

What the tensors are is asked of transformers; their bits are random, so that denormals and infinities
are among them, and so is their dtype. A NaN keeps its bits where the tensors that Megatron holds as one
are of one dtype: through another dtype it stays a NaN, with other bits.
"""

import math
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from megaqwen.architecture import FAMILIES, count_parameters
from megaqwen.weights import (
    convert_to_megatron,
    export_to_huggingface,
)
from megaqwen.weights.bridge import checked_model

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
RANDOM_MODELS = settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.data_too_large]
)


@st.composite
def architectures(draw: st.DrawFn, family: str) -> dict[str, Any]:
    """A config.json: widths and vocabularies that nothing divides, any heads and groups."""
    groups = draw(st.integers(1, 4))
    heads = groups * draw(st.integers(1, 4))
    layers = draw(st.integers(1, 4))
    facts: dict[str, Any] = {
        "model_type": family,
        "num_attention_heads": heads,
        "num_key_value_heads": groups,
        "head_dim": 2 * draw(st.integers(1, 7)),
        "hidden_size": draw(st.integers(1, 40)),
        "intermediate_size": draw(st.integers(1, 40)),
        "num_hidden_layers": layers,
        "vocab_size": draw(st.integers(1, 300)),
        "max_position_embeddings": draw(st.integers(1, 10**6)),
        "rms_norm_eps": draw(st.sampled_from([1e-5, 1e-6])),
        "tie_word_embeddings": draw(st.booleans()),
    }
    if FAMILIES[family].experts:
        experts = draw(st.integers(2, 9))
        facts |= {
            "num_experts": experts,
            "num_experts_per_tok": draw(st.integers(2, experts)),
            "moe_intermediate_size": draw(st.integers(1, 20)),
            "norm_topk_prob": draw(st.booleans()),
            "decoder_sparse_step": draw(st.integers(1, layers)),
        }
        sparse = [n for n in range(layers) if (n + 1) % facts["decoder_sparse_step"] == 0]
        plain = draw(st.lists(st.sampled_from(range(layers)), unique=True))
        facts["mlp_only_layers"] = [] if set(sparse) <= set(plain) else plain
    if FAMILIES[family].shared_expert:
        facts["shared_expert_intermediate_size"] = draw(st.integers(1, 20))
        facts["qkv_bias"] = draw(st.booleans())
    return facts


def write_model(directory: Path, facts: dict[str, Any], seed: int) -> dict[str, Tensor]:
    """transformers' own files, with other bits in them."""
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**facts))
    model.save_pretrained(directory)
    generator = torch.Generator().manual_seed(seed)
    mixed = seed % 2 == 1
    tensors = {}
    for number, (name, tensor) in enumerate(load_file(directory / "model.safetensors").items()):
        dtype = DTYPES[(seed + number if mixed else seed) % len(DTYPES)]
        shape = (*tensor.shape[:-1], tensor.shape[-1] * dtype.itemsize)
        random_bytes = torch.randint(256, shape, dtype=torch.uint8, generator=generator)
        values = random_bytes.view(dtype)
        tensors[name] = torch.where(values.isnan(), -0.0, values) if mixed else values
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    return tensors


def bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(torch.uint8)


@pytest.mark.parametrize("family", FAMILIES)
@RANDOM_MODELS
@given(data=st.data())
def test_every_bit_of_a_random_model_comes_back(family: str, data: st.DataObject) -> None:
    facts, seed = data.draw(architectures(family)), data.draw(st.integers(0, 1000))
    with tempfile.TemporaryDirectory() as directory:
        model, megatron, back = (Path(directory) / name for name in ("hf", "megatron", "back"))
        tensors = write_model(model, facts, seed)
        megatron.mkdir()
        convert_to_megatron(model, megatron)
        back.mkdir()
        export_to_huggingface(model, megatron, back, max_shard_bytes=10_000)
        shards = sorted(back.glob("*.safetensors"))
        found = {name: tensor for path in shards for name, tensor in load_file(path).items()}
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert (found[name].dtype, found[name].shape) == (tensor.dtype, tensor.shape), name
        assert torch.equal(bits(found[name]), bits(tensor)), name


@pytest.mark.parametrize("family", FAMILIES)
@RANDOM_MODELS
@given(data=st.data())
def test_the_table_covers_each_tensor_of_transformers_once(
    family: str, data: st.DataObject
) -> None:
    facts = data.draw(architectures(family))
    with tempfile.TemporaryDirectory() as directory:
        tensors = write_model(Path(directory), facts, 0)
        weights, transfers = checked_model(Path(directory))
    shapes = {
        name: shape
        for transfer in transfers
        for name, shape in zip(transfer.huggingface, transfer.shapes, strict=True)
    }
    assert shapes == {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    assert sum(len(transfer.huggingface) for transfer in transfers) == len(tensors)
    assert count_parameters(weights.config) == sum(map(torch.Tensor.numel, tensors.values()))
    # No two transfers go to one place, and together they fill Megatron's tensors.
    places = [place for each in transfers for place in (each.places[0], *each.copies)]
    assert len(places) == len(set(places))
    assert all(
        sum(other.key == place.key for other in places) == math.prod(place.lengths)
        for place in places
    )
