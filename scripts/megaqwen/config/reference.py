"""The table of config/README.md, made from the models."""

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
    lines += [f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in row)} |" for row in rows]
    return "\n".join(lines) + "\n"


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
            value = "null" if node.get("default") is None else node["default"]
            default = "required" if key in required else f"`{value}`"
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
