"""Tokenized corpora: Megatron's own bytes, the model's own ids, and figures that can be counted again."""

import json
import math
import shutil
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy
import pytest
from megatron.core.datasets.indexed_dataset import (
    DType,
    IndexedDataset,
    IndexedDatasetBuilder,
)
from transformers import AutoTokenizer

from megaqwen.config.sections import FilesCorpus
from megaqwen.data import deduplication, streams
from megaqwen.data.parts import tokenize_part
from megaqwen.data.pieces import Shard
from megaqwen.data.splits import check_shares, heldout_documents, split_documents
from megaqwen.data.statistics import length_figures
from megaqwen.data.tokenization import DocumentTokenizer
from megaqwen.data.tokenize_corpus import tokenize_corpus
from megaqwen.errors import InputError
from megaqwen.provenance import sha256_file
from megaqwen.training.datasets import Corpora, EndOfDocument, build_datasets

TEXTS = ["The first.", " \n\t", "今天天气很好", "", "a\n\nb  c", "x" * 3000, "<|im_end|>"]
END = "<|endoftext|>"


@pytest.fixture(scope="module")
def tokenizer(tiny_qwen3: Path) -> DocumentTokenizer:
    return DocumentTokenizer(tiny_qwen3)


@pytest.fixture(scope="module")
def plain(tiny_qwen3: Path) -> Any:
    """transformers' tokenizer, as a user of the model loads it."""
    return AutoTokenizer.from_pretrained(tiny_qwen3)


def corpus(path: Path, texts: Sequence[str], **fields: Any) -> FilesCorpus:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    values = {"source": "files", "name": path.stem, "files": [str(path)], **fields}
    return FilesCorpus.model_validate(values)


def documents(prefix: Path) -> list[list[int]]:
    return [document.tolist() for document in IndexedDataset(str(prefix))]


# What is on disk


def build_with_megatron(prefix: Path, ids: Sequence[Sequence[int]], vocabulary: int) -> None:
    """As Megatron's tools/preprocess_data.py does it."""
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=DType.optimal_dtype(vocabulary))
    for document in ids:
        builder.add_document(document, [len(document)])
    builder.finalize(f"{prefix}.idx")


@pytest.mark.parametrize(
    ("vocabulary", "dtype"),
    [(2560, "uint16"), (65_499, "uint16"), (65_500, "int32"), (151_936, "int32")],
)
def test_the_files_are_megatrons_own_to_the_byte(
    tmp_path: Path, tiny_qwen3: Path, plain: Any, vocabulary: int, dtype: str
) -> None:
    model = tmp_path / "model"
    shutil.copytree(tiny_qwen3, model)
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "vocab_size": vocabulary}))
    card, known = tokenize_corpus(
        corpus(tmp_path / "ours.jsonl", TEXTS * 3), DocumentTokenizer(model), tmp_path
    )
    assert card["dtype"] == dtype

    texts = [text for text in TEXTS * 3 if text.strip()]
    ids = [plain.encode(text) for text in texts if "<|" not in text]
    found = documents(tmp_path / "ours")
    end = plain.convert_tokens_to_ids(END)
    markup = [document for document, text in zip(found, texts, strict=True) if "<|" in text]
    assert [document for document in found if document not in markup] == [
        [*row, end] for row in ids
    ]
    build_with_megatron(tmp_path / "theirs", found, vocabulary)
    for suffix in ("bin", "idx"):
        ours, theirs = (tmp_path / f"{name}.{suffix}" for name in ("ours", "theirs"))
        assert ours.read_bytes() == theirs.read_bytes()
        facts = {"bytes": ours.stat().st_size, "sha256": sha256_file(ours)}
        assert known[ours] == facts
    left = {path.name for path in tmp_path.iterdir() if path.name.startswith("ours")}
    assert left == {"ours.jsonl", "ours.bin", "ours.idx"}


def test_documents_are_the_models_ids_in_their_order_and_ended(
    tmp_path: Path, tokenizer: DocumentTokenizer, plain: Any
) -> None:
    card, _ = tokenize_corpus(corpus(tmp_path / "notes.jsonl", TEXTS), tokenizer, tmp_path)
    end = plain.convert_tokens_to_ids(END)
    found = documents(tmp_path / "notes")
    expected = [text for text in TEXTS if text.strip()]
    assert [document[-1] for document in found] == [end] * len(expected)
    assert [plain.decode(document[:-1]) for document in found] == expected
    assert found[:3] == [[*plain.encode(text), end] for text in expected[:3]]
    assert card["empty_documents_skipped"] == 2


@pytest.mark.parametrize("special", [END, "<|im_start|>", "<|im_end|>"])
def test_special_tokens_in_a_text_are_text(
    tokenizer: DocumentTokenizer, plain: Any, special: str
) -> None:
    text = f"before {special} after"
    (ids,) = tokenizer.encode([text])
    assert plain.convert_tokens_to_ids(special) not in ids[:-1].tolist()
    assert list(ids).count(tokenizer.end_of_document) == 1 and ids[-1] == tokenizer.end_of_document
    assert tokenizer.decode(ids[:-1].tolist()) == text
    assert plain.convert_tokens_to_ids(special) in plain.encode(text)  # what is avoided here


def test_markup_that_is_not_special_is_one_token(tokenizer: DocumentTokenizer, plain: Any) -> None:
    (ids,) = tokenizer.encode(["<think>\n</think>"])
    assert {plain.convert_tokens_to_ids(tag) for tag in ("<think>", "</think>")} <= set(ids)


def test_a_corpus_without_text_is_refused(tmp_path: Path, tokenizer: DocumentTokenizer) -> None:
    empty = corpus(tmp_path / "notes.jsonl", ["", "\u2003\n"])
    with pytest.raises(InputError, match="corpus notes is empty: 2 documents in 1 files, and none"):
        tokenize_corpus(empty, tokenizer, tmp_path)


@pytest.mark.parametrize("block", [1, 60, 500])
def test_the_batches_do_not_show(
    tmp_path: Path,
    tokenizer: DocumentTokenizer,
    monkeypatch: pytest.MonkeyPatch,
    block: int,
) -> None:
    notes = corpus(tmp_path / "notes.jsonl", TEXTS * 5)
    (tmp_path / "other").mkdir()
    card, _ = tokenize_corpus(notes, tokenizer, tmp_path)
    monkeypatch.setattr(streams, "BLOCK", block)
    assert tokenize_corpus(notes, tokenizer, tmp_path / "other")[0] == card
    for name in ("notes.bin", "notes.idx"):
        assert sha256_file(tmp_path / name) == sha256_file(tmp_path / "other" / name)


def test_weights_are_no_part_of_the_data(tmp_path: Path, tokenizer: DocumentTokenizer) -> None:
    path, other = tmp_path / "notes.jsonl", tmp_path / "other"
    other.mkdir()
    card, _ = tokenize_corpus(corpus(path, TEXTS, weight=1.0), tokenizer, tmp_path)
    assert tokenize_corpus(corpus(path, TEXTS, weight=7.5), tokenizer, other)[0] == card
    assert sha256_file(tmp_path / "notes.bin") == sha256_file(other / "notes.bin")


# The card


def test_the_card_counts_what_is_on_disk(tmp_path: Path, tokenizer: DocumentTokenizer) -> None:
    notes = corpus(tmp_path / "notes.jsonl", TEXTS)
    card, _ = tokenize_corpus(notes, tokenizer, tmp_path)
    found = documents(tmp_path / "notes")
    texts = [text for text in TEXTS if text.strip()]
    lengths = sorted(map(len, found))
    counts = Counter(token for document in found for token in document)
    tokens = counts.total()
    size = sum(len(text.encode()) for text in texts)
    entropy = -sum(count / tokens * math.log(count / tokens) for count in counts.values())
    assert card == {
        "documents": len(texts),
        "empty_documents_skipped": 2,
        "short_documents_skipped": 0,
        "bad_documents_skipped": 0,
        "duplicate_documents_skipped": 0,
        "characters": sum(map(len, texts)),
        "bytes": size,
        "tokens": tokens,
        "tokens_per_byte": round(tokens / size, 6),
        "distinct_tokens": len(counts),
        "median_document_tokens": lengths[2],
        "longest_document_tokens": lengths[-1],
        "length_histogram": [
            {
                "from": 2**bit,
                "below": 2 ** (bit + 1),
                "documents": sum(2**bit <= length < 2 ** (bit + 1) for length in lengths),
            }
            for bit in range(lengths[0].bit_length() - 1, lengths[-1].bit_length())
        ],
        "unigram_entropy": pytest.approx(entropy, abs=1e-12),
        "dtype": "uint16",
        "engine": {"name": "gigatoken", "reason": None},
        "sample": f"{TEXTS[0]}{END}",
        "sources": [
            {
                "path": str(tmp_path / "notes.jsonl"),
                "bytes": (tmp_path / "notes.jsonl").stat().st_size,
                "sha256": sha256_file(tmp_path / "notes.jsonl"),
            }
        ],
    }
    assert tokens == (tmp_path / "notes.bin").stat().st_size // 2


@pytest.mark.parametrize("lengths", [[5], [1, 70_000, 2**20, 3], [2, 2], [7, 9, 70_000] * 400])
def test_length_figures(lengths: list[int]) -> None:
    chunks = [numpy.array(lengths[:2], numpy.int32), numpy.array(lengths[2:], numpy.int32)]
    figures = length_figures(len(lengths), lambda: filter(len, chunks))
    assert figures["median_document_tokens"] == float(numpy.median(lengths))
    assert figures["longest_document_tokens"] == max(lengths)
    histogram = figures["length_histogram"]
    assert sum(part["documents"] for part in histogram) == len(lengths)
    for part in histogram:
        inside = [length for length in lengths if part["from"] <= length < part["below"]]
        assert part["documents"] == len(inside)
    assert histogram[0]["documents"] and histogram[-1]["documents"]


# What is left out


@pytest.mark.parametrize("at_once", [4, 2**22])
def test_duplicates_are_left_out_as_if_they_had_never_been_there(
    tmp_path: Path, tokenizer: DocumentTokenizer, monkeypatch: pytest.MonkeyPatch, at_once: int
) -> None:
    monkeypatch.setattr(deduplication, "AT_ONCE", at_once)
    texts = [f"document {number % 7} {'zwölf ' * (number % 7)}" for number in range(40)]
    texts[20:20] = ["only once", " ", "document 1"]
    unique = list(dict.fromkeys(texts))
    (tmp_path / "unique").mkdir()
    plain_card, _ = tokenize_corpus(
        corpus(tmp_path / "unique" / "notes.jsonl", unique), tokenizer, tmp_path / "unique"
    )
    card, _ = tokenize_corpus(
        corpus(tmp_path / "notes.jsonl", texts, deduplicate=True), tokenizer, tmp_path
    )
    assert card["duplicate_documents_skipped"] == len(texts) - len(unique)
    for key in card.keys() - {"duplicate_documents_skipped", "sources"}:
        assert card[key] == plain_card[key], key
    for name in ("notes.bin", "notes.idx"):
        assert sha256_file(tmp_path / name) == sha256_file(tmp_path / "unique" / name)
    assert not list(tmp_path.glob(".notes*")) and not list(tmp_path.glob("notes.doc*"))


def test_short_documents_are_left_out_and_counted(
    tmp_path: Path, tokenizer: DocumentTokenizer
) -> None:
    texts = ["seven!!", "eight!!!", "今天天气很好今天", "今天天气很好今", "", "nine chars"]
    notes = corpus(tmp_path / "notes.jsonl", texts, min_characters=8)
    card, _ = tokenize_corpus(notes, tokenizer, tmp_path)
    assert (card["short_documents_skipped"], card["empty_documents_skipped"]) == (2, 1)
    kept = [tokenizer.decode(document[:-1]) for document in documents(tmp_path / "notes")]
    assert kept == ["eight!!!", "今天天气很好今天", "nine chars"]
    with pytest.raises(InputError, match="none of them has any text of 50 characters"):
        tokenize_corpus(notes.model_copy(update={"min_characters": 50}), tokenizer, tmp_path)


def test_bad_documents_of_all_shards_together_are_held_against_the_tolerance(
    tmp_path: Path, tokenizer: DocumentTokenizer
) -> None:
    path = tmp_path / "notes.jsonl"
    notes = corpus(path, ["a good document"] * 9, max_bad_documents=2)
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join([b"bad\n", *lines[:4], b"bad\n", *lines[4:]]))
    card, _ = tokenize_corpus(notes, tokenizer, tmp_path)
    assert (card["bad_documents_skipped"], card["documents"]) == (2, 9)
    path.write_bytes(path.read_bytes() + b"bad\n")
    shards = [tmp_path / "0", tmp_path / "1"]
    for index, directory in enumerate(shards):
        directory.mkdir()
        tokenize_part(notes, tokenizer, directory, Shard(index=index, count=2))
    with pytest.raises(InputError) as error:
        tokenize_corpus(notes, tokenizer, tmp_path, shards)
    told = str(error.value)
    assert told.startswith("corpus notes: more than 2 documents cannot be used, which is what")
    assert [f"{path}:{number}: not JSON" in told for number in (1, 6, 12)] == [True] * 3


# Separators


def samples(prefix: Path, cache: Path, end: EndOfDocument) -> list[dict[str, Any]]:
    """What Megatron trains on."""
    parts = Corpora(
        prefixes=[prefix],
        weights=[[1.0, 0.0, 0.0]],
        splits=[[1, 0, 0]],
        seed=1,
        cache=cache,
        tokenizer=end,
    )
    (blended, *_) = build_datasets(parts, [4, 0, 0], sequence_length=16)
    return [blended[index] for index in range(4)]


def test_the_ends_of_documents_are_trained_on(
    tmp_path: Path, tokenizer: DocumentTokenizer, plain: Any
) -> None:
    tokenize_corpus(corpus(tmp_path / "notes.jsonl", ["a b"] * 40), tokenizer, tmp_path)
    end = tokenizer.end_of_document
    ours = samples(tmp_path / "notes", tmp_path / "ours", EndOfDocument(eod=end, vocab_size=2560))
    for sample in ours:
        assert end in sample["labels"] and end in sample["tokens"]
        assert sample["loss_mask"].all()
    # The trap: with an Instruct tokenizer's eos and pad token the ends are masked and made id 0.
    turn = plain.convert_tokens_to_ids("<|im_end|>")
    with pytest.raises(InputError, match=f"^{end} is given as the id that pads"):
        EndOfDocument(eod=turn, vocab_size=2560, pad=end)
    trap = EndOfDocument(eod=turn, vocab_size=2560)
    object.__setattr__(trap, "pad", end)
    for sample in samples(tmp_path / "notes", tmp_path / "trap", trap):
        assert end not in sample["tokens"] and not sample["loss_mask"].all()


# Held-out documents


def megatron_splits(
    prefix: Path, split: Sequence[float], end: int, cache: Path
) -> Iterator[list[int] | None]:
    """The document indices that Megatron gives its training, validation and test datasets."""
    corpora = Corpora(
        prefixes=[prefix],
        weights=[[1.0 if share else 0.0 for share in split]],
        splits=[split],
        seed=1,
        cache=cache,
        tokenizer=EndOfDocument(eod=end, vocab_size=2560),
    )
    for dataset in build_datasets(corpora, [4, 4, 4], sequence_length=4):
        yield None if dataset is None else dataset.datasets[0].indices.tolist()


@pytest.mark.parametrize(
    ("split", "count"),
    [
        ((96, 2, 2), 75),
        ((96.0, 2.0, 2.0), 103),
        ((0.5, 0.3, 0.2), 25),
        ((1, 1, 1), 25),
        ((8e-05, 1e-05, 1e-05), 25),  # which str() writes in a way that Megatron misreads
        ((9, 0, 1), 25),
        ((9, 1, 0), 25),
    ],
)
def test_held_out_documents_are_megatrons_test_split(
    tmp_path: Path, tokenizer: DocumentTokenizer, split: tuple[float, ...], count: int
) -> None:
    texts = [f"Document number {number} of the corpus." for number in range(count)]
    tokenize_corpus(corpus(tmp_path / "notes.jsonl", texts), tokenizer, tmp_path)
    prefix = tmp_path / "notes"
    check_shares({"notes": (count, split)})
    theirs = list(megatron_splits(prefix, split, tokenizer.end_of_document, tmp_path / "cache"))
    ours = split_documents(count, split)
    assert [list(part) for part in ours] == [part or [] for part in theirs]
    held_out = heldout_documents(prefix, split, 3)
    assert [tokenizer.decode(ids) for ids in held_out] == [texts[index] for index in ours[2][:3]]
    assert set(ours[2]).isdisjoint([*ours[0], *ours[1]])


@pytest.mark.parametrize(
    ("split", "count", "share"),
    [((96, 2, 2), 25, "validation"), ((90, 9, 1), 40, "test"), ((1, 9, 9), 2, "training")],
)
def test_an_empty_share_is_refused(split: tuple[float, ...], count: int, share: str) -> None:
    text = ",".join(map(str, split))
    message = f"corpus b: none of its {count} documents falls to {share} by the split {text}: give"
    with pytest.raises(InputError, match=message):
        check_shares({"a": (1000, split), "b": (count, split)})
