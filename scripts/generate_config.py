"""Write what is generated from Megatron's parser and from the config's models.

    python scripts/generate_config.py            write the files that differ
    python scripts/generate_config.py --check    write nothing; exit with 1 if a file differs

The files: the list of Megatron's options (scripts/megaqwen/config/megatron_options.json), the
schemas for editors (config/schema.json, config/overlay.schema.json) and the table of
config/README.md. Run it after a change of megatron-core's version or of
scripts/megaqwen/config/sections.py.
"""

import argparse
import sys
from pathlib import Path

from megaqwen.config.megatron_options import OPTIONS_FILE, megatron_options
from megaqwen.config.reference import with_table
from megaqwen.config.schema import config_schema, overlay_schema, schema_json
from megaqwen.provenance import write_text

CONFIG = Path(__file__).resolve().parents[1] / "config"


def replace_if_different(path: Path, text: str, check: bool) -> bool:
    """Write `text` unless the file has it already or `check`; returns whether it differed."""
    if path.is_file() and path.read_text(encoding="utf-8") == text:
        return False
    if check:
        print(f"{path} is out of date: run python scripts/generate_config.py")
    else:
        write_text(path, text)
        print(f"wrote {path}")
    return True


def main() -> int:
    """Generate in order: the schemas and the table are made from the list of options."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true", help="write nothing; exit with 1 on drift")
    check = parser.parse_args().check
    from megaqwen.config.parser_options import options_json  # with Megatron

    differed = replace_if_different(OPTIONS_FILE, options_json(), check)
    megatron_options.cache_clear()
    readme = CONFIG / "README.md"
    for path, text in (
        (CONFIG / "schema.json", schema_json(config_schema())),
        (CONFIG / "overlay.schema.json", schema_json(overlay_schema())),
        (readme, with_table(readme.read_text(encoding="utf-8"))),
    ):
        differed |= replace_if_different(path, text, check)
    return 1 if check and differed else 0


if __name__ == "__main__":
    sys.exit(main())
