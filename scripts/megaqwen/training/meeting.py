"""Where ranks wait for each other before torch.distributed has them meet, for whom it waits ten minutes.

One node may copy its data for longer than another by more than that; and the option for those minutes,
distributed_timeout_minutes, is also how long a collective may hang.
"""

import os
import time
from datetime import timedelta

from torch.distributed import TCPStore

from megaqwen.training.ranks import Rank

KEY = "megaqwen/here"
POLL_SECONDS = 0.5
CONNECTING = timedelta(minutes=10)  # as torch's own; for ranks that are just starting


class Meeting:
    """Of all ranks of a job, at the place where torch.distributed will have them meet."""

    def __init__(self, rank: Rank):
        """Open the place on the first rank, and find it on the others; torchrun has one already."""
        self.world_size = rank.world_size
        if self.world_size > 1:
            by_torchrun = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
            self.store = TCPStore(
                os.environ["MASTER_ADDR"],
                int(os.environ["MASTER_PORT"]),
                is_master=rank.rank == 0 and not by_torchrun,
                timeout=CONNECTING,
                wait_for_workers=False,
                multi_tenant=True,  # torch's own store on this port shares its server
            )

    def wait(self) -> None:
        """Return when every rank has called this, however long it takes; one that fails ends the others.

        This object has to live until torch.distributed is initialized: the first rank's is the place.
        """
        if self.world_size == 1:
            return
        if self.store.add(KEY, 1) == self.world_size:
            self.store.set(f"{KEY}/all", "")
        while not self.store.check([f"{KEY}/all"]):  # in between, signals are heeded
            time.sleep(POLL_SECONDS)
