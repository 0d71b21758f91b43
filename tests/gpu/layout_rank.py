"""A rank of the train stage that does its imports first and then waits for its turn.

    LAYOUT_TURN=FILE torchrun --nproc-per-node 2 layout_rank.py ARGUMENTS OF scripts/train.py

Nothing but the wait differs from scripts/train.py, which it runs as soon as FILE is there: while one
training has the GPUs, the next one starts.
"""

import os
import runpy
import sys
import time
from pathlib import Path

TRAIN = Path(__file__).resolve().parents[2] / "scripts" / "train.py"
sys.path.insert(0, str(TRAIN.parent))
LONGEST = 1800.0  # seconds


def main() -> None:
    from megaqwen.environment import prepare_gpu

    prepare_gpu()
    import megaqwen.training.run  # noqa: F401  the slow imports

    turn, end = Path(os.environ["LAYOUT_TURN"]), time.monotonic() + LONGEST
    while not turn.exists():
        if time.monotonic() > end or os.getppid() == 1:
            sys.exit("its turn never came")
        time.sleep(0.02)
    sys.argv[0] = str(TRAIN)
    runpy.run_path(str(TRAIN), run_name="__main__")


if __name__ == "__main__":
    main()
