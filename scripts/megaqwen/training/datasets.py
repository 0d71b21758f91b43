"""Megatron's GPT datasets over the .bin and .idx files of preprocess."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron.core import mpu
from megatron.core.datasets import utils as dataset_utils
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
from megatron.core.datasets.indexed_dataset import IndexedDataset
from megatron.core.datasets.utils import Split
from megatron.training import get_args
from numpy.typing import NDArray

from megaqwen.config import Config
from megaqwen.config.blends import corpus_split, corpus_weights
from megaqwen.data.splits import split_argument, split_documents
from megaqwen.errors import InputError
from megaqwen.training.scratch import Copy


@dataclass(frozen=True, kw_only=True)
class EndOfDocument:
    """All that Megatron's datasets ask of a tokenizer: the text is tokenized already."""

    eod: int
    """The id that preprocess wrote after each document."""
    vocab_size: int
    """How many ids there are; decides the width of an id on disk."""
    pad: int = -1
    """No id: the files have no padding."""

    def __post_init__(self) -> None:
        """Refuse the trap in which what pads is what ends documents: no model would learn to end."""
        if self.pad >= 0:
            raise InputError(
                f"{self.pad} is given as the id that pads: Megatron takes its tokens out of the loss and"
                " makes them 0 in the input, and tokenized documents have no padding: leave pad out"
            )

    @property
    def unique_identifiers(self) -> dict[str, int]:
        """What the dataset cache's key takes from the tokenizer."""
        return {"eod": self.eod, "vocab_size": self.vocab_size}


@dataclass(frozen=True, kw_only=True)
class Corpora:
    """The corpora of a run and how samples are drawn from them."""

    prefixes: Sequence[Path]
    """Paths without .bin and .idx."""
    weights: Sequence[Sequence[float]]
    """Of each corpus, its share of training, validation and test samples, relative to the others."""
    splits: Sequence[Sequence[float]]
    """Of each corpus, the shares of its documents for training, validation and test."""
    seed: int
    cache: Path
    """Where Megatron keeps its sample indices."""
    tokenizer: EndOfDocument
    copy: Copy | None = None
    """This node's copy of the files, if the config asks for one."""

    def files(self, prefix: Path) -> Path:
        """The prefix of the files that a corpus is read from; its own stays what it is known by."""
        return self.copy.directory / prefix.name if self.copy else prefix

    def alike(self) -> bool:
        """Whether one split for all of them and one weight for each say it all."""
        common = list(self.splits[0])
        return all(list(split) == common for split in self.splits) and all(
            len({weight for weight, share in zip(weights, common, strict=True) if share}) == 1
            for weights in self.weights
        )


def run_corpora(
    config: Config,
    directory: Path,
    made: Mapping[str, Any],
    vocabulary: int,
    cache: Path,
    copy: Copy | None = None,
) -> Corpora:
    """A run's corpora on disk, in the config's order.

    Args:
        config: The run's.
        directory: Preprocess's.
        made: The results in its manifest.
        vocabulary: The model's, in ids.
        cache: Where Megatron keeps its sample indices.
        copy: This node's of the directory.
    """
    data = config.data
    return Corpora(
        prefixes=[directory / corpus.name for corpus in data.corpora],
        weights=[corpus_weights(data, corpus) for corpus in data.corpora],
        splits=[corpus_split(data, corpus) for corpus in data.corpora],
        seed=data.seed,
        cache=cache,
        tokenizer=EndOfDocument(
            eod=made["tokenizer"]["end_of_document"]["id"], vocab_size=vocabulary
        ),
        copy=copy,
    )


@dataclass
class BlendConfig(GPTDatasetConfig):
    """Megatron's, with what `CorpusShare` knows of its corpora."""

    corpus_splits: dict[str, list[float]] = field(default_factory=dict)
    """The shares of each corpus's documents, by its prefix; none where Megatron's own split says it."""
    spare_samples: int = 0
    """How many samples more than its part of the blend each corpus has."""
    files: dict[str, str] = field(default_factory=dict)
    """By a corpus's prefix, that of the files that it is read from, where they are a copy."""

    def share(
        self, dataset_path: str | None, indices: NDArray[Any], index_split: Split
    ) -> NDArray[Any]:
        """The documents of a split, of those that Megatron's builder hands over."""
        if not self.corpus_splits:
            return indices
        split = self.corpus_splits[str(dataset_path)]
        part = split_documents(len(indices), split)[index_split.value]
        return indices[part.start : part.stop]


class CorpusShare(GPTDataset):
    """The training, validation or test share of a corpus.

    Megatron's blend_per_split hands over a corpus whole; here its own split is taken. And Megatron
    builds each corpus of a blend half a percent longer than its part, but a blend of n corpora takes up
    to n + 1 samples more: where the corpora are small, that would end in its IndexError.
    """

    def __init__(
        self,
        indexed_dataset: Any,
        dataset_path: str | None,
        indexed_indices: NDArray[Any],
        num_samples: int,
        index_split: Split,
        config: BlendConfig,
    ):
        """Take the share of `index_split`; the arguments are those of Megatron's datasets."""
        share = config.share(dataset_path, indexed_indices, index_split)
        wanted = num_samples + config.spare_samples
        super().__init__(indexed_dataset, dataset_path, share, wanted, index_split, config)

    @staticmethod
    def build_low_level_dataset(dataset_path: str, config: BlendConfig) -> IndexedDataset:
        """The corpus's files; the cached sample indices know it by its own path all the same."""
        files = config.files.get(dataset_path, dataset_path)
        return GPTDataset.build_low_level_dataset(files, config)

    @staticmethod
    def _key_config_attributes() -> list[str]:
        """What the cached sample indices depend on."""
        return [*GPTDataset._key_config_attributes(), "corpus_splits"]


def dataset_config(
    corpora: Corpora, sequence_length: int, make: Callable[..., BlendConfig] = BlendConfig
) -> BlendConfig:
    """What Megatron's datasets are built by; `sequence_length` is the tokens of a sample."""
    prefixes = [str(prefix) for prefix in corpora.prefixes]
    common: dict[str, Any] = {
        "random_seed": corpora.seed,
        "sequence_length": sequence_length,
        "path_to_cache": str(corpora.cache),
        "tokenizer": corpora.tokenizer,
        "reset_position_ids": False,
        "reset_attention_mask": False,
        "eod_mask_loss": False,
        "create_attention_mask": False,
        "spare_samples": len(prefixes) + 1 if len(prefixes) > 1 else 0,
        "files": {str(prefix): str(corpora.files(prefix)) for prefix in corpora.prefixes},
    }
    if corpora.alike():
        blend = (prefixes, [max(weights) for weights in corpora.weights])
        return make(blend=blend, split=split_argument(corpora.splits[0]), **common)
    splits = {prefix: list(split) for prefix, split in zip(prefixes, corpora.splits, strict=True)}
    blends = [blend_of(prefixes, column) for column in zip(*corpora.weights, strict=True)]
    return make(blend_per_split=blends, corpus_splits=splits, **common)


def blend_of(
    prefixes: Sequence[str], weights: Sequence[float]
) -> tuple[list[str], list[float]] | None:
    """Megatron's blend of the corpora that have a weight; None where no corpus has."""
    pairs = [(p, w) for p, w in zip(prefixes, weights, strict=True) if w]
    return ([p for p, _ in pairs], [w for _, w in pairs]) if pairs else None


def use_compiled_helpers() -> None:
    """Have Megatron take the helper that its wheel has compiled: there is no Makefile for its make."""
    dataset_utils.compile_helpers = lambda: None


def build_datasets(
    corpora: Corpora,
    samples: Sequence[int],
    sequence_length: int,
    reads_data: Callable[[], bool] = lambda: True,
) -> list[Any]:
    """Megatron's training, validation and test sets; None where nothing is drawn.

    Args:
        corpora: The run's.
        samples: How many are wanted of each, at least.
        sequence_length: Tokens of a sample.
        reads_data: Whether this rank has them.
    """
    config = dataset_config(corpora, sequence_length)
    builder = BlendedMegatronDatasetBuilder(CorpusShare, list(samples), reads_data, config)
    return indices_on_node(list(builder.build()), corpora)


def indices_on_node(datasets: list[Any], corpora: Corpora) -> list[Any]:
    """Datasets that read their indices from this node's disk, where the data is copied to it."""
    for dataset in datasets if corpora.copy else ():
        corpora.copy.of_indices(dataset, corpora.cache)  # type: ignore[union-attr]
    return datasets


def without_training(provider: Any) -> Any:
    """The sets to evaluate alone: of that to train on no sample is left, which Megatron refuses."""

    def provide(samples: Sequence[int], vp_stage: int | None = None) -> Any:
        return None, *provider(samples, vp_stage)[1:]

    provide.is_distributed = provider.is_distributed  # type: ignore[attr-defined]
    return provide


def dataset_provider(corpora: Corpora) -> Any:
    """The function that `pretrain` asks for its training, validation and test sets."""

    def provide(samples: Sequence[int], vp_stage: int | None = None) -> Any:
        def reads_data() -> bool:
            ends = mpu.is_pipeline_first_stage(ignore_virtual=False, vp_stage=vp_stage) or (
                mpu.is_pipeline_last_stage(ignore_virtual=False, vp_stage=vp_stage)
            )
            return ends and mpu.get_tensor_model_parallel_rank() == 0

        train, *evaluated = build_datasets(corpora, samples, get_args().seq_length, reads_data)
        # Megatron does not take an empty set for one that is not there.
        return train, *(evaluated if get_args().eval_iters else (None, None))

    provide.is_distributed = True  # type: ignore[attr-defined]  # each rank builds its own
    return provide
