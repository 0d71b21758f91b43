"""Configs: merging, every mistake in one pass, canonical options, and what is generated from them."""

import copy
import json
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml
from jsonschema import Draft202012Validator
from snakemake.cli import parse_config

from megaqwen.config import ConfigError, load_config, merge_overlay, validate_config
from megaqwen.config.checks import check_model_fits
from megaqwen.config.cpu import cpu_mistakes
from megaqwen.config.loading import as_written
from megaqwen.config.managed_options import BY_GROUP, BY_PREFIX, REASON_BY_NAME, reason_not_to_set
from megaqwen.config.megatron_options import (
    WrongValue,
    checked_bool,
    megatron_options,
    option_names,
    settable_names,
    to_arguments,
    validate_train_options,
)
from megaqwen.config.reading import read_yaml
from megaqwen.config.tiny_shapes import tiny_hf_config
from megaqwen.errors import InputError
from megaqwen.layout import Layout
from megaqwen.runs import read_runs
from published import PUBLISHED

ROOT = Path(__file__).resolve().parents[2]
DEFAULT = ROOT / "config/config.yaml"
EXPERIMENTS = sorted((ROOT / "config/experiments").glob("*.yaml"))
NEED_GPUS = {"qwen3-30b-a3b"}


def first_run(experiment: Path | None) -> Layout:
    """The run of an experiment, or of its sweep the first, as Snakemake reads it."""
    runs = read_runs(DEFAULT, {}, [experiment] if experiment else [])
    runs.check()
    return runs.layout(runs.names[0])


# The default's training is tuned now and then; these tests do arithmetic on numbers of their own.
TRAIN = {
    "tensor_model_parallel_size": 2,
    "sequence_parallel": True,
    "seq_length": 256,
    "micro_batch_size": 4,
    "global_batch_size": 8,
    "train_iters": 60,
    "lr": 2e-3,
    "min_lr": 2e-4,
    "lr_decay_style": "cosine",
    "lr_warmup_iters": 6,
    "bf16": False,
    "save_interval": 30,
}

DELAYED = {"bf16": True, "fp8": "hybrid"}
SELECTIVE = {"recompute_granularity": "selective"}
FULL = {
    "recompute_granularity": "full",
    "recompute_method": "uniform",
    "recompute_num_layers": 1,
}


@pytest.fixture
def values() -> dict[str, Any]:
    return read_yaml(DEFAULT) | {"train": dict(TRAIN)}


@pytest.fixture
def base(tmp_path: Path, values: dict[str, Any]) -> Path:
    """A config file with `values`."""
    path = tmp_path / "base.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


def mistakes(values: Mapping[str, Any]) -> list[str]:
    """The lines of the one message, without its first."""
    with pytest.raises(ConfigError) as caught:
        validate_config(values)
    return [line.strip() for line in str(caught.value).splitlines()[1:]]


def with_train(values: Mapping[str, Any], **options: Any) -> dict[str, Any]:
    return merge_overlay(values, {"train": options})


# Mistakes


def test_all_mistakes_are_reported_in_one_pass(values: dict[str, Any]) -> None:
    values["parity"]["max_tokens"] = "many"
    values["parity"]["max_tokenz"] = 3
    values["model"]["architecture"] = "qwen33"
    values["data"]["corpora"][0]["weight"] = -1
    values["data"]["corpora"].append({"source": "filez", "name": "b"})
    values["train"] |= {"lr_decay_stile": "cosine", "lr_decay_style": "cosin", "seq_length": "long"}
    del values["train"]["lr"], values["export"]
    assert sorted(mistakes(values)) == sorted(
        [
            'parity.max_tokens: "many" is given, a whole number of at least 2 is allowed',
            "parity.max_tokenz: there is no such key: did you mean max_tokens?",
            'model.architecture: "qwen33" is given, qwen3, qwen2, qwen3_moe or qwen2_moe is allowed: '
            "did you mean qwen3?",
            "data.corpora[0].weight: -1 is given, a number greater than 0 is allowed",
            'data.corpora[1].source: "filez" is given, builtin or files is allowed: '
            "did you mean files?",
            "export: is missing: the section is needed",
            "train.lr_decay_stile: Megatron has no such option: did you mean lr_decay_style?",
            'train.lr_decay_style: "cosin" is given, constant, linear, cosine, '
            "inverse-square-root or WSD is allowed: did you mean cosine?",
            'train.seq_length: "long" is given, a whole number is allowed',
            "train.lr: is missing: every run has to say it",
        ]
    )


@pytest.mark.parametrize(
    ("options", "where", "text"),
    [
        ({"global_batch_size": 10}, "global_batch_size", "not a multiple of micro_batch_size 4"),
        ({"min_lr": 1.0}, "min_lr", "is more than lr 0.002"),
        ({"lr_warmup_iters": 60}, "lr_warmup_iters", "is not less than train_iters 60"),
        ({"tensor_model_parallel_size": 1}, "sequence_parallel", "of 2 or more"),
        ({"seq_length": 255}, "seq_length", "254 or 256 would be"),
        ({"overlap_param_gather": True}, "overlap_param_gather", "use_distributed_optimizer"),
        ({"bf16": True, "fp16": True}, "fp16", "cannot be set together with train.bf16"),
        ({"recompute_granularity": "full"}, "recompute_granularity", "needs train.recompute_meth"),
        ({"micro_batch_size": 0}, "micro_batch_size", "at least 1 is allowed"),
        ({"async_save": True, "dist_ckpt_workers": 4}, "dist_ckpt_workers", "ckpt_assume_constant"),
        (
            {"moe_router_load_balancing_type": ["quantile_balancing"]},
            "moe_router_load_balancing_type",
            "a bias that a Qwen does not have",
        ),
        (
            {"iterations_to_skip": [3], "pipeline_model_parallel_size": 2},
            "iterations_to_skip",
            "pipeline_model_parallel_size 1",
        ),
        (
            {"seed": 2**32 - 100, "pipeline_model_parallel_size": 2},
            "seed",
            f"at most {2**32 - 101} is allowed",
        ),
        ({"recompute_modules": ["mlp"]}, "recompute_modules", "needs train.recompute_granularity"),
        ({**SELECTIVE, "recompute_modules": ["mla_up_proj"]}, "recompute_modules", "core_attn, la"),
        ({**SELECTIVE, "recompute_modules": ["moe_act"]}, "recompute_modules", "moe_grouped_gemm"),
        ({**FULL, "recompute_modules": ["mlp"]}, "recompute_modules", "full recomputes whole"),
        (
            {**FULL, "distribute_saved_activations": True},
            "distribute_saved_activations",
            "cannot be set together with train.sequence_parallel",
        ),
        (
            {"optimizer_cpu_offload": True, "optimizer_offload_fraction": 0.0},
            "optimizer_offload_fraction",
            "whose count of steps is not saved",
        ),
        ({"optimizer_cpu_offload": True}, "optimizer_cpu_offload", "needs train.bf16"),
        ({"optimizer": "sgd"}, "optimizer", "does not load again: adam is allowed"),
        (
            {**DELAYED, "use_transformer_engine_op_fuser": True},
            "use_transformer_engine_op_fuser",
            "whose scales it does not save",
        ),
        (
            {**DELAYED, "fp8_param_gather": True, "stream_ckpt_dequant": True},
            "stream_ckpt_dequant",
            "before the scales of fp8_recipe delayed are loaded",
        ),
        (
            {**DELAYED, "fp8_param_gather": True, "moe_grouped_gemm": True},
            "fp8_param_gather",
            "fp8_recipe tensorwise and blockwise are allowed",
        ),
        (
            {**DELAYED, "fp8_recipe": "tensorwise", "exp_avg_sq_dtype": "fp8"},
            "exp_avg_sq_dtype",
            "fp32 and bf16 are allowed",
        ),
        (
            {"use_distributed_optimizer": True, "optimizer_cuda_graph": True},
            "optimizer_cuda_graph",
            "cannot be set together with train.use_distributed_optimizer",
        ),
        ({"moe_router_force_biased": -1.0}, "moe_router_force_biased", "a bias that is not saved"),
        (
            {"moe_router_force_load_balancing": True, "expert_model_parallel_size": 2},
            "moe_router_force_load_balancing",
            "whose state is not saved",
        ),
        ({"qk_clip": True}, "qk_clip", "set train.eval_iters 0"),
        ({"iterations_to_skip": [60]}, "iterations_to_skip", "60 is to be saved (train_iters 60, "),
        ({"iterations_to_skip": [30]}, "iterations_to_skip", "30 is to be saved (train_iters 60, "),
        ({"start_eval_at_iter": 60, "eval_interval": 20}, "start_eval_at_iter", ": 59 begins at"),
        ({"start_eval_at_iter": 61}, "start_eval_at_iter", "is more than train_iters 60"),
        # Of the tiny model, whose shape is known without files:
        ({"seq_length": 2048}, "seq_length", "max_position_embeddings 1024"),
        ({"tensor_model_parallel_size": 4}, "tensor_model_parallel_size", "6 attention heads"),
        ({"pipeline_model_parallel_size": 3}, "pipeline_model_parallel_size", "4 layers are not"),
        ({"expert_model_parallel_size": 2}, "expert_model_parallel_size", "no experts"),
        ({"expert_tensor_parallel_size": 2}, "expert_tensor_parallel_size", "no experts"),
        ({**SELECTIVE, "recompute_modules": ["moe"]}, "recompute_modules", "no experts"),
    ],
)
def test_values_that_do_not_go_together(
    values: dict[str, Any], options: dict[str, Any], where: str, text: str
) -> None:
    found = mistakes(with_train(values, **options))
    assert any(line.startswith(f"train.{where}: ") and text in line for line in found), found


@pytest.mark.parametrize(
    ("keep_last", "keep_every", "text"),
    [(0, 60, "keep_last 0 keeps all"), (2, 70, "train.save_interval 30: 60 or 90 would be")],
)
def test_checkpoints_that_would_not_be_kept(
    values: dict[str, Any], keep_last: int, keep_every: int, text: str
) -> None:
    kept = {**values["checkpoints"], "keep_last": keep_last, "keep_every": keep_every}
    (line,) = mistakes({**values, "checkpoints": kept})
    assert line.startswith(f"checkpoints.keep_every: {keep_every} is") and text in line


def test_names_of_corpora_differ(values: dict[str, Any]) -> None:
    values["data"]["corpora"] *= 2
    [found] = mistakes(values)
    assert found.startswith(
        'data.corpora[1].name: "python-docs" is also the name of data.corpora[0]'
    )


def test_no_corpus_is_written_where_the_targets_of_another_are(values: dict[str, Any]) -> None:
    names = ("chats.targets", "chats", "notes.targets")
    values["data"]["corpora"] = [{"name": name, "source": "builtin"} for name in names]
    validate_config(values)
    values["data"]["kind"] = "sft"
    [found] = mistakes(values)
    assert found.startswith('data.corpora[0].name: "chats.targets" is where the targets of data.')


def test_the_seed_of_the_data_is_one_for_numpy(values: dict[str, Any]) -> None:
    values["data"]["seed"] = 2**32 - 1
    validate_config(values)
    values["data"]["seed"] = 2**32
    [found] = mistakes(values)
    assert found.startswith("data.seed: ") and str(2**32 - 1) in found


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("run: a\nrun: b\n", "line 2, column 1: the key run is given twice, first in line 1"),
        ("- run\n", "a mapping of sections is expected"),
        ("run: [a\n", "line 2, column 1"),
        (None, "there is no config file"),
    ],
)
def test_files_that_are_no_config(tmp_path: Path, text: str | None, message: str) -> None:
    path = tmp_path / "config.yaml"
    if text is not None:
        path.write_text(text)
    with pytest.raises(ConfigError, match=message):
        load_config(path)


# Overlays


def test_an_overlay_that_changes_the_source_replaces_the_section(base: Path) -> None:
    hub = {"model": {"source": "hub", "repo_id": "Qwen/Qwen3-0.6B"}}
    config = load_config(base, hub | {"train": {"train_iters": 50}})
    assert config.model.model_dump() == {**hub["model"], "revision": "main"}
    assert (config.train["train_iters"], config.train["seq_length"]) == (50, 256)


def test_an_overlay_keeps_the_fields_of_the_same_source(base: Path) -> None:
    model = load_config(base, {"model": {"architecture": "qwen2"}}).model
    assert model.model_dump() == {"source": "tiny", "architecture": "qwen2", "seed": 1234}


def test_none_removes_a_key(base: Path, values: dict[str, Any]) -> None:
    before = copy.deepcopy(values)
    assert "bf16" in values["train"]
    assert "bf16" not in load_config(base, {"train": {"bf16": None}}).train
    assert merge_overlay(values, {"parity": None, "unknown": None}).keys() == values.keys() - {
        "parity"
    }
    assert values == before


def test_an_overlay_file_gives_a_key_once(base: Path, tmp_path: Path) -> None:
    file = tmp_path / "overlay.yaml"
    file.write_text("train:\n  lr: 1e-3\n  lr: 2e-3\n")
    with pytest.raises(ConfigError, match=r"overlay.yaml, line 3, .* first in line 2"):
        load_config(base, yaml.safe_load(file.read_text()), [file])


def test_values_from_the_command_line_have_no_types(base: Path) -> None:
    overlay = {"run": 7, "train": {"lr": "1e-3", "train_iters": "20", "bf16": "true"}}
    config = load_config(base, overlay | {"data": {"split": ["90", "5", 5]}})
    assert (config.run, config.data.split) == ("7", [90, 5, 5])
    assert [config.train[name] for name in overlay["train"]] == [1e-3, 20, True]
    assert config.train["min_lr"] == 2e-4


@pytest.mark.parametrize("run", ["012", "2024_11_05", "7"])
def test_a_run_is_named_as_it_is_written(base: Path, run: str) -> None:
    read = parse_config([f"run={run}"])
    assert isinstance(read["run"], int), "Snakemake takes it for a number"
    for words in (["--config", f"run={run}"], [f"--config=run={run}"], [f"-Crun={run}"]):
        assert load_config(base, as_written(read, ["snakemake", *words])).run == run


# Canonical options


@pytest.mark.parametrize("written", ["2e-3", "2.0e-3", "0.002", "2E-3", "+2e-3"])
def test_floats_are_written_as_one_likes(base: Path, written: str) -> None:
    expected = load_config(base)
    text = base.read_text()
    assert "lr: 0.002\n" in text
    base.write_text(text.replace(" lr: 0.002\n", f" lr: {written}\n"))
    assert load_config(base) == expected


def test_a_whole_number_is_a_float_where_one_is_meant(values: dict[str, Any]) -> None:
    clip = validate_config(with_train(values, clip_grad=1)).train["clip_grad"]
    assert (clip, type(clip)) == (1.0, float)


def test_an_option_and_its_opposite_are_the_same(values: dict[str, Any]) -> None:
    by_flag = validate_config(with_train(values, no_rope_fusion=True))
    assert by_flag == validate_config(with_train(values, apply_rope_fusion=False))
    assert by_flag.train["apply_rope_fusion"] is False
    [found] = mistakes(with_train(values, no_rope_fusion=True, apply_rope_fusion=False))
    assert "is the same option as train." in found


@pytest.mark.parametrize(
    ("option", "value", "reason"),
    [
        ("num_layers", 4, "it comes from the model's config.json"),
        ("norm_epsilon", 1e-6, "it comes from the model's config.json"),
        ("disable_bias_linear", True, "it comes from the model's config.json"),
        ("save", "here", "set `run` and `results`"),
        ("data_path", ["x"], "it comes from the `data` section"),
        ("tokenizer_type", "NullTokenizer", "the model's own tokenizer is used"),
        ("full_validation", True, "eval_iters says how much"),
        ("eod_mask_loss", True, "text joined by end-of-document tokens"),
        ("ckpt_format", "torch", "written and resumed as torch_dist"),
        ("wandb_project", "qwen", "the `tracking` section"),
        ("tensorboard_log_interval", 10, "each iteration's figures are kept"),
        ("save_retain_interval", 60, "checkpoints.keep_every and keep_last"),
        ("distributed_backend", "gloo", "the launcher and the machine decide it"),
        ("train_samples", 8, "use train_iters"),
        ("rampup_batch_size", [4, 4, 8], "deprecated or no longer reads it"),
        ("fp8_interval", 2, "deprecated or no longer reads it"),
        ("step_batch_size_schedule", "0:4 1M:8", "has global_batch_size samples"),
        ("decrease_batch_size_if_needed", True, "has global_batch_size samples"),
    ],
)
def test_managed_options_are_refused_with_the_reason(
    values: dict[str, Any], option: str, value: Any, reason: str
) -> None:
    [found] = mistakes(with_train(values, **{option: value}))
    assert found.startswith(f"train.{option}: leave it out: ")
    assert reason in found


def test_managed_options_are_options_of_megatron() -> None:
    options = megatron_options()
    assert set(REASON_BY_NAME) <= set(options)
    assert set(BY_GROUP) <= {option["group"] for option in options.values()}
    assert [prefix for prefix in BY_PREFIX if not any(o.startswith(prefix) for o in options)] == []


@pytest.mark.parametrize(
    ("results", "good"),
    [
        ("/scratch/user@host/a-b_c.d+e=f", True),
        ("../résultats", True),
        ("~/results", False),
        ("$SCRATCH/results", False),
        ("my results", False),
        ("a;b", False),
        ("{run}", False),
        ("-o", False),
        ("", False),
    ],
)
def test_results_stand_in_shell_commands(values: dict[str, Any], results: str, good: bool) -> None:
    given = {**values, "results": results}
    if good:
        assert validate_config(given).results == results
    else:
        (line,) = mistakes(given)
        assert line.startswith("results: ") and "without ~, $ and spaces" in line


# Fitting a model and the ranks


def test_a_config_fits_a_number_of_ranks(base: Path) -> None:
    config, model = load_config(base), tiny_hf_config("qwen3")
    assert check_model_fits(config, model, 2) == []
    assert check_model_fits(config, model, 4) == []
    [odd] = check_model_fits(config, model, 3)
    assert odd.startswith("train.tensor_model_parallel_size: tensor 2 x pipeline 1 x context 1 = 2")
    assert "start 2 or 4 ranks" in odd
    [batch] = check_model_fits(config, model, 6)
    assert batch.startswith(
        "train.global_batch_size: 8 is not a multiple of micro_batch_size 4 x 3"
    )
    assert "12 would be" in batch


# The real parser


@pytest.fixture(scope="module")
def parse() -> Any:
    from megaqwen.config.parser_options import megatron_parser, plain

    parser = megatron_parser()
    return lambda words: {k: plain(v) for k, v in vars(parser.parse_args(words)).items()}


def samples(option: Mapping[str, Any]) -> Iterator[Any]:
    """Values that an option takes, in canonical form."""
    if option["type"] == "bool":
        for value in (True, False):
            try:
                yield checked_bool(option, value)
            except WrongValue:
                assert bool(option["default"]) is not value
        return
    of_type = {
        "int": [0, 7, -1],
        "float": [2e-3, 1e-10, -1e-5, 3.0],
        "str": ["a b", "-x", "--y"],
        "enum": [],
        "pattern": [3, "([0]+[1]*3)"],
        "int_tuple": [[4, 0]],
    }
    singles = option.get("choices") or of_type[option["type"]]
    if "nargs" not in option:
        yield from singles
        return
    singles = [single for single in singles if not str(single).startswith("--")]
    singles = [single for single in singles if single != "-x"]
    yield (
        [singles[index % len(singles)] for index in range(option["nargs"])]
        if isinstance(option["nargs"], int)
        else singles
    )


def test_every_settable_option_round_trips_through_the_parser(parse: Any) -> None:
    options = megatron_options()
    dests = {dest for dest, _ in settable_names().values()}
    assert len(dests) > 300
    for dest in sorted(dests):
        for value in samples(options[dest]):
            parsed = parse(to_arguments({dest: value}))
            expected = pattern(value) if options[dest]["type"] == "pattern" else value
            assert parsed[dest] == expected, dest


def pattern(value: Any) -> Any:
    """What Megatron makes of a list expression."""
    return eval(value) if isinstance(value, str) else value


def test_every_name_of_an_option_says_what_its_flag_says(parse: Any) -> None:
    for name, (dest, _) in settable_names().items():
        option = megatron_options()[dest]
        flag = "--" + name.replace("_", "-")
        if (
            flag in [*option.get("on", ()), *option.get("off", ())]
            and name not in megatron_options()
        ):
            canonical, _ = validate_train_options({name: True})
            assert canonical[dest] is parse([flag])[dest], name


@pytest.mark.parametrize("gpu", [False, True])
@pytest.mark.parametrize("experiment", [None, *EXPERIMENTS], ids=lambda path: path and path.stem)
def test_the_whole_command_line_round_trips(parse: Any, experiment: Path | None, gpu: bool) -> None:
    from megaqwen.training.arguments import RunPaths, training_options

    config = first_run(experiment).config
    shape = tiny_hf_config(getattr(config.model, "architecture", "qwen3"))
    paths = RunPaths(
        pretrained=Path("pretrained"), checkpoints=Path("a b"), tensorboard=Path("tensorboard")
    )
    if not gpu and (experiment and experiment.stem) in NEED_GPUS:
        with pytest.raises(InputError, match=r"train\.moe_grouped_gemm: .* kernel for GPUs"):
            training_options(config, shape, paths, gpu=gpu)
        return
    options = training_options(config, shape, paths, gpu=gpu)
    parsed = parse(to_arguments(options))
    assert {dest: parsed[dest] for dest in options} == options
    assert parsed["add_bias_linear"] is False
    assert parsed["exit_signal_handler"] is True
    untouched = parsed.keys() - options.keys()
    defaults = parse([])
    assert {dest: parsed[dest] for dest in untouched} == {d: defaults[d] for d in untouched}


def test_to_arguments_refuses_what_no_flag_says() -> None:
    assert to_arguments({"save": None}) == []
    rounding = "yarn-correction-range-round-to-int"  # unset by default: both have to be said
    for value, flag in ((True, f"--{rounding}"), (False, f"--no-{rounding}")):
        assert to_arguments({rounding.replace("-", "_"): value}) == [flag]
    with pytest.raises(ValueError, match="Megatron has no option sav"):
        to_arguments({"sav": "x"})
    with pytest.raises(ValueError, match="bf16: 1 is given, true or false is allowed"):
        to_arguments({"bf16": 1})
    with pytest.raises(ValueError, match="lr: true is given, a number is allowed"):
        to_arguments({"lr": True})


# What is generated and shipped


def test_generated_files_are_up_to_date() -> None:
    from megaqwen.config.megatron_options import OPTIONS_FILE
    from megaqwen.config.parser_options import options_json
    from megaqwen.config.reference import table, with_table
    from megaqwen.config.schema import config_schema, overlay_schema, schema_json

    readme = (ROOT / "config/README.md").read_text()
    assert OPTIONS_FILE.read_text() == options_json()
    assert (ROOT / "config/schema.json").read_text() == schema_json(config_schema())
    assert (ROOT / "config/overlay.schema.json").read_text() == schema_json(overlay_schema())
    assert with_table(readme) == readme
    # Each key is a row of four cells, in YAML's words.
    _, _, *rows = table().splitlines()
    assert all(row.count(" | ") == 3 and row.endswith(" |") for row in rows)
    assert not re.search("`(True|False|None)`", table())


def modeline_schema(path: Path) -> Path:
    """The schema that an editor takes for a YAML file."""
    first = path.read_text().splitlines()[0]
    return path.parent / first.removeprefix("# yaml-language-server: $schema=")


@pytest.mark.parametrize("path", [DEFAULT, *EXPERIMENTS], ids=lambda path: path.stem)
def test_every_shipped_yaml_is_valid(path: Path) -> None:
    schema = json.loads(modeline_schema(path).read_text())
    Draft202012Validator.check_schema(schema)
    # As an editor and Snakemake read it: with YAML 1.1's types.
    assert list(Draft202012Validator(schema).iter_errors(yaml.safe_load(path.read_text()))) == []
    first_run(None if path == DEFAULT else path)
    names = [read_yaml(each)["run"] for each in (DEFAULT, *EXPERIMENTS)]
    assert len(set(names)) == len(names)


def test_the_experiments_are_what_their_names_say() -> None:
    configs = {path.stem: first_run(path).config for path in EXPERIMENTS}
    default = load_config(DEFAULT)
    names = {"qwen2.5", "data-parallel", "hub", "files", "moe", "continued-pretraining", "sft"}
    assert names <= set(configs)
    assert check_model_fits(configs["moe"], tiny_hf_config("qwen3_moe"), 2) == []
    assert configs["qwen2.5"].train == default.train
    assert configs["data-parallel"].model == default.model
    assert check_model_fits(configs["data-parallel"], tiny_hf_config("qwen3"), 2) == []
    assert [corpus.source for corpus in configs["files"].data.corpora] == ["files", "files"]
    for model in PUBLISHED:
        if config := configs.get(model.name.lower()):  # on a node of 8 GPUs
            names.add(model.name.lower())
            assert check_model_fits(config, model.config, 8) == []
    assert {"qwen3-8b", "qwen3-30b-a3b"} <= names


@pytest.mark.parametrize(
    ("overlay", "valid"),
    [
        ({"train": {"lr": None, "no_rope_fusion": True}}, True),
        ({"export": {"dtype": None}, "results": None}, True),
        ({"train": {"num_layers": 4}}, False),
        ({"train": {"lr": "fast"}}, False),
        ({"data": {"corpora": [{"source": "files", "name": "a"}]}}, False),
        ({"parity": {"max_tokenz": 1}}, False),
        ({"scratch": {"directory": "$TMPDIR"}}, True),
        ({"scratch": {"directory": "not/absolute"}}, False),
    ],
)
def test_the_schema_of_overlays(overlay: dict[str, Any], valid: bool) -> None:
    schema = json.loads((ROOT / "config/overlay.schema.json").read_text())
    assert Draft202012Validator(schema).is_valid(overlay) is valid


def test_every_option_has_an_owner() -> None:
    """An option may be set, or there is a reason; and its own name always means it."""
    settable = {dest for dest, _ in settable_names().values()}
    for dest, option in megatron_options().items():
        assert (dest in settable) == (reason_not_to_set(dest, option) is None)
        assert option_names()[dest] == (dest, False)


def test_loading_is_light() -> None:
    code = (
        "import sys; from pathlib import Path; from megaqwen.config import load_config; "
        "load_config(Path('config/config.yaml')); "
        "print(*({'torch', 'numpy', 'transformers', 'megatron'} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env={"PYTHONPATH": "scripts"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.split() == []


@pytest.mark.parametrize(
    ("options", "where", "text"),
    [
        ({"context_parallel_size": 2}, "context_parallel_size", "Transformer Engine's alone"),
        ({"fp8": "hybrid"}, "fp8", "Transformer Engine's"),
        ({"fp16": True}, "fp16", "use bf16"),
        ({**SELECTIVE, "recompute_modules": ["mlp", "layernorm"]}, "recompute_modules", "alone"),
        ({"moe_token_dispatcher_type": "flex"}, "moe_token_dispatcher_type", "use alltoall"),
        ({"attention_backend": "flash"}, "attention_backend", "kernel for GPUs"),
        (
            {
                "pipeline_model_parallel_size": 4,
                "num_virtual_stages_per_pipeline_rank": 2,
                "overlap_p2p_comm": False,
            },
            "overlap_p2p_comm",
            "wrong gradients over gloo",
        ),
    ],
)
def test_what_a_machine_without_a_gpu_cannot_do(
    options: dict[str, Any], where: str, text: str
) -> None:
    """Of each the reason is said before a rank starts: some of it would run, and be wrong."""
    (mistake,) = map(str, cpu_mistakes({**TRAIN, **options}))
    assert mistake.startswith(f"train.{where}: ") and text in mistake
    assert "this machine has no GPU" in mistake


def test_what_it_can_do_is_not_refused() -> None:
    allowed = {
        "pipeline_model_parallel_size": 2,
        "num_virtual_stages_per_pipeline_rank": 2,
        "context_parallel_size": 1,
        "moe_token_dispatcher_type": "alltoall",
        "attention_backend": "auto",
        "bf16": True,
        **SELECTIVE,
    }
    assert cpu_mistakes({**TRAIN, **allowed}) == []
