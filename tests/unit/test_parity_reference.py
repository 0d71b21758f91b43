"""The reference is transformers' own model, though it is called layer by layer."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from megaqwen.parity.generation import continue_greedily
from megaqwen.parity.huggingface import HuggingFaceLayers
from megaqwen.weights import HuggingFaceWeights
from small_models import MODELS, make_model

LENGTHS = (5, 21, 1, 21, 13)


@pytest.fixture(scope="module", params=["qwen3", "qwen2_moe"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp(request.param), MODELS[request.param])


@pytest.fixture(scope="module")
def texts() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(250, (length,), generator=generator) for length in LENGTHS]


@torch.no_grad()
def test_each_text_has_the_logits_of_transformers(model: Path, texts: list[torch.Tensor]) -> None:
    whole = AutoModelForCausalLM.from_pretrained(model, attn_implementation="eager")
    layers = HuggingFaceLayers(HuggingFaceWeights(model), torch.float32)
    hidden = layers.embed(texts)
    for index in range(layers.layers):
        hidden, _ = layers.layer(index, hidden)
    with layers.head() as (norm, logits):
        for tokens, states in zip(texts, hidden, strict=True):
            expected = whole(tokens[None]).logits[0]
            torch.testing.assert_close(logits(norm(states)), expected, rtol=0, atol=1e-5)
    masks = {call["attention_mask"].untyped_storage().data_ptr() for call in layers.calls}
    assert len(masks) == 1, "memory for a mask of each text"


def test_greedy_generation_is_that_of_transformers(model: Path, texts: list[torch.Tensor]) -> None:
    whole = AutoModelForCausalLM.from_pretrained(model, attn_implementation="eager")
    layers = HuggingFaceLayers(HuggingFaceWeights(model), torch.float32)
    prompts = {str(number): tokens.tolist() for number, tokens in enumerate(texts)}
    found = continue_greedily(layers, prompts, 6)
    for name, prompt in prompts.items():
        tokens = torch.tensor([prompt])
        mask = torch.ones_like(tokens)
        how = {"do_sample": False, "min_new_tokens": 6, "max_new_tokens": 6, "pad_token_id": 0}
        whole.generation_config.eos_token_id = None
        expected = whole.generate(tokens, attention_mask=mask, **how)[0].tolist()
        assert found[name] == expected and len(expected) == len(prompt) + 6
