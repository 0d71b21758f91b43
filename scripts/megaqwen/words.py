"""Figures in words for a person: sizes, counts and durations, the same in every stage."""

import math


def readable_bytes(count: float) -> str:
    """A size in units of 1000: 1.9 MB."""
    for unit, size in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return counted(round(count), "byte")


def counted(number: int, noun: str) -> str:
    """A number with its noun: 1 document, 2,000 documents."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def duration(seconds: float) -> str:
    """Seconds as 12s, 3m05s or 2h07m, rounded up: what is not over yet never takes 0s."""
    whole = max(0, math.ceil(seconds))
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02d}s"
    return f"{whole // 3600}h{whole % 3600 // 60:02d}m"
