"""Packs of conversations through Megatron's dataset builder: what a sample holds, and which are drawn."""

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from conversation_files import Conversation, random_conversations, write_conversations
from megaqwen.errors import InputError
from megaqwen.training.conversations import (
    ConversationFiles,
    PackedConversations,
    build_conversations,
)
from megaqwen.training.datasets import Corpora, EndOfDocument
from megaqwen.training.epochs import conversation_epochs

EOD, SIZE = 250, 64


def corpora(
    directory: Path,
    made: dict[str, list[Conversation]],
    weights: Any = None,
    splits: Any = None,
) -> Corpora:
    """Corpora on disk, all of them for training unless told otherwise."""
    for name, conversations in made.items():
        write_conversations(directory / name, conversations)
    return Corpora(
        prefixes=[directory / name for name in made],
        weights=weights or [[1.0, 0.0, 0.0]] * len(made),
        splits=splits or [[1.0, 0.0, 0.0]] * len(made),
        seed=3,
        cache=directory / "cache",
        tokenizer=EndOfDocument(eod=EOD, vocab_size=251),
    )


def only_corpus(dataset: Any) -> PackedConversations:
    """The packs of a blend's one corpus."""
    (packs,) = dataset.datasets
    assert isinstance(packs, PackedConversations)
    return packs


def train_set(given: Corpora, samples: int, too_long: str = "error") -> PackedConversations:
    """The training set of one corpus."""
    blend = build_conversations(given, [samples, 0, 0], SIZE, too_long)[0]
    assert len(blend) == samples
    return only_corpus(blend)


def read_back(sample: dict[str, torch.Tensor]) -> list[Conversation]:
    """The conversations of a sample; the target of a first token is not told."""
    starts = (sample["position_ids"] == 0).nonzero().flatten().tolist()
    found = []
    for begin, end in zip(starts, [*starts[1:], SIZE], strict=True):
        assert sample["position_ids"][begin:end].tolist() == list(range(end - begin))
        if sample["padding_mask"][begin]:
            assert sample["padding_mask"][begin:].all() and not sample["loss_mask"][begin:].any()
            continue
        assert not sample["padding_mask"][begin:end].any()
        tokens, labels = sample["tokens"][begin:end], sample["labels"][begin:end]
        assert tokens[1:].tolist() == labels[:-1].tolist()
        mask = sample["loss_mask"][begin:end].int().tolist()
        found.append(([*tokens.tolist(), int(labels[-1])], [0, *mask]))
    return found


def as_text(conversations: list[Conversation]) -> list[str]:
    return sorted(map(str, conversations))


def test_an_epoch_has_every_conversation_once(tmp_path: Path) -> None:
    made = random_conversations(300, SIZE)
    dataset = train_set(corpora(tmp_path, {"chats": made}), 1000)
    packs = len(dataset.packs)
    epochs = [
        [each for number in range(first, first + packs) for each in read_back(dataset[number])]
        for first in (0, packs, 2 * packs)
    ]
    for epoch in epochs:
        assert as_text(epoch) == as_text(made)
    assert epochs[0] != epochs[1] != epochs[2]  # in another order


def test_a_longer_run_goes_on_where_a_shorter_one_was(tmp_path: Path) -> None:
    given = corpora(tmp_path, {"chats": random_conversations(100, SIZE)})
    short, long = train_set(given, 20), train_set(given, 500)
    for number in range(20):
        assert all(torch.equal(value, long[number][name]) for name, value in short[number].items())


def test_packs_are_made_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given = corpora(tmp_path, {"chats": random_conversations(100, SIZE)})
    before = train_set(given, 20)[3]
    with monkeypatch.context() as patched:
        patched.setattr("megaqwen.training.conversation_packs.pack", None)
        again = train_set(given, 400)[3]
    assert all(torch.equal(before[name], again[name]) for name in before)
    (folder,) = given.cache.glob("chats-packs-*")
    assert {path.name for path in folder.iterdir()} == {"order.npy", "bounds.npy", "facts.json"}
    # Other conversations under the same name are packed anew.
    write_conversations(tmp_path / "chats", random_conversations(90, SIZE, seed=2))
    train_set(given, 20)
    assert len(list(given.cache.glob("chats-packs-*"))) == 2


def test_splits_are_of_conversations(tmp_path: Path) -> None:
    made = random_conversations(100, SIZE)
    shares = {"weights": [[1.0, 1.0, 1.0]], "splits": [[80.0, 15.0, 5.0]]}
    given = corpora(tmp_path, {"chats": made}, **shares)
    sets = build_conversations(given, [40, 40, 40], SIZE, "error")
    for dataset, part in zip(sets, (made[:80], made[80:95], made[95:]), strict=True):
        packs = only_corpus(dataset)
        epoch = [each for n in range(len(packs.packs)) for each in read_back(packs[n])]
        assert as_text(epoch) == as_text(part)


def test_corpora_are_blended_by_weight(tmp_path: Path) -> None:
    made = {
        name: random_conversations(count, SIZE, vocabulary=100 * number, seed=number)
        for number, (name, count) in enumerate({"small": 20, "large": 200}.items(), 1)
    }
    weights = [[3.0, 0.0, 0.0], [1.0, 0.0, 2.0]]
    given = corpora(tmp_path, made, weights, [[1.0, 0.0, 0.0], [9.0, 0.0, 1.0]])
    train, valid, test = build_conversations(given, [400, 0, 40], SIZE, "error")
    origin = {str(each[0]): name for name, each in ((n, c) for n in made for c in made[n])}
    drawn = Counter(origin[str(read_back(train[number])[0][0])] for number in range(400))
    assert drawn == {"small": 300, "large": 100}
    assert valid is None
    assert {origin[str(read_back(test[number])[0][0])] for number in range(40)} == {"large"}
    facts = conversation_epochs(given, [400, 0, 40], SIZE, "error")
    assert [set(each) for each in facts] == [{"train"}, {"train", "test"}]
    assert facts[0]["train"]["samples"] == 300
    assert facts[0]["train"]["epochs"] == 300 / facts[0]["train"]["packs"]


def long_ones() -> list[Conversation]:
    """50 that fit and three that do not, of which the last has targets at its very end alone."""
    fit = random_conversations(50, SIZE)
    longer = [(list(range(length)), [0] * 10 + [1] * (length - 10)) for length in (65, 90)]
    return [*fit, *longer, (list(range(80)), [0] * 79 + [1])]


def test_too_long_is_an_error_unless_the_config_says_what_to_do(tmp_path: Path) -> None:
    given = corpora(tmp_path, {"chats": long_ones()})
    with pytest.raises(InputError) as error:
        train_set(given, 10)
    assert "corpus chats: 3 of its 53 conversations are longer than train.seq_length 64" in str(
        error.value
    )
    assert "the longest has 90 tokens. Set data.too_long to drop or to truncate" in str(error.value)


@pytest.mark.parametrize(("too_long", "truncated", "dropped"), [("drop", 0, 3), ("truncate", 2, 1)])
def test_too_long_ones_are_counted(
    tmp_path: Path, too_long: str, truncated: int, dropped: int
) -> None:
    made = long_ones()
    given = corpora(tmp_path, {"chats": made})
    dataset = train_set(given, 10, too_long)
    kept = made[:50] + [(ids[:SIZE], flags[:SIZE]) for ids, flags in made[50 : 50 + truncated]]
    epoch = [each for n in range(len(dataset.packs)) for each in read_back(dataset[n])]
    assert as_text(epoch) == as_text(kept)
    (facts,) = conversation_epochs(given, [10, 0, 0], SIZE, too_long)
    train = facts["train"]
    assert (train["truncated"], train["dropped"], train["longest"]) == (truncated, dropped, 90)
    assert train["documents"] == 53
    assert train["target_tokens"] == sum(sum(flags) for _, flags in kept)
    assert train["tokens"] == sum(len(ids) for ids, _ in kept)
    positions = sum(len(ids) - 1 for ids, _ in kept)
    assert train["packing_efficiency"] == positions / (train["packs"] * SIZE)


def test_without_a_target_there_is_nothing_to_train_on(tmp_path: Path) -> None:
    given = corpora(tmp_path, {"chats": [(list(range(9)), [0] * 9)] * 4})
    with pytest.raises(InputError, match="none of 4 conversations has a target token"):
        train_set(given, 10)


def test_files_that_do_not_belong_together_are_refused(tmp_path: Path) -> None:
    write_conversations(tmp_path / "a", random_conversations(5, SIZE))
    write_conversations(tmp_path / "b", random_conversations(5, SIZE, seed=2))
    for suffix in ("bin", "idx"):
        (tmp_path / f"b.targets.{suffix}").replace(tmp_path / f"a.targets.{suffix}")
    with pytest.raises(InputError, match="not the same lengths"):
        ConversationFiles(tmp_path / "a")
