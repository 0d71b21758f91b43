"""The copy of the data on a node's own disk: made once, whole or not at all, read in the data's place."""

import multiprocessing
import os
import shutil
import socket
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from conversation_files import random_conversations, write_conversations
from megaqwen.config.sections import Scratch
from megaqwen.errors import InputError
from megaqwen.provenance import describe_files
from megaqwen.training import scratch
from megaqwen.training.conversations import build_conversations
from megaqwen.training.datasets import Corpora, EndOfDocument, build_datasets
from megaqwen.training.epochs import epochs
from megaqwen.training.meeting import Meeting
from megaqwen.training.ranks import Rank
from megaqwen.training.scratch import copied

RANKS, SIZE = 4, 64
NAMES = ("a", "b")


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """A directory as preprocess leaves one."""
    (tmp_path / "data").mkdir()
    for seed, name in enumerate(NAMES):
        write_conversations(tmp_path / "data" / name, random_conversations(40, SIZE, seed=seed))
    (tmp_path / "data" / "card.json").write_text("{}")
    return tmp_path / "data"


def hold(settings: Scratch, data: Path, files: Any = None) -> Any:
    return copied(settings, data, files or describe_files(data), NAMES)


def one_rank(settings: Scratch, data: Path, barrier: Any, made: Any) -> None:
    """What each rank of a node does; counts the copies that are made, and leaves when all have read."""
    make = scratch.make_copy

    def counted(*words: Any) -> None:
        made.value += 1
        make(*words)

    scratch.make_copy = counted
    with hold(settings, data) as copy:
        whole = describe_files(data)
        names = {path.name for path in copy.directory.iterdir()} - {scratch.WHOLE}
        assert names == whole.keys() - {"card.json"}
        barrier.wait(60)


@pytest.mark.parametrize("keep", [False, True])
def test_one_of_a_nodes_ranks_copies_and_the_last_one_removes(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, keep: bool
) -> None:
    monkeypatch.setenv("NODE_DISK", str(tmp_path / "disk"))
    settings = Scratch(directory="$NODE_DISK/of-mine", keep=keep)
    context = multiprocessing.get_context("fork")
    barrier, made = context.Barrier(RANKS), context.Value("i", 0)
    for _ in range(2):
        words = (settings, data, barrier, made)
        ranks = [context.Process(target=one_rank, args=words) for _ in range(RANKS)]
        for rank in ranks:
            rank.start()
        for rank in ranks:
            rank.join()
            assert rank.exitcode == 0
    left = sorted(path.name.partition("-")[0] for path in (tmp_path / "disk/of-mine").iterdir())
    assert left == (["megaqwen"] * 3 if keep else [])
    assert made.value == (1 if keep else 2)


def test_what_a_kill_left_is_made_again(data: Path, tmp_path: Path) -> None:
    settings = Scratch(directory=str(tmp_path / "disk"), keep=True)
    with hold(settings, data) as copy:
        (copy.directory / "a.bin").write_bytes(b"half")
        (copy.directory / scratch.WHOLE).unlink()
    with hold(settings, data) as copy:
        assert (copy.directory / "a.bin").read_bytes() == (data / "a.bin").read_bytes()


@pytest.mark.parametrize("left", [b"half", None])
def test_a_copy_that_was_left_is_made_again_where_a_file_is_not_whole(
    data: Path, tmp_path: Path, left: bytes | None
) -> None:
    settings = Scratch(directory=str(tmp_path / "disk"), keep=True)
    with hold(settings, data) as copy:
        (copy.directory / "a.bin").unlink()
        if left:
            (copy.directory / "a.bin").write_bytes(left)
    with hold(settings, data) as copy:
        assert (copy.directory / "a.bin").read_bytes() == (data / "a.bin").read_bytes()


def test_the_disk_has_a_copy_before_it_counts_as_whole(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[str] = []
    fsync = os.fsync

    def record(descriptor: int) -> None:
        path = Path(f"/proc/self/fd/{descriptor}").readlink()
        assert not list((tmp_path / "disk").glob(f"*/{scratch.WHOLE}"))
        synced.append(path.name.partition("-")[0])
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", record)
    with hold(Scratch(directory=str(tmp_path / "disk")), data) as copy:
        files = [path.name for path in copy.directory.iterdir() if path.name != scratch.WHOLE]
    assert synced == [*sorted(files), "megaqwen"]


def late_rank(rank: int, port: int, here: Any) -> None:
    """Of two ranks the second has to copy for longer; then both do what Megatron does."""
    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2"}
    meeting = Meeting(Rank(rank=rank, world_size=2, local_rank=rank))
    if rank:
        time.sleep(1.5)
        here.value = 1
    meeting.wait()
    assert here.value
    torch.distributed.init_process_group("gloo")
    torch.distributed.barrier()


def test_nodes_wait_for_the_one_that_copies_longest() -> None:
    with socket.create_server(("localhost", 0)) as server:
        port = server.getsockname()[1]
    context = multiprocessing.get_context("fork")
    here = context.Value("i", 0)
    ranks = [context.Process(target=late_rank, args=(rank, port, here)) for rank in range(2)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(120)
        assert process.exitcode == 0


def unset(data: Path, disk: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    return hold(Scratch(directory="$NO_SUCH/disk"), data)


def a_file(data: Path, disk: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    disk.write_text("")
    return hold(Scratch(directory=f"{disk}/below"), data)


def changed(data: Path, disk: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    files = describe_files(data)
    (data / "b.bin").write_bytes(bytes(files["b.bin"]["bytes"]))
    return hold(Scratch(directory=str(disk)), data, files)


def full(data: Path, disk: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    size = shutil.disk_usage(data.parent)._replace(free=10)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: size)
    return hold(Scratch(directory=str(disk)), data)


REFUSED: dict[str, tuple[Callable[..., Any], str]] = {
    "a variable that is not set": (unset, r"scratch.directory is \$NO_SUCH/disk, and a variable"),
    "a path that cannot be": (a_file, "cannot be made on"),
    "data that is not what its manifest says": (changed, r"b\.bin is not the file that its"),
    "a disk that is full": (full, "has 0 bytes free|has 10 bytes free"),
}


@pytest.mark.parametrize("wrong", REFUSED)
def test_one_clear_message_and_nothing_left(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wrong: str
) -> None:
    make, words = REFUSED[wrong]
    disk = tmp_path / "disk"
    with pytest.raises(InputError, match=words), make(data, disk, monkeypatch):
        pass
    assert not list(disk.glob("megaqwen-*/*"))


def pretraining(given: Corpora) -> list[Any]:
    return build_datasets(given, [60, 8, 0], SIZE)


def conversations(given: Corpora) -> list[Any]:
    return build_conversations(given, [20, 8, 0], SIZE, "error")


def zero(directory: Path) -> None:
    """Overwrite all files in place, so that whoever has one mapped sees it."""
    for path in directory.rglob("*"):
        if path.is_file():
            with open(path, "r+b") as stream:
                stream.write(bytes(path.stat().st_size))


@pytest.mark.parametrize("build", [pretraining, conversations])
def test_samples_come_from_the_copy_and_are_the_same(
    data: Path, tmp_path: Path, build: Callable[[Corpora], list[Any]]
) -> None:
    given = Corpora(
        prefixes=[data / name for name in NAMES],
        weights=[[3.0, 1.0, 0.0], [1.0, 1.0, 0.0]],
        splits=[[4.0, 1.0, 0.0]] * 2,
        seed=3,
        cache=tmp_path / "cache",
        tokenizer=EndOfDocument(eod=250, vocab_size=251),
    )
    without = build(given)
    expected = [without[0][number] for number in range(len(without[0]))]
    indices = {path.name for path in given.cache.rglob("*")}
    with hold(Scratch(directory=str(tmp_path / "disk")), data) as copy:
        train, *_ = build(replace(given, copy=copy))
        assert {path.name for path in given.cache.rglob("*")} == indices  # found, not built again
        zero(data)
        zero(given.cache)
        for number, sample in enumerate(expected):
            found = train[number]
            assert found.keys() == sample.keys()
            for name, value in sample.items():
                assert torch.equal(torch.as_tensor(found[name]), torch.as_tensor(value)), name
        assert list((copy.directory / scratch.INDICES).rglob("*.npy"))
        assert epochs(replace(given, copy=copy), [60, 8, 0], SIZE)[0]["train"]["documents"] == 32
