"""The sections of a config file as pydantic models: the source of config/schema.json.

Frozen, and strict about unknown keys. A field's docstring is its description in the schema. What
Megatron itself understands stands in `train`, under Megatron's own names (see megatron_options.py).
"""

import re
from typing import Annotated, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, WithJsonSchema

LARGEST_SEED = 2**32 - 1  # of NumPy's random generators
SPLITS = ("train", "valid", "test")  # as Megatron calls them
NAME_PATTERN = r"^[A-Za-z0-9][\w.-]*$"
NODE_PATH_PATTERN = r"^([/$~].*)?$"
RESULTS_PATTERN = r"^[\w./][\w./+@=-]*$"  # rules' shell commands have it as it stands
SPLIT_PATTERN = r"^(train|valid|test|[\d.]+(,[\d.]+){0,2})$"


Name = Annotated[str, Field(pattern=NAME_PATTERN)]


class Section(BaseModel):
    """What all sections share."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        use_attribute_docstrings=True,
        strict=True,
        allow_inf_nan=False,
        validate_default=True,
    )


class TinyModel(Section):
    """A model of a few million parameters that is made on the spot, for trying the whole DAG."""

    source: Literal["tiny"]
    architecture: Literal["qwen3", "qwen2", "qwen3_moe", "qwen2_moe"] = "qwen3"
    """qwen3 (q/k norm, tied), qwen2 (Qwen2.5: QKV bias, untied), or one with experts of each kind."""
    seed: int = Field(default=1234, ge=0, le=2**63 - 1)
    """Seed of its random weights."""


class HubModel(Section):
    """A model repository on the Hugging Face Hub. A token is read from the environment only."""

    source: Literal["hub"]
    repo_id: str = Field(pattern=r"^[\w.-]+/[\w.-]+$")
    """Owner and name, such as Qwen/Qwen3-0.6B."""
    revision: str = Field(default="main", min_length=1)
    """Branch, tag or commit; resolved to a commit, which the manifest keeps."""


class PathModel(Section):
    """A Hugging Face model directory that is already on disk; it is linked, not copied."""

    source: Literal["path"]
    path: str = Field(min_length=1)
    """The directory with config.json, the safetensors files and the tokenizer."""


Model = Annotated[TinyModel | HubModel | PathModel, Field(discriminator="source")]


def shares(given: object) -> object:
    """The three shares of a split that is given as one split's name or as a string.

    In a string, as Megatron's --split, what is left out at the end is 0.
    """
    if not isinstance(given, str) or not re.match(SPLIT_PATTERN, given):
        return given
    if given in SPLITS:
        return [float(given == split) for split in SPLITS]
    try:
        return [*map(float, given.split(",")), 0.0, 0.0][: len(SPLITS)]
    except ValueError:  # such as 1.2.3
        return given


Shares = Annotated[
    list[Annotated[float, Field(ge=0)]],
    Field(min_length=3, max_length=3),
    BeforeValidator(shares),
    WithJsonSchema(
        {
            "anyOf": [
                {
                    "type": "array",
                    "items": {"type": "number", "minimum": 0},
                    "minItems": 3,
                    "maxItems": 3,
                },
                {"type": "string", "pattern": SPLIT_PATTERN},
            ]
        }
    ),
]


class TextCorpus(Section):
    """What every corpus has."""

    name: Name
    """The corpus's name in manifests and reports."""
    weight: float = Field(default=1.0, gt=0)
    """Share of training samples, relative to the other corpora's weights."""
    valid_weight: float | None = Field(default=None, ge=0)
    """Share of validation samples; 0 draws none from this corpus. Left out, it is weight."""
    test_weight: float | None = Field(default=None, ge=0)
    """Share of test samples; 0 draws none from this corpus. Left out, it is weight."""
    split: Shares | None = None
    """Its own shares, or train, valid or test: all its documents are for that. Else data.split."""
    min_characters: int = Field(default=0, ge=0)
    """Shorter documents are left out and counted; 0 keeps all that have any text. Of conversations,
    what is trained on counts."""
    deduplicate: bool = False
    """true leaves out a document whose text an earlier one of the corpus has to the byte."""


class BuiltinCorpus(TextCorpus):
    """English text that every machine has, from Python's own documentation; as conversations for sft."""

    source: Literal["builtin"]


class FilesCorpus(TextCorpus):
    """Text files of one's own."""

    source: Literal["files"]
    files: list[str] = Field(min_length=1)
    """Paths and glob patterns, relative to the working directory; a folder that datasets saved."""
    format: Literal["auto", "jsonl", "text", "parquet", "arrow"] = "auto"
    """auto goes by the name: .jsonl, .json, .txt, .parquet, .arrow; .gz, .zst and .xz are unpacked."""
    text_field: str = Field(default="text", min_length=1)
    """pretrain: the field (JSONL) or column (Parquet, Arrow) that holds a document's text."""
    conversation_field: str | None = Field(default=None, min_length=1)
    """sft: the field or column that holds the messages. Left out, it is messages or conversations,
    whichever there is, or else prompt and completion."""
    max_bad_documents: int = Field(default=0, ge=0)
    """Lines or rows that may be unusable (no JSON, no text, no conversation): left out and counted."""


Corpus = Annotated[BuiltinCorpus | FilesCorpus, Field(discriminator="source")]


class Data(Section):
    """What is trained on."""

    kind: Literal["pretrain", "sft"] = "pretrain"
    """pretrain trains on every token of documents, sft on the assistant's turns of conversations."""
    corpora: list[Corpus] = Field(min_length=1)
    """One entry a corpus; their names differ, and for sft none is another one's with `.targets`."""
    split: Shares = [96, 2, 2]
    """Shares of each corpus's documents, in order, for training, validation and test; or "96,2,2"."""
    seed: int = Field(default=1234, ge=0, le=LARGEST_SEED)
    """Seed of the order in which samples are drawn."""
    shards: int = Field(default=1, ge=1, le=9999)
    """Jobs that tokenize side by side; the result is the same, and another number redoes nothing."""
    too_long: Literal["error", "drop", "truncate"] = "error"
    """sft: what becomes of a conversation longer than seq_length; truncate keeps its beginning."""


class Checkpoints(Section):
    """Which of training's checkpoints stay. No other value of these trains anything again."""

    keep_last: int = Field(default=0, ge=0)
    """How many of the newest stay; 0 keeps all. The newest whole one always stays."""
    keep_every: int = Field(default=0, ge=0)
    """Checkpoints at multiples of this iteration stay as well; 0 keeps no others."""
    verify: Literal["checksums", "sizes"] = "checksums"
    """What a checkpoint's files are checked by before training resumes from it."""


class Tracking(Section):
    """Where curves go beside metrics.jsonl and TensorBoard; no value of these trains anything again."""

    wandb_project: str = ""
    """A project of Weights & Biases, offline without a key; empty: none."""
    mlflow_experiment: str = ""
    """Of MLflow (`uv sync --inexact --extra mlflow`), a file without MLFLOW_TRACKING_URI; empty: none."""


class Scratch(Section):
    """A disk of each node's own, to read the data from; no value of these trains anything again."""

    directory: str = Field(default="", pattern=NODE_PATH_PATTERN)
    """Such as $TMPDIR, set on the node; training copies its data there. Empty: it is read where it is."""
    keep: bool = False
    """true leaves the copy to the next training of the node; false removes it when this one ends."""


class Export(Section):
    """The Hugging Face directory that comes out."""

    dtype: Literal["source", "float32", "bfloat16"] = "source"
    """source keeps the dtype that each tensor had in the model that was downloaded; where those are
    several, one that would round a trained tensor is refused."""
    max_shard_gigabytes: float = Field(default=5.0, gt=0)
    """Largest safetensors file, in units of 10^9 bytes."""


class Parity(Section):
    """The two gates: after convert, which training waits for, and after export."""

    texts: list[str] = Field(min_length=1)
    """Texts whose logits are compared at every position, beside held-out documents."""
    held_out_documents: int = Field(default=4, ge=0)
    """How many documents of the test split are compared as well."""
    max_tokens: int = Field(default=256, ge=2)
    """Longer texts are cut to this many tokens."""
    max_logit_difference: float = Field(default=1e-4, gt=0)
    """Largest |difference| of float32 logits that passes, or 4 times their own rounding if more."""
    generated_tokens: int = Field(default=8, ge=1)
    """How many tokens are generated greedily from the beginnings of the texts."""
    minutes: float = Field(default=10, gt=0)
    """To compare the models; where a large one would take longer here, less text is compared."""
    gradients: bool = True
    """Compare the gradient of every tensor, or say that memory or minutes do not suffice for it."""
    trajectory_iterations: int = Field(default=5, ge=0)
    """Steps of the optimizer compared before training, likewise; 0 for none."""


class Sweep(Section):
    """Several runs that one Snakemake makes, each with other values; what they share is made once."""

    grid: dict[str, list[object]] = {}
    """The values that keys take, such as `train.lr: [1.0e-3, 3.0e-3]`: a run for each combination."""
    runs: dict[Name, dict[str, object]] = {}
    """Runs by name, with what each lays over the config; with a grid, each name has all combinations."""


class Config(Section):
    """A run: everything that its results depend on."""

    run: Name
    """The run's name: a folder below results/runs."""
    results: str = Field(default="results", pattern=RESULTS_PATTERN)
    """Where everything is written."""
    model: Model
    data: Data
    train: dict[str, object]
    """Megatron's options by their own names, without the dashes (micro_batch_size: 4)."""
    checkpoints: Checkpoints
    tracking: Tracking
    scratch: Scratch = Scratch()
    export: Export
    parity: Parity
    sweep: Sweep = Field(default=Sweep(), exclude=True)
    """Other runs than this one: config/README.md."""
