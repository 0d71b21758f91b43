"""The bridge: every bit survives both directions, and what does not fit is refused by name."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from megaqwen.architecture import count_parameters
from megaqwen.errors import InputError
from megaqwen.weights import (
    HuggingFaceWeights,
    MegatronWeights,
    convert_to_megatron,
    export_to_huggingface,
    find_checkpoint,
    read_hf_tensors,
)
from megaqwen.weights.bridge import checked_model
from megaqwen.weights.huggingface import EMBEDDING, HEAD
from megaqwen.weights.transforms import GateUp, QueryKeyValue

Tensors = dict[str, Tensor]
QUERY = "model.layers.1.self_attn.q_proj.weight"


@pytest.fixture(params=("qwen3", "qwen2"))
def model(request: pytest.FixtureRequest, tiny_qwen3: Path, tiny_qwen2: Path) -> Path:
    return tiny_qwen3 if request.param == "qwen3" else tiny_qwen2


def tensors_of(directory: Path) -> Tensors:
    return {
        name: tensor
        for path in sorted(directory.glob("*.safetensors"))
        for name, tensor in load_file(path).items()
    }


def converted(model: Path, directory: Path) -> Path:
    directory.mkdir()
    convert_to_megatron(model, directory)
    return directory


def exported(model: Path, checkpoint: Path, directory: Path, max_shard_bytes: int) -> Path:
    directory.mkdir()
    export_to_huggingface(model, checkpoint, directory, max_shard_bytes=max_shard_bytes)
    shutil.copyfile(model / "config.json", directory / "config.json")
    return directory


def changed(model: Path, directory: Path, change: Callable[[Tensors], None]) -> Path:
    """A copy of a model, with other tensors in its file."""
    directory.mkdir()
    shutil.copyfile(model / "config.json", directory / "config.json")
    tensors = tensors_of(model)
    change(tensors)
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    return directory


def assert_same_bits(first: Tensors, second: Tensors) -> None:
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        other = second[name]
        assert (tensor.dtype, tensor.shape) == (other.dtype, other.shape), name
        same = torch.equal(
            tensor.contiguous().view(torch.uint8), other.contiguous().view(torch.uint8)
        )
        assert same, name


def test_there_and_back_is_bitwise(model: Path, tmp_path: Path) -> None:
    checkpoint = converted(model, tmp_path / "megatron")
    back = exported(model, checkpoint, tmp_path / "back", max_shard_bytes=10**9)
    assert [path.name for path in back.glob("*.safetensors*")] == ["model.safetensors"]
    assert_same_bits(tensors_of(model), tensors_of(back))


def test_special_values_survive(tiny_qwen3: Path, tmp_path: Path) -> None:
    def special(tensors: Tensors) -> None:
        tensors[QUERY][0, :4] = torch.tensor([float("nan"), -0.0, float("inf"), 1e-45])

    model = changed(tiny_qwen3, tmp_path / "model", special)
    back = dict(
        read_hf_tensors(
            converted(model, tmp_path / "megatron"), json.loads((model / "config.json").read_text())
        )
    )
    assert_same_bits(tensors_of(model), back)


def test_shards_load_in_transformers(model: Path, tmp_path: Path) -> None:
    checkpoint = converted(model, tmp_path / "megatron")
    back = exported(model, checkpoint, tmp_path / "back", max_shard_bytes=2_000_000)
    shards = sorted(path.name for path in back.glob("*.safetensors"))
    assert len(shards) > 3
    assert shards[0] == f"model-00001-of-{len(shards):05d}.safetensors"
    index = json.loads((back / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"].values()) == set(shards)
    facts = json.loads((model / "config.json").read_text())
    assert index["metadata"]["total_size"] == 4 * count_parameters(facts)
    assert_same_bits(
        AutoModelForCausalLM.from_pretrained(model).state_dict(),
        AutoModelForCausalLM.from_pretrained(back).state_dict(),
    )


def test_sharded_input_gives_the_same_checkpoint(model: Path, tmp_path: Path) -> None:
    AutoModelForCausalLM.from_pretrained(model).save_pretrained(
        tmp_path / "sharded", max_shard_size="2MB"
    )
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 3
    first = converted(model, tmp_path / "first") / "release"
    second = converted(tmp_path / "sharded", tmp_path / "second") / "release"
    files = sorted(path.name for path in first.iterdir())
    assert files == sorted(path.name for path in second.iterdir())
    for name in files:
        assert (first / name).read_bytes() == (second / name).read_bytes(), name


def test_each_tensor_keeps_its_dtype(model: Path, tmp_path: Path) -> None:
    def mix(tensors: Tensors) -> None:
        kinds = (torch.bfloat16, torch.float32, torch.float16)
        for number, (name, tensor) in enumerate(tensors.items()):
            tensors[name] = tensor.to(kinds[number % 3])

    mixed = changed(model, tmp_path / "mixed", mix)
    checkpoint = converted(mixed, tmp_path / "megatron")
    back = exported(mixed, checkpoint, tmp_path / "back", max_shard_bytes=10**9)
    tensors = tensors_of(mixed)
    assert {tensor.dtype for tensor in tensors.values()} == {
        torch.bfloat16,
        torch.float32,
        torch.float16,
    }
    assert_same_bits(tensors, tensors_of(back))


def test_of_several_dtypes_none_rounds_what_was_trained(tiny_qwen3: Path, tmp_path: Path) -> None:
    norm = "model.layers.1.input_layernorm.weight"

    def narrow_all_but_norms(tensors: Tensors) -> None:
        names = [name for name in tensors if "norm" not in name]
        tensors.update({name: tensors[name].bfloat16() for name in names})

    def train(tensors: Tensors) -> None:
        """As if float32 had been trained from there."""
        for name in tensors:
            tensors[name] = tensors[name].float()
        tensors[norm].mul_(1.0 + 2**-20)

    source = changed(tiny_qwen3, tmp_path / "source", narrow_all_but_norms)
    trained = converted(changed(source, tmp_path / "trained", train), tmp_path / "megatron")
    back = tensors_of(exported(source, trained, tmp_path / "back", max_shard_bytes=10**9))
    assert back[QUERY].dtype == torch.bfloat16 and back[norm].dtype == torch.float32
    further = changed(
        tmp_path / "trained",
        tmp_path / "further",
        lambda tensors: tensors[QUERY].mul_(1.0 + 2**-20),
    )
    trained = converted(further, tmp_path / "trained further")
    message = f"{QUERY} is bfloat16 there, .* choose one for all under export.dtype"
    with pytest.raises(InputError, match=message):
        exported(source, trained, tmp_path / "refused", max_shard_bytes=10**9)
    (tmp_path / "wide").mkdir()
    words = {"dtype": torch.float32, "max_shard_bytes": 10**9}
    export_to_huggingface(source, trained, tmp_path / "wide", **words)
    assert_same_bits(tensors_of(further), tensors_of(tmp_path / "wide"))


def test_bfloat16_stays_bfloat16_in_the_checkpoint(tiny_qwen3: Path, tmp_path: Path) -> None:
    def narrow(tensors: Tensors) -> None:
        tensors.update({name: tensor.bfloat16() for name, tensor in tensors.items()})

    model = changed(tiny_qwen3, tmp_path / "model", narrow)
    weights = MegatronWeights(find_checkpoint(converted(model, tmp_path / "megatron")))
    _, transfers = checked_model(model)
    assert {weights.read(transfer).dtype for transfer in transfers} == {torch.bfloat16}


def test_export_to_another_dtype(tiny_qwen3: Path, tmp_path: Path) -> None:
    checkpoint = converted(tiny_qwen3, tmp_path / "megatron")
    (tmp_path / "back").mkdir()
    export_to_huggingface(
        tiny_qwen3, checkpoint, tmp_path / "back", dtype=torch.bfloat16, max_shard_bytes=10**9
    )
    expected = {name: tensor.bfloat16() for name, tensor in tensors_of(tiny_qwen3).items()}
    assert_same_bits(expected, tensors_of(tmp_path / "back"))


def test_megatron_sees_groups_of_query_key_value(tiny_qwen2: Path, tmp_path: Path) -> None:
    """The fused order, written out for the tiny Qwen2: 6 heads in 2 groups, heads of 32."""
    weights, transfers = checked_model(tiny_qwen2)
    stored = MegatronWeights(find_checkpoint(converted(tiny_qwen2, tmp_path / "megatron")))
    (bias,) = (
        t for t in transfers if t.key.endswith("linear_qkv.bias") and t.places[0].position == (1,)
    )
    query, key, value = (weights.read(name) for name in bias.huggingface)
    expected = [query[:96], key[:32], value[:32], query[96:], key[32:], value[32:]]
    assert torch.equal(stored.read(bias), torch.cat(expected))
    (fc1,) = (
        t for t in transfers if t.key.endswith("linear_fc1.weight") and t.places[0].position == (3,)
    )
    gate, up = (weights.read(f"model.layers.3.mlp.{part}_proj.weight") for part in ("gate", "up"))
    assert torch.equal(stored.read(fc1), torch.cat([gate, up]))


def drop(name: str) -> Callable[[Tensors], None]:
    return lambda tensors: tensors.__delitem__(name)


def put(name: str, tensor: Tensor) -> Callable[[Tensors], None]:
    return lambda tensors: tensors.__setitem__(name, tensor)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (drop(QUERY), f"{QUERY}: missing"),
        (put(QUERY, torch.zeros(288, 191)), rf"{QUERY} has shape \[288, 191\].* \[288, 192\]"),
        (put(QUERY, torch.zeros(288, 192).to(torch.float8_e4m3fn)), f"{QUERY} has dtype F8_E4M3"),
        (put("model.layers.1.self_attn.q_proj.bias", torch.zeros(288)), "q_proj.bias: not part of"),
        (put(HEAD, torch.zeros(2560, 192)), "tie_word_embeddings, but lm_head.weight"),
        # A tied head that is stored: what it is held against is looked at first.
        (lambda tensors: put(HEAD, tensors.pop(EMBEDDING))(tensors), f"{EMBEDDING}: missing"),
        (put(HEAD, torch.zeros(2560, 192).half()), "tie_word_embeddings, but lm_head.weight"),
        (put(HEAD, torch.zeros(2560, 192).double()), "lm_head.weight has dtype F64; supported"),
        (put(HEAD, torch.zeros(2559, 192)), r"lm_head.weight has shape \[2559, 192\]"),
    ],
)
def test_what_is_not_the_model_is_refused(
    tiny_qwen3: Path, tmp_path: Path, change: Callable[[Tensors], None], message: str
) -> None:
    model = changed(tiny_qwen3, tmp_path / "model", change)
    with pytest.raises(InputError, match=message):
        converted(model, tmp_path / "megatron")
    assert not list((tmp_path / "megatron").iterdir())


def test_a_tied_head_that_is_stored_too_is_taken(tiny_qwen3: Path, tmp_path: Path) -> None:
    def store_head(tensors: Tensors) -> None:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()

    model = changed(tiny_qwen3, tmp_path / "model", store_head)
    facts = json.loads((model / "config.json").read_text())
    back = dict(read_hf_tensors(converted(model, tmp_path / "megatron"), facts))
    assert_same_bits(tensors_of(tiny_qwen3), back)


def test_a_checkpoint_of_another_model_is_refused(
    tiny_qwen3: Path, tiny_qwen2: Path, tmp_path: Path
) -> None:
    checkpoint = converted(tiny_qwen3, tmp_path / "megatron")
    other = HuggingFaceWeights(tiny_qwen2).config
    with pytest.raises(InputError, match="the checkpoint is not of this model"):
        dict(read_hf_tensors(checkpoint, other))
    with pytest.raises(InputError, match="iter_0000007: there is no whole torch_dist checkpoint"):
        find_checkpoint(checkpoint, 7)
    with pytest.raises(InputError, match="no checkpoint was saved there"):
        find_checkpoint(tmp_path)


def test_each_tensor_is_transferred_once(model: Path) -> None:
    _, transfers = checked_model(model)
    names = [name for transfer in transfers for name in transfer.huggingface]
    assert len(names) == len(set(names))
    with safe_open(model / "model.safetensors", framework="pt") as file:
        assert set(names) == set(file.keys())
    boxes = [transfer.places[0] for transfer in transfers]
    assert len(boxes) == len(set(boxes))


@st.composite
def attention_shapes(draw: st.DrawFn) -> SimpleNamespace:
    groups, per_group = draw(st.integers(1, 5)), draw(st.integers(1, 5))
    return SimpleNamespace(
        groups=groups,
        heads=groups * per_group,
        head_dim=draw(st.integers(1, 6)),
        rest=draw(st.sampled_from([(), (1,), (7,)])),
    )


def numbered(*shapes: tuple[int, ...]) -> list[Tensor]:
    """Tensors of which no two elements are equal, of this one or another."""
    parts, start = [], 0
    for shape in shapes:
        count = torch.Size(shape).numel()
        parts.append(torch.arange(start, start + count).reshape(shape))
        start += count
    return parts


@settings(max_examples=100, deadline=None)
@given(attention_shapes())
def test_query_key_value_splits_what_it_fused(shape: SimpleNamespace) -> None:
    rows = (shape.heads * shape.head_dim, *[shape.groups * shape.head_dim] * 2)
    parts = numbered(*((count, *shape.rest) for count in rows))
    transform = QueryKeyValue(heads=shape.heads, query_groups=shape.groups, head_dim=shape.head_dim)
    fused = transform.fuse(parts)
    assert fused.shape == transform.fused_shape([part.shape for part in parts])
    assert sorted(fused.flatten().tolist()) == list(range(fused.numel()))
    for part, again in zip(parts, transform.split(fused), strict=True):
        assert torch.equal(part, again)
    # A tensor parallel rank takes whole groups: the first has the first heads of each part.
    first = fused.chunk(shape.groups)[0]
    sizes = [len(part) // shape.groups for part in parts]
    for part, size, own in zip(parts, sizes, first.split(sizes), strict=True):
        assert torch.equal(part[:size], own)


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 20), st.integers(1, 20))
def test_gate_up_splits_what_it_fused(ffn: int, hidden: int) -> None:
    gate, up = numbered((ffn, hidden), (ffn, hidden))
    fused = GateUp().fuse([gate, up])
    assert fused.shape == GateUp().fused_shape([gate.shape, up.shape])
    assert torch.equal(fused[:ffn], gate)
    for part, again in zip((gate, up), GateUp().split(fused), strict=True):
        assert torch.equal(part, again)
