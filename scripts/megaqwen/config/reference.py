"""The table of config/README.md, made from the models."""

import json
from collections.abc import Iterator, Mapping
from typing import Any

from megaqwen.config.megatron_options import REQUIRED, megatron_options
from megaqwen.config.mistakes import allowed, resolved
from megaqwen.config.sections import Config

BEGIN = "<!-- The table is written by scripts/generate_config.py -->"
END = "<!-- End of the table -->"


def with_table(readme: str) -> str:
    """The text of config/README.md with its table brought up to date."""
    before, _, rest = readme.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not end:
        raise ValueError(f"config/README.md needs the lines {BEGIN!r} and {END!r}")
    return f"{before}{BEGIN}\n{table()}{END}{after}"


def table() -> str:
    """All sections and keys in Markdown: key, what is allowed, default, meaning."""
    schema = Config.model_json_schema()
    rows = list(section_rows(schema, schema, ""))
    lines = ["| Key | Allowed | Default | Meaning |", "|---|---|---|---|"]
    lines += [f"| {' | '.join(map(in_a_cell, row))} |" for row in rows]
    return "\n".join(lines) + "\n"


def in_a_cell(text: str) -> str:
    """A text on the one line that a row of a table is."""
    return " ".join(text.split()).replace("|", r"\|")


def section_rows(
    schema: Mapping[str, Any], section: Mapping[str, Any], prefix: str
) -> Iterator[tuple[str, str, str, str]]:
    """The rows of one section and of those inside it."""
    required = section.get("required", [])
    for key, value in section["properties"].items():
        node = resolved(schema, value)
        path = prefix + key
        if "discriminator" in node:
            yield from union_rows(schema, node, path)
        elif "discriminator" in node.get("items", {}):
            yield from union_rows(schema, node["items"], f"{path}[]")
        elif path == "train":
            yield from train_rows()
        elif "properties" in node:
            yield from section_rows(schema, node, f"{path}.")
        elif "const" not in node:
            value = node.get("default")
            text = json.dumps(value) if value is None or isinstance(value, bool) else value
            default = "required" if key in required else f"`{text}`"
            yield f"`{path}`", allowed(node), default, node.get("description", "")


def union_rows(
    schema: Mapping[str, Any], node: Mapping[str, Any], path: str
) -> Iterator[tuple[str, str, str, str]]:
    """The rows of a section that has one form for each `source`."""
    for source, reference in node["discriminator"]["mapping"].items():
        form = resolved(schema, {"$ref": reference})
        yield f"`{path}.source: {source}`", "", "", form.get("description", "")
        yield from section_rows(schema, form, f"{path}.")


def train_rows() -> Iterator[tuple[str, str, str, str]]:
    """The options that every run gives; the others are Megatron's."""
    words = {"int": "a whole number", "float": "a number"}
    for name in REQUIRED:
        option = megatron_options()[name]
        yield f"`train.{name}`", words[option["type"]], "required", option["help"]
    yield "`train.*`", "by the option", "Megatron's", "Any other option of Megatron's: see above."
