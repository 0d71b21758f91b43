"""Thinking that stands in the content of an assistant's message, in a block that ends with </think>.

Templates that know thinking take such a content apart at the tag, wherever it stands: what is no block
at its beginning would be lost, or written as thinking.
"""

from megaqwen.data.records import excerpt
from megaqwen.errors import InputError

OPEN, CLOSE = "<think>", "</think>"


def block_of(content: str) -> str:
    """The thinking of a content that has </think>, without white space around it.

    The opening tag may be missing, as where generation was prompted with it.

    Raises:
        InputError: The content is not one block and what is said after it; the message goes on from
            "and".
    """
    first, *others = content.split(CLOSE)
    before, opened, thinking = first.partition(OPEN)
    if not opened:
        before, thinking = "", first
    if len(others) > 1:
        raise InputError(f"the tag stands there {len(others)} times")
    if before.strip():
        raise InputError(f"words stand before {OPEN}, {excerpt(before.strip())}")
    if OPEN in thinking:
        raise InputError(f"{OPEN} stands before it more than once")
    line_before, line_after = first.rpartition("\n")[2], others[0].partition("\n")[0]
    if not opened and line_before.strip() and line_after.strip():
        raise InputError(f"it stands within a line, without {OPEN} before it")
    return thinking.strip()
