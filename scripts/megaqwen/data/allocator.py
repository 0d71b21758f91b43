"""glibc's allocator set up for buffers of megabytes that come and go in several threads."""

import ctypes

# mallopt's parameters, from glibc's malloc.h.
TRIM_THRESHOLD, MAPPING_THRESHOLD, MOST_ARENAS = -1, -3, -8
LARGEST = 2**31 - 1


def keep_freed_memory() -> None:
    """Let freed memory be used again, where glibc would give it back to the system at once.

    To get it anew costs a page fault for every 4 KiB: a fifth of the time of tokenization. Does nothing
    where the C library is another.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt:
        mallopt(MOST_ARENAS, 1)
        mallopt(MAPPING_THRESHOLD, 2**30)
        mallopt(TRIM_THRESHOLD, LARGEST)
