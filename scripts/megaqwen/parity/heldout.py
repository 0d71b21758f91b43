"""Samples of held-out text, drawn by Megatron's dataset builder exactly as training draws them.

A sample of pretraining is a run of text, one of SFT a pack of conversations, each for itself.

Call `cpu_emulation.install` before this is imported.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

from megaqwen.config import Config
from megaqwen.config.blends import EVAL_ITERS, corpus_weights
from megaqwen.training.conversations import build_conversations
from megaqwen.training.datasets import build_datasets, run_corpora, use_compiled_helpers

SETS = {"validation": 1, "test": 2}
"""Megatron's place of each among its datasets."""


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One sample of a dataset."""

    index: int
    """Its number in the dataset."""
    tokens: Tensor
    """[positions] ids that a model is given."""
    labels: Tensor
    """[positions] the id after each."""
    mask: Tensor
    """[positions] 1 where the label is a target, in float64."""
    positions: Tensor
    """[positions] from 0 in each of the texts that it holds: none of them attends to another."""

    def part(self, begin: int, end: int) -> "Sample":
        """Some of its positions, neighbours."""
        names = ("tokens", "labels", "mask", "positions")
        return Sample(index=self.index, **{name: getattr(self, name)[begin:end] for name in names})

    def beginning(self, positions: int) -> "Sample":
        """Its first positions, as many more as it takes to have a target."""
        first = int(self.mask.nonzero()[0])
        return self.part(0, max(positions, first + 1))

    def texts(self) -> list["Sample"]:
        """Each text with a target by itself: what pads a pack of conversations has none."""
        starts = (self.positions == 0).nonzero().flatten().tolist()
        texts = (self.part(*bounds) for bounds in pairwise([*starts, len(self.positions)]))
        return [text for text in texts if text.mask.any()]


@dataclass(frozen=True, kw_only=True)
class Evaluated:
    """An evaluation of training, as its manifest tells it, or one that a run would do."""

    kind: str
    """validation or test."""
    samples: int
    drawn: int
    """How many samples the dataset was asked for: Megatron shuffles by it."""
    first_sample: int = 0
    iteration: int | None = None
    loss: float | None = None
    """In nats per token, as training logged it; None where nothing was trained."""
    losses: Mapping[str, Sequence[float]]
    """Sum in nats and number of targets of some samples, by their numbers."""

    def logged(self, samples: Sequence[Sample]) -> float | None:
        """The mean loss that training found over these samples, if it told it."""
        numbers = [str(sample.index) for sample in samples]
        if self.loss is None or len(samples) == self.samples:
            return self.loss
        if not numbers or not all(number in self.losses for number in numbers):
            return None
        sums, targets = zip(*(self.losses[number] for number in numbers), strict=True)
        return sum(sums) / sum(targets)


def sequence_length(config: Config) -> int:
    """Tokens of a sample."""
    length: Any = config.train["seq_length"]
    return int(length)


def last_evaluation(trained: Mapping[str, Any]) -> Evaluated | None:
    """Training's last one, of the test set where there is one; None where none was recorded.

    Args:
        trained: The results in training's manifest.
    """
    evaluations = trained.get("evaluations", {})
    for kind in ("test", "validation"):
        if kind in evaluations and evaluations[kind]["iteration"] == trained["iteration"]:
            return Evaluated(kind=kind, **evaluations[kind])
    return None


def planned_evaluation(config: Config) -> Evaluated | None:
    """What a run of this config will evaluate at its end; None where all documents are trained on."""
    weights = [corpus_weights(config.data, corpus) for corpus in config.data.corpora]
    options = config.train
    batch: Any = options.get("eval_global_batch_size") or options["global_batch_size"]
    iterations: Any = options.get("eval_iters", EVAL_ITERS)
    samples = batch * max(1, iterations)
    for kind in ("test", "validation"):
        if any(row[SETS[kind]] for row in weights):
            return Evaluated(kind=kind, samples=samples, drawn=samples, losses={})
    return None


def heldout_samples(
    evaluated: Evaluated,
    config: Config,
    data: Path,
    made: Mapping[str, Any],
    vocabulary: int,
    affordable: float,
    longest: int,
) -> list[Sample]:
    """The evaluation's samples: all that are affordable, and of the first at least its beginning.

    Where one has a text that is too long for the memory, it is the beginning of the first as well.

    Those come first whose losses training kept.

    Args:
        evaluated: Which.
        config: The run's.
        data: Preprocess's directory.
        made: The results in its manifest.
        vocabulary: The model's, in ids.
        affordable: Tokens.
        longest: Positions of a text that fit the memory.
    """
    use_compiled_helpers()
    length = sequence_length(config)
    wanted = [0, 0, 0]
    wanted[SETS[evaluated.kind]] = evaluated.drawn
    with TemporaryDirectory() as cache:
        corpora = run_corpora(config, data, made, vocabulary, Path(cache))
        if config.data.kind == "sft":
            datasets = build_conversations(corpora, wanted, length, config.data.too_long)
        else:
            datasets = build_datasets(corpora, wanted, length)
        dataset = datasets[SETS[evaluated.kind]]
        every = range(evaluated.first_sample, evaluated.first_sample + evaluated.samples)
        kept = [index for index in every if str(index) in evaluated.losses]
        if affordable >= evaluated.samples * length:
            chosen: Sequence[int] = every
        else:
            chosen = (kept or every)[: max(1, int(affordable // length))]
        samples = [sample_of(index, dataset[index]) for index in chosen]
    lengths = (len(text.tokens) for sample in samples for text in sample.texts())
    if affordable < length or max(lengths) > longest:
        samples = [samples[0].beginning(max(2, min(int(affordable), longest)))]
    return samples


def sample_of(index: int, item: Mapping[str, Any]) -> Sample:
    """A sample from what Megatron's dataset gives."""
    parts = {name: torch.as_tensor(item[name]) for name in ("tokens", "labels")}
    mask = torch.as_tensor(item["loss_mask"]).double()
    return Sample(index=index, **parts, mask=mask, positions=torch.as_tensor(item["position_ids"]))
