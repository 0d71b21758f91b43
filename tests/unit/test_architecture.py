"""Published Qwens in Megatron's words: facts, parameters to the unit, and what is refused."""

import math
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from megaqwen.architecture import (
    FAMILIES,
    count_parameters,
    megatron_options,
    padded_vocabulary,
    read_architecture,
    tensor_shapes,
)
from megaqwen.errors import InputError
from published import PUBLISHED, Published

CONFIGS = {row.name: row.config for row in PUBLISHED}
QWEN3 = CONFIGS["Qwen3-0.6B"]
QWEN3_MOE, QWEN2_MOE = CONFIGS["Qwen3-30B-A3B"], CONFIGS["Qwen1.5-MoE-A2.7B"]
EACH_SIZE = pytest.mark.parametrize("row", PUBLISHED, ids=lambda row: row.name)
Shapes = dict[str, tuple[int, ...]]


@EACH_SIZE
def test_published_facts(row: Published) -> None:
    """Every option, written out from the row alone."""
    layers, hidden, ffn, heads, groups, vocabulary, positions = row.shape
    is_qwen3 = row.model_type.startswith("qwen3")
    expected = {
        "num_layers": layers,
        "hidden_size": hidden,
        "ffn_hidden_size": ffn,
        "num_attention_heads": heads,
        "group_query_attention": True,
        "num_query_groups": groups,
        "kv_channels": 128 if is_qwen3 else hidden // heads,
        "max_position_embeddings": positions,
        "padded_vocab_size": vocabulary,
        "untie_embeddings_and_output_weights": not row.tied,
        "position_embedding_type": "rope",
        "rotary_base": 1_000_000,
        "rotary_percent": 1.0,
        "use_rope_scaling": False,
        "normalization": "RMSNorm",
        "layernorm_epsilon": row.epsilon,
        "layernorm_zero_centered_gamma": False,
        "qk_layernorm": is_qwen3,
        "add_qkv_bias": not is_qwen3,
        "add_bias_linear": False,
        "swiglu": True,
        "attention_dropout": 0.0,
        "hidden_dropout": 0.0,
        "init_method_std": 0.02,
    }
    if row.experts:
        expected |= {
            "num_experts": row.experts[0],
            "moe_router_topk": row.experts[1],
            "moe_ffn_hidden_size": row.experts[2],
            "moe_router_pre_softmax": not is_qwen3,
            "moe_router_score_function": "softmax",
            "moe_layer_freq": 1,
        }
    if len(row.experts) == 4:
        expected |= {
            "moe_shared_expert_intermediate_size": row.experts[3],
            "moe_shared_expert_gate": True,
        }
    options = megatron_options(row.config)
    assert options == expected
    assert isinstance(options["rotary_base"], int)


def transformers_shapes(config: dict[str, Any]) -> Shapes:
    """The tensors of transformers' model as its files have them: each expert's by itself."""
    facts = dict(config)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(
            AutoConfig.for_model(facts.pop("model_type"), **facts)
        )
    shapes: Shapes = {}
    for name, tensor in model.named_parameters():
        shape = tuple(tensor.shape)
        prefix, _, last = name.rpartition(".")
        if not prefix.endswith(".experts"):
            shapes[name] = shape
            continue
        parts = ("gate_proj", "up_proj") if last == "gate_up_proj" else ("down_proj",)
        for expert in range(shape[0]):
            for part in parts:
                shapes[f"{prefix}.{expert}.{part}.weight"] = (shape[1] // len(parts), shape[2])
    assert sum(map(math.prod, shapes.values())) == model.num_parameters()
    return shapes


@EACH_SIZE
def test_tensors_are_those_of_transformers(row: Published) -> None:
    """Names, shapes and the count of parameters, against the model on the meta device."""
    expected = transformers_shapes(row.config)
    assert tensor_shapes(read_architecture(row.config)) == expected
    assert count_parameters(row.config) == row.parameters == sum(map(math.prod, expected.values()))


@pytest.mark.parametrize(
    "change",
    [
        {"decoder_sparse_step": 2},
        {"decoder_sparse_step": 3, "mlp_only_layers": [5, 23]},
        {"mlp_only_layers": [0, 7]},
        {"tie_word_embeddings": True},
        {"head_dim": 64},
    ],
    ids=str,
)
@pytest.mark.parametrize("base", [QWEN2_MOE, QWEN3_MOE], ids=("qwen2_moe", "qwen3_moe"))
def test_layers_without_experts_are_those_of_transformers(
    base: dict[str, Any], change: dict[str, Any]
) -> None:
    config = {**base, **change, "num_hidden_layers": 24, "num_experts": 8}
    expected = transformers_shapes(config)
    assert tensor_shapes(read_architecture(config)) == expected
    routed = [f"model.layers.{layer}.mlp.gate.weight" in expected for layer in range(24)]
    frequency = megatron_options(config)["moe_layer_freq"]
    assert frequency == (1 if all(routed) else [int(has) for has in routed])


def test_a_bias_that_qwen2_moe_leaves_out() -> None:
    config = {**QWEN2_MOE, "qkv_bias": False, "num_hidden_layers": 2}
    assert tensor_shapes(read_architecture(config)) == transformers_shapes(config)
    assert megatron_options(config)["add_qkv_bias"] is False


def test_both_names_of_the_number_of_experts_are_read() -> None:
    config = {**QWEN3_MOE, "num_local_experts": QWEN3_MOE["num_experts"]}
    del config["num_experts"]
    assert megatron_options(config) == megatron_options(QWEN3_MOE)


def test_the_softmax_comes_first_where_the_probabilities_are_not_scaled() -> None:
    for base in (QWEN2_MOE, QWEN3_MOE):
        for scaled in (True, False):
            options = megatron_options({**base, "norm_topk_prob": scaled})
            assert options["moe_router_pre_softmax"] is not scaled
    unsaid = {key: value for key, value in QWEN3_MOE.items() if key != "norm_topk_prob"}
    assert megatron_options(unsaid)["moe_router_pre_softmax"] is True


@pytest.mark.parametrize("family", FAMILIES)
def test_what_a_config_leaves_out_is_what_transformers_makes_of_it(family: str) -> None:
    sizes = ("num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads")
    facts = dict(zip(sizes, (2, 512, 1024, 4), strict=True)) | {"num_key_value_heads": 2}
    if family.endswith("_moe"):
        facts |= {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64}
        facts |= {"shared_expert_intermediate_size": 128} if family == "qwen2_moe" else {}
    loaded = AutoConfig.for_model(family, **facts)
    qwen = read_architecture({"model_type": family, "vocab_size": 1000, **facts})
    assert qwen.norm_epsilon == loaded.rms_norm_eps
    assert qwen.rope_theta == loaded.rope_parameters["rope_theta"]
    assert qwen.max_positions == loaded.max_position_embeddings
    assert qwen.tied_embeddings == loaded.tie_word_embeddings
    assert qwen.init_std == loaded.initializer_range
    assert qwen.head_dim == (getattr(loaded, "head_dim", None) or 128)
    assert qwen.yarn is None
    if qwen.experts:
        assert qwen.experts.normalized == loaded.norm_topk_prob
        assert all(qwen.experts.in_layer)


def test_both_spellings_of_the_rotary_base_are_read() -> None:
    config = {key: value for key, value in QWEN3.items() if key != "rope_theta"}
    assert megatron_options(config)["rotary_base"] == 10_000
    config["rope_parameters"] = {"rope_type": "default", "rope_theta": 5_000_000.0}
    assert megatron_options(config)["rotary_base"] == 5_000_000


YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}
YARN_OPTIONS = {
    "position_embedding_type": "yarn",
    "rotary_scaling_factor": 4.0,
    "yarn_original_max_position_embeddings": 32768,
    "yarn_beta_fast": 32.0,
    "yarn_beta_slow": 1.0,
    "yarn_correction_range_round_to_int": True,
    "mscale": 1.0,
    "mscale_all_dim": 0.0,
}
# What differs from YARN in config.json, and what differs from YARN_OPTIONS then.
YARNS: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({}, {}),
    ({"rope_type": None, "type": "yarn"}, {}),
    ({"beta_fast": 16, "beta_slow": 2.0}, {"yarn_beta_fast": 16.0, "yarn_beta_slow": 2.0}),
    ({"truncate": False}, {"yarn_correction_range_round_to_int": False}),
    ({"mscale": 1.2, "mscale_all_dim": 0.8}, {"mscale": 1.2, "mscale_all_dim": 0.8}),
    ({"mscale": 1.2}, {}),
    ({"attention_factor": 1.3}, {"mscale": 0.3 / (0.1 * math.log(4.0))}),
    (
        {"original_max_position_embeddings": None, "factor": 2.0},
        {"rotary_scaling_factor": 2.0, "yarn_original_max_position_embeddings": 131072},
    ),
    ({"factor": None}, {}),
]


@pytest.mark.parametrize("spelling", ["rope_parameters", "rope_scaling"])
@pytest.mark.parametrize(("change", "expected"), YARNS, ids=str)
def test_yarn(spelling: str, change: dict[str, Any], expected: dict[str, Any]) -> None:
    """Both spellings of config.json; the attention factor is what transformers computes."""
    rope = {key: value for key, value in {**YARN, **change}.items() if value is not None}
    config = {**QWEN3, "max_position_embeddings": 131072, spelling: rope}
    if spelling == "rope_parameters":
        config["rope_parameters"]["rope_theta"] = config.pop("rope_theta")
    options = megatron_options(config)
    for name, value in {**YARN_OPTIONS, "rotary_base": 1_000_000, **expected}.items():
        assert options[name] == pytest.approx(value), name

    if "factor" in rope:  # transformers' function refuses a config without one
        loaded = AutoConfig.for_model(**config)
        _, attention_factor = ROPE_INIT_FUNCTIONS["yarn"](loaded, torch.device("cpu"))
        logarithm = 0.1 * math.log(options["rotary_scaling_factor"])
        scales = [logarithm * options[name] + 1 for name in ("mscale", "mscale_all_dim")]
        assert scales[0] / scales[1] == pytest.approx(attention_factor)


def test_vocabulary_is_padded_to_the_tensor_parallel_ranks_alone() -> None:
    assert padded_vocabulary(151936, 8) == 151936
    assert padded_vocabulary(2601, 4) == 2604
    assert padded_vocabulary(2600, 1) == 2600


def test_a_window_that_is_named_but_not_in_use_is_no_window() -> None:
    """As transformers decides: by use_sliding_window, and in dense models by the first layer."""
    used = {"use_sliding_window": True, "sliding_window": 4096}
    for change in (
        {"use_sliding_window": False, "sliding_window": 4096, "max_window_layers": 0},
        {**used, "max_window_layers": 28},
        {**used, "sliding_window": None, "max_window_layers": 0},
        {**used, "max_window_layers": 0, "layer_types": ["full_attention"] * 28},
    ):
        config = {**QWEN3, **change}
        assert set(AutoConfig.for_model(**config).layer_types) == {"full_attention"}
        assert megatron_options(config) == megatron_options(QWEN3)


WINDOW = {"use_sliding_window": True, "sliding_window": 4096}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({**WINDOW, "max_window_layers": 27}, "use_sliding_window true"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "layer_types other than"),
        ({"rope_scaling": {**YARN, "factor": 0}}, "factor is 0: a number above zero"),
        ({"rope_scaling": {**YARN, "factor": 1.0, "attention_factor": 1.2}}, "attention_factor"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope type 'linear'"),
        ({"rope_parameters": {"rope_type": "dynamic"}}, "rope type 'dynamic'.* yarn"),
        ({"rope_scaling": "yarn"}, "rope_scaling is 'yarn': an object is expected"),
        (  # transformers would take rope_scaling alone, with its default base
            {"rope_parameters": {"rope_theta": 1e6}, "rope_scaling": YARN},
            "rope_parameters and rope_scaling, which differ",
        ),
        ({"rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]}}, "rope type 'mrope'"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"rope_theta": 10000.5}, "rope_theta 10000.5 is no whole number"),
        ({"rope_theta": "1e6"}, "rope_theta is '1e6': a number above zero"),
        ({"rms_norm_eps": "1e-6"}, "rms_norm_eps is '1e-6': a number above zero"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantization_config"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu'"),
        ({"attention_bias": True}, "attention_bias true in qwen3"),
        ({"model_type": "llama"}, "'llama' is not supported; supported: qwen2, qwen3, qwen2_moe"),
        ({"model_type": "qwen3_next"}, "model_type 'qwen3_next' is not supported"),
        ({"hidden_size": "1024"}, "hidden_size is '1024'"),
        ({"num_hidden_layers": 0}, "num_hidden_layers is 0"),
        ({"num_key_value_heads": 3}, "16 is no multiple of num_key_value_heads 3"),
    ],
)
def test_what_cannot_be_carried_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        megatron_options({**QWEN3, **change})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (WINDOW, "use_sliding_window true"),
        ({"num_experts": 0}, "num_experts is 0"),
        ({"num_experts_per_tok": 129}, "num_experts_per_tok 129 is more than the 128 experts"),
        ({"num_experts_per_tok": 1}, "norm_topk_prob true with num_experts_per_tok 1"),
        ({"moe_intermediate_size": None}, "moe_intermediate_size is None"),
        ({"decoder_sparse_step": 0}, "decoder_sparse_step is 0"),
        ({"decoder_sparse_step": 49}, r"no layer has experts: .* a dense model \(qwen3\)"),
        ({"mlp_only_layers": "all"}, "mlp_only_layers is 'all': a list of layers"),
        ({"attention_bias": True}, "attention_bias true in qwen3_moe"),
        ({"model_type": "qwen2_moe"}, "shared_expert_intermediate_size is missing"),
    ],
)
def test_experts_that_cannot_be_carried_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        megatron_options({**QWEN3_MOE, **change})


def test_a_missing_size_is_named() -> None:
    config = {key: value for key, value in QWEN3.items() if key != "vocab_size"}
    with pytest.raises(InputError, match="vocab_size is missing"):
        read_architecture(config)
