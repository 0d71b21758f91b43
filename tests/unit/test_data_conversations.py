"""Conversations of every form from files to tokens and targets, as training reads them."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from megatron.core.datasets.indexed_dataset import IndexedDataset
from pyarrow import ipc, parquet

from megaqwen.config.sections import BuiltinCorpus, FilesCorpus
from megaqwen.data import chats, streams
from megaqwen.data.conversations import conversation_of
from megaqwen.data.parts import tokenize_part
from megaqwen.data.pieces import Shard
from megaqwen.data.tokenization import ChatTokenizer
from megaqwen.data.tokenize_corpus import tokenize_corpora
from megaqwen.errors import InputError


@pytest.fixture(scope="module")
def tokenizer(tiny_qwen3: Path) -> ChatTokenizer:
    return ChatTokenizer(tiny_qwen3)


def turns(*contents: str) -> list[dict[str, Any]]:
    roles = ("user", "assistant")
    return [{"role": roles[n % 2], "content": text} for n, text in enumerate(contents)]


def write(path: Path, *records: Any) -> Path:
    lines = (each if isinstance(each, str) else json.dumps(each) for each in records)
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return path


def corpus(*files: Path, **fields: Any) -> FilesCorpus:
    return FilesCorpus(name="chats", source="files", files=[str(file) for file in files], **fields)


def tokenized(
    given: FilesCorpus | BuiltinCorpus, tokenizer: ChatTokenizer, directory: Path
) -> tuple[dict[str, Any], list[tuple[str, str]]]:
    """The card, and of each conversation its text and that of its targets, as IndexedDataset has them."""
    directory.mkdir(exist_ok=True)
    card = tokenize_corpora([given], tokenizer, directory, [])["corpora"][given.name]
    return card, on_disk(directory / given.name, tokenizer)


def on_disk(prefix: Path, tokenizer: ChatTokenizer) -> list[tuple[str, str]]:
    ids, targets = IndexedDataset(str(prefix)), IndexedDataset(f"{prefix}.targets")
    assert ids.sequence_lengths.tolist() == targets.sequence_lengths.tolist()
    assert ids.document_indices.tolist() == targets.document_indices.tolist()
    decoded = []
    for row, flags in zip(ids, targets, strict=True):
        assert flags.dtype == "uint8" and set(flags.tolist()) == {0, 1}
        chosen = row[flags == 1].tolist()
        decoded.append((tokenizer.decode(row.tolist()), tokenizer.decode(chosen)))
    return decoded


QUESTION = "<|im_start|>user\nIs it?<|im_end|>\n<|im_start|>assistant\n"
ANSWERED = (f"{QUESTION}It is.<|im_end|>\n", "It is.<|im_end|>")
FORMS: dict[str, dict[str, Any]] = {
    "messages": {"messages": turns("Is it?", "It is.")},
    "text parts": {
        "messages": [turns("Is it?")[0], {"role": "assistant", "content": [{"text": "It is."}]}]
    },
    "prompt and completion": {"prompt": "Is it?", "completion": "It is."},
    "lists of both": {"prompt": turns("Is it?"), "completion": turns("", "It is.")[1:]},
    "ShareGPT": {
        "conversations": [{"from": "human", "value": "Is it?"}, {"from": "gpt", "value": "It is."}]
    },
    "messages among nulls": {"messages": turns("Is it?", "It is."), "conversations": None},
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_is_the_same_conversation(
    form: str, tokenizer: ChatTokenizer, tmp_path: Path
) -> None:
    path = write(tmp_path / "a.jsonl", FORMS[form])
    _, found = tokenized(corpus(path), tokenizer, tmp_path / "out")
    assert found == [ANSWERED]


def test_forms_may_be_mixed_and_a_field_may_be_named(
    tokenizer: ChatTokenizer, tmp_path: Path
) -> None:
    path = write(tmp_path / "a.jsonl", *FORMS.values())
    _, found = tokenized(corpus(path), tokenizer, tmp_path / "out")
    assert found == [ANSWERED] * len(FORMS)
    other = write(tmp_path / "b.jsonl", {"messages": 7, "dialogue": turns("Is it?", "It is.")})
    named = corpus(other, conversation_field="dialogue")
    assert tokenized(named, tokenizer, tmp_path / "named")[1] == [ANSWERED]


def test_a_system_field_and_calls_of_sharegpt() -> None:
    record = {
        "system": "Be short.",
        "tools": json.dumps([{"type": "function", "function": {"name": "f"}}]),
        "conversations": [
            {"from": "human", "value": "Is it?"},
            {"from": "function_call", "value": '{"name": "f", "arguments": {"x": 1}}'},
            {"from": "observation", "value": "Yes."},
            {"from": "gpt", "value": "It is."},
        ],
    }
    found = conversation_of(record, None)
    assert [message["role"] for message in found.messages] == [
        *("system", "user", "assistant", "tool", "assistant")
    ]
    assert found.messages[2]["tool_calls"] == [
        {"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}
    ]
    assert found.tools == [{"type": "function", "function": {"name": "f"}}]


def test_the_same_system_message_twice_is_one() -> None:
    messages = [{"role": "system", "content": "Be short."}, *turns("a", "b")]
    found = conversation_of({"system": "Be short.\n", "messages": messages}, None)
    assert found.messages == messages


def test_arguments_in_a_string_are_an_object() -> None:
    """A template would write the string once more as JSON."""
    call = {"function": {"name": "f", "arguments": '{"x": "é"}'}}
    given = {
        "messages": [*turns("a"), {"role": "assistant", "content": None, "tool_calls": [call]}]
    }
    message = conversation_of(given, None).messages[1]
    assert message["tool_calls"][0]["function"]["arguments"] == {"x": "é"}
    assert message["content"] == ""


def test_a_completion_is_trained_on_and_its_prompt_is_not(
    tokenizer: ChatTokenizer, tmp_path: Path
) -> None:
    """Whoever speaks in the prompt, and whatever is said there about training on it."""
    prompt = turns("a", "b", "Is it?")
    prompt[1]["weight"] = 0
    record = {"prompt": prompt, "completion": turns("", "It is.", "Sure?", "Yes.")[1:]}
    path = write(tmp_path / "a.jsonl", record, {**record, "system": "Be short."}, FORMS["messages"])
    card, found = tokenized(corpus(path), tokenizer, tmp_path / "out")
    said = "It is.<|im_end|>Yes.<|im_end|>"
    assert [targets for _, targets in found] == [said, said, "It is.<|im_end|>"]
    assert all("assistant\nb<|im_end|>" in text for text, _ in found[:2])
    assert card["assistant_turns"] == 5


def as_parquet(path: Path, table: pyarrow.Table) -> Path:
    parquet.write_table(table, path.with_suffix(".parquet"), row_group_size=2)
    return path.with_suffix(".parquet")


def as_arrow(path: Path, table: pyarrow.Table) -> Path:
    with ipc.new_stream(path.with_suffix(".arrow"), table.schema) as writer:
        writer.write_table(table)
    return path.with_suffix(".arrow")


@pytest.mark.parametrize("write_table", [as_parquet, as_arrow])
def test_tables(
    write_table: Callable[[Path, pyarrow.Table], Path], tokenizer: ChatTokenizer, tmp_path: Path
) -> None:
    call = [{"function": {"name": "f", "arguments": "{}"}}]
    rows = [
        {"id": 1, "messages": turns("Is it?", "It is.")},
        {"id": 2, "messages": [*turns("a"), {"role": "assistant", "tool_calls": call}]},
        {"id": 3, "messages": turns("Is it?")},
    ]
    path = write_table(tmp_path / "a", pyarrow.Table.from_pylist(rows))
    with pytest.raises(InputError, match=r"row 2: the assistant's turn 1 .* lacks its words 'f'"):
        tokenized(corpus(path), tokenizer, tmp_path / "out")
    card, found = tokenized(corpus(path, max_bad_documents=2), tokenizer, tmp_path / "out")
    assert found == [ANSWERED] and card["bad_documents_skipped"] == 2


@pytest.mark.parametrize("write_table", [as_parquet, as_arrow])
def test_a_row_that_is_not_utf8(
    write_table: Callable[[Path, pyarrow.Table], Path], tokenizer: ChatTokenizer, tmp_path: Path
) -> None:
    said = pyarrow.array([b"Is it?", b"It is.", b"Is it?", b"caf\xe9", b"Is it?", b"It is."])
    contents = pyarrow.Array.from_buffers(pyarrow.string(), len(said), said.buffers())
    roles = pyarrow.array(["user", "assistant"] * 3)
    messages = pyarrow.StructArray.from_arrays([roles, contents], ["role", "content"])
    column = pyarrow.ListArray.from_arrays([0, 2, 4, 6], messages)
    path = write_table(tmp_path / "a", pyarrow.table({"messages": column}))
    with pytest.raises(InputError) as error:
        tokenized(corpus(path), tokenizer, tmp_path / "out")
    assert str(error.value).startswith(f"{path}: row 2: not UTF-8 at these bytes: e9")
    card, found = tokenized(corpus(path, max_bad_documents=1), tokenizer, tmp_path / "out")
    assert found == [ANSWERED] * 2 and card["bad_documents_skipped"] == 1


GOOD = {"messages": turns("Is it?", "It is.")}
WRONG: dict[str, tuple[Any, str]] = {
    "no JSON": ("{", "not JSON"),
    "no object": ("[1]", "one JSON object a line is expected"),
    "another field": ({"text": "a"}, "no field 'messages', 'conversations' or 'prompt'"),
    "no list": ({"messages": "a"}, "'messages' is to be a list of messages, found a string"),
    "no messages": ({"messages": []}, "no message is the assistant's"),
    "no object in it": ({"messages": ["a"]}, "message 1 is to be an object with role and content"),
    "an unknown role": (
        {"messages": [*turns("a"), {"role": "asistant", "content": "b"}]},
        "message 2 has the role 'asistant': known are",
    ),
    "no role": ({"messages": [{"content": "b"}]}, "message 1 has no role"),
    "no content": ({"messages": [{"role": "user"}, *turns("a", "b")]}, "message 1 has no content"),
    "a number": ({"messages": turns("a", 7)}, "message 2: the content is to be a string"),  # type: ignore[arg-type]
    "an image": (
        {"messages": [{"role": "user", "content": [{"type": "image"}]}]},
        "message 1: the content has a part of kind 'image'",
    ),
    "an empty answer": ({"messages": turns("a", " \n")}, "message 2 is empty"),
    "no answer": ({"messages": turns("a")}, "there is nothing to train on"),
    "an answer not to be trained on": (
        {"messages": [*turns("a"), {"role": "assistant", "content": "b", "weight": 0}]},
        "message 2 is not to be trained on",
    ),
    "arguments that are no JSON": (
        {"messages": [{"role": "assistant", "tool_calls": [{"name": "f", "arguments": "{x"}]}]},
        "message 1: the arguments of 'f' is not JSON",
    ),
    "a call without a name": (
        {"messages": [{"role": "assistant", "tool_calls": [{"arguments": {}}]}]},
        "message 1: a tool call is an object with a function's name",
    ),
    "a user that calls": (
        {"messages": [{"role": "user", "content": "", "tool_calls": [{"name": "f"}]}]},
        "message 1: tool_calls is a list of calls, in a message of the assistant",
    ),
    "tools that are no list": (
        {**GOOD, "tools": {"a": 1}},
        "tools is to be a list of JSON schemas",
    ),
    "two system messages": (
        {
            "system": "Be long.",
            "messages": [{"role": "system", "content": "Be short."}, *turns("a", "b")],
        },
        "'system' says something else than message 1, which is the system's too: 'Be long.' and 'Be",
    ),
    "half a surrogate pair": (
        '{"messages": [{"role": "assistant", "content": "\\ud800"}]}',
        "half a surrogate pair",
    ),
    "a completion in which the assistant is silent": (
        {"prompt": turns("a", "b"), "completion": turns("c")},
        "no message of the completion is the assistant's: there is nothing to train on",
    ),
    "a completion alone": ({"completion": "a"}, "no field"),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_what_is_wrong_is_told_by_file_and_line(
    wrong: str, tokenizer: ChatTokenizer, tmp_path: Path
) -> None:
    record, message = WRONG[wrong]
    path = write(tmp_path / "a.jsonl", GOOD, "", record, GOOD)
    with pytest.raises(InputError) as error:
        tokenize_part(corpus(path), tokenizer, tmp_path, Shard())
    assert str(error.value).startswith(f"{path}:3: ") and message in str(error.value)
    card, found = tokenized(corpus(path, max_bad_documents=1), tokenizer, tmp_path / "out")
    assert found == [ANSWERED] * 2 and card["bad_documents_skipped"] == 1


def test_a_table_without_messages_and_a_text_file(tokenizer: ChatTokenizer, tmp_path: Path) -> None:
    path = as_parquet(tmp_path / "a", pyarrow.table({"mesages": ["a"]}))
    with pytest.raises(InputError, match=r"Did you mean 'mesages'.* Set conversation_field"):
        tokenize_part(corpus(path), tokenizer, tmp_path, Shard())
    text = write(tmp_path / "a.txt", "a")
    with pytest.raises(InputError, match="a text file holds no conversations"):
        tokenize_part(corpus(text), tokenizer, tmp_path, Shard())


def test_wrong_targets_fail_the_stage_and_name_the_sample(
    tokenizer: ChatTokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever made them: here the targets of the second conversation are those of another text."""
    whole_texts = chats.Rendered.whole_texts

    def damaged(self: chats.Rendered, names: dict[int, str]) -> tuple[list[str], list[str]]:
        whole, said = whole_texts(self, names)
        return whole, [said[0], "It was.<|im_end|>", *said[2:]]

    monkeypatch.setattr(chats.Rendered, "whole_texts", damaged)
    path = write(tmp_path / "a.jsonl", GOOD, GOOD, GOOD)
    with pytest.raises(
        InputError, match=r"a.jsonl:2: what is trained on cannot be told: the target"
    ):
        tokenize_part(corpus(path), tokenizer, tmp_path, Shard())
    card, found = tokenized(corpus(path, max_bad_documents=1), tokenizer, tmp_path / "out")
    assert found == [ANSWERED] * 2 and card["documents"] == 2


def many(count: int) -> list[dict[str, Any]]:
    return [
        {"messages": turns(*(f"{n % 10} {'word ' * (n % 7)}{k}" for k in range(2 + 2 * (n % 3))))}
        for n in range(count)
    ]


def test_the_card_counts_what_is_on_disk(tokenizer: ChatTokenizer, tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", *many(40))
    card, found = tokenized(corpus(path), tokenizer, tmp_path / "out")
    targets = IndexedDataset(str(tmp_path / "out" / "chats.targets"))
    dataset = IndexedDataset(str(tmp_path / "out" / "chats"))  # its memory map lives as long as it
    lengths = dataset.sequence_lengths
    assert card["documents"] == len(found) == 40
    assert card["tokens"] == lengths.sum()
    assert card["target_tokens"] == sum(int(flags.sum()) for flags in targets)
    assert card["turns"] == sum(len(each["messages"]) for each in many(40))
    assert card["assistant_turns"] * 2 == card["turns"]
    assert card["bytes"] == card["characters"] == sum(len(text) for text, _ in found)
    assert card["longest_document_tokens"] == lengths.max()
    sample = card["sample"]
    assert "".join(piece["text"] for piece in sample) == found[0][0]
    assert "".join(piece["text"] for piece in sample if piece["target"]) == found[0][1]


@pytest.mark.parametrize("deduplicate", [False, True])
def test_neither_shards_nor_processes_nor_blocks_show(
    deduplicate: bool, tokenizer: ChatTokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path / "a.jsonl", *many(700))
    given = corpus(path, deduplicate=deduplicate, min_characters=10)
    (tmp_path / "whole").mkdir()
    whole = tokenize_corpora([given], tokenizer, tmp_path / "whole", [])
    monkeypatch.setattr(streams, "BLOCK", 2**12)
    monkeypatch.setattr(chats, "PROCESSES_FROM", 0)
    monkeypatch.setattr(chats, "computing_threads", lambda: 2)
    directories = []
    for index in range(2):
        directories.append(tmp_path / f"{index}")
        directories[-1].mkdir()
        tokenize_part(given, tokenizer, directories[-1], Shard(index=index, count=2))
    (tmp_path / "merged").mkdir()
    merged = tokenize_corpora([given], tokenizer, tmp_path / "merged", directories)
    assert merged == whole
    for name in ("chats.bin", "chats.idx", "chats.targets.bin", "chats.targets.idx", "card.json"):
        assert (tmp_path / "merged" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    card = whole["corpora"]["chats"]
    assert card["short_documents_skipped"] > 0
    assert (card["duplicate_documents_skipped"] > 0) is deduplicate
    if deduplicate:
        texts = [text for text, _ in on_disk(tmp_path / "whole" / "chats", tokenizer)]
        assert len(set(texts)) == len(texts)


def test_duplicates_leave_no_trace_in_the_card(tokenizer: ChatTokenizer, tmp_path: Path) -> None:
    once = write(tmp_path / "once.jsonl", *many(20))
    twice = write(tmp_path / "twice.jsonl", *many(20), *many(20))
    first, _ = tokenized(corpus(once, deduplicate=True), tokenizer, tmp_path / "once")
    second, _ = tokenized(corpus(twice, deduplicate=True), tokenizer, tmp_path / "twice")
    differ = {key for key in first if first[key] != second[key]}
    assert differ == {"duplicate_documents_skipped", "sources"}


@pytest.mark.parametrize("suffix", [".gz", ".xz"])
def test_compressed_files(suffix: str, tokenizer: ChatTokenizer, tmp_path: Path) -> None:
    import gzip
    import lzma

    path = write(tmp_path / "a.jsonl", GOOD)
    pack = gzip.compress if suffix == ".gz" else lzma.compress
    packed = Path(f"{path}{suffix}")
    packed.write_bytes(pack(path.read_bytes()))
    assert tokenized(corpus(packed), tokenizer, tmp_path / "out")[1] == [ANSWERED]


@pytest.mark.slow
def test_the_builtin_conversations(tokenizer: ChatTokenizer, tmp_path: Path) -> None:
    given = BuiltinCorpus(name="python", source="builtin")
    card, found = tokenized(given, tokenizer, tmp_path / "out")
    assert card["documents"] > 1000 and card["longest_document_tokens"] <= 256
    assert card["assistant_turns"] > card["documents"], "some go on"
    assert any(text.startswith("<|im_start|>system") for text, _ in found)
    shutil.rmtree(tmp_path / "out")
