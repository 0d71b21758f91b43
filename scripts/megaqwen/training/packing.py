"""Packing: which conversations share a sequence, computed from their lengths alone.

Best fit decreasing: the longest first, each into the fullest sequence that still has room for it. All
conversations of one length go through one step, and so do all sequences with the same room left: the
work grows with the number of different lengths, not with that of conversations.
"""

from bisect import bisect_left, insort
from collections import defaultdict
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy
from numpy.typing import NDArray

Integers = NDArray[numpy.int64]


@dataclass(frozen=True, kw_only=True)
class Packs:
    """Conversations in the order of the packs that they are in."""

    order: Integers
    """[conversations], indices into the lengths that were packed."""
    bounds: Integers
    """[packs + 1]: pack p holds order[bounds[p] : bounds[p + 1]]."""

    def __len__(self) -> int:
        """How many packs there are."""
        return len(self.bounds) - 1

    def __getitem__(self, pack: int) -> Integers:
        """The conversations of a pack."""
        return self.order[self.bounds[pack] : self.bounds[pack + 1]]


class OpenPacks:
    """Packs that are not full, by the room that they have left."""

    def __init__(self, capacity: int):
        """No pack yet; one that is opened has room for `capacity` positions."""
        self.capacity = capacity
        self.opened = 0
        self.rooms: list[int] = []  # in ascending order, those that `packs` has
        self.packs: dict[int, list[Integers]] = defaultdict(list)

    def take(self, length: int, wanted: int) -> tuple[int, Integers]:
        """Packs with the least room in which `length` fits, or as many new ones as `wanted` ask for.

        Args:
            length: Positions of each conversation that is to be placed.
            wanted: How many of them there are.

        Returns:
            The room that is left in each of the packs, and their numbers.
        """
        at = bisect_left(self.rooms, length)
        if at == len(self.rooms):
            first, each = self.opened, self.capacity // length
            self.opened += -(-wanted // each)
            return self.capacity, numpy.arange(first, self.opened)
        room = self.rooms[at]
        packs = self.packs[room].pop()
        if not self.packs[room]:
            del self.rooms[at], self.packs[room]
        return room, packs

    def put(self, room: int, packs: Integers) -> None:
        """Keep packs that have `room` left."""
        if room and len(packs):
            if room not in self.packs:
                insort(self.rooms, room)
            self.packs[room].append(packs)


def pack(lengths: NDArray[Any], capacity: int, seed: int = 0) -> Packs:
    """Place conversations into sequences of `capacity` positions.

    The same arguments give the same packs on every machine.

    Args:
        lengths: [conversations], positions of each: at least 1, at most `capacity`.
        capacity: Positions of a sequence.
        seed: Decides which of the conversations of one length comes where.

    Raises:
        ValueError: A length is out of range.
    """
    if len(lengths) and not 1 <= lengths.min() <= lengths.max() <= capacity:
        raise ValueError(f"lengths of 1 to {capacity} can be packed")
    shuffled = numpy.random.RandomState(seed).permutation(len(lengths))
    items = shuffled[numpy.argsort(-lengths[shuffled].astype(numpy.int64), kind="stable")]
    pack_of = numpy.empty(len(items), dtype=numpy.int64)
    descending = lengths[items]
    bounds = [*numpy.flatnonzero(numpy.diff(descending, prepend=-1)).tolist(), len(items)]
    packs = OpenPacks(capacity)
    for start, stop in pairwise(bounds):
        place(packs, int(descending[start]), pack_of[start:stop])
    order = items[numpy.argsort(pack_of, kind="stable")]
    counts = numpy.bincount(pack_of, minlength=packs.opened)
    return Packs(order=order, bounds=numpy.concatenate([[0], numpy.cumsum(counts)]))


def place(packs: OpenPacks, length: int, pack_of: Integers) -> None:
    """Place all conversations of one length; `pack_of`, [conversations], is filled with their packs.

    A pack with the least room that is enough stays that as long as another one fits: it is filled.
    """
    done = 0
    while done < len(pack_of):
        left = len(pack_of) - done
        room, chosen = packs.take(length, left)
        each = room // length
        filled = min(len(chosen), left // each)
        pack_of[done : done + filled * each] = numpy.repeat(chosen[:filled], each)
        packs.put(room - each * length, chosen[:filled])
        done += filled * each
        rest = chosen[filled:]
        last = min(len(pack_of) - done, each - 1) if len(rest) else 0
        if last:
            pack_of[done : done + last] = rest[0]
            packs.put(room - last * length, rest[:1])
            done, rest = done + last, rest[1:]
        packs.put(room, rest)
