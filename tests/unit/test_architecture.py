"""Published Qwens in Megatron's words: facts, parameters to the unit, and what is refused."""

from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from megaqwen.architecture import (
    count_parameters,
    megatron_options,
    padded_vocabulary,
    read_architecture,
    tensor_shapes,
)
from megaqwen.errors import InputError

QWEN2 = {
    "model_type": "qwen2",
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000.0,
    "max_position_embeddings": 32768,
    "use_sliding_window": False,
    "sliding_window": 32768,
    "tie_word_embeddings": True,
}
QWEN3 = {
    "model_type": "qwen3",
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000,
    "rope_scaling": None,
    "head_dim": 128,
    "attention_bias": False,
    "max_position_embeddings": 40960,
    "use_sliding_window": False,
    "sliding_window": None,
    "tie_word_embeddings": True,
    "vocab_size": 151936,
}


def shape(hidden: int, ffn: int, layers: int, heads: int, groups: int) -> dict[str, int]:
    return {
        "hidden_size": hidden,
        "intermediate_size": ffn,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": groups,
    }


UNTIED = {"tie_word_embeddings": False}
# The config.json of each model on the Hub, as far as it decides weights or arithmetic.
PUBLISHED: dict[str, dict[str, Any]] = {
    "Qwen2.5-0.5B": {**QWEN2, **shape(896, 4864, 24, 14, 2), "vocab_size": 151936},
    "Qwen2.5-1.5B": {**QWEN2, **shape(1536, 8960, 28, 12, 2), "vocab_size": 151936},
    "Qwen2.5-7B": {**QWEN2, **UNTIED, **shape(3584, 18944, 28, 28, 4), "vocab_size": 152064},
    "Qwen2.5-14B": {
        **QWEN2,
        **UNTIED,
        **shape(5120, 13824, 48, 40, 8),
        "vocab_size": 152064,
        "rms_norm_eps": 1e-5,
    },
    "Qwen3-0.6B": {**QWEN3, **shape(1024, 3072, 28, 16, 8)},
    "Qwen3-4B": {**QWEN3, **shape(2560, 9728, 36, 32, 8)},
    "Qwen3-8B": {**QWEN3, **UNTIED, **shape(4096, 12288, 36, 32, 8)},
}
PARAMETERS = {"Qwen2.5-0.5B": 494_032_768, "Qwen3-0.6B": 596_049_920}
# kv_channels, layernorm_epsilon, untied, query groups
FACTS = {
    "Qwen2.5-0.5B": (64, 1e-6, False, 2),
    "Qwen2.5-1.5B": (128, 1e-6, False, 2),
    "Qwen2.5-7B": (128, 1e-6, True, 4),
    "Qwen2.5-14B": (128, 1e-5, True, 8),
    "Qwen3-0.6B": (128, 1e-6, False, 8),
    "Qwen3-4B": (128, 1e-6, False, 8),
    "Qwen3-8B": (128, 1e-6, True, 8),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_facts(name: str) -> None:
    config = PUBLISHED[name]
    options = megatron_options(config)
    named = ("kv_channels", "layernorm_epsilon", "untie_embeddings_and_output_weights")
    assert tuple(options[key] for key in (*named, "num_query_groups")) == FACTS[name]
    assert options["rotary_base"] == 1_000_000
    assert isinstance(options["rotary_base"], int)
    is_qwen3 = name.startswith("Qwen3")
    assert (options["add_qkv_bias"], options["qk_layernorm"]) == (not is_qwen3, is_qwen3)
    assert (options["normalization"], options["swiglu"]) == ("RMSNorm", True)
    assert (options["add_bias_linear"], options["rotary_percent"]) == (False, 1.0)
    sizes = ("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads")
    keys = ("num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads")
    assert [options[key] for key in sizes] == [config[key] for key in keys]
    assert options["padded_vocab_size"] == config["vocab_size"]


@pytest.mark.parametrize("name", PUBLISHED)
def test_tensors_are_those_of_transformers(name: str) -> None:
    """Names, shapes and the count of parameters, against the model on the meta device."""
    config = dict(PUBLISHED[name])
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(
            AutoConfig.for_model(config.pop("model_type"), **config)
        )
    expected = {key: tuple(tensor.shape) for key, tensor in model.named_parameters()}
    assert tensor_shapes(read_architecture(PUBLISHED[name])) == expected
    count = count_parameters(PUBLISHED[name])
    assert count == model.num_parameters() == PARAMETERS.get(name, count)


def test_what_a_config_leaves_out_is_what_transformers_makes_of_it() -> None:
    for family in ("qwen2", "qwen3"):
        facts = shape(512, 1024, 2, 4, 2)
        loaded = AutoConfig.for_model(family, **facts)
        qwen = read_architecture({"model_type": family, "vocab_size": 1000, **facts})
        assert qwen.norm_epsilon == loaded.rms_norm_eps
        assert qwen.rope_theta == loaded.rope_parameters["rope_theta"]
        assert qwen.max_positions == loaded.max_position_embeddings
        assert qwen.tied_embeddings == loaded.tie_word_embeddings
        assert qwen.head_dim == (getattr(loaded, "head_dim", None) or 128)


def test_both_spellings_of_the_rotary_base_are_read() -> None:
    config = {key: value for key, value in PUBLISHED["Qwen3-4B"].items() if key != "rope_theta"}
    assert megatron_options(config)["rotary_base"] == 10_000
    config["rope_parameters"] = {"rope_type": "default", "rope_theta": 5_000_000.0}
    assert megatron_options(config)["rotary_base"] == 5_000_000


def test_vocabulary_is_padded_to_the_tensor_parallel_ranks_alone() -> None:
    assert padded_vocabulary(151936, 8) == 151936
    assert padded_vocabulary(2601, 4) == 2604
    assert padded_vocabulary(2600, 1) == 2600


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"use_sliding_window": True}, "use_sliding_window true"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "layer_types other than"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "rope type 'yarn'"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope type 'linear'"),
        ({"rope_parameters": {"rope_type": "dynamic"}}, "rope type 'dynamic'"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"rope_theta": 10000.5}, "rope_theta 10000.5 is no whole number"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantization_config"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu'"),
        ({"attention_bias": True}, "attention_bias true in qwen3"),
        ({"model_type": "llama"}, "model_type 'llama' is not supported; supported: qwen2, qwen3"),
        ({"model_type": "qwen3_moe"}, "model_type 'qwen3_moe' is not supported"),
        ({"hidden_size": "1024"}, "hidden_size is '1024'"),
        ({"num_hidden_layers": 0}, "num_hidden_layers is 0"),
        ({"num_key_value_heads": 3}, "16 is no multiple of num_key_value_heads 3"),
    ],
)
def test_what_cannot_be_carried_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        megatron_options({**PUBLISHED["Qwen3-0.6B"], **change})


def test_a_missing_size_is_named() -> None:
    config = {key: value for key, value in PUBLISHED["Qwen3-0.6B"].items() if key != "vocab_size"}
    with pytest.raises(InputError, match="vocab_size is missing"):
        read_architecture(config)
