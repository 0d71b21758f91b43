"""scripts/train.py whose saves take their time before they copy from the GPU.

The process that copies imports `stage` from here.
"""

import runpy
import sys
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve()
SCRIPTS = HERE.parents[2] / "scripts"
SECONDS = 3.0


def stage(*words: Any, **named: Any) -> Any:
    """What `megaqwen.training.async_saving.stage` does, later."""
    from megaqwen.training import async_saving

    time.sleep(SECONDS)
    return async_saving.stage(*words, **named)


if __name__ == "__main__":
    sys.path[:0] = [str(SCRIPTS), str(HERE.parent)]
    import slow_copy

    from megaqwen.training import async_saving

    install = async_saving.install

    def install_slow() -> None:
        """Megatron's writer gets ours in the place of the quick one."""
        install()
        from megatron.core.dist_checkpointing.strategies.filesystem_async import (
            FileSystemWriterAsync,
        )

        FileSystemWriterAsync.preload_tensors = staticmethod(slow_copy.stage)

    async_saving.install = install_slow
    runpy.run_path(str(SCRIPTS / "train.py"), run_name="__main__")
