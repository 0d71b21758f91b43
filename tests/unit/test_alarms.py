"""What is said of an iteration that is not like the others, and of one that never ends."""

import math
import random
import time

import pytest

from megaqwen.training.alarms import Alarms, StallWatch


def usual(alarms: Alarms, iterations: int = 40, loss: float = 3.0) -> None:
    """Iterations of which nothing is said."""
    noise = random.Random(1)
    for iteration in range(iterations):
        seconds, wobble = 2 + noise.random(), loss - iteration / 100 + 0.05 * noise.gauss(0, 1)
        found = alarms.observe(iteration, loss=wobble, gradient_norm=1.0, seconds=seconds)
        assert found == []


@pytest.mark.parametrize("loss", [math.nan, math.inf])
def test_a_loss_that_is_no_number(loss: float) -> None:
    (text,) = Alarms().observe(1, loss=loss, gradient_norm=1.0, seconds=1.0)
    assert text == f"the loss is {loss}"


def test_a_gradient_norm_that_is_no_number() -> None:
    (text,) = Alarms().observe(1, loss=1.0, gradient_norm=math.inf, seconds=1.0)
    assert text == "the gradient norm is inf"


def test_a_spike_is_said_once_and_then_again_after_a_while() -> None:
    alarms = Alarms()
    usual(alarms)
    (text,) = alarms.observe(40, loss=5.0, gradient_norm=1.0, seconds=2.0)
    assert text.startswith("loss 5.0000 is a spike: the last 40 had a median of 2.7")
    assert alarms.observe(41, loss=5.0, gradient_norm=1.0, seconds=2.0) == []
    assert alarms.observe(50, loss=5.0, gradient_norm=1.0, seconds=2.0) != []


def test_the_steep_beginning_of_a_training_is_no_spike() -> None:
    alarms = Alarms()
    for iteration in range(100):
        loss = 2 + 8 * math.exp(-iteration / 15)
        assert alarms.observe(iteration, loss=loss, gradient_norm=1.0, seconds=1.0) == []


def test_a_slow_iteration() -> None:
    alarms = Alarms()
    usual(alarms)
    (text,) = alarms.observe(40, loss=2.7, gradient_norm=1.0, seconds=30.0)
    assert "took 30.0 s, the usual is 2." in text


def test_iterations_of_milliseconds_may_be_uneven() -> None:
    alarms = Alarms()
    for iteration in range(40):
        seconds = 0.9 if iteration % 7 == 0 else 0.01
        assert alarms.observe(iteration, loss=1.0, gradient_norm=1.0, seconds=seconds) == []


def test_a_stall_is_said_once_and_not_in_a_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    alarms, said = Alarms(), []
    assert alarms.stalled_after() == math.inf
    usual(alarms)
    assert alarms.stalled_after() == 60
    monkeypatch.setattr("megaqwen.training.alarms.LEAST_STALL_SECONDS", 0.05)
    monkeypatch.setattr("megaqwen.training.alarms.STALL", 0.001)
    watch = StallWatch(alarms, said.append, poll_seconds=0.01)
    watch.start()
    watch.paused = True
    time.sleep(0.3)
    assert said == []
    watch.alive()
    end = time.monotonic() + 30
    while not said:
        assert time.monotonic() < end
        time.sleep(0.01)
    time.sleep(0.2)
    watch.ended.set()
    assert len(said) == 1 and said[0].startswith("no iteration has ended for")
