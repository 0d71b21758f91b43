"""Where everything lies, and what each stage reads of the config.

Download, convert, preprocess and the gate are shared: they live under a key made from what determines
them, so that runs with the same model or corpora do that work once. The other stages live under the
run's name.
"""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from megaqwen.config import Config
from megaqwen.config.blends import corpus_split, corpus_weights
from megaqwen.config.megatron_options import without_defaults
from megaqwen.config.operational_options import OPERATIONAL
from megaqwen.config.rank_options import OF_ONE_RUN, PARALLEL, deciding, taken
from megaqwen.provenance import digest, read_json, write_json

# Raise a stage's number when its result for the same config changes: old results are then redone.
RECIPE = {
    "download": 1,
    "convert": 2,
    "preprocess": 2,
    "gate": 4,
    "parity": 8,
    "train": 2,
    "export": 1,
    "report": 3,
}

SHARED = {"model": "models", "megatron": "megatron", "data": "data", "gate": "gates"}

# Under another of these a stopped training goes on. (The two optimizers save differently.)
LAYOUT_OPTIONS = {
    *PARALLEL,
    *("microbatch_group_size_per_vp_stage", "context_parallel_size", "micro_batch_size"),
    *("recompute_granularity", "recompute_method", "recompute_num_layers", "recompute_modules"),
}


@dataclass(frozen=True, kw_only=True)
class Layout:
    """The paths and stage configs of one run."""

    config: Config

    @cached_property
    def stage_configs(self) -> dict[str, dict[str, Any]]:
        """Those that were asked for: each has others' digests in it."""
        return {}

    def stage_config(self, stage: str) -> dict[str, Any]:
        """What determines a stage's result: the fields that it reads, and its upstream's digest.

        Two configs with equal stage configs share the stage's result. Weights and splits are
        training's: they do not change the tokens on disk. Training keeps its checkpoints under its
        digest: with its upstream in it, it never resumes from those of another model or corpus.
        """
        if stage not in self.stage_configs:
            self.stage_configs[stage] = {**self.fields(stage), "recipe": RECIPE[stage]}
        return self.stage_configs[stage]

    def fields(self, stage: str) -> dict[str, Any]:
        """The fields of `stage_config`."""
        config = self.config.model_dump(mode="json")
        data, corpora = config["data"], self.config.data.corpora
        splits = {each.name: list(corpus_split(self.config.data, each)) for each in corpora}
        weights = {each.name: corpus_weights(self.config.data, each) for each in corpora}
        for corpus in data["corpora"]:  # what is drawn from the tokens, not the tokens
            for field in ("weight", "valid_weight", "test_weight", "split"):
                del corpus[field]
        del data["shards"]  # how, not what comes out
        del config["checkpoints"], config["tracking"], config["scratch"]
        for name in OPERATIONAL & config["train"].keys():
            del config["train"][name]
        too_long = forget_other_kind(data)
        match stage:
            case "download":
                fields = {"model": config["model"]}
            case "convert":
                fields = {"model": self.model_key}
            case "preprocess":
                # Form 2 of conversations: what a prompt has of the assistant's is no target.
                kind = {"kind": data["kind"], "form": 2} if "kind" in data else {}
                fields = {"model": self.model_key, "corpora": data["corpora"], **kind}
            case "gate":
                # What is compared, not how: other texts are no reason to train again.
                made_of = {"convert": self.stage_digest("convert")}
                fields = {**made_of, "preprocess": self.stage_digest("preprocess")}
                # And how it is trained, as far as that changes what the ranks of training compute, or the
                # length up to which the models are compared.
                trained = without_defaults(deciding(config["train"]))
                fields |= {"splits": splits, "train": trained}
            case "parity":
                # And what of training the gate's verdict leaves out: it is then another one's.
                other = without_defaults(taken(config["train"], OF_ONE_RUN))
                fields = {"parity": config["parity"], **({"train": other} if other else {})}
            case "train":
                order = {"weights": weights, "splits": splits, "seed": data["seed"], **too_long}
                made_of = {"convert": self.stage_digest("convert")}
                made_of |= {"preprocess": self.stage_digest("preprocess")}
                fields = {"train": without_defaults(config["train"]), **order, **made_of}
            case "export":
                fields = {"export": config["export"]}
            case "report":
                fields = {**config, "weights": weights, "splits": splits}
            case _:
                raise ValueError(f"no stage {stage!r}")
        return fields

    def stage_digest(self, stage: str) -> str:
        """The digest of `stage_config`: the param by which Snakemake sees a change."""
        return digest(self.stage_config(stage))

    @cached_property
    def model_key(self) -> str:
        """The key of the downloaded model."""
        return self.stage_digest("download")

    @cached_property
    def results(self) -> Path:
        """The top of everything that is written."""
        return Path(self.config.results)

    @staticmethod
    def shared(results: Path, kind: str, key: str) -> Path:
        """The directory of a shared stage: `kind` is a Layout's own name for it."""
        return results / "shared" / SHARED[kind] / key

    @cached_property
    def model(self) -> Path:
        """Download's directory: `hf/` (the Hugging Face directory) and manifest.json."""
        return self.shared(self.results, "model", self.model_key)

    @cached_property
    def megatron(self) -> Path:
        """Convert's directory: `checkpoint/` (torch_dist) and manifest.json."""
        return self.shared(self.results, "megatron", self.stage_digest("convert"))

    @cached_property
    def data(self) -> Path:
        """Preprocess's directory: one .bin and .idx a corpus, and manifest.json."""
        return self.shared(self.results, "data", self.stage_digest("preprocess"))

    @cached_property
    def shards(self) -> Path:
        """Preprocess's shards until they are merged: a folder each, such as `2-of-8`."""
        return self.shards_of(self.data)

    @staticmethod
    def shards_of(data: Path) -> Path:
        """The shards of a directory of data."""
        return data.with_name(f"{data.name}.shards")

    def shard_count(self, *, planning: bool) -> int:
        """Of how many shards the data is made.

        Data that is there keeps the number that it was made of, so that another one in the config is
        no reason to tokenize again. So does a job of a plan that was made before it.

        Args:
            planning: This process makes the plan; it is no job of it.
        """
        if planning and not (self.data / "manifest.json").is_file():
            return self.config.data.shards
        if self.shard_record.is_file():
            return int(read_json(self.shard_record)["shards"])
        return 1

    def store_shard_count(self, count: int) -> None:
        """Keep the number of shards of a plan for its jobs and for later plans; none is one."""
        if count > 1:
            write_json(self.shard_record, {"shards": count})
        else:
            self.shard_record.unlink(missing_ok=True)

    @cached_property
    def shard_record(self) -> Path:
        """The file that keeps the number of shards where there are several."""
        return self.data.with_name(f"{self.data.name}.shards.json")

    @cached_property
    def gate(self) -> Path:
        """The gate's directory: parity.json, the verdict after convert that training waits for."""
        return self.shared(self.results, "gate", self.stage_digest("gate"))

    @cached_property
    def run(self) -> Path:
        """The run's directory."""
        return self.results / "runs" / self.config.run

    @cached_property
    def checkpoints(self) -> Path:
        """Training's checkpoints: another config, model or corpus never resumes from them.

        Another parallel layout does, micro batch or recomputation: they compute the same, but for the
        order of sums and, with experts, the micro batch over which these are balanced.
        """
        config = self.stage_config("train")
        train = {k: v for k, v in config["train"].items() if k not in LAYOUT_OPTIONS}
        return self.run / "train" / "checkpoints" / digest({**config, "train": train})


def forget_other_kind(data: dict[str, Any]) -> dict[str, Any]:
    """Take what only the other kind of data reads out of the data section; what only training reads.

    Pretraining's section is as it was before there was another kind: its results stay valid.
    """
    sft = data["kind"] == "sft"
    for corpus in data["corpora"]:
        corpus.pop("text_field" if sft else "conversation_field", None)
    too_long = data.pop("too_long")
    if sft:
        return {"too_long": too_long}
    del data["kind"]
    return {}
