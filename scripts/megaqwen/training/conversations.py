"""Megatron's datasets over tokenized conversations: a sample is a pack of whole conversations.

Of a conversation of n tokens, n - 1 stand in a sample: the last one is a label alone. Each label whose
token is a target counts in the loss; the first token of a conversation is nobody's label.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy
import torch
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.indexed_dataset import IndexedDataset
from megatron.core.datasets.megatron_dataset import MegatronDataset
from megatron.core.datasets.utils import Split
from megatron.training import get_args
from numpy.typing import NDArray

from megaqwen.config import Config
from megaqwen.errors import InputError
from megaqwen.training.conversation_packs import ConversationPacks, check_longest, stored_packs
from megaqwen.training.datasets import BlendConfig, Corpora, dataset_config, indices_on_node


@dataclass
class ConversationConfig(BlendConfig):
    """What the datasets of conversations are built by."""

    too_long: str = "error"
    """data.too_long."""


class ConversationFiles:
    """The tokens and the targets of a corpus, memory-mapped."""

    def __init__(self, prefix: Path, source: Path | None = None):
        """Open both files.

        Args:
            prefix: Path of the corpus's .bin and .idx, without the extension.
            source: That of the copy which is read in their place.

        Raises:
            InputError: They do not belong together.
        """
        self.prefix = prefix
        self.source = source or prefix
        self.tokens = IndexedDataset(str(self.source))
        self.targets = IndexedDataset(f"{self.source}.targets")
        if not numpy.array_equal(self.lengths, self.targets.sequence_lengths):
            raise InputError(
                f"{prefix}.bin and {prefix}.targets.bin have not the same lengths: run preprocess again"
            )

    def __len__(self) -> int:
        """How many conversations there are."""
        return len(self.tokens)

    @property
    def lengths(self) -> NDArray[numpy.int32]:
        """[conversations], tokens of each."""
        lengths: NDArray[numpy.int32] = self.tokens.sequence_lengths
        return lengths


class PackedConversations(MegatronDataset):
    """The packs of a corpus's training, validation or test share, shuffled anew in each epoch.

    Which pack is sample number i depends on the seed and the corpus alone: a run that is made longer
    goes on where the shorter one was.
    """

    def __init__(
        self,
        files: ConversationFiles,
        dataset_path: str | None,
        indices: NDArray[Any],
        num_samples: int,
        index_split: Split,
        config: ConversationConfig,
    ):
        """Take the share of `index_split`; the arguments are those of Megatron's datasets."""
        share = config.share(dataset_path, indices, index_split)
        wanted = num_samples + config.spare_samples
        super().__init__(files, dataset_path, share, wanted, index_split, config)
        self.packs = packs_of(files, share, config)
        self.shuffled: tuple[int, NDArray[Any]] | None = None

    @staticmethod
    def build_low_level_dataset(dataset_path: str, config: Any) -> ConversationFiles:
        """The corpus's files."""
        prefix = Path(dataset_path)
        return ConversationFiles(prefix, Path(config.files.get(dataset_path, dataset_path)))

    @staticmethod
    def numel_low_level_dataset(low_level_dataset: ConversationFiles) -> int:
        """What a split shares out: conversations."""
        return len(low_level_dataset)

    def __len__(self) -> int:
        """As many samples as are wanted: there is always another epoch."""
        wanted: int = self.num_samples
        return wanted

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Sample number `index`, of `sequence_length` positions.

        Returns:
            tokens and labels (ids), loss_mask (1 where the label is a target), position_ids (from 0
            in each conversation, and in the padding), padding_mask (true where nothing is).
        """
        epoch, number = divmod(index, len(self.packs))
        conversations = self.packs[int(self.permutation(epoch)[number])]
        size = self.config.sequence_length
        tokens = numpy.full(size, self.config.tokenizer.eod, dtype=numpy.int64)
        labels = tokens.copy()
        loss_mask = numpy.zeros(size, dtype=numpy.float32)
        positions = numpy.empty(size, dtype=numpy.int64)
        begin = 0
        for conversation in conversations.tolist():
            length = min(int(self.dataset.lengths[conversation]), size)
            ids = self.dataset.tokens.get(conversation, length=length)
            end = begin + length - 1
            tokens[begin:end], labels[begin:end] = ids[:-1], ids[1:]
            loss_mask[begin:end] = self.dataset.targets.get(conversation, length=length)[1:]
            positions[begin:end] = numpy.arange(length - 1)
            begin = end
        positions[begin:] = numpy.arange(size - begin)
        sample = {
            "tokens": tokens,
            "labels": labels,
            "loss_mask": loss_mask,
            "position_ids": positions,
            "padding_mask": numpy.arange(size) >= begin,
        }
        return {name: torch.from_numpy(array) for name, array in sample.items()}

    def permutation(self, epoch: int) -> NDArray[Any]:
        """[packs], the order in which an epoch takes them; kept, since a sampler goes epoch by epoch."""
        if self.shuffled is None or self.shuffled[0] != epoch:
            seeds = [self.config.random_seed, self.index_split.value, epoch]
            self.shuffled = epoch, numpy.random.RandomState(seeds).permutation(len(self.packs))
        return self.shuffled[1]


def check_conversations(prefix: Path, config: Config) -> None:
    """InputError where a conversation is too long and data.too_long does not say what to do.

    Args:
        prefix: Path of the corpus's .bin and .idx, without the extension.
        config: The run's.
    """
    files = ConversationFiles(prefix)
    if config.data.too_long == "error":
        check_longest(prefix.name, files.lengths, int(str(config.train["seq_length"])))


def packs_of(
    files: ConversationFiles, share: NDArray[Any], config: ConversationConfig
) -> ConversationPacks:
    """The packs of a split's conversations: made once, and read from the cache from then on."""
    first = int(share[0])  # a split without conversations is refused before
    return stored_packs(
        files,
        range(first, first + len(share)),
        config.sequence_length,
        too_long=config.too_long,
        seed=config.random_seed,
        cache=Path(str(config.path_to_cache)),
    )


def build_conversations(
    corpora: Corpora, samples: Sequence[int], sequence_length: int, too_long: str
) -> list[Any]:
    """Megatron's training, validation and test sets; None where nothing is drawn.

    Args:
        corpora: The run's.
        samples: How many are wanted of each, at least.
        sequence_length: Positions of a sample.
        too_long: data.too_long.
    """
    make = partial(ConversationConfig, too_long=too_long)
    config = dataset_config(corpora, sequence_length, make)
    builder = BlendedMegatronDatasetBuilder(
        PackedConversations, list(samples), lambda: True, config
    )
    return indices_on_node(list(builder.build()), corpora)


def conversation_provider(corpora: Corpora, too_long: str, built: Callable[[], None]) -> Any:
    """The function that `pretrain` asks for its training, validation and test sets.

    Args:
        corpora: The run's.
        too_long: data.too_long.
        built: Called once the packs are there to be read.
    """

    def provide(samples: Sequence[int], vp_stage: int | None = None) -> Any:
        train, *evaluated = build_conversations(corpora, samples, get_args().seq_length, too_long)
        if not vp_stage:
            built()
        # Megatron does not take an empty set for one that is not there.
        return train, *(evaluated if get_args().eval_iters else (None, None))

    provide.is_distributed = True  # type: ignore[attr-defined]  # each rank builds its own
    return provide
