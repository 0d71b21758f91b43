"""What each corpus gives to training, validation and test: shares of its documents, and weights.

Megatron's names for the three are train, valid and test.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from pydantic import ValidationError

from megaqwen.config.mistakes import Mistake, shown
from megaqwen.config.sections import SPLITS, Corpus, Data, FilesCorpus

EVAL_ITERS = 100  # Megatron's default
PURPOSES = ("training", "validation", "test")


def corpus_split(data: Data, corpus: Corpus) -> Sequence[float]:
    """A corpus's shares of documents for training, validation and test: its own, or all corpora's."""
    return data.split if corpus.split is None else corpus.split


def corpus_weights(data: Data, corpus: Corpus) -> list[float]:
    """A corpus's weights in training, validation and test; 0 where no sample is drawn from it."""
    weights = (corpus.weight, corpus.valid_weight, corpus.test_weight)
    return [
        (corpus.weight if weight is None else weight) if share else 0.0
        for weight, share in zip(weights, corpus_split(data, corpus), strict=True)
    ]


def data_mistakes(values: Mapping[str, Any]) -> list[Mistake]:
    """What the data section's fields say against each other; wrong types are not ours to report."""
    section = values.get("data")
    if not isinstance(section, Mapping):
        return []
    mistakes = list(name_mistakes(section.get("corpora")))
    try:
        data = Data.model_validate(section)
    except ValidationError:
        return mistakes
    train = values.get("train")
    evaluations = train.get("eval_iters", EVAL_ITERS) if isinstance(train, Mapping) else 0
    mistakes += kind_mistakes(data)
    return [*mistakes, *weight_mistakes(data), *share_mistakes(data, evaluations)]


def name_mistakes(corpora: Any) -> Iterator[Mistake]:
    """Two corpora of one name."""
    first: dict[str, int] = {}
    for index, corpus in enumerate(corpora if isinstance(corpora, list) else []):
        name = corpus.get("name") if isinstance(corpus, Mapping) else None
        if isinstance(name, str) and first.setdefault(name, index) != index:
            text = f"{shown(name)} is also the name of data.corpora[{first[name]}]: names differ"
            yield Mistake(("data", "corpora", index, "name"), text)


def kind_mistakes(data: Data) -> Iterator[Mistake]:
    """Fields of the other kind of data that are set, and names that only one kind can have."""
    if data.kind == "pretrain" and data.too_long != "error":
        text = "is for kind sft: a document of pretraining is cut where a sample ends"
        yield Mistake(("data", "too_long"), text)
    names = {corpus.name: index for index, corpus in enumerate(data.corpora)}
    for index, corpus in enumerate(data.corpora):
        where = ("data", "corpora", index)
        other = corpus.name.removesuffix(".targets")
        if data.kind == "sft" and other != corpus.name and other in names:
            text = (
                f"{shown(corpus.name)} is where the targets of data.corpora[{names[other]}],"
                f" {shown(other)}, are written: take another name"
            )
            yield Mistake((*where, "name"), text)
        if not isinstance(corpus, FilesCorpus):
            continue
        if data.kind == "pretrain" and corpus.conversation_field is not None:
            text = "is for kind sft, and data.kind is pretrain: text_field names a document's text"
            yield Mistake((*where, "conversation_field"), text)
        if data.kind == "sft" and corpus.text_field != "text":
            text = (
                "is for kind pretrain, and data.kind is sft: conversation_field names the messages"
            )
            yield Mistake((*where, "text_field"), text)
        if data.kind == "sft" and corpus.format == "text":
            text = '"text" is given: a text file holds no conversations; jsonl, parquet or arrow do'
            yield Mistake((*where, "format"), text)


def weight_mistakes(data: Data) -> Iterator[Mistake]:
    """Splits that give nothing, and weights for a purpose that the corpus has no documents for."""
    for index, corpus in enumerate(data.corpora):
        split = corpus_split(data, corpus)
        if not any(split) and corpus.split is not None:
            text = f"{shown(split)} gives no document to anything: leave out the corpus"
            yield Mistake(("data", "corpora", index, "split"), text)
        for field, weight, share, purpose in (
            ("valid_weight", corpus.valid_weight, split[1], "validation"),
            ("test_weight", corpus.test_weight, split[2], "test"),
        ):
            if weight and not share:
                text = f"{weight:g} is given, but the corpus's split has no share for {purpose}"
                where = ("data", "corpora", index, field)
                yield Mistake(where, f"{text}: give it one, or leave {field} out")


def share_mistakes(data: Data, evaluations: Any) -> Iterator[Mistake]:
    """Nothing to train on, or to validate with."""
    weights = [corpus_weights(data, corpus) for corpus in data.corpora]
    empty = [not any(column) for column in zip(*weights, strict=True)]
    common = all(corpus.split is None for corpus in data.corpora)
    advice = (
        "training needs a share of the documents, as in [96, 2, 2]",
        "validation needs a share of the documents, or train.eval_iters 0 (it is"
        f" {shown(evaluations)})",
    )
    for number, (needed, text) in enumerate(zip((True, evaluations), advice, strict=True)):
        if not needed or not empty[number]:
            continue
        if common and not data.split[number]:
            yield Mistake(("data", "split", number), f"0 is given: {text}")
        else:
            what = f"no corpus gives documents to {PURPOSES[number]} ({SPLITS[number]})"
            yield Mistake(("data", "corpora"), f"{what}: {text}")
