"""A config's mistakes in words: where, what is given, what is allowed, what was probably meant."""

import difflib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError

from megaqwen.config.sections import (
    NAME_PATTERN,
    NODE_PATH_PATTERN,
    RESULTS_PATTERN,
    SPLIT_PATTERN,
)

Path = tuple[str | int, ...]
Node = Mapping[str, Any]

LONGEST_SHOWN = 80  # characters of a value
MOST_LISTED = 16  # choices

PATTERN_WORDS = {
    NAME_PATTERN: "a name of letters, digits, '.', '_' and '-'",
    r"^[\w.-]+/[\w.-]+$": "OWNER/NAME, such as Qwen/Qwen3-0.6B",
    NODE_PATH_PATTERN: "a path that begins with / or a variable of the node, such as $TMPDIR",
    RESULTS_PATTERN: "a path of letters, digits and ./+@=_-, written out without ~, $ and spaces",
    SPLIT_PATTERN: "a text (96,2,2 or train, valid, test)",
}


@dataclass(frozen=True)
class Mistake:
    """One mistake of a config."""

    path: Path
    text: str
    wants_text: bool = False
    """Whether the value would be right as a text."""

    def __str__(self) -> str:
        """Path and text on one line."""
        return f"{path_words(self.path)}: {self.text}"


def path_words(path: Iterable[str | int]) -> str:
    """A path as one writes it: data.corpora[0].weight."""
    words = ""
    for step in path:
        words += f"[{step}]" if isinstance(step, int) else f".{step}" if words else step
    return words or "the config"


def shown(value: object) -> str:
    """A value as it stands in a config, on one line."""
    try:
        text = json.dumps(value, ensure_ascii=False)
    except (TypeError, ValueError):
        text = str(value)
    return text if len(text) <= LONGEST_SHOWN else text[: LONGEST_SHOWN - 3] + "..."


def listed(choices: Sequence[object]) -> str:
    """`a, b or c`."""
    words = [str(choice) for choice in choices]
    if len(words) > MOST_LISTED:
        words = [*words[:MOST_LISTED], f"one of {len(words) - MOST_LISTED} more"]
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} or {words[-1]}"


def did_you_mean(given: object, known: Iterable[object]) -> str:
    """`: did you mean x?`, or nothing where no known name is near."""
    near = difflib.get_close_matches(str(given), [str(name) for name in known], n=1, cutoff=0.6)
    return f": did you mean {near[0]}?" if near else ""


def mistakes_of(error: ValidationError, schema: Node) -> list[Mistake]:
    """pydantic's errors as mistakes.

    Args:
        error: What `Config.model_validate` raised.
        schema: `Config.model_json_schema()`: it says what is allowed at each place.
    """
    return [describe(dict(detail), schema) for detail in error.errors(include_url=False)]


def describe(detail: dict[str, Any], schema: Node) -> Mistake:
    """One of pydantic's errors."""
    location, given = detail["loc"], detail["input"]
    match detail["type"]:
        case "extra_forbidden":
            path, section = find(schema, location[:-1])
            known = list(section.get("properties", {}))
            hint = did_you_mean(location[-1], known) or f": known are {', '.join(known)}"
            return Mistake((*path, location[-1]), f"there is no such key{hint}")
        case "missing":
            path, node = find(schema, location)
            what = "the section" if "properties" in node or "oneOf" in node else allowed(node)
            return Mistake(path, f"is missing: {what} is needed")
        case "union_tag_not_found":
            path, node = find(schema, location)
            sources = listed(list(node["discriminator"]["mapping"]))
            return Mistake((*path, "source"), f"is missing: {sources} is allowed")
        case "union_tag_invalid":
            path, node = find(schema, location)
            known, tag = list(node["discriminator"]["mapping"]), given.get("source")
            text = f"{shown(tag)} is given, {listed(known)} is allowed"
            return Mistake((*path, "source"), text + did_you_mean(tag, known))
        case "invalid_key":
            path, _ = find(schema, location[:-1])
            return Mistake((*path, str(location[-1])), "there is no such key")
        case kind:
            path, node = find(schema, location)
            text = f"{shown(given)} is given, {allowed(node)} is allowed"
            if "enum" in node:
                text += did_you_mean(given, node["enum"])
            if kind == "string_type" and isinstance(given, int | float):
                text += ": put it in quotes"
            return Mistake(path, text, wants_text=kind == "string_type")


def find(schema: Node, location: Sequence[str | int]) -> tuple[Path, Node]:
    """What the schema says at one of pydantic's locations; the path has no unions' tags."""
    path: Path = ()
    node = resolved(schema, schema)
    for step in location:
        if "discriminator" in node:
            node = resolved(schema, {"$ref": node["discriminator"]["mapping"].get(step, "#")})
            continue
        path += (step,)
        inside = (
            each.get("items") if isinstance(step, int) else value_node(each, step)
            for each in node.get("anyOf", [node])
        )
        node = resolved(schema, next(filter(None, inside), {}))
    return path, node


def value_node(node: Node, key: str) -> Node | None:
    """What a mapping's schema says of one of its keys; of any key where it names none."""
    values = node.get("additionalProperties")
    found: Node | None = node.get("properties", {}).get(key)
    return found or (values if isinstance(values, dict) else None)


def resolved(schema: Node, node: Node) -> Node:
    """The node that a `$ref` stands for."""
    reference = node.get("$ref", "")
    name = reference.removeprefix("#/$defs/")
    return schema["$defs"][name] | {**node} if name in schema.get("$defs", {}) else node


def allowed(node: Node) -> str:
    """What a part of the schema allows, in words."""
    if "enum" in node:
        return listed(node["enum"])
    if "anyOf" in node:
        return listed([allowed(each) for each in node["anyOf"] if each.get("type") != "null"])
    match node.get("type"):
        case "boolean":
            return "true or false"
        case "string":
            words = PATTERN_WORDS.get(node.get("pattern", ""))
            return words or ("a text that is not empty" if "minLength" in node else "a text")
        case "integer":
            return "a whole number" + bounds(node)
        case "number":
            return "a number" + bounds(node)
        case "array":
            least, most = node.get("minItems", 0), node.get("maxItems")
            count = f"{least} " if least == most else f"{least} or more " if least else ""
            return f"a list of {count}entries"
    return "a mapping of keys to values"


def bounds(node: Node) -> str:
    """A number's bounds, in words."""
    if "exclusiveMinimum" in node:
        return f" greater than {node['exclusiveMinimum']:g}"
    if "minimum" in node and "maximum" in node:
        return f" from {node['minimum']} to {node['maximum']}"
    if "minimum" in node:
        return f" of at least {node['minimum']:g}"
    return ""
