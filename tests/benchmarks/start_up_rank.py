"""One rank of a training of any number of ranks, up to its first iteration: what takes how long.

    RANK=511 WORLD_SIZE=512 LOCAL_RANK=7 python tests/benchmarks/start_up_rank.py WORDS

WORDS are those of scripts/train.py. Nothing but the ranks' communication is left out: Megatron's own fake
process group takes its place.
Prints seconds of the processor by phase as JSON: what else a machine does changes them little.
"""

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

BEGAN = time.process_time()
sys.path.insert(0, str(Path(__file__).parents[2] / "scripts"))


class Started(BaseException):
    """All is there for the first iteration."""


SECONDS: dict[str, float] = {}


def timed(module: Any, name: str, phase: str) -> None:
    """Count the seconds of a function of a module as a phase's."""
    original: Callable[..., Any] = getattr(module, name)

    def function(*words: Any, **named: Any) -> Any:
        start = time.process_time()
        try:
            return original(*words, **named)
        finally:
            SECONDS[phase] = SECONDS.get(phase, 0.0) + time.process_time() - start

    setattr(module, name, function)


def stop(*words: Any, **named: Any) -> None:
    raise Started


def main() -> None:
    import train
    from megaqwen.training import preflight, ranks

    arguments = train.parser().parse_args()
    arguments.terminal = sys.stderr
    ranks.rank_from_environment()
    timed(preflight, "check_run", "config and preflight")
    run = preflight.check_run(arguments)
    start = time.process_time()
    from megatron.core.dist_checkpointing import validation
    from megatron.training import training

    from megaqwen.training import run as training_run

    SECONDS["imports"] = time.process_time() - start
    of_run = training_run.training_arguments
    training_run.training_arguments = lambda *w, **n: [*of_run(*w, **n), "--fake-process-group"]
    timed(training_run, "check_data", "data checked")
    timed(training_run, "say_epochs", "data checked")
    timed(training_run, "validated_arguments", "arguments")
    # It holds what all ranks say against one another.
    validation.validate_sharding_integrity = lambda *w, **n: None
    training_run.cpu_emulation.install_training()
    timed(training, "initialize_megatron", "process groups")
    training_run.cpu_emulation.install_training = lambda: None
    timed(training, "setup_model_and_optimizer", "model and checkpoint")
    timed(training, "build_train_valid_test_data_iterators", "data sets")
    training.train = stop
    try:
        training_run.pretrain_run(run)
    except Started:
        SECONDS["all"] = time.process_time() - BEGAN
        print(json.dumps(SECONDS), flush=True)


if __name__ == "__main__":
    main()
