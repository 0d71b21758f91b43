"""Which checkpoints are whole, what becomes of the others, and which may go."""

from pathlib import Path

import pytest

from megaqwen.checkpoints import (
    FILES,
    TRACKER,
    damage,
    forget_save,
    is_finished,
    iteration_name,
    iterations,
    prepare,
    prune,
    superfluous,
    write_checksums,
    write_sizes,
)

DATA = "__0_0.distcp"


def save(root: Path, iteration: int) -> Path:
    """A checkpoint as two ranks leave it."""
    directory = root / iteration_name(iteration)
    directory.mkdir()
    for name in (DATA, "__1_0.distcp", ".metadata", "metadata.json"):
        (directory / name).write_bytes(f"{name} of {iteration}".encode() * 100)
    write_sizes(directory)
    write_checksums(directory, "rank0", [DATA, ".metadata", "metadata.json"])
    write_checksums(directory, "rank1", ["__1_0.distcp"])
    (root / TRACKER).write_text(str(iteration))
    return directory


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Iterations 2, 4 and 6."""
    for iteration in (2, 4, 6):
        save(tmp_path, iteration)
    return tmp_path


def truncate(directory: Path) -> None:
    data = directory / DATA
    data.write_bytes(data.read_bytes()[:-1])


def flip(directory: Path) -> None:
    data = bytearray((directory / "__1_0.distcp").read_bytes())
    data[50] ^= 1
    (directory / "__1_0.distcp").write_bytes(data)


def lose(directory: Path) -> None:
    (directory / DATA).unlink()


def garble(directory: Path) -> None:
    (directory / FILES).write_text("{")


DAMAGES = {
    "truncated": (truncate, f"{DATA} has 1,699 of its 1,700 bytes"),
    "flipped": (flip, "__1_0.distcp has CRC-32"),
    "lost": (lose, f"{DATA} is missing"),
    "garbled": (garble, f"{FILES} cannot be read"),
}


def test_the_newest_is_resumed_from(root: Path) -> None:
    prepared = prepare(root)
    assert (prepared.iteration, prepared.said) == (6, [])
    assert iterations(root) == [2, 4, 6]


@pytest.mark.parametrize("kind", DAMAGES)
def test_a_damaged_one_is_named_and_set_aside(root: Path, kind: str) -> None:
    hurt, words = DAMAGES[kind]
    hurt(root / iteration_name(6))
    prepared = prepare(root)
    assert prepared.iteration == 4
    assert words in prepared.said[0]
    assert (root / TRACKER).read_text() == "4"
    assert iterations(root) == [2, 4]
    assert (root / "damaged-iter_0000006-1" / ".metadata").is_file()
    assert prepare(root).said == []


def test_sizes_alone_do_not_find_a_flipped_bit(root: Path) -> None:
    flip(root / iteration_name(6))
    assert damage(root / iteration_name(6), "sizes") == []
    assert prepare(root, "sizes").iteration == 6


def test_a_kill_before_the_checksums_leaves_the_sizes(root: Path) -> None:
    for path in (root / iteration_name(6)).glob("checksums.*"):
        path.unlink()
    assert prepare(root).iteration == 6
    truncate(root / iteration_name(6))
    assert prepare(root).iteration == 4


def test_what_was_cut_short_is_removed(root: Path) -> None:
    (root / iteration_name(6) / "metadata.json").unlink()
    prepared = prepare(root)
    assert prepared.iteration == 4
    assert "not complete" in prepared.said[0]
    assert sorted(path.name for path in root.iterdir()) == [
        *("iter_0000002", "iter_0000004"),
        TRACKER,
    ]


@pytest.mark.parametrize("text", ["", "4", "8"])
def test_the_tracker_is_corrected(root: Path, text: str) -> None:
    """Empty after a full disk, behind after a kill before it was written, ahead after a removal."""
    (root / TRACKER).write_text(text)
    prepared = prepare(root)
    assert prepared.iteration == 6
    assert (root / TRACKER).read_text() == "6"
    assert f"named {text or 'none'}" in prepared.said[0]


def test_one_whose_last_file_a_full_disk_left_empty_is_not_whole(root: Path) -> None:
    newest = root / iteration_name(6)
    (newest / "metadata.json").write_bytes(b"")
    (newest / FILES).unlink()
    found = prepare(root)
    assert found.iteration == 4 and "iter_0000006, which is not complete" in found.said[0]


def test_an_iteration_that_is_saved_again_is_not_whole_meanwhile(root: Path) -> None:
    newest = root / iteration_name(6)
    forget_save(newest)
    assert not is_finished(newest) and {path.name for path in newest.iterdir()} == {
        *(DATA, "__1_0.distcp", ".metadata")
    }


def test_where_none_is_whole_training_starts_again(root: Path) -> None:
    for iteration in (2, 4, 6):
        truncate(root / iteration_name(iteration))
    prepared = prepare(root)
    assert prepared.iteration == 0
    assert "starts from the converted weights" in prepared.said[-1]
    assert not (root / TRACKER).exists()
    assert len(list(root.glob("damaged-*"))) == 3


def test_a_second_damage_of_one_iteration_gets_a_name_of_its_own(root: Path) -> None:
    truncate(root / iteration_name(6))
    prepare(root)
    truncate(save(root, 6))
    prepare(root)
    assert sorted(path.name for path in root.glob("damaged-*")) == [
        *("damaged-iter_0000006-1", "damaged-iter_0000006-2"),
    ]


def test_of_another_programs_checkpoint_nothing_is_known(root: Path) -> None:
    (root / iteration_name(6) / FILES).unlink()
    assert prepare(root).iteration == 6


@pytest.mark.parametrize(
    ("keep_last", "keep_every", "going"),
    [
        (0, 0, []),
        (0, 4, []),
        (1, 0, [2, 4, 6, 8]),
        (2, 0, [2, 4, 6]),
        (2, 4, [2, 6]),
        (9, 0, []),
    ],
)
def test_which_checkpoints_may_go(keep_last: int, keep_every: int, going: list[int]) -> None:
    saved = [2, 4, 6, 8, 10]
    assert superfluous(saved, keep_last=keep_last, keep_every=keep_every) == going


def test_what_is_not_finished_counts_for_nothing_when_others_go(root: Path) -> None:
    save(root, 8)
    (root / iteration_name(8) / "metadata.json").unlink()
    assert prune(root, keep_last=1, keep_every=0) == [2, 4]
    assert iterations(root) == [6, 8]
    assert prepare(root).iteration == 6
