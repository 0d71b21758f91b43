"""JSON schemas of a config file and of an overlay, for editors: config/*schema.json.

Draft 2020-12. Descriptions are the fields' docstrings and Megatron's own help.
"""

import json
from collections.abc import Mapping
from typing import Any

from megaqwen.config.megatron_options import (
    REQUIRED,
    flags,
    megatron_options,
    name_of_flag,
    settable_names,
)
from megaqwen.config.sections import Config

DIALECT = "https://json-schema.org/draft/2020-12/schema"
JSON_TYPES = {"bool": "boolean", "int": "integer", "float": "number", "str": "string"}

Schema = dict[str, Any]


def config_schema() -> Schema:
    """What a whole config file is."""
    schema = without_titles(Config.model_json_schema())
    described = schema["properties"]["train"].get("description")
    schema["properties"]["train"] = train_schema() | (
        {"description": described} if described else {}
    )
    return {"$schema": DIALECT, "title": "A MegaQwen run", **schema}


def overlay_schema() -> Schema:
    """What a file of config/experiments is: any part of a config, and null to remove a key."""
    whole = config_schema()
    schema = optional(whole)
    # A list is replaced, not merged: its entries are as complete as in a whole config.
    schema["$defs"] |= {name: whole["$defs"][name] for name in entry_names(whole["$defs"])}
    return schema | {"title": "An overlay over config/config.yaml"}


def entry_names(definitions: Mapping[str, Schema]) -> list[str]:
    """The definitions that are entries of some section's list."""
    fields = [field for each in definitions.values() for field in each["properties"].values()]
    forms = [form for field in fields for form in field.get("items", {}).get("oneOf", [])]
    return [form["$ref"].removeprefix("#/$defs/") for form in forms]


def train_schema() -> Schema:
    """The options that a config may set, under each of their names."""
    options = megatron_options()
    properties = {}
    for name, (dest, opposite) in settable_names().items():
        option = options[dest]
        properties[name] = option_schema(option)
        if name != dest:
            relation = "The opposite of" if opposite else "Another name of"
            properties[name] = {
                "type": properties[name].get("type"),
                "description": f"{relation} {dest}.",
            }
    return {
        "type": "object",
        "properties": dict(sorted(properties.items())),
        "required": list(REQUIRED),
        "additionalProperties": False,
    }


def option_schema(option: Mapping[str, Any]) -> Schema:
    """One of Megatron's options."""
    choices = option.get("choices")
    kind = JSON_TYPES.get(option["type"], "string")
    if choices is not None:
        value: Schema = {"enum": choices}
        kind = "integer" if isinstance(choices[0], int) else "string"
    else:
        value = {"type": kind}
    schema: Schema = {"type": kind, **value}
    if "nargs" in option:
        schema = {"type": ["array", kind], "items": value}
    names = {name_of_flag(flag) for flag in flags(option)}
    schema["description"] = option["help"] or f"Megatron's {' or '.join(sorted(names))}."
    if option["default"] is not None:
        schema["default"] = option["default"]
    return schema


def without_titles(node: Any) -> Any:
    """A schema without the titles that pydantic makes of field names."""
    if isinstance(node, list):
        return [without_titles(item) for item in node]
    if isinstance(node, dict):
        return {
            key: without_titles(value)
            for key, value in node.items()
            if not (key == "title" and isinstance(value, str))
        }
    return node


def optional(node: Any) -> Any:
    """A schema in which no key has to be there, and null stands for none."""
    if isinstance(node, list):
        return [optional(item) for item in node]
    if not isinstance(node, dict):
        return node
    changed = {key: optional(value) for key, value in node.items() if key != "required"}
    if "properties" in node:
        changed["properties"] = {
            key: nullable(optional(value)) for key, value in node["properties"].items()
        }
    return changed


def nullable(node: Schema) -> Schema:
    """A schema that allows null as well, where it says a plain type."""
    if "type" not in node or "const" in node:
        return node
    types = node["type"] if isinstance(node["type"], list) else [node["type"]]
    enum = {"enum": [*node["enum"], None]} if "enum" in node else {}
    return {**node, "type": [*types, "null"], **enum}


def schema_json(schema: Schema) -> str:
    """A schema as the text of its file."""
    return json.dumps(schema, indent=1, ensure_ascii=False) + "\n"
