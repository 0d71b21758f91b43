"""JSON lines to texts: whole blocks at once where every line is good, line by line where one is not."""

import difflib
import json
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import msgspec
import numpy

from megaqwen.data import streams
from megaqwen.errors import InputError

NEWLINE, RETURN, OPEN, CLOSE = b"\n\r{}"

UNREADABLE = (msgspec.MsgspecError, ValueError, RecursionError)
"""What a decoder raises: ValueError of text that is no UTF-8, and of integers with too many digits."""

Refuse = Callable[[InputError], None]


class LineParser:
    """Takes one field, a string, out of each line's JSON object."""

    def __init__(self, text_field: str):
        """Set up for the field of that name."""
        self.text_field = text_field
        field = ("text", str, msgspec.field(name=text_field))
        record: Any = msgspec.defstruct("Record", [field], gc=False)
        self.decoder = msgspec.json.Decoder(record)

    def texts(self, block: bytes, where: Callable[[int], str], refuse: Refuse) -> list[str]:
        """The texts of a block of whole lines; blank lines are passed over.

        Args:
            block: Some lines.
            where: Names the line of the block with an index, from 0.
            refuse: Told what is wrong with a line that is left out.
        """
        try:
            texts: list[str] = [record.text for record in self.decoder.decode_lines(block)]
        except UNREADABLE:
            return list(self.texts_by_line(block, where, refuse))
        if len(texts) == lines_of_objects(block):
            return texts
        return list(self.texts_by_line(block, where, refuse))

    def texts_by_line(
        self, block: bytes, where: Callable[[int], str], refuse: Refuse
    ) -> Iterator[str]:
        """`texts` one by one."""
        for index, line in enumerate(block.split(b"\n")):
            if not line.strip():
                continue
            try:
                yield self.decoder.decode(line).text
            except UNREADABLE:
                # Python's parser has the say: it takes NaN, and tells well what is wrong.
                name = streams.Place(where=where, index=index)
                try:
                    yield text_of_record(parse_record(line, name), self.text_field, name)
                except InputError as error:
                    refuse(error)


def lines_of_objects(block: bytes) -> int:
    """How many lines a block of JSON has if each begins and ends as an object does; otherwise 0.

    A newline between } and { is within no record: inside of a value no valid JSON has it. So a block with
    as many records as such lines has one on each.
    """
    content = block.removesuffix(b"\n").removesuffix(b"\r")
    if not (content.startswith(b"{") and content.endswith(b"}")):
        return 0
    octets = numpy.frombuffer(content, numpy.uint8)
    (newlines,) = numpy.nonzero(octets == NEWLINE)
    lasts = octets[newlines - 1]
    returns = lasts == RETURN
    lasts[returns] = octets[newlines[returns] - 2]
    good = bool((lasts == CLOSE).all() and (octets[newlines + 1] == OPEN).all())
    return len(newlines) + 1 if good else 0


def parse_record(line: bytes, where: object) -> dict[str, Any]:
    """The JSON object of a line."""
    text = decode(line, where).rstrip("\r\n")
    try:
        record = json.loads(text)
    except (ValueError, RecursionError) as error:  # also of an integer with too many digits
        raise InputError(
            f"{where}: not JSON ({error}): one JSON object a line is expected, "
            f"found {excerpt(text)}"
        ) from error
    if not isinstance(record, dict):
        raise InputError(
            f"{where}: one JSON object a line is expected, found {json_type(record)}: "
            f"{excerpt(text)}"
        )
    return record


def text_of_record(record: dict[str, Any], text_field: str, where: object) -> str:
    """The text field of a JSON object, checked."""
    if text_field not in record:
        raise InputError(
            f"{where}: no field {text_field!r}. {choices('Fields', record, text_field)}"
        )
    text = record[text_field]
    if not isinstance(text, str):
        raise InputError(
            f"{where}: the field {text_field!r} is to be a string, found {json_type(text)}"
        )
    return usable(text, where)


def decode(line: bytes, where: object) -> str:
    """A line as text; InputError where it is not UTF-8."""
    try:
        return line.decode()
    except UnicodeDecodeError as error:
        raise not_utf8(where, error) from error


def usable(text: str, where: object) -> str:
    """`text`, unless it is too large or a JSON escape put half a surrogate pair in it."""
    if len(text) > streams.LARGEST_DOCUMENT:
        raise streams.too_large(where)
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise InputError(
                f"{where}: the text holds half a surrogate pair at character {error.start}, which "
                "UTF-8 cannot hold: repair the escape or leave the document out"
            ) from error
    return text


def not_utf8(where: object, error: UnicodeDecodeError) -> InputError:
    """The error for bytes that are not UTF-8."""
    found = error.object[error.start : error.start + 4].hex(" ")
    return InputError(f"{where}: not UTF-8 at these bytes: {found}. Convert the file to UTF-8")


def choices(kind: str, names: Iterable[str], wanted: str, setting: str = "text_field") -> str:
    """What there is instead of what was asked for, and what was perhaps meant."""
    known = list(names)
    close = difflib.get_close_matches(wanted, known, n=1)
    meant = f" Did you mean {close[0]!r}?" if close else ""
    return f"{kind} that it has: {', '.join(known) or 'none'}.{meant} Set {setting} in the config"


def excerpt(text: str) -> str:
    """The beginning of a line, for a message."""
    return repr(text[:60]) + ("..." if len(text) > 60 else "")


def json_type(value: Any) -> str:
    """The name of a JSON value's type."""
    names = {dict: "an object", list: "an array", str: "a string", bool: "a boolean"}
    return "null" if value is None else names.get(type(value), "a number")
