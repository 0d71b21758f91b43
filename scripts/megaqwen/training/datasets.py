"""Megatron's GPT datasets over the .bin and .idx files of preprocess."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron.core import mpu
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
from megatron.training import get_args

from megaqwen.data.splits import split_argument


@dataclass(frozen=True, kw_only=True)
class EndOfDocument:
    """All that Megatron's datasets ask of a tokenizer: the text is tokenized already."""

    eod: int
    """The id that preprocess wrote after each document."""
    vocab_size: int
    """How many ids there are; decides the width of an id on disk."""
    pad: int = -1
    """No id: the files have no padding, and an id here would be masked from the loss."""

    @property
    def unique_identifiers(self) -> dict[str, int]:
        """What the dataset cache's key takes from the tokenizer."""
        return {"eod": self.eod, "vocab_size": self.vocab_size}


@dataclass(frozen=True, kw_only=True)
class Corpora:
    """The corpora of a run and how samples are drawn from them."""

    prefixes: Sequence[Path]
    """Paths without .bin and .idx."""
    weights: Sequence[float]
    """Share of samples from each, relative to the others."""
    split: Sequence[float]
    """Shares of the documents for training, validation and test."""
    seed: int
    cache: Path
    """Where Megatron keeps its sample indices."""
    tokenizer: EndOfDocument


def dataset_config(corpora: Corpora, sequence_length: int) -> GPTDatasetConfig:
    """What Megatron's datasets are built by; `sequence_length` is the tokens of a sample."""
    return GPTDatasetConfig(
        random_seed=corpora.seed,
        sequence_length=sequence_length,
        blend=([str(prefix) for prefix in corpora.prefixes], list(corpora.weights)),
        split=split_argument(corpora.split),
        path_to_cache=str(corpora.cache),
        tokenizer=corpora.tokenizer,
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=False,
        create_attention_mask=False,
    )


def dataset_provider(corpora: Corpora) -> Any:
    """The function that `pretrain` asks for its training, validation and test sets."""

    def provide(samples: Sequence[int], vp_stage: int | None = None) -> Any:
        config = dataset_config(corpora, get_args().seq_length)

        def reads_data() -> bool:
            ends = mpu.is_pipeline_first_stage(ignore_virtual=False, vp_stage=vp_stage) or (
                mpu.is_pipeline_last_stage(ignore_virtual=False, vp_stage=vp_stage)
            )
            return ends and mpu.get_tensor_model_parallel_rank() == 0

        builder = BlendedMegatronDatasetBuilder(GPTDataset, samples, reads_data, config)
        train, *evaluated = builder.build()
        # Megatron does not take an empty set for one that is not there.
        return train, *(evaluated if get_args().eval_iters else (None, None))

    provide.is_distributed = True  # type: ignore[attr-defined]  # each rank builds its own
    return provide
