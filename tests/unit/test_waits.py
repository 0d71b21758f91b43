"""Waiting for data and stragglers, as ranks time them."""

import time
from collections.abc import Iterator
from typing import Any

from megaqwen.training.waits import Waits, slowest


def test_waiting_for_data_is_no_part_of_the_forward_step() -> None:
    def slow() -> Iterator[int]:
        while True:
            time.sleep(0.05)
            yield 7

    def forward(iterator: Any, model: str) -> tuple[int, str]:
        time.sleep(0.02)
        return next(iterator), model

    waits = Waits()
    step, data = waits.timed(forward), slow()
    assert [step(data, "model") for _ in range(3)] == [(7, "model")] * 3
    assert waits.data >= 0.15
    assert waits.forward >= 0.06
    assert waits.timed(lambda iterator, model: iterator)(None, "model") is None


def test_the_slowest_of_all_ranks_is_told() -> None:
    ranks = [(0.1, 1.0), (0.4, 1.1), (0.0, 1.0), (0.0, 3.0)]
    assert slowest(ranks) == {
        "data_wait_seconds": 0.4,
        "straggler_rank": 3,
        "straggler_seconds": 1.95,
    }
