"""What a person should hear of during training: not a number, a spike, a slow or a missing iteration.

Megatron stops by itself at a loss that is no number; the rest is only said, and written to metrics.jsonl.
"""

import math
import threading
import time
from collections import deque
from collections.abc import Callable
from statistics import median

from megaqwen.words import duration

REMEMBERED, FEWEST = 50, 10  # iterations that the usual is taken from
DEVIATIONS = 6.0  # of a loss from the median, in standard deviations by the median deviation
TO_STANDARD = 1.4826  # a normal distribution's standard deviation over its median deviation
LEAST_SPIKE = 0.3  # nats per token: less is no spike, however smooth the curve was
SLOW, LEAST_SLOW_SECONDS = 5.0, 1.0
STALL, LEAST_STALL_SECONDS = 10.0, 60.0
QUIET_ITERATIONS = 10  # after an alarm, before one of its kind is said again


class Alarms:
    """Knows the usual, and tells what is not."""

    def __init__(self) -> None:
        self.losses: deque[float] = deque(maxlen=REMEMBERED)
        self.seconds: deque[float] = deque(maxlen=REMEMBERED)
        self.said: dict[str, int] = {}

    def observe(
        self, iteration: int, *, loss: float, gradient_norm: float, seconds: float | None
    ) -> list[str]:
        """The alarms of an iteration; what it was is the usual of later ones, but for no seconds."""
        found = {
            "finite": self.not_finite(loss, gradient_norm),
            "spike": self.spike(loss),
            "slow": None if seconds is None else self.slow(seconds),
        }
        if math.isfinite(loss):
            self.losses.append(loss)
        if seconds is not None:
            self.seconds.append(seconds)
        return [text for kind, text in found.items() if text and self.is_new(kind, iteration)]

    def is_new(self, kind: str, iteration: int) -> bool:
        """Whether none of this kind was said shortly before."""
        if iteration - self.said.get(kind, -QUIET_ITERATIONS) < QUIET_ITERATIONS:
            return False
        self.said[kind] = iteration
        return True

    def not_finite(self, loss: float, gradient_norm: float) -> str | None:
        """Numbers that are none."""
        for name, value in (("loss", loss), ("gradient norm", gradient_norm)):
            if not math.isfinite(value):
                return f"the {name} is {value}"
        return None

    def spike(self, loss: float) -> str | None:
        """A loss far above the last ones."""
        if len(self.losses) < FEWEST:
            return None
        usual = median(self.losses)
        deviation = TO_STANDARD * median(abs(each - usual) for each in self.losses)
        if loss - usual <= max(DEVIATIONS * deviation, LEAST_SPIKE):
            return None
        return (
            f"loss {loss:.4f} is a spike: the last {len(self.losses)} had a median of {usual:.4f}"
        )

    def slow(self, seconds: float) -> str | None:
        """An iteration that took several times the usual."""
        if len(self.seconds) < FEWEST:
            return None
        usual = median(self.seconds)
        if seconds <= max(SLOW * usual, usual + LEAST_SLOW_SECONDS):
            return None
        return f"this iteration took {seconds:.1f} s, the usual is {usual:.2f} s"

    def stalled_after(self) -> float:
        """Seconds without an iteration after which training is said to hang; inf: not known yet."""
        if len(self.seconds) < FEWEST:
            return math.inf
        return max(STALL * median(self.seconds), LEAST_STALL_SECONDS)


class StallWatch:
    """Says once that no iteration ends any more, from a thread of its own."""

    def __init__(self, alarms: Alarms, say: Callable[[str], None], poll_seconds: float = 5.0):
        """Watch what `alarms` knows; `say` gets the words."""
        self.alarms, self.say = alarms, say
        self.poll_seconds = poll_seconds
        self.last = time.monotonic()
        self.paused = self.told = False
        self.ended = threading.Event()

    def start(self) -> None:
        """Begin to watch, until `ended` is set."""
        self.alive()
        threading.Thread(target=self.watch, name="stalls", daemon=True).start()

    def alive(self) -> None:
        """An iteration, a save or an evaluation has ended."""
        self.last = time.monotonic()
        self.paused = self.told = False

    def watch(self) -> None:
        """Look now and then."""
        while not self.ended.wait(self.poll_seconds):
            silent = time.monotonic() - self.last
            if not (self.paused or self.told) and silent > self.alarms.stalled_after():
                self.told = True
                usual = median(self.alarms.seconds)
                self.say(
                    f"no iteration has ended for {duration(silent)} (the usual is {usual:.2f} s): a rank"
                    " may hang or be gone, or storage may be slow"
                )
