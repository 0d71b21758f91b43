"""Packing: every conversation once, no sequence too full, and hardly a position empty."""

import resource
from pathlib import Path

import numpy
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megaqwen.training.conversation_packs import ConversationPacks, PackFacts, store
from megaqwen.training.packing import pack


@settings(deadline=None)
@given(st.lists(st.integers(1, 40), max_size=200), st.integers(40, 60), st.integers(0, 3))
def test_every_conversation_is_in_one_pack_that_holds_it(
    lengths: list[int], capacity: int, seed: int
) -> None:
    array = numpy.array(lengths, dtype=numpy.int32)
    packs = pack(array, capacity, seed)
    assert sorted(packs.order.tolist()) == list(range(len(lengths)))
    filled = [int(array[packs[number]].sum()) for number in range(len(packs))]
    assert all(0 < each <= capacity for each in filled)
    # Two packs that are at most half full would have been one.
    assert sum(2 * each <= capacity for each in filled) <= 1


@pytest.mark.parametrize(
    ("median", "sigma"), [(245, 1.0), (490, 0.9), (1800, 0.6)], ids=["chat", "long", "very-long"]
)
def test_realistic_lengths_fill_the_sequences(median: float, sigma: float) -> None:
    capacity = 4096
    lengths = numpy.random.RandomState(1).lognormal(numpy.log(median), sigma, 100_000)
    lengths = lengths.astype(numpy.int32).clip(2, capacity)
    packs = pack(lengths, capacity)
    efficiency = lengths.sum(dtype=numpy.int64) / (len(packs) * capacity)
    print(f"{efficiency:.4%} of {len(packs):,} sequences")
    assert efficiency > 0.99


def test_the_seed_alone_decides() -> None:
    lengths = numpy.random.RandomState(1).randint(1, 65, 1000)
    first, again, other = (pack(lengths, 64, seed) for seed in (7, 7, 8))
    assert (first.order == again.order).all() and (first.bounds == again.bounds).all()
    assert (first.order != other.order).any()
    assert len(first) == len(other)  # which of equal lengths come where, not how full the packs are


@pytest.mark.parametrize("lengths", [[0, 3], [3, 65]])
def test_what_does_not_fit_is_refused(lengths: list[int]) -> None:
    with pytest.raises(ValueError, match="lengths of 1 to 64"):
        pack(numpy.array(lengths), 64)


def test_nothing_is_packed_into_nothing() -> None:
    assert len(pack(numpy.array([], dtype=numpy.int32), 64)) == 0


def test_a_full_disk_leaves_no_packs(tmp_path: Path) -> None:
    """Also where only the end of a file is too much, which is written when that is closed."""
    figures = dict.fromkeys(PackFacts.__dataclass_fields__, 1)
    numbers = numpy.arange(100)
    packs = ConversationPacks(order=numbers, bounds=numbers, facts=PackFacts(**figures))
    earlier = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (500, earlier[1]))  # bytes of a file: facts.json fits
    try:
        with pytest.raises(OSError, match="File too large"):
            store(packs, tmp_path / "packs")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, earlier)
    assert not (tmp_path / "packs").exists()
    store(packs, tmp_path / "packs")
    assert (tmp_path / "packs" / "order.npy").stat().st_size > 500
