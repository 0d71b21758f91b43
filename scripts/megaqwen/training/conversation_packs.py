"""The packs of a corpus's conversations as a folder of the run's cache: made once, then memory-mapped."""

import hashlib
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy
from numpy.typing import NDArray

from megaqwen.data.writing import save_array
from megaqwen.errors import InputError
from megaqwen.provenance import digest, read_json, write_json
from megaqwen.training.packing import Packs, pack

CHUNK = 1 << 26
"""Targets, a byte each, that are summed at a time."""


class Files(Protocol):
    """What is packed."""

    prefix: Path
    """By which they are known."""
    source: Path
    """That of the files that are read."""
    tokens: Any
    targets: Any

    @property
    def lengths(self) -> NDArray[numpy.int32]:
        """[conversations], tokens of each."""


@dataclass(frozen=True, kw_only=True)
class PackFacts:
    """What was packed, for log, manifest and report."""

    documents: int
    """Conversations of the split, before any was left out."""
    truncated: int
    """Conversations of which the beginning is kept."""
    dropped: int
    """Conversations that are left out: too long, or without a target in what is kept."""
    longest: int
    """Tokens of the longest conversation."""
    packs: int
    tokens: int
    """Of the conversations that are in packs, as far as they are."""
    target_tokens: int
    """Tokens that count in the loss, once through all packs."""
    packing_efficiency: float
    """Share of the packs' positions that conversations fill."""


@dataclass(frozen=True, kw_only=True)
class ConversationPacks(Packs):
    """Conversations by their number in the corpus, in packs."""

    facts: PackFacts


def stored_packs(
    files: Files,
    share: range,
    sequence_length: int,
    *,
    too_long: str,
    seed: int,
    cache: Path,
) -> ConversationPacks:
    """The packs of some conversations, from the cache where it has them.

    Args:
        files: The corpus.
        share: The numbers of the conversations.
        sequence_length: Positions of a pack.
        too_long: data.too_long.
        seed: data.seed.
        cache: The folder of such folders.

    Raises:
        InputError: A conversation is too long, or none is left.
    """
    # What the packs depend on: other lengths under the same name are other packs.
    lengths = files.lengths[share.start : share.stop]
    content = hashlib.sha256(numpy.ascontiguousarray(lengths)).hexdigest()
    key = digest([str(files.prefix), str(share), sequence_length, too_long, seed, content])
    directory = cache / f"{files.prefix.name}-packs-{key}"
    if not (directory / "facts.json").is_file():
        made = make_packs(files, share, sequence_length, too_long=too_long, seed=seed)
        store(made, directory)
    order, bounds = (
        numpy.load(directory / f"{name}.npy", mmap_mode="r") for name in ("order", "bounds")
    )
    facts = PackFacts(**read_json(directory / "facts.json"))
    return ConversationPacks(order=order, bounds=bounds, facts=facts)


def store(packs: ConversationPacks, directory: Path) -> None:
    """Write the folder under a temporary name and rename it; another rank's may be there by then."""
    directory.parent.mkdir(parents=True, exist_ok=True)
    written = Path(tempfile.mkdtemp(prefix=f"{directory.name}.", dir=directory.parent))
    save_array(written / "order.npy", packs.order)
    save_array(written / "bounds.npy", packs.bounds)
    write_json(written / "facts.json", asdict(packs.facts))
    try:
        written.rename(directory)
    except OSError:
        if not directory.is_dir():
            raise
        shutil.rmtree(written)


def make_packs(
    files: Files, share: range, sequence_length: int, *, too_long: str, seed: int
) -> ConversationPacks:
    """Choose the conversations that are kept, and pack them."""
    lengths = files.lengths[share.start : share.stop].astype(numpy.int64)
    longer, longest = lengths > sequence_length, int(lengths.max())
    if too_long == "error":
        check_longest(files.prefix.name, lengths, sequence_length)
    targets = target_counts(files, share)
    for number in numpy.flatnonzero(longer).tolist():
        kept = sequence_length if too_long == "truncate" else 1
        targets[number] = int(files.targets.get(share[number], length=kept)[1:].sum())
    lengths = numpy.minimum(lengths, sequence_length)
    chosen = numpy.flatnonzero(targets)
    if not len(chosen):
        raise InputError(
            f"corpus {files.prefix.name}: none of {len(share)} conversations has a target token within"
            f" train.seq_length {sequence_length}: raise it, or give the corpus a larger share"
        )
    packed = pack(lengths[chosen] - 1, sequence_length, seed)
    positions = int((lengths[chosen] - 1).sum())
    facts = PackFacts(
        documents=len(share),
        truncated=int(longer[chosen].sum()),
        dropped=len(share) - len(chosen),
        longest=longest,
        packs=len(packed),
        tokens=int(lengths[chosen].sum()),
        target_tokens=int(targets.sum()),
        packing_efficiency=positions / (len(packed) * sequence_length),
    )
    return ConversationPacks(
        order=chosen[packed.order] + share.start, bounds=packed.bounds, facts=facts
    )


def check_longest(corpus: str, lengths: NDArray[Any], sequence_length: int) -> None:
    """InputError where a conversation is longer than a sequence."""
    count = int((lengths > sequence_length).sum())
    if count:
        raise InputError(
            f"corpus {corpus}: {count:,} of its {len(lengths):,} conversations are longer than"
            f" train.seq_length {sequence_length}; the longest has {int(lengths.max()):,} tokens. Set"
            f" data.too_long to drop or to truncate, or train.seq_length to {int(lengths.max())}"
        )


def target_counts(files: Files, share: range) -> NDArray[numpy.int64]:
    """[conversations], how many tokens of each are scored: the first of a conversation never is."""
    lengths = files.lengths[share.start : share.stop]
    pointers = files.targets.index.sequence_pointers[share.start : share.stop]
    flags = numpy.memmap(f"{files.source}.targets.bin", dtype=numpy.uint8, mode="r")
    counts = numpy.empty(len(share), dtype=numpy.int64)
    for begin, end in chunks(lengths):
        first = int(pointers[begin])
        part = flags[first : int(pointers[end - 1]) + int(lengths[end - 1])]
        starts = pointers[begin:end] - first
        sums = numpy.add.reduceat(part, starts, dtype=numpy.int64)
        counts[begin:end] = sums - part[starts]
    return counts


def chunks(lengths: NDArray[Any]) -> Iterator[tuple[int, int]]:
    """Neighbouring conversations of about CHUNK tokens together: the first and the one after the last."""
    ends = numpy.cumsum(lengths, dtype=numpy.int64)
    begin = 0
    while begin < len(lengths):
        before = int(ends[begin - 1]) if begin else 0
        end = max(begin + 1, int(numpy.searchsorted(ends, before + CHUNK, side="right")))
        yield begin, end
        begin = end
