"""The share of a GPU's time that goes to communication, from a trace of torch's profiler.

A trace of one iteration names every kernel with its beginning and its length. Those of NCCL are
communication, whatever they wait for: another rank that is late, or a pipeline stage that has nothing to
do yet, counts. What of that runs while no other kernel does is exposed: the iteration is longer by it.
"""

import gzip
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ON_GPU = ("kernel", "gpu_memcpy", "gpu_memset")
Span = tuple[float, float]


@dataclass(frozen=True, kw_only=True)
class Shares:
    """Of the time from the first kernel of an iteration to the end of the last."""

    communication: float
    """NCCL's kernels run."""
    exposed: float
    """NCCL's kernels run and no other."""
    idle: float
    """Nothing runs: the GPU waits for the CPU."""


def merged(spans: Iterable[Span]) -> list[Span]:
    """Spans that do not touch, in order, covering the same time."""
    together: list[Span] = []
    for start, end in sorted(spans):
        if together and start <= together[-1][1]:
            together[-1] = (together[-1][0], max(end, together[-1][1]))
        else:
            together.append((start, end))
    return together


def length(spans: Iterable[Span]) -> float:
    """The time that spans which do not touch cover."""
    return sum(end - start for start, end in spans)


def shares(events: Iterable[dict[str, Any]]) -> Shares | None:
    """The shares of a trace's events; None where no kernel ran, as without a GPU."""
    nccl: list[Span] = []
    others: list[Span] = []
    for event in events:
        if event.get("cat") in ON_GPU and "dur" in event:
            span = (float(event["ts"]), float(event["ts"]) + float(event["dur"]))
            (nccl if "nccl" in event["name"].lower() else others).append(span)
    busy = merged([*nccl, *others])
    if not busy:
        return None
    whole = busy[-1][1] - busy[0][0]
    return Shares(
        communication=length(merged(nccl)) / whole,
        exposed=(length(busy) - length(merged(others))) / whole,
        idle=1 - length(busy) / whole,
    )


def read_shares(trace: Path) -> Shares | None:
    """The shares of a trace as Megatron's --use-pytorch-profiler leaves it."""
    with gzip.open(trace, "rt", encoding="utf-8") as stream:
        return shares(json.load(stream)["traceEvents"])
