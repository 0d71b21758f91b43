"""What is drawn from which documents: weights and splits of each corpus, and how often it is read."""

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from random import Random
from typing import Any

import pytest
import yaml

from commands import ROOT
from megaqwen.config import Config, load_config
from megaqwen.config.blends import corpus_split, corpus_weights
from megaqwen.config.loading import validate_config
from megaqwen.config.reading import ConfigError
from megaqwen.config.sections import FilesCorpus
from megaqwen.data.splits import check_ends, split_documents
from megaqwen.data.tokenization import DocumentTokenizer
from megaqwen.data.tokenize_corpus import tokenize_corpus
from megaqwen.errors import InputError
from megaqwen.layout import Layout
from megaqwen.training.datasets import (
    Corpora,
    EndOfDocument,
    build_datasets,
    dataset_config,
)
from megaqwen.training.epochs import epochs
from megaqwen.training.preflight import check_tokenizer

DOCUMENTS = {"web": 90, "books": 40, "held": 25}
SEQUENCE = 16

# The config


def config(*corpora: dict[str, Any], **data: Any) -> Config:
    values = yaml.safe_load((ROOT / "config" / "config.yaml").read_text())
    entries = [{"source": "builtin", "name": f"c{i}", **each} for i, each in enumerate(corpora)]
    return validate_config({**values, "data": {"corpora": entries, **data}})


def mistakes(*corpora: dict[str, Any], **data: Any) -> list[str]:
    with pytest.raises(ConfigError) as error:
        config(*corpora, **data)
    return [line.strip() for line in str(error.value).splitlines()[1:]]


@pytest.mark.parametrize(
    ("given", "split"),
    [
        ("98,1.5,.5", [98, 1.5, 0.5]),
        ("99,1", [99, 1, 0]),
        ("100", [100, 0, 0]),
        ("valid", [0, 1, 0]),
        ([3, 2, 1], [3, 2, 1]),
        (None, [96, 2, 2]),
    ],
)
def test_a_corpus_has_a_split_of_its_own_or_the_common_one(given: Any, split: list[float]) -> None:
    data = config({}, {"split": given}, split="96,2,2").data
    assert corpus_split(data, data.corpora[0]) == [96, 2, 2]
    assert corpus_split(data, data.corpora[1]) == split


def test_weights_are_those_of_training_unless_others_are_given() -> None:
    data = config(
        {"weight": 3.0, "valid_weight": 0.0, "test_weight": 2.0}, {"split": "train"}, {}
    ).data
    found = [corpus_weights(data, corpus) for corpus in data.corpora]
    assert found == [[3, 0, 2], [1, 0, 0], [1, 1, 1]]


@pytest.mark.parametrize(
    ("corpora", "data", "where", "what"),
    [
        ([{"split": "trian"}], {}, "data.corpora[0].split", '"trian" is given, a list of 3 entr'),
        ([{"split": [1, 2]}], {}, "data.corpora[0].split", "[1, 2] is given"),
        ([{"split": [1, "a", 2]}], {}, "data.corpora[0].split[1]", '"a" is given, a number of at'),
        ([{}], {"split": "0,1,1"}, "data.split[0]", "0 is given: training needs a share"),
        (
            [{}, {"split": "0,0,0"}],
            {},
            "data.corpora[1].split",
            "[0.0, 0.0, 0.0] gives no document",
        ),
        ([{"split": "test"}], {}, "data.corpora", "no corpus gives documents to training (train)"),
        ([{"valid_weight": 0}], {}, "data.corpora", "no corpus gives documents to validation"),
        (
            [{}, {"split": "train", "valid_weight": 1.0}],
            {},
            "data.corpora[1].valid_weight",
            "1 is given, but the corpus's split has no share for validation",
        ),
    ],
)
def test_what_does_not_go_together_is_told(
    corpora: list[dict[str, Any]], data: dict[str, Any], where: str, what: str
) -> None:
    assert any(line.startswith(f"{where}: {what}") for line in mistakes(*corpora, **data))


def test_splits_and_weights_are_trainings_and_never_tokenize_again() -> None:
    first = Layout(config=config({}, {}))
    for corpus in ({"split": "train"}, {"valid_weight": 2.0}, {"test_weight": 0.0}):
        other = Layout(config=config({}, corpus))
        assert other.stage_digest("preprocess") == first.stage_digest("preprocess")
        assert other.stage_digest("train") != first.stage_digest("train")
    same = Layout(config=config({}, {"split": "96,2,2", "valid_weight": 1.0}))
    assert same.stage_digest("train") == first.stage_digest("train")


# What is drawn


@pytest.fixture(scope="module")
def tokenized(tiny_qwen3: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Corpora in which every document says where it is from."""
    directory = tmp_path_factory.mktemp("blends")
    tokenizer = DocumentTokenizer(tiny_qwen3)
    for name, count in DOCUMENTS.items():
        path = directory / f"{name}.jsonl"
        lines = (json.dumps({"text": f" {name} {i} " * (i % 5 + 4)}) for i in range(count))
        path.write_text("\n".join(lines))
        values = {"source": "files", "name": name, "files": [str(path)]}
        tokenize_corpus(FilesCorpus.model_validate(values), tokenizer, directory)
    return directory


def corpora(directory: Path, cache: Path, **parts: tuple[Sequence[float], Sequence[float]]) -> Any:
    """Corpora with weights and split of each."""
    return Corpora(
        prefixes=[directory / name for name in parts],
        weights=[weights for weights, _ in parts.values()],
        splits=[split for _, split in parts.values()],
        seed=1,
        cache=cache,
        tokenizer=EndOfDocument(eod=0, vocab_size=2560),
    )


def drawn(datasets: Sequence[Any], wanted: Sequence[int]) -> list[dict[str, Any]]:
    """Of each split, the documents by corpus that its samples may come from, and the samples' share."""
    found = []
    for dataset, count in zip(datasets, wanted, strict=True):
        parts = [] if dataset is None else getattr(dataset, "datasets", [dataset])
        indices = {Path(part.dataset_path).name: part.indices.tolist() for part in parts}
        samples = Counter(
            int(dataset[number].get("dataset_id", 0)) for number in range(count if parts else 0)
        )
        found.append({"indices": indices, "samples": [samples[i] for i in range(len(parts))]})
    return found


def test_each_split_has_a_blend_of_its_own(tokenized: Path, tmp_path: Path) -> None:
    parts = corpora(
        tokenized,
        tmp_path,
        web=([3.0, 0.0, 0.0], [9, 1, 0]),
        books=([1.0, 1.0, 1.0], [5, 3, 2]),
        held=([0.0, 3.0, 0.0], [0, 1, 0]),
    )
    wanted = [40, 16, 8]
    train, valid, test = drawn(build_datasets(parts, wanted, SEQUENCE), wanted)
    assert train["indices"] == {"web": list(range(81)), "books": list(range(20))}
    assert valid["indices"] == {"books": list(range(20, 32)), "held": list(range(25))}
    assert test["indices"] == {"books": list(range(32, 40))}
    assert train["samples"] == [30, 10] and valid["samples"] == [4, 12]


def test_explicit_files_for_each_split(tokenized: Path, tmp_path: Path) -> None:
    parts = corpora(
        tokenized,
        tmp_path,
        web=([1.0, 0.0, 0.0], [1, 0, 0]),
        books=([0.0, 1.0, 0.0], [0, 1, 0]),
        held=([0.0, 0.0, 1.0], [0, 0, 1]),
    )
    found = drawn(build_datasets(parts, [8, 4, 4], SEQUENCE), [8, 4, 4])
    assert [each["indices"] for each in found] == [
        {name: list(range(count))} for name, count in DOCUMENTS.items()
    ]


def test_nothing_is_held_out_where_no_corpus_gives_anything(
    tokenized: Path, tmp_path: Path
) -> None:
    parts = corpora(
        tokenized, tmp_path, web=([1.0, 0.0, 0.0], [1, 0, 0]), books=([1.0, 1.0, 0.0], [9, 1, 0])
    )
    assert build_datasets(parts, [8, 4, 4], SEQUENCE)[2] is None


def test_one_split_for_all_is_megatrons_own(tokenized: Path, tmp_path: Path) -> None:
    """The documents of each split by our way are those that Megatron's split gives."""
    splits: tuple[float, ...] = (0.7, 0.2, 0.1)
    same = {"web": ([2.0] * 3, splits), "books": ([1.0] * 3, splits)}
    parts = corpora(tokenized, tmp_path / "a", **same)
    assert parts.alike() and dataset_config(parts, SEQUENCE).split == "0.7,0.2,0.1"
    theirs = drawn(build_datasets(parts, [8, 4, 4], SEQUENCE), [8, 4, 4])
    other = corpora(tokenized, tmp_path / "b", **same, held=([1.0, 0.0, 0.0], [1, 0, 0]))
    assert not other.alike()
    ours = build_datasets(other, [8, 4, 4], SEQUENCE)
    for split, found in zip(theirs, drawn(ours, [8, 4, 4]), strict=True):
        assert found["indices"] | split["indices"] == found["indices"]


def test_another_split_never_reads_the_samples_of_the_first(
    tokenized: Path, tmp_path: Path
) -> None:
    """Megatron caches the indices of samples under a key, which has to have the split."""
    for bound in (9, 5):
        parts = corpora(
            tokenized,
            tmp_path,
            web=([1.0, 1.0, 0.0], [bound, 10 - bound, 0]),
            books=([1.0, 0.0, 0.0], [1, 0, 0]),
        )
        (train, *_) = build_datasets(parts, [400, 4, 4], SEQUENCE)
        assert set(train.datasets[0].document_index.tolist()) == set(range(9 * bound))


def test_epochs_are_what_is_drawn(tokenized: Path, tmp_path: Path) -> None:
    parts = corpora(
        tokenized,
        tmp_path,
        web=([3.0, 0.0, 0.0], [9, 1, 0]),
        books=([1.0, 1.0, 1.0], [5, 3, 2]),
        held=([0.0, 3.0, 0.0], [0, 1, 0]),
    )
    wanted = [800, 16, 0]
    web, books, held = epochs(parts, wanted, SEQUENCE)
    assert (web.keys(), books.keys(), held.keys()) == ({"train"}, {"train", "valid"}, {"valid"})
    assert (web["train"]["samples"], books["train"]["samples"]) == (600, 200)
    assert held["valid"]["documents"] == 25 and books["valid"]["documents"] == 12
    (train, *_) = build_datasets(parts, [800, 16, 16], SEQUENCE)
    for dataset, facts in zip(train.datasets, (web["train"], books["train"]), strict=True):
        tokens = sum(len(dataset.dataset[index]) for index in dataset.indices)
        assert facts["tokens"] == tokens
        assert facts["epochs"] == pytest.approx(facts["samples"] * SEQUENCE / tokens)
        passes = Counter(dataset.document_index.tolist()).most_common(1)[0][1]
        assert passes == pytest.approx(facts["epochs"], abs=1.1)


@pytest.mark.parametrize("own", [False, True])
def test_small_corpora_are_blended_by_any_weights(
    tokenized: Path, tmp_path: Path, own: bool
) -> None:
    """Where corpora are read many times over, Megatron's own surplus is too small for its blend."""
    random = Random(7)
    for trial in range(8):
        shares = [10 ** random.uniform(-3, 0) for _ in range(9)]
        parts = Corpora(
            prefixes=[tokenized / "held"] * len(shares),
            weights=[[share, share, share / 2 if own else share] for share in shares],
            splits=[[2, 1, 1]] * len(shares),
            seed=trial,
            cache=tmp_path / str(trial),
            tokenizer=EndOfDocument(eod=0, vocab_size=2560),
        )
        wanted = [random.randint(100, 300), 40, 20]
        found = build_datasets(parts, wanted, 400)  # tokens: about as many as a share has
        for dataset, count in zip(found, wanted, strict=True):
            assert len(dataset) >= count


# The end of a document, and the tokenizer


def test_documents_that_end_otherwise_are_refused(
    tokenized: Path, tmp_path: Path, tiny_qwen3: Path
) -> None:
    tokenizer = DocumentTokenizer(tiny_qwen3)
    known = tokenizer.describe()["end_of_document"]
    check_ends(tokenized / "web", known)
    turn = {"token": "<|im_end|>", "id": tokenizer.backend.token_to_id("<|im_end|>")}
    with pytest.raises(
        InputError, match=r"web\.bin: document 0 ends with the id \d+, not with <\|im"
    ):
        check_ends(tokenized / "web", turn)


def test_data_of_another_tokenizer_is_refused(tiny_qwen3: Path, tmp_path: Path) -> None:
    facts = DocumentTokenizer(tiny_qwen3).describe()
    check_tokenizer(facts, tiny_qwen3, tmp_path)
    changed = {"files": {**facts["files"], "tokenizer.json": "0" * 64}}
    with pytest.raises(InputError, match=r"by another tokenizer than that of .*tokenizer\.json"):
        check_tokenizer(changed, tiny_qwen3, tmp_path)


def test_the_split_arithmetic_of_names() -> None:
    assert split_documents(7, [0.0, 1.0, 0.0]) == [range(0), range(7), range(0)]


def test_an_overlay_may_give_a_split_string(tmp_path: Path) -> None:
    base = ROOT / "config" / "config.yaml"
    assert load_config(base, {"data": {"split": "98,1,1"}}).data.split == [98, 1, 1]
