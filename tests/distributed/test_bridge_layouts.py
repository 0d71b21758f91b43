"""Hugging Face -> Megatron -> a layout of real ranks -> Hugging Face, every bit.

Megatron's own code loads what convert wrote under each layout, over gloo, and saves it again; the
export of that has to be the first model.
"""

import json
from collections.abc import Iterator, Mapping
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch

from commands import start_ranks, wait_for_ranks
from megaqwen.architecture import megatron_options
from megaqwen.training.arguments import CPU_OPTIONS
from megaqwen.weights import (
    HuggingFaceWeights,
    MegatronWeights,
    convert_to_megatron,
    find_checkpoint,
    read_hf_tensors,
)
from small_models import MODELS, make_model

IN_BFLOAT16 = ("qwen2", "qwen3_moe")
pytestmark = pytest.mark.slow
RANKS = 4
PIPELINES: dict[str, dict[str, Any]] = {
    "pp1": {"pipeline_model_parallel_size": 1},
    "pp2": {"pipeline_model_parallel_size": 2},
    "pp2-uneven": {"pipeline_model_parallel_size": 2, "decoder_first_pipeline_num_layers": 1},
    "pp2-vpp2": {"pipeline_model_parallel_size": 2, "num_virtual_stages_per_pipeline_rank": 2},
}


def dense_layouts() -> Iterator[tuple[str, dict[str, Any]]]:
    """All that 4 ranks allow; what tensor and pipeline parallelism leave is data parallel."""
    for tensor, (name, pipeline) in product((1, 2, 4), PIPELINES.items()):
        if tensor * pipeline["pipeline_model_parallel_size"] <= RANKS:
            yield (
                f"tp{tensor}-{name}",
                {
                    **pipeline,
                    "tensor_model_parallel_size": tensor,
                    "sequence_parallel": tensor > 1,
                    "overlap_p2p_comm": name != "pp1",
                },
            )


def expert_layouts() -> Iterator[tuple[str, dict[str, Any]]]:
    """The same with every way to share out experts."""
    for (name, sizes), expert, tensor in product(dense_layouts(), (1, 2, 4), (1, 2, 4)):
        if expert * tensor * sizes["pipeline_model_parallel_size"] <= RANKS:
            experts = {"expert_model_parallel_size": expert, "expert_tensor_parallel_size": tensor}
            yield f"{name}-ep{expert}-etp{tensor}", {**sizes, **experts}


LAYOUTS = {
    **{("qwen2", name): sizes for name, sizes in dense_layouts()},
    **{("qwen3", name): sizes for name, sizes in dense_layouts()},
    **{("qwen2_moe", name): sizes for name, sizes in expert_layouts()},
    **{("qwen3_moe", name): sizes for name, sizes in expert_layouts()},
}
EACH_LAYOUT = pytest.mark.parametrize(("model", "name"), LAYOUTS, ids="-".join)


def job(directory: Path, model: str, name: str, sizes: Mapping[str, Any]) -> dict[str, Any]:
    """What one layout's ranks are told."""
    config = HuggingFaceWeights(directory / model / "hf").config
    options = {
        **megatron_options(config, sizes["tensor_model_parallel_size"]),
        **CPU_OPTIONS,
        **sizes,
        "bf16": model in IN_BFLOAT16,
        "vocab_size": config["vocab_size"],
        "tokenizer_type": "NullTokenizer",
        "seq_length": 64,
        "micro_batch_size": 1,
        "global_batch_size": 16,
        "train_iters": 1,
        "lr": 1.0,
        "save_interval": 1,
        "finetune": True,
        **dict.fromkeys(("no_load_optim", "no_load_rng", "no_save_optim", "no_save_rng"), True),
    }
    megatron, saved = directory / model / "megatron", directory / model / name
    return {"options": options, "load": str(megatron), "save": str(saved)}


@pytest.fixture(scope="session")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All models under all layouts, by one start of the ranks: MODEL/hf, MODEL/LAYOUT."""
    directory = tmp_path_factory.mktemp("layouts")
    for model, facts in MODELS.items():
        dtype = torch.bfloat16 if model in IN_BFLOAT16 else torch.float32
        make_model(directory / model / "hf", facts, dtype)
        (directory / model / "megatron").mkdir()
        convert_to_megatron(directory / model / "hf", directory / model / "megatron")
    jobs = [job(directory, model, name, sizes) for (model, name), sizes in LAYOUTS.items()]
    (directory / "jobs.json").write_text(json.dumps(jobs))
    program, log = Path(__file__).with_name("relayout.py"), directory / "log"
    settings = {"CUDA_DEVICE_MAX_CONNECTIONS": "1"}
    process = start_ranks(program, RANKS, directory / "jobs.json", log=log, **settings)
    wait_for_ranks(process, log, 540)
    return directory


@EACH_LAYOUT
def test_every_bit_survives_a_layout(saved: Path, model: str, name: str) -> None:
    source = HuggingFaceWeights(saved / model / "hf")
    streamed = dict(read_hf_tensors(saved / model / name, source.config))
    assert streamed.keys() == source.dtypes.keys()
    for tensor_name, tensor in streamed.items():
        expected = source.read(tensor_name)
        assert tensor.dtype == expected.dtype, tensor_name
        same = torch.equal(
            tensor.contiguous().view(torch.uint8), expected.contiguous().view(torch.uint8)
        )
        assert same, tensor_name


@EACH_LAYOUT
def test_the_layout_was_what_it_is_called(saved: Path, model: str, name: str) -> None:
    """The ranks' parts in the checkpoint: rows of the padded vocabulary, columns of experts."""
    sizes = LAYOUTS[model, name]
    tensor = sizes["tensor_model_parallel_size"]
    tensors = MegatronWeights(find_checkpoint(saved / model / name)).tensors
    embedding = tensors["embedding.word_embeddings.weight"]
    assert len(embedding.chunks) == tensor
    assert embedding.size[0] == -(-MODELS[model]["vocab_size"] // tensor) * tensor
    for key, stored in tensors.items():
        if key.endswith("experts.experts.linear_fc2.weight"):
            columns = {chunk.offsets[-1] for chunk in stored.chunks}
            assert len(columns) == sizes["expert_tensor_parallel_size"], key
